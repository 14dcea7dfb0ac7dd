"""Two processes, as torchrun starts them, train as one with the same global batch does."""

import pytest
import torch
from killed_training import TINY_DEIT, start, torchrun_environment, train_here

from twicing.training.checkpoint import CHECKPOINT
from twicing.training.hardware import Hardware
from twicing.training.recipe import digits, imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.split import with_classes

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ALONE = Hardware(precision="64-true")
TOGETHER = Hardware(precision="64-true", devices="2", strategy="ddp")


def train_together(recipe, data_dir, folder, **options):
    processes = [
        start(recipe, data_dir, folder, environment, hardware=TOGETHER, dropout=0.0, **options)
        for environment in torchrun_environment(2)
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_as_one(one, both):
    weights, curve = one
    for result in both:
        for name, weight in weights.items():
            # Double precision, so that rounding is all that may differ; AdamW makes it larger.
            torch.testing.assert_close(result["weights"][name], weight, atol=1e-8, rtol=1e-8, msg=name)
        for row, (epoch, loss, accuracy) in zip(curve, result["curve"], strict=True):
            assert epoch == row.epoch
            assert loss == pytest.approx(row.loss, rel=1e-6)
            assert accuracy == pytest.approx(row.held_out_accuracy)
    assert all(torch.equal(both[0]["weights"][name], both[1]["weights"][name]) for name in weights)


def test_in_memory_with_an_uneven_last_batch(tiny, tmp_path):
    # 129 images: the last batch is a single image, and one process has none of it; 300 are held out in one batch.
    recipe = tiny(digits(), "epochs=2", "batch_size=32", "train_images=129")
    one = train_here(recipe, None, tmp_path / "one", hardware=ALONE, dropout=0.0)
    assert_as_one(one, train_together(recipe, None, tmp_path / "two"))


def test_the_whole_recipe_of_deit_but_for_drop_path(made_up_folder, tmp_path):
    """Mirrored slices: mixup and CutMix mix the same pairs. Two resumed processes go on from one's checkpoint too."""
    settings = [*TINY_DEIT, "drop_path=0", "epochs=2", "cosine.cooldown_epochs=0"]
    recipe = with_classes(apply_settings(imagenet_deit_tiny(), settings), made_up_folder)
    one = train_here(recipe, made_up_folder, tmp_path / "one", hardware=ALONE, dropout=0.0)
    assert_as_one(one, train_together(recipe, made_up_folder, tmp_path / "two"))
    saved = [torch.load(tmp_path / folder / CHECKPOINT, weights_only=True)["state_dict"] for folder in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[0].items():
        torch.testing.assert_close(saved[1][name], weight, atol=1e-8, rtol=1e-8, msg=name)
