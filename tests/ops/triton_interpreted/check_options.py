"""Masks of keys, dropout, strides, diverged heads, and the order in which sums are made."""

import pytest
import torch

from twicing import attention_matrix, twicing_attention
from twicing.ops.triton import tuning
from twicing.testing import make_inputs, measured_errors, relative_rms

N = 20


def masks():
    """Masks of keys that broadcast to [2, 2, N, N]; the second entry of "padding" has no keys at all."""
    padding = torch.arange(N) < torch.tensor([[17], [0]])
    per_head = torch.rand(1, 2, 1, N, generator=torch.Generator().manual_seed(1)) > 0.3
    return {"padding": padding[:, None, None, :], "per-head": per_head, "one-for-all": torch.ones(1, 1).bool()}


@pytest.mark.parametrize("name", ["padding", "per-head"])
def test_masks_of_keys(name, schedule, call, generator):
    inputs = make_inputs((2, 2, N, 16), generator=generator)
    errors = measured_errors(call, *inputs, masks()[name], gain=0.6, generator=generator)
    assert all(error <= budget for error, budget in errors.values()), errors


def test_masks_are_broadcast_to_keys(by_blocks, call, generator):
    inputs = make_inputs((1, 2, N, 16), generator=generator)
    assert torch.equal(call(*inputs, masks()["one-for-all"]), call(*inputs))
    per_head = masks()["per-head"]
    assert torch.equal(call(*inputs, per_head[0, :1]), call(*inputs, per_head[:, :1].expand(1, 2, 1, N)))


def test_an_entry_that_may_attend_to_nothing_is_zero_and_gives_none(schedule, call, generator):
    inputs = [x.requires_grad_() for x in make_inputs((2, 2, N, 16), generator=generator)]
    output = call(*inputs, masks()["padding"])
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    d_query, d_key, d_value = torch.autograd.grad(output.sum(), inputs)
    assert not d_query[1].any()
    assert not d_key[1].any()
    assert not d_value[1].any()
    assert d_value[0].any()


def test_a_diverged_head_shows_and_spoils_no_other(schedule, call, generator):
    q, k, v = make_inputs((1, 3, N, 16), generator=generator)
    for is_causal in (False, True):
        expected = call(q, k, v, is_causal=is_causal)
        diverged = q.clone()
        diverged[0, 1, 0, 0] = float("nan")
        output = call(diverged, k, v, is_causal=is_causal)
        # R of the first row is NaN, and all rows attend to it.
        assert output[0, 1].isnan().all()
        assert torch.equal(output[0, ::2], expected[0, ::2])


