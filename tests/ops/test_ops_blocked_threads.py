"""Heads over threads: the same results for any number of threads, and no trace left in torch's settings."""

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from twicing import twicing_attention
from twicing.ops.blocked import crew, operator, walk
from twicing.ops.blocked.plan import Box
from twicing.testing import make_inputs, measured_errors

call = partial(twicing_attention, backend="blocked")


@pytest.fixture
def three_threads(monkeypatch):
    """Small calls are not worth threads: make them so."""
    monkeypatch.setattr(walk, "WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def heads(count):
    return [Box(slice(head, head + 1), slice(0, 1), slice(head, head + 1)) for head in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_outputs_and_gradients_are_within_the_budget(is_causal, dtype, three_threads, generator):
    inputs = make_inputs((3, 5, 63, 16), generator=generator, dtype=dtype)
    gain = torch.rand(5, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert not {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}


def test_several_threads_give_the_same_bits_every_time(three_threads, generator):
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
def test_dropout_is_the_same_for_any_number_of_threads(shape, three_threads, generator):
    """In the forward and in the backward, which may use another number: the gradient of a mask takes one thread."""
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


def test_in_inference_mode_and_after_it(three_threads, generator):
    inputs = make_inputs((3, 5, 63, 16), generator=generator)
    with torch.inference_mode():
        output = call(*inputs).clone()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    again = call(*leaves)
    again.sum().backward()
    assert torch.equal(output, again.detach())
    assert all(leaf.grad is not None for leaf in leaves)


def test_torchs_number_of_threads_stays_what_it_was(three_threads, generator, monkeypatch):
    monkeypatch.setattr(crew, "_crews", {})
    call(*make_inputs((3, 5, 63, 16), generator=generator))
    assert torch.get_num_threads() == 3
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


def test_kernels_of_the_crew_use_one_thread_and_every_box_is_done_once(three_threads, monkeypatch):
    monkeypatch.setattr(crew, "_crews", {})
    done = []

    def new_worker():
        return lambda box: done.append((box.flat.start, torch.get_num_threads(), threading.current_thread().name))

    crew.each(heads(20), new_worker, 2)
    assert sorted(head for head, _, _ in done) == list(range(20))
    assert {threads for _, threads, _ in done} == {1}
    assert all(name.startswith("twicing") for _, _, name in done)


def test_the_gradient_of_a_mask_for_all_heads_does_not_depend_on_who_is_first(three_threads, generator, monkeypatch):
    """It is a sum over boxes: several threads would add to it in any order, here in the opposite one."""
    leaves = list(make_inputs((3, 5, 63, 16), generator=generator))
    leaves.append(torch.randn(63, 63, generator=generator).requires_grad_())
    (expected,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[-1])

    def opposite(boxes, new_worker, threads):
        boxes = list(boxes)
        crew.each(boxes if threads == 1 else boxes[::-1], new_worker, 1)

    monkeypatch.setattr(operator, "each", opposite)
    (found,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[-1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 6])
def test_every_thread_gets_a_box(threads, generator):
    q, k, v = make_inputs((2, 6, 9, 4), generator=generator)
    boxes = list(walk.Walk(q, k, v, None, torch.ones(1), None, 0.0, False, 0.5).boxes(threads))
    assert len(boxes) >= threads
    assert sum(len(box) for box in boxes) == 12


def test_an_error_in_a_thread_reaches_the_caller():
    def new_worker():
        def work(box):
            raise RuntimeError(f"box {box.flat.start}")

        return work

    with pytest.raises(RuntimeError, match="box"):
        crew.each(heads(4), new_worker, 2)


SCRIPT = """
import os, torch
from twicing.ops.call import checked_call
from twicing.ops import blocked

torch.set_num_threads(2)
q = torch.randn(4, 4, 512, 8)
run = lambda: blocked.run(checked_call(q, q, q, None, 0.0, False, None, False, order=2, gain=1.0))
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(run(), expected)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_makes_threads_of_its_own():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
