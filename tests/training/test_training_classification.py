"""Training: paired by construction, resumable to the last bit, and loud where it would lie."""

import copy
import dataclasses

import pytest
import torch

from twicing.adapters.surgery import convert
from twicing.data.images import MemoryImages
from twicing.training.checkpoint import CHECKPOINT, read_checkpoint
from twicing.training.classification import build_model, load_trained, train_classifier
from twicing.training.hardware import wait_for
from twicing.training.order import batch_order
from twicing.training.recipe import digits, imagefolder
from twicing.training.schedule import optimizer_and_schedule
from twicing.training.settings import apply_settings
from twicing.training.split import Split, load_split
from twicing.training.streams import STEP_STREAM, stream_seed

# Lightning's own use of a renamed torch name, which training silences only around its own loop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

# 11 batches in a pass, the last one of 60 images.
SMALL = ["epochs=3", "depth=2", "width=16", "heads=2", "batch_size=64", "train_images=700"]


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
    assert steps[-1] == 1


def test_a_training_is_the_one_written_out_by_hand(recipe, split, tmp_path):
    """Bit for bit: batches by (seed, epoch), dropout by (seed, step), AdamW on all weights, one cycle by steps."""
    recipe = apply_settings(recipe, ["drop_path=0.2", "epochs=2"])
    model = build_model(recipe, 1)
    by_hand = copy.deepcopy(model).train()
    train_classifier(model, recipe, split, 1, tmp_path, lambda share: None)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=2 * 11, pct_start=0.2)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(stream_seed(1, 1, epoch))
        for place, batch in enumerate(torch.randperm(len(split.train), generator=generator).split(64)):
            torch.manual_seed(stream_seed(1, STEP_STREAM, 11 * epoch + place))
            loss = torch.nn.functional.cross_entropy(
                by_hand(split.train.load(batch.tolist())), split.train.labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert same_weights(model, by_hand)


def test_a_training_whose_rate_would_rise_for_one_step_begins_at_the_top():
    model = torch.nn.Linear(2, 2)
    for steps, expected in ((4, [1e-3] * 2), (5, [1e-3] * 2), (10, [1e-3 / 25, 1e-3])):
        made = optimizer_and_schedule(model, digits(), steps)
        rates = []
        for _ in range(steps):
            rates.append(made["optimizer"].param_groups[0]["lr"])
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        assert rates[0] == pytest.approx(expected[0], rel=0.2)
        assert max(rates) == pytest.approx(expected[1], rel=0.2)
        assert rates[-1] < 1e-7


def test_a_longer_training_takes_more_steps_and_stays_resumable(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["training_length=1.25"])
    seen = {"whole": [], "in-two": []}
    expected, curve = trained(recipe, split, 0, tmp_path / "whole", seen["whole"].append)
    assert len(curve) == 3
    # 11 batches in a pass, 14 steps in an epoch.
    assert len(seen["whole"]) == 42

    def stop(share):
        if share > 0.5:
            raise KilledError

    with pytest.raises(KilledError):
        trained(recipe, split, 0, tmp_path / "in-two", stop)
    model, _ = trained(recipe, split, 0, tmp_path / "in-two", seen["in-two"].append)
    assert same_weights(model, expected)
    assert seen["in-two"] == seen["whole"][14:]


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
    batches = [list(batch_order(recipe, 100, seed=3)) for _ in range(2)]
    assert batches[0] == batches[1]


def test_building_a_model_leaves_the_global_random_state_alone(recipe):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(recipe, 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_needs_to_know_its_classes():
    with pytest.raises(ValueError, match=r"imagefolder finds its classes in the data: call with_classes\(recipe"):
        build_model(imagefolder(), 0)


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


def test_two_attentions_are_trained_and_told_from_one(recipe, split, tmp_path):
    once = apply_settings(recipe, ["epochs=1"])
    twice = dataclasses.replace(once, attention_passes=2)
    model, _ = trained(twice, split, 0, tmp_path)
    again = build_model(twice, 1)
    load_trained(again, 0, tmp_path)
    assert same_weights(model, again)
    # The weights are named alike, and would fit.
    with pytest.raises(
        ValueError, match=r"trained with \[.*'two attentions a block'.*, and the model has standard att"
    ):
        load_trained(build_model(once, 1), 0, tmp_path)


def test_a_folder_of_another_seed_is_refused(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["epochs=1"])
    trained(recipe, split, 0, tmp_path)
    with pytest.raises(ValueError, match=r"last\.ckpt is one of seed 0, and this training's is 1: give each"):
        trained(recipe, split, 1, tmp_path)


def test_a_diverged_training_says_so(recipe, split, tmp_path):
    model = build_model(recipe, 0)
    with torch.no_grad():
        model.network.head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the training diverged: the loss of epoch 1 is nan\. Lower"):
        train_classifier(model, recipe, split, 0, tmp_path, lambda share: None)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x80\x02}q\x00", b"(lp0\n", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60]
)
def test_a_checkpoint_of_other_bytes_is_damaged(content, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: delete it and training\.json beside it"):
        read_checkpoint(path)


def test_a_checkpoint_that_memory_does_not_hold_is_not_called_damaged(tmp_path, monkeypatch):
    def too_large(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(MemoryError):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_damaged_checkpoint_says_what_to_delete(recipe, split, tmp_path):
    recipe = apply_settings(recipe, ["epochs=1"])
    trained(recipe, split, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
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
    assert len(set(seeds)) == len(seeds) == 22, "a draw of one step came again in another"


def test_curves_are_those_of_the_epoch(recipe, split, tmp_path):
    """The last, smaller batch counts by its images, and held-out accuracy is that of the weights that are saved."""
    recipe = apply_settings(recipe, ["epochs=2", "learning_rate=1e-30", "weight_decay=0"])
    model = build_model(recipe, 0)
    # More than one batch held out, the last one smaller.
    held_out = MemoryImages(split.test.pixels.repeat(2, 1, 1, 1), split.test.labels.repeat(2), split.test.classes)
    split = Split(split.train, held_out, torch.arange(600), torch.arange(600))
    curve = train_classifier(model, recipe, split, 0, tmp_path, lambda share: None)
    with torch.no_grad():
        logits = model.eval()(split.train.load(range(700)))
        loss = torch.nn.functional.cross_entropy(logits, split.train.labels).item()
        right = (model(split.test.pixels).argmax(1) == split.test.labels).double().mean().item()
    # Nothing was learned, so the mean over images is the loss of the whole set.
    assert [epoch.loss for epoch in curve] == pytest.approx([loss, loss], rel=1e-5)
    assert [epoch.held_out_accuracy for epoch in curve] == pytest.approx([right, right])
    assert [epoch.epoch for epoch in curve] == [1, 2]


def test_seconds_count_training_steps_and_survive_a_resume(recipe, split, tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("twicing.training.loop.time.perf_counter", lambda: float(next(ticks)))

    def stop(share):
        if share > 0.5:
            raise KilledError

    with pytest.raises(KilledError):
        trained(recipe, split, 0, tmp_path, stop)
    _, curve = trained(recipe, split, 0, tmp_path)
    # Two looks at the clock per step, one tick apart: a second for each of the 11 steps of an epoch.
    assert [epoch.seconds for epoch in curve] == [11.0, 22.0, 33.0]


def test_seconds_count_what_a_device_works_after_its_calls_have_returned(recipe, split, tmp_path, monkeypatch):
    clock = [0.0]
    asked = []

    def wait_for(device):
        asked.append(device)
        clock[0] += 1

    monkeypatch.setattr("twicing.training.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("twicing.training.loop.wait_for", wait_for)
    _, curve = trained(recipe, split, 0, tmp_path)
    # What is waited for before a step belongs to no step, what is waited for at its end does.
    assert [epoch.seconds for epoch in curve] == [11.0, 22.0, 33.0]
    assert asked == [torch.device("cpu")] * 66


def test_a_gpu_is_waited_for_and_a_cpu_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for(torch.device("cpu"))
    wait_for(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]