UPSTREAM = {
    "stride-0": lambda like: torch.ones(()).expand_as(like),
    "transposed": lambda like: like.transpose(1, 2).contiguous().transpose(1, 2),
    "columns": lambda like: like.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", UPSTREAM)
def test_strides(layout, schedule, call, generator):
    """Queries from one packed projection, keys of one head for all, values transposed, and any upstream gradient."""
    is_causal = schedule == "heads"
    q = torch.randn(1, N, 3, 2, 32, generator=generator)[..., ::2].permute(2, 0, 3, 1, 4)[0]
    k = torch.randn(1, 1, 2 * N, 16, generator=generator)[:, :, ::2].expand(1, 2, N, 16)
    v = torch.randn(1, 2, 16, N, generator=generator).mT
    upstream = UPSTREAM[layout](torch.randn(1, 2, N, 16, generator=generator))
    results = []
    for inputs in ((q, k, v), [x.contiguous() for x in (q, k, v)]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = call(*leaves, is_causal=is_causal)
        results.append((output, *torch.autograd.grad(output, leaves, upstream)))
        upstream = upstream.contiguous()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def seeded(call, *args, **options):
    """The call with the same weights dropped every time."""
    torch.manual_seed(3)
    return call(*args, **options)


def dropped_matrix(call, q, k, **options):
    """With gain 0 and the identity for values, what comes out is the dropped A itself."""
    identity = torch.eye(k.shape[-2]).expand(*k.shape[:-1], k.shape[-2])
    return seeded(call, q, k, identity, gain=0.0, **options)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_both_passes_and_the_backward_drop_the_same_weights(is_causal, schedule, call, generator):
    q, k, v = (x.requires_grad_() for x in make_inputs((1, 2, N, 16), value_width=24, generator=generator))
    gain = torch.tensor([0.2, -1.0], requires_grad=True)
    options = {"dropout_p": 0.3, "is_causal": is_causal}
    kept = dropped_matrix(call, q.detach(), k.detach(), **options) != 0
    A = attention_matrix(q.double(), k.double(), is_causal=is_causal)
    assert abs(float(kept[A > 0].double().mean()) - 0.7) < 0.06
    dropped = A * kept / 0.7
    g = gain.double().view(2, 1, 1)
    expected = (1 + g) * dropped @ v.double() - g * dropped @ (dropped @ v.double())
    output = seeded(call, q, k, v, gain=gain, **options)
    assert relative_rms(output, expected) < 1e-6
    upstream = torch.randn(output.shape, generator=generator)
    found = torch.autograd.grad(output, (q, k, v, gain), upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (q, k, v, gain), upstream.double()), strict=True):
        assert relative_rms(gradient, wanted) < 2e-6


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["masked", "causal"])
def test_every_head_of_every_entry_has_its_own_mask_gain_and_dropped_weights(
    is_causal, order, schedule, call, generator
):
    """Two entries of four heads, of which two share a key head: nothing is the same for two of them."""
    q, k, v = (x.requires_grad_() for x in make_inputs((2, 4, N, 16), key_heads=2, generator=generator))
    gains = torch.linspace(-1, 2, 8, requires_grad=True)
    mask = None if is_causal else (torch.rand(2, 4, 2 * N, generator=generator) > 0.3)[:, :, None, ::2]
    options = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": 0.3, "enable_gqa": True}
    kept = dropped_matrix(call, q.detach(), k.detach(), **options) != 0
    A = attention_matrix(q.double(), k.double(), mask, is_causal, enable_gqa=True)
    dropped = A * kept / 0.7
    expected = dropped @ v.double().repeat_interleave(2, 1)
    leaves = [q, k, v]
    if order == 2:
        g = gains[::2].double().view(4, 1, 1)
        expected = (1 + g) * expected - g * dropped @ expected
        leaves.append(gains)
    output = seeded(call, q, k, v, order=order, **options, **({"gain": gains[::2]} if order == 2 else {}))
    assert relative_rms(output, expected) < 1e-6
    upstream = torch.randn(output.shape, generator=generator)
    found = torch.autograd.grad(output, leaves, upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert relative_rms(gradient, wanted) < 2e-6


def test_dropout_does_not_depend_on_how_a_call_is_cut(call, generator):
    q, k, v = make_inputs((1, 2, N, 16), generator=generator)
    with tuning.tried("heads"):
        outputs = [seeded(call, q, k, v, dropout_p=0.5)]
    for blocks in (tuning.Blocks(16, 16, 4, 1), tuning.Blocks(64, 32, 4, 1)):
        with tuning.tried("blocks", smooth=blocks):
            outputs.append(seeded(call, q, k, v, dropout_p=0.5))
    assert all(relative_rms(output, outputs[0]) < 1e-6 for output in outputs)


def test_heads_rows_and_calls_drop_different_weights(by_blocks, call, generator):
    q, k, _ = make_inputs((2, 2, 32, 16), generator=generator)
    kept = dropped_matrix(call, q, k, dropout_p=0.5) != 0
    pairs = [(kept[0, 0], kept[0, 1]), (kept[0, 0], kept[1, 0]), (kept[0, 0, :16], kept[0, 0, 16:])]
    pairs += [(kept[..., :16], kept[..., 16:]), (kept[0, 0], kept[0, 0].mT)]
    again = call(q, k, torch.eye(32).expand(2, 2, 32, 32), gain=0.0, dropout_p=0.5) != 0
    for one, other in [*pairs, (again, kept)]:
        assert 0.4 < float((one == other).double().mean()) < 0.6


def test_all_weights_dropped(schedule, call, generator):
    leaves = [x.requires_grad_() for x in make_inputs((1, 1, N, 16), generator=generator)]
    output = call(*leaves, dropout_p=1.0)
    assert torch.equal(output, torch.zeros_like(output))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(output.sum(), leaves))


def test_the_seed_comes_from_torchs_default_generator(by_blocks, call, generator):
    inputs = make_inputs((1, 1, N, 16), generator=generator)
    outputs = [seeded(call, *inputs, dropout_p=0.5) for _ in range(2)]
    assert torch.equal(*outputs)
    assert not torch.equal(call(*inputs, dropout_p=0.5), outputs[0])
    state = torch.get_rng_state()
    call(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_with_and_without_gradients_and_again_it_gives_the_same_bits(schedule, call, generator):
    is_causal = schedule == "heads"
    inputs = make_inputs((1, 1, N, 16), generator=generator)
    with torch.inference_mode():
        outputs = [call(*inputs, is_causal=is_causal)]
    leaves = [x.requires_grad_() for x in inputs]
    outputs += [call(*leaves, is_causal=is_causal) for _ in range(2)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    firsts, seconds = (torch.autograd.grad(output.sum(), leaves) for output in outputs[1:])
    assert all(torch.equal(first, second) for first, second in zip(firsts, seconds, strict=True))


@pytest.mark.parametrize("leading", [(3,), (), (2, 1, 2)], ids=str)
def test_any_leading_axes(leading, by_blocks, call, generator):
    q, k, v = make_inputs((*leading, 9, 16), generator=generator)
    k = k[:1] if leading == (2, 1, 2) else k
    expected = twicing_attention(q, k, v, backend="reference")
    assert relative_rms(call(q, k, v), expected) < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 0, 16), (0, 3, 5, 16)], ids=["no-tokens", "no-batch"])
@pytest.mark.parametrize("order", [1, 2])
def test_empty_inputs(order, shape, by_blocks, call):
    q = torch.randn(shape, requires_grad=True)
    output = call(q, q, q, order=order)
    assert output.shape == shape
    output.sum().backward()
    assert q.grad.shape == shape
