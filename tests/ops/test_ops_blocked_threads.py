"""Heads over torch's threads: a box has work for each, and the results are as right, and the same every time."""

from functools import partial

import pytest
import torch

from twicing import twicing_attention
from twicing.ops.blocked import plan
from twicing.testing import make_inputs, measured_errors

call = partial(twicing_attention, backend="blocked")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_boxes(monkeypatch):
    """One head for each thread in a box, so that small calls have several."""
    monkeypatch.setattr(plan, "BOX_BYTES", {"forward": 16 << 10, "backward": 16 << 10})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_outputs_and_gradients_are_within_the_budget(is_causal, dtype, three_threads, small_boxes, generator):
    inputs = make_inputs((3, 5, 63, 16), generator=generator, dtype=dtype)
    gain = torch.rand(5, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert not {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}


def test_several_threads_give_the_same_bits_every_time(three_threads, small_boxes, generator):
    """The gradient of a mask for all heads too, which gathers from every box."""
    leaves = [tensor.requires_grad_() for tensor in make_inputs((3, 5, 63, 16), generator=generator)]
    leaves.append(torch.randn(63, 63, generator=generator).requires_grad_())
    results = []
    for _ in range(5):
        output = call(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for result in results[1:]:
        assert all(torch.equal(found, first) for found, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(63, 63), (3, 5, 63, 63)], ids=["mask-for-all", "mask-for-each"])
def test_dropout_is_the_same_for_any_number_of_threads(shape, three_threads, small_boxes, generator):
    """In the forward and in the backward, which may have another number of threads, and so other boxes."""
    leaves = [tensor.requires_grad_() for tensor in make_inputs((3, 5, 63, 16), generator=generator)]
    leaves.append(torch.randn(shape, generator=generator).requires_grad_())
    results = []
    for forward_threads, backward_threads in ((1, 1), (3, 3), (3, 1), (1, 2)):
        torch.set_num_threads(forward_threads)
        torch.manual_seed(0)
        output = call(*leaves, dropout_p=0.5)
        torch.set_num_threads(backward_threads)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("tokens", [197, 1024, 2048])
def test_a_box_has_a_head_for_every_thread(tokens, three_threads):
    made = plan.plan(24, tokens, 4, is_causal=False, direction="forward")
    assert made.blocks == [slice(0, tokens)]
    assert made.heads >= 3


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [1, 197, 1024, 2048, 60_000])
def test_however_many_threads_there_are_a_box_has_no_more_of_a_than_it_may(tokens, direction, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 128)
    made = plan.plan(1 << 30, tokens, 4, is_causal=False, direction=direction)
    # But for the columns of one head, which are no fewer however long they are.
    narrowest = 4 * tokens * 2 * plan.LEAST_COLUMNS if made.heads == 1 and direction == "backward" else 0
    assert made.block_size * 4 <= max(plan.MOST_BYTES, narrowest)


def test_threads_without_room_for_a_head_each_share_one(three_threads, monkeypatch):
    monkeypatch.setattr(plan, "MOST_BYTES", 5 << 20)
    assert plan.plan(24, 1024, 4, is_causal=False, direction="forward").heads == 1
