"""Training: paired by construction, resumable to the last bit, and loud where it would lie."""

from itertools import chain

import pytest
import torch

from twicing.adapters.surgery import convert
from twicing.training.classification import CHECKPOINT, build_model, load_trained, train_classifier
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import ShuffledBatches, Split, load_split, stream_seed

# Lightning's own use of a renamed torch name, which training silences only around its own loop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SMALL = ["epochs=3", "depth=2", "width=16", "heads=2", "batch_size=64"]


class KilledError(Exception):
    pass


@pytest.fixture
def recipe():
    return apply_settings(digits(), SMALL)


@pytest.fixture
def split(recipe):
    return load_split(recipe, 0)


def trained(recipe, split, seed, folder, progress=lambda share: None, mechanism=None):
    model = build_model(recipe, seed)
    # Dropout draws from the global generator at every step: a resume has to meet the same draws.
    for block in model.network.blocks:
        block.mlp.drop1.p = 0.1
    if mechanism:
        convert(model, mechanism)
    curve = train_classifier(model, recipe, split, seed, folder, progress)
    return model, curve


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("mechanism", [None, "twicing"])
@pytest.mark.parametrize("stop_at", [0.5, 0.99], ids=["second epoch", "last step"])
def test_an_interrupted_training_ends_with_the_same_weights(recipe, split, tmp_path, mechanism, stop_at):
    whole, in_two = tmp_path / "whole", tmp_path / "in-two"
    expected, curve = trained(recipe, split, 0, whole, mechanism=mechanism)

    def stop(share):
        if share > stop_at:
            raise KilledError

    with pytest.raises(KilledError):
        trained(recipe, split, 0, in_two, stop, mechanism)
    steps = []
    model, resumed_curve = trained(recipe, split, 0, in_two, steps.append, mechanism)
    assert same_weights(model, expected)
    assert [(e.epoch, e.loss, e.held_out_accuracy) for e in resumed_curve] == [
        (e.epoch, e.loss, e.held_out_accuracy) for e in curve
    ]
    assert min(steps) > stop_at - 1 / recipe.epochs, "finished epochs were trained again"


def test_the_model_is_trained_in_training_mode(recipe, split, tmp_path):
    model = build_model(recipe, 0).eval()
    modes = set()
    model.network.blocks[0].register_forward_hook(
        lambda module, *_: modes.add((module.training, torch.is_grad_enabled()))
    )
    train_classifier(model, recipe, split, 0, tmp_path, lambda share: None)
    assert (True, True) in modes
    assert (False, True) not in modes


def test_mechanisms_start_from_the_same_weights_and_see_the_same_batches(recipe):
    standard, twiced = build_model(recipe, 7), build_model(recipe, 7)
    convert(twiced, "twicing")
    assert same_weights(standard, twiced)
    assert not same_weights(standard, build_model(recipe, 8))
    batches = [list(ShuffledBatches(100, 16, seed=3)) for _ in range(2)]
    assert batches[0] == batches[1]


def test_building_a_model_leaves_the_global_random_state_alone(recipe):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(recipe, 0)
    assert torch.equal(torch.rand(3), expected)


def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch():
    sampler = ShuffledBatches(50, 16, seed=0)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        assert len(batches) == len(sampler)
        orders.append(list(chain.from_iterable(batches)))
        assert sorted(orders[-1]) == list(range(50))
    other = list(chain.from_iterable(ShuffledBatches(50, 16, seed=1)))
    assert orders[0] != orders[1]
    assert orders[0] != other


def test_streams_do_not_collide():
    seeds = {stream_seed(seed, stream, count) for seed in range(8) for stream in range(1, 5) for count in range(50)}
    assert len(seeds) == 8 * 4 * 50


def test_held_out_images_are_not_trained_on(recipe):
    index = []
    for k in range(6):
        split = load_split(recipe, k)
        index += split.test_index.tolist()
        assert len(split.train_labels) + len(split.test_labels) == 1797
        train = {image.numpy().tobytes() for image in split.train_images}
        repeated = sum(image.numpy().tobytes() in train for image in split.test_images)
        # The data set itself holds no image twice.
        assert repeated == 0
    assert sorted(index) == list(range(1797))


