"""A training that is killed goes on to the very weights it would have had: by SIGKILL, in the middle of an epoch."""

import signal

import pytest
import torch
from killed_training import TINY_DEIT, start, train_here

from twicing.training.checkpoint import CHECKPOINT
from twicing.training.classification import build_model, load_trained
from twicing.training.recipe import cifar10, digits, imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.split import load_split, with_classes

# Lightning's own use of a renamed torch name, which training silences only around its own loop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def kill_and_resume(recipe, data_dir, tmp_path, mechanism=None):
    """Whole and killed training, both to the end. Returns what they left, and the folder of the killed one."""
    whole = train_here(recipe, data_dir, tmp_path / "whole", mechanism=mechanism)
    # In the middle of the second epoch.
    killed = start(recipe, data_dir, tmp_path / "killed", kill_at=1.5 / recipe.all_epochs, mechanism=mechanism)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)
    assert left["epoch"] == 0, "the checkpoint is not that of the first epoch"
    return whole, train_here(recipe, data_dir, tmp_path / "killed", mechanism=mechanism)


def assert_the_same(whole, resumed):
    for name, weight in whole[0].items():
        assert torch.equal(weight, resumed[0][name]), name
    rows = [[(row.epoch, row.loss, row.held_out_accuracy) for row in curve] for _, curve in (whole, resumed)]
    assert rows[0] == rows[1]


def test_in_memory_with_dropout_and_drop_path(tiny, tmp_path):
    recipe = tiny(digits(), "epochs=3", "batch_size=64", "drop_path=0.2", "augmentation.flip=true")
    recipe = apply_settings(recipe, ["augmentation.pad_crop=1", "train_images=400"])
    assert_the_same(*kill_and_resume(recipe, None, tmp_path, mechanism="twicing"))


def test_the_whole_recipe_of_deit(picture_folder, tmp_path):
    """Mixup, CutMix, erasing, RandAugment, repeats, running mean, schedule: an epoch, a kill, a resume, evaluation."""
    recipe = with_classes(apply_settings(imagenet_deit_tiny(), TINY_DEIT), picture_folder)
    whole, resumed = kill_and_resume(recipe, picture_folder, tmp_path)
    assert_the_same(whole, resumed)
    assert len(whole[1]) == 4, "three epochs and one of cool-down"
    checkpoints = [torch.load(tmp_path / folder / CHECKPOINT, weights_only=True) for folder in ("whole", "killed")]
    means = [{n: w for n, w in c["state_dict"].items() if n.startswith("ema.module.")} for c in checkpoints]
    assert means[0].keys()
    assert all(torch.equal(weight, means[1][name]) for name, weight in means[0].items())
    assert checkpoints[0]["lr_schedulers"] == checkpoints[1]["lr_schedulers"]
    # What is evaluated are the last weights, not their running mean.
    model = build_model(recipe, 3)
    load_trained(model, 3, tmp_path / "killed")
    assert all(torch.equal(weight, whole[0][name]) for name, weight in model.state_dict().items())
    assert not all(torch.equal(weight, means[0][f"ema.module.{name}"]) for name, weight in model.state_dict().items())
    split = load_split(recipe, 0, picture_folder)
    with torch.no_grad():
        right = model.eval()(split.test.load(range(len(split.test)))).argmax(1) == split.test.labels
    assert right.double().mean().item() == pytest.approx(whole[1][-1].held_out_accuracy)


def test_a_kill_within_the_first_epoch_leaves_nothing_half_written(tiny, tmp_path):
    recipe = tiny(digits(), "epochs=1", "batch_size=64", "train_images=200")
    killed = start(recipe, None, tmp_path / "killed", kill_at=0.5)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    assert_the_same(train_here(recipe, None, tmp_path / "whole"), train_here(recipe, None, tmp_path / "killed"))


def test_cifar10_settings_reach_the_loop():
    """The recipe that has them all in memory is the one that people will change."""
    recipe = apply_settings(cifar10(), ["augmentation.flip=true", "augmentation.pad_crop=4", "training_length=1.5"])
    assert (recipe.augmentation.flip, recipe.augmentation.pad_crop, recipe.training_length) == (True, 4, 1.5)
