"""The operator as torch's registry sees it: opcheck, compile, vmap, autocast, FLOPs, and what is saved."""

from functools import partial

import pytest
import torch
import torch._dynamo
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from twicing import explain_backend, twicing_attention
from twicing.ops.triton.operator import triton_backward, triton_forward
from twicing.testing import make_inputs, relative_rms

N = 9
MASK = (torch.arange(N) < torch.tensor([[7]]))[:, None]
# Name -> key_mask, gain, seed, dropout_p, is_causal, order: arguments of the operator.
OPERATOR_CALLS = {
    "causal-gain-per-head": (None, torch.linspace(0, 1, 2), None, 0.0, True, 2),
    "mask-and-dropout": (MASK, torch.ones(1), torch.tensor([7]), 0.3, False, 2),
    "order-one": (None, torch.ones(1), None, 0.0, False, 1),
}


@pytest.fixture
def inputs(generator):
    return make_inputs((1, 2, N, 16), generator=generator)


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(name, inputs, by_blocks):
    mask, gain, *options = OPERATOR_CALLS[name]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    *options, order = options
    arguments = (*leaves, mask, gain.clone().requires_grad_(), *options, 0.3, order)
    opcheck(triton_forward, (*arguments, True))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    opcheck(triton_forward, (*plain, False))
    saved = triton_forward(*plain, True)
    opcheck(triton_backward, (torch.randn_like(saved[0]), *saved, *plain))


COMPILED = {
    "causal": {"is_causal": True, "gain": torch.linspace(0, 1, 2)},
    "mask-and-dropout": {"attn_mask": MASK[:, None], "dropout_p": 0.2},
}


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_to_one_graph_with_the_same_output_and_gradients(name, inputs, by_blocks, call):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.manual_seed(1)
    output = compiled(*inputs, **COMPILED[name])
    torch.manual_seed(1)
    expected = call(*inputs, **COMPILED[name])
    assert torch.equal(output, expected)
    upstream = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (output, expected))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    torch._dynamo.reset()


def test_vmap_is_a_loop(inputs, by_blocks, call):
    looped = torch.stack([call(*one, is_causal=True) for one in zip(*inputs, strict=True)])
    assert torch.equal(torch.func.vmap(partial(call, is_causal=True))(*inputs), looped)


def test_a_second_derivative_is_refused_in_a_sentence(inputs, by_blocks, call):
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    (d_query,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"first derivative only\. Use backend='reference'"):
        d_query.sum().backward()


def test_torch_func_and_bf16_in_the_interpreter_are_refused(inputs, call):
    with pytest.raises(ValueError, match=r"torch.func.grad and its kin cannot differentiate an operator"):
        torch.func.grad(lambda q: call(q, *inputs[1:]).sum())(inputs[0])
    with pytest.raises(ValueError, match=r"Triton's interpreter computes torch.bfloat16 wrongly"):
        call(*(tensor.bfloat16() for tensor in inputs))


def test_it_is_taken_by_name_only(inputs):
    lines = explain_backend(*inputs).split("\n")
    assert lines[0].startswith("backend='auto' takes 'sdpa'")
    assert lines[-1].startswith("not 'triton': it would serve too: on a GPU: fused kernels")


def test_autocast_casts_what_comes_in(inputs, by_blocks, call):
    with torch.autocast("cpu", torch.float16):
        output = call(*inputs)
    assert output.dtype == torch.float16
    assert torch.equal(output, call(*(tensor.half() for tensor in inputs)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_nothing_of_size_n_by_n_is_saved(options, by_blocks, call, generator):
    leaves = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 48, 16), generator=generator)]
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*leaves, **options).sum().backward()
    assert max(sizes) <= leaves[0].numel()


@pytest.mark.parametrize("gain_dtype", [torch.float16, torch.float64], ids=str)
def test_the_gradient_of_a_gain_has_its_dtype(gain_dtype, inputs, by_blocks, call):
    gain = torch.tensor([0.5, 1.0], dtype=gain_dtype, requires_grad=True)
    (found,) = torch.autograd.grad(call(*inputs, gain=gain).square().sum(), gain)
    expected = twicing_attention(*inputs, gain=gain, backend="reference").square().sum()
    assert found.dtype == gain_dtype
    assert relative_rms(found, torch.autograd.grad(expected, gain)[0]) < 1e-3


@pytest.mark.parametrize(("order", "units"), [(1, (2, 5)), (2, (3, 7))])
def test_flops_are_counted_by_their_units(order, units, by_blocks, call, generator):
    """Two operations per multiply-add, all of A although it is causal, as PyTorch counts its own."""
    leaves = [tensor.requires_grad_() for tensor in make_inputs((1, 2, N, 16), generator=generator)]
    unit = 2 * 1 * 2 * N * N * 16
    with FlopCounterMode(display=False) as counter:
        output = call(*leaves, is_causal=True, order=order)
    assert counter.get_total_flops() == units[0] * unit
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == units[1] * unit