def test_a_checkpoint_knows_its_formula(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["epochs=1"])
    model, _ = trained(recipe, split, 0, tmp_path, mechanism="twicing")
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert saved["twicing"]["spec"][0]["mechanism"] == "twicing"
    other = build_model(recipe, 1)
    with pytest.raises(
        ValueError, match=r"holds weights of another formula: it was trained with .*'twicing'.*standard"
    ):
        load_trained(other, 0, tmp_path)
    convert(other, spec=saved["twicing"]["spec"])
    load_trained(other, 0, tmp_path)
    assert same_weights(model, other)


def test_a_folder_of_another_seed_is_refused(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["epochs=1"])
    trained(recipe, split, 0, tmp_path)
    with pytest.raises(ValueError, match=r"last\.ckpt is one of seed 0, and this training's is 1: give each"):
        trained(recipe, split, 1, tmp_path)


def test_a_diverged_training_says_so(recipe, split, tmp_path):
    broken = Split(
        split.train_images * float("nan"), split.train_labels, split.test_images, split.test_labels, split.test_index
    )
    with pytest.raises(FloatingPointError, match=r"the training diverged: the loss of epoch 1 is nan\. Lower"):
        trained(recipe, broken, 0, tmp_path)


def test_a_damaged_checkpoint_says_what_to_delete(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["epochs=1"])
    trained(recipe, split, 0, tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged: delete it and training\.json beside it"):
            load_trained(build_model(recipe, 0), 0, tmp_path)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
            trained(recipe, split, 0, tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is missing: delete training\.json beside it"):
        load_trained(build_model(recipe, 0), 0, tmp_path)


def test_the_recipe_reaches_model_and_optimiser(recipe, split, tmp_path, monkeypatch):
    recipe = apply_settings(
        recipe, ["epochs=2", "weight_decay=0.25", "learning_rate=0.004", "warmup_share=0.5", "mlp_ratio=3"]
    )
    assert build_model(recipe, 0).network.blocks[0].mlp.fc1.weight.shape == (48, 16)
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        group = self.param_groups[0]
        seen.append((group["lr"], group["weight_decay"], torch.initial_seed()))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train_classifier(build_model(recipe, 0), recipe, split, 0, tmp_path, lambda share: None)
    rates, decays, seeds = zip(*seen, strict=True)
    assert set(decays) == {0.25}
    assert max(rates) == pytest.approx(0.004, rel=1e-3)
    # Warm-up over half of all steps, then down to nearly nothing.
    assert abs(rates.index(max(rates)) - len(rates) / 2) <= 1
    assert rates[-1] < 1e-3 * max(rates)
    assert len(set(seeds)) == len(seeds) == 48, "a draw of one step came again in another"


def test_curves_are_those_of_the_epoch(recipe, split, tmp_path):
    """The last, smaller batch counts by its images, and held-out accuracy is that of the weights that are saved."""
    recipe = apply_settings(recipe, ["epochs=2", "learning_rate=1e-30", "weight_decay=0"])
    model = build_model(recipe, 0)
    curve = train_classifier(model, recipe, split, 0, tmp_path, lambda share: None)
    with torch.no_grad():
        logits = model.eval()(split.train_images)
        loss = torch.nn.functional.cross_entropy(logits, split.train_labels).item()
        right = (model(split.test_images).argmax(1) == split.test_labels).double().mean().item()
    # Nothing was learned, so the mean over images is the loss of the whole set.
    assert [epoch.loss for epoch in curve] == pytest.approx([loss, loss], rel=1e-5)
    assert [epoch.held_out_accuracy for epoch in curve] == pytest.approx([right, right])
    assert [epoch.epoch for epoch in curve] == [1, 2]


def test_seconds_count_training_steps_and_survive_a_resume(recipe, split, tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("twicing.training.classification.time.perf_counter", lambda: float(next(ticks)))

    def stop(share):
        if share > 0.5:
            raise KilledError

    with pytest.raises(KilledError):
        trained(recipe, split, 0, tmp_path, stop)
    _, curve = trained(recipe, split, 0, tmp_path)
    # Two looks at the clock per step, one tick apart: a second for each of the 24 steps of an epoch.
    assert [epoch.seconds for epoch in curve] == [24.0, 48.0, 72.0]
