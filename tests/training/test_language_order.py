"""Which windows make which step: a function of (seed, step), every window once in a pass, in both orders."""

import dataclasses

import pytest
import torch

from twicing.training.language_order import TextWindows, WindowOrder, window_loader
from twicing.training.language_recipes import text_demo
from twicing.training.streams import ORDER_STREAM, stream_seed


def recipe(**changes):
    small = {"length": 4, "batch_size": 3, "steps_per_epoch": 5, "epochs": 3, "warmup_steps": 1}
    return dataclasses.replace(text_demo(), **(small | changes))


def all_steps(tokens, made, seed=0, epochs=None, **who):
    order = WindowOrder(tokens, made, seed, **who)
    found = []
    for epoch in range(epochs or made.epochs):
        order.set_epoch(epoch)
        found += [starts.tolist() for starts in order]
        assert len(found) == (epoch + 1) * len(order)
    return found


def test_contiguous_reads_every_column_from_top_to_bottom():
    # Three columns of 14 tokens: 0-13, 14-27, 28-41; three windows of four, and the token after each, fit.
    steps = all_steps(43, recipe(order="contiguous", steps_per_epoch=4), epochs=1)
    assert steps == [[0, 14, 28], [4, 18, 32], [8, 22, 36], [0, 14, 28]]
    assert all_steps(43, recipe(order="contiguous"), seed=1) == all_steps(43, recipe(order="contiguous"), seed=2)


@pytest.mark.parametrize(("tokens", "steps_in_a_pass"), [(39, 3), (38, 2), (15, 1)])
def test_contiguous_needs_the_token_after_the_last_window(tokens, steps_in_a_pass):
    assert WindowOrder(tokens, recipe(order="contiguous"), 0).steps_in_a_pass == steps_in_a_pass


@pytest.mark.parametrize("tokens", [16, 17, 27, 28, 53])
def test_shuffled_windows_lie_side_by_side_within_the_text(tokens):
    made = recipe(order="shuffled", batch_size=1, steps_per_epoch=(tokens - 4) // 4)
    passes = [all_steps(tokens, made, seed)[: made.steps_per_epoch] for seed in range(40)]
    offsets = set()
    for windows in passes:
        starts = sorted(start for (start,) in windows)
        offsets.add(starts[0])
        assert starts == list(range(starts[0], starts[0] + 4 * len(starts), 4))
        assert starts[-1] + 4 < tokens
    assert offsets == {0, 1, 2, 3}


def test_shuffled_is_drawn_by_seed_and_pass():
    made = recipe(order="shuffled")
    steps = all_steps(53, made, seed=7)
    # Twelve windows are four batches a pass.
    assert WindowOrder(53, made, 7).steps_in_a_pass == 4
    expected = []
    for number in range(4):
        generator = torch.Generator().manual_seed(stream_seed(7, ORDER_STREAM, number))
        offset = torch.randint(4, (), generator=generator)
        expected += (offset + 4 * torch.randperm(12, generator=generator)).view(4, 3).tolist()
    assert steps == expected[:15]
    assert steps != all_steps(53, made, seed=8)


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
def test_an_epoch_can_be_begun_anywhere(order):
    made = recipe(order=order)
    late = WindowOrder(53, made, 7)
    late.set_epoch(2)
    assert [starts.tolist() for starts in late] == all_steps(53, made, seed=7)[10:]


def test_training_length_makes_epochs_longer():
    longer = recipe(training_length=1.25)
    assert (len(WindowOrder(53, longer, 0)), longer.steps) == (6, 18)
    assert all_steps(53, longer)[:15] == all_steps(53, recipe())


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
def test_processes_share_the_windows_of_one(order):
    made = recipe(order=order, batch_size=4, length=3)
    alone = all_steps(53, made)
    both = [all_steps(53, made, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(alone, *both, strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1])
        assert len(parts[0]) == len(parts[1])
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes: got 4"):
        WindowOrder(53, made, 0, world=3)


@pytest.mark.parametrize(("order", "tokens"), [("contiguous", 14), ("shuffled", 15)])
def test_a_text_that_is_too_short_is_told(order, tokens):
    assert WindowOrder(tokens + 1, recipe(order=order), 0).steps_in_a_pass == 1
    with pytest.raises(ValueError, match=rf"more than 3 windows of 4 tokens: it has {tokens} tokens"):
        WindowOrder(tokens, recipe(order=order), 0)


def test_windows_are_the_text_and_the_token_after():
    stream = torch.arange(100, 153, dtype=torch.int32)
    windows = TextWindows(stream, 4)[torch.tensor([0, 48])]
    assert windows.tolist() == [[100, 101, 102, 103, 104], [148, 149, 150, 151, 152]]
    assert windows.dtype == torch.int64
    made = recipe()
    batches = list(window_loader(stream, made, seed=3))
    assert [batch[:, 0].tolist() for batch in batches] == [
        [100 + start for start in starts] for starts in all_steps(53, made, seed=3)[:5]
    ]
