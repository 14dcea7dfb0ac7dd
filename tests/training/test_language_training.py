"""Training of language models: the loop written out by hand, exact after a kill, and loud where it would lie."""

import signal

import pytest
import torch
from killed_language_training import rows, small_corpus, small_recipe, start, train_here
from killed_training import torchrun_environment

from twicing.adapters.surgery import convert
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.classification import load_trained
from twicing.training.hardware import Hardware
from twicing.training.language import build_language_model, learning_rate_factor, train_language_model
from twicing.training.language_order import WindowOrder
from twicing.training.language_perplexity import segment_perplexity
from twicing.training.streams import STEP_STREAM, stream_seed

# Lightning's own use of a renamed torch name, which training silences only around its own loop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
def test_a_training_is_the_one_written_out_by_hand(order, tmp_path):
    """Bit for bit: windows and dropout by (seed, step), AdamW, clipping, warm-up and cosine, the curve."""
    recipe = small_recipe(order=order, weight_decay=0.1, clip=0.1, training_length=1.2)
    weights, curve = train_here(recipe, tmp_path, seed=1)
    corpus = small_corpus()
    model = build_language_model(recipe, 1, 50).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    windows, expected, clipped = WindowOrder(len(corpus.train), recipe, 1), [], 0
    assert recipe.steps == 21
    for epoch in range(3):
        windows.set_epoch(epoch)
        losses = []
        for place, starts in enumerate(windows):
            step = 7 * epoch + place
            torch.manual_seed(stream_seed(1, STEP_STREAM, step))
            batch = torch.stack([corpus.train[start : start + 9] for start in starts]).long()
            loss = model.losses(batch[:, :-1], batch[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.param_groups[0]["lr"] = 1e-2 * learning_rate_factor(step, recipe)
            optimizer.step()
            losses.append(loss.item())
        valid = segment_perplexity(model.eval(), corpus.valid).value
        model.train()
        expected.append((epoch + 1, 7 * (epoch + 1), sum(losses) / 7, valid))
    assert clipped > 10, "the test would not notice"
    assert same(weights, model.state_dict())
    for row, by_hand in zip(rows(curve), expected, strict=True):
        assert row[:2] == by_hand[:2]
        assert row[2:] == pytest.approx(by_hand[2:], rel=1e-5)


def test_it_learns(tmp_path):
    recipe = small_recipe(epochs=4, steps_per_epoch=30, clip=1.0)
    _, curve = train_here(recipe, tmp_path)
    assert curve[0].valid_perplexity > 2 * curve[-1].valid_perplexity
    # Three words may follow each one.
    assert 3 < curve[-1].valid_perplexity < 15
    assert [row.step for row in curve] == [30, 60, 90, 120]
    assert 0 < curve[0].seconds < curve[-1].seconds


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    """By SIGKILL in the middle of the second epoch, in a process of its own."""
    recipe, mechanism = small_recipe(order="shuffled"), "twicing"
    weights, curve = train_here(recipe, tmp_path / "whole", mechanism=mechanism)
    killed = start(recipe, tmp_path / "killed", kill_at=0.5, mechanism=mechanism)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["epoch"] == 0
    shares = []
    resumed, resumed_curve = train_here(recipe, tmp_path / "killed", mechanism=mechanism, progress=shares.append)
    assert same(resumed, weights)
    assert rows(resumed_curve) == rows(curve)
    assert shares == [step / 18 for step in range(7, 19)]


def test_the_mechanism_is_trained(tmp_path):
    standard, _ = train_here(small_recipe(), tmp_path / "standard")
    twiced, _ = train_here(small_recipe(), tmp_path / "twicing", mechanism="twicing")
    assert not same(standard, twiced)


def test_weights_are_read_back_and_only_into_the_same_formula(tmp_path):
    recipe = small_recipe(epochs=1)
    weights, _ = train_here(recipe, tmp_path, mechanism="twicing")
    model = build_language_model(recipe, 3, 50)
    with pytest.raises(ValueError, match="holds weights of another formula"):
        load_trained(model, 3, tmp_path)
    convert(model, "twicing")
    load_trained(model, 3, tmp_path)
    assert same(model.state_dict(), weights)
    with pytest.raises(ValueError, match="is one of seed 3, and this training's is 4"):
        train_here(recipe, tmp_path, mechanism="twicing", seed=4)


def test_seeds_differ_in_weights_windows_and_dropout(tmp_path):
    runs = [train_here(small_recipe(epochs=1), tmp_path / str(seed), seed=seed)[0] for seed in (1, 2)]
    assert not same(*runs)


def test_a_diverged_training_is_told(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the training diverged: the loss of epoch \d is nan.*learning_rate"):
        train_here(small_recipe(learning_rate=1e30, norm="pre", clip=1e30), tmp_path)


def test_fsdp_is_refused(tmp_path):
    corpus = small_corpus()
    model = build_language_model(small_recipe(), 0, 50)
    hardware = Hardware(accelerator="auto", strategy="fsdp")
    with pytest.raises(ValueError, match="fsdp would cut the tied embedding up"):
        train_language_model(model, small_recipe(), corpus, 0, tmp_path, lambda share: None, hardware)


def test_two_processes_train_what_one_does(tmp_path):
    """Without dropout, of which each draws its own; in double precision, so that rounding is all that may differ."""
    recipe = small_recipe(dropout=0.0, epochs=2)
    weights, curve = train_here(recipe, tmp_path / "one", hardware=Hardware(precision="64-true"))
    (tmp_path / "two").mkdir()
    together = Hardware(precision="64-true", devices="2", strategy="ddp")
    processes = [
        start(recipe, tmp_path / "two", environment, hardware=together) for environment in torchrun_environment(2)
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in (0, 1):
        result = torch.load(tmp_path / "two" / f"result-{rank}.pt", weights_only=True)
        for name, weight in weights.items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-8, atol=1e-8, msg=name)
        for row, alone in zip(result["curve"], rows(curve), strict=True):
            # The mean loss is kept in single precision.
            assert row == pytest.approx(alone, rel=1e-6)
