"""Under torch.compile, torch.export, autocast and functorch: the same call, the same result."""

from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vjp, vmap

from twicing import attention_matrix, effective_matrix, twicing_attention
from twicing.testing import make_inputs, relative_rms

N = 9
# The first vmap of a backward and the first forward-mode derivative in a process make torch script its own functions.
TORCH_SCRIPTS_ITSELF = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@pytest.fixture
def inputs(generator):
    return make_inputs((2, 4, N, 8), generator=generator)


@pytest.fixture
def compiled():
    """A compiled call (whole graph, or an error) that counts its compilations."""
    torch._dynamo.reset()
    counter = CompileCounter()
    yield torch.compile(twicing_attention, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def mask(seed=1):
    allowed = torch.rand(N, N, generator=torch.Generator().manual_seed(seed)) > 0.4
    allowed[2] = False
    return allowed


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool-mask": {"attn_mask": mask()},
    "float-mask": {"attn_mask": torch.zeros(N, N).masked_fill(~mask(), float("-inf"))},
    "gain-per-head": {"gain": torch.linspace(0, 1, 4)},
    "gain": {"gain": 0.5},
    "order-3": {"order": 3},
    "order-1": {"order": 1},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("call", CALLS)
def test_it_compiles_to_one_graph_with_the_same_output_and_gradients(call, inputs):
    torch._dynamo.reset()
    options = CALLS[call]
    compiled = torch.compile(twicing_attention, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output, expected = compiled(*leaves, **options), twicing_attention(*leaves, **options)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(expected)
    for gradient, wanted in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_a_compiled_call_with_another_length_compiles_once_more_and_then_no_more(compiled, generator):
    call, counter = compiled
    for tokens in (9, 10, 11, 12, 20, 33):
        inputs = make_inputs((2, 4, tokens, 8), generator=generator)
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        torch.testing.assert_close(call(*inputs, allowed), twicing_attention(*inputs, allowed))
    assert counter.frame_count == 2


def test_a_compiled_call_with_another_gain_compiles_at_most_once_more(compiled, inputs):
    call, counter = compiled
    for gain in (0.1, 0.2, 0.3, 0.4, 0.7):
        torch.testing.assert_close(call(*inputs, gain=gain), twicing_attention(*inputs, gain=gain))
    assert counter.frame_count == 2


def test_values_of_a_gain_tensor_or_a_mask_make_no_new_graph(compiled, inputs):
    call, counter = compiled
    for seed in range(4):
        gain = torch.full((4,), float(seed))
        torch.testing.assert_close(
            call(*inputs, mask(seed), gain=gain), twicing_attention(*inputs, mask(seed), gain=gain)
        )
    assert counter.frame_count == 1


class Attention(nn.Module):
    """A module around the call, with a learnable gain per head and a mask of padding."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0, 1, 4))

    def forward(self, query, key, value, padding):
        return twicing_attention(query, key, value, padding[:, None, None, :], gain=self.gain)


def test_it_exports_with_any_number_of_tokens(inputs, generator):
    module = Attention()
    padding = torch.ones(2, N, dtype=torch.bool)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    by_token = [{2: tokens}] * 3 + [{1: tokens}]
    exported = torch.export.export(module, (*inputs, padding), dynamic_shapes=by_token).module()
    longer = make_inputs((2, 4, 30, 8), generator=generator)
    padding = torch.arange(30) < torch.tensor([[30], [17]])
    torch.testing.assert_close(exported(*longer, padding), module(*longer, padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_casts_what_sdpa_casts_before_any_check(backend, dtype, inputs):
    q, k, v = inputs
    bias = torch.randn(N, N)
    cast = [tensor.to(dtype) for tensor in (q, k, v, bias)]
    with torch.autocast("cpu", dtype):
        assert F.scaled_dot_product_attention(q, k.to(dtype), v, bias).dtype == dtype
        output = twicing_attention(q, k.to(dtype), v, bias, backend=backend)
        A = attention_matrix(q, k.to(dtype), bias)
        effective = effective_matrix(q, k, bias)
    assert output.dtype == dtype
    assert torch.equal(output, twicing_attention(*cast, backend=backend))
    assert torch.equal(A, attention_matrix(cast[0], cast[1], cast[3]))
    assert torch.equal(effective, effective_matrix(cast[0], cast[1], cast[3]))


def test_autocast_casts_a_mask_of_another_half_precision_too(inputs):
    bias = torch.randn(N, N).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs, bias).dtype == torch.bfloat16
        assert twicing_attention(*inputs, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_leaves_fp64_alone_as_sdpa_does(backend, inputs):
    q, k, v = (tensor.double() for tensor in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.float64
        output = twicing_attention(q, k, v, backend=backend)
        with pytest.raises(ValueError, match=r"query is torch.float64 on cpu, key is torch.bfloat16"):
            twicing_attention(q, k.float(), v, backend=backend)
    assert torch.equal(output, twicing_attention(q, k, v, backend=backend))


def test_a_learnable_gain_keeps_its_fp32_gradient_under_autocast(inputs):
    gain = torch.full((4,), 0.5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = twicing_attention(*inputs, gain=gain)
    output.float().square().sum().backward()
    (exact,) = torch.autograd.grad(twicing_attention(*inputs, gain=gain).square().sum(), gain)
    assert gain.grad.dtype == torch.float32
    assert relative_rms(gain.grad, exact) < 0.02


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"order": 3, "gain": 0.5}], ids=str)
def test_vmap_is_a_loop(options, inputs):
    looped = torch.stack([twicing_attention(*one, **options) for one in zip(*inputs, strict=True)])
    torch.testing.assert_close(vmap(partial(twicing_attention, **options))(*inputs), looped)


def test_vmap_over_masks_and_gains(inputs):
    q, k, v = inputs
    masks, gains = torch.stack([mask(1), mask(2)]), torch.rand(2, 4)

    def call(q, one_mask, gain):
        return twicing_attention(q, k[0], v[0], one_mask, gain=gain)

    looped = torch.stack([call(*one) for one in zip(q, masks, gains, strict=True)])
    torch.testing.assert_close(vmap(call)(q, masks, gains), looped)


def test_functional_gradients_are_those_of_autograd(inputs):
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def loss(q, k, v):
        return twicing_attention(q, k, v, mask()).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    plain = [tensor.detach() for tensor in inputs]
    for gradient, wanted in zip(grad(loss, argnums=(0, 1, 2))(*plain), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    _, pull_back = vjp(loss, *plain)
    for gradient, wanted in zip(pull_back(torch.tensor(1.0)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@TORCH_SCRIPTS_ITSELF
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
def test_gradients_per_sample_of_a_module(inputs):
    """What per-sample gradients (as for privacy) do: vmap of grad of functional_call."""
    module = Attention()
    padding = torch.ones(2, N, dtype=torch.bool)

    def loss(parameters, *one):
        return functional_call(module, parameters, tuple(tensor[None] for tensor in one)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *inputs, padding)
    for sample in range(2):
        alone = grad(loss)(parameters, *(tensor[sample] for tensor in (*inputs, padding)))
        torch.testing.assert_close(per_sample["gain"][sample], alone["gain"])


def test_the_jacobian_by_the_values_is_the_effective_matrix(inputs):
    q, k, _ = (tensor[0, 0].double() for tensor in inputs)
    jacobian = jacrev(lambda v: twicing_attention(q, k, v)[:, 0])(torch.randn(N, 1, dtype=torch.float64))
    assert relative_rms(jacobian[:, :, 0], effective_matrix(q, k)) < 1e-14


@TORCH_SCRIPTS_ITSELF
def test_forward_mode_derivatives_of_the_reference(inputs):
    q, k, v = (tensor.double() for tensor in inputs)
    tangent = torch.randn_like(q)
    with forward_ad.dual_level():
        output = twicing_attention(forward_ad.make_dual(q, tangent), k, v, backend="reference")
        forward = forward_ad.unpack_dual(output).tangent
    step = 1e-6
    ahead, behind = (twicing_attention(q + s * tangent, k, v, backend="reference") for s in (step, -step))
    assert relative_rms(forward, (ahead - behind) / (2 * step)) < 1e-7


def test_shapes_can_be_inferred_without_data():
    q = torch.empty(2, 4, N, 8, device="meta")
    for options in ({}, {"is_causal": True}, {"backend": "reference"}, {"dropout_p": 0.1}):
        assert twicing_attention(q, q, q, **options).shape == q.shape


def test_two_calls_give_the_same_bits(inputs):
    for backend in ("sdpa", "reference"):
        outputs = [twicing_attention(*inputs, mask(), backend=backend) for _ in range(2)]
        assert torch.equal(*outputs)
