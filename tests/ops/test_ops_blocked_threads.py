"""The same results for any number of threads that torch's kernels use, and for calls at the same time."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from twicing import twicing_attention
from twicing.testing import make_inputs, measured_errors

call = partial(twicing_attention, backend="blocked")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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
    """In the forward and in the backward, which may use another number."""
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


def test_two_threads_that_call_at_once_do_not_share_a_buffer(generator):
    inputs = make_inputs((3, 5, 63, 16), generator=generator)
    others = make_inputs((3, 5, 63, 16), generator=generator)
    expected = [call(*inputs), call(*others)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            found = list(pool.map(lambda given: call(*given), (inputs, others)))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
