"""Dropout of the blocked backend: one dropped A for both passes and for the backward, drawn again from a seed."""

from functools import partial

import pytest
import torch

from twicing import attention_matrix, twicing_attention
from twicing.ops.blocked import plan
from twicing.testing import make_inputs, relative_rms
from twicing.testing.budget import FP64_BUDGET

call = partial(twicing_attention, backend="blocked")
N = 37


@pytest.fixture(params=["one-block", "blocks", "blocks-in-the-backward", "uneven-blocks", "large-squares"])
def cut(request, monkeypatch):
    """The third as for a thousand or two tokens: the forward takes all rows in one block. The last cuts no square."""
    if request.param != "one-block":
        whole = 16 << 20 if request.param == "blocks-in-the-backward" else 0
        backward = 8 << 10 if request.param == "uneven-blocks" else 4 << 10
        monkeypatch.setattr(plan, "BOX_BYTES", {"forward": 4 << 10, "backward": 4 << 10})
        monkeypatch.setattr(plan, "PART_BYTES", {"forward": 4 << 10, "backward": backward})
        monkeypatch.setattr(plan, "WHOLE_BYTES", {"forward": whole, "backward": 0})
        monkeypatch.setattr(plan, "LEAST_COLUMNS", 8)
        monkeypatch.setattr(plan, "DROPOUT_TILE", 24 if request.param == "large-squares" else 8)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return make_inputs((2, 3, N, 8), generator=generator, dtype=torch.float64)


def seeded(*args, **options):
    """The call with the same weights dropped every time."""
    torch.manual_seed(3)
    return call(*args, **options)


def dropped_matrix(q, k, **options):
    """With gain 0 and the identity for values, what comes out is the dropped A itself."""
    identity = torch.eye(N, dtype=torch.float64).expand(2, 3, N, N)
    return seeded(q, k, identity, gain=0.0, **options)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_both_passes_see_the_same_dropped_weights(is_causal, cut, inputs):
    q, k, v = inputs
    options = {"dropout_p": 0.3, "is_causal": is_causal}
    dropped = dropped_matrix(q, k, **options)
    A = attention_matrix(q, k, is_causal=is_causal)
    kept = dropped != 0
    assert relative_rms(dropped[kept], A[kept] / 0.7) < FP64_BUDGET
    assert abs(float(kept[A > 0].double().mean()) - 0.7) < 0.03
    gain = torch.tensor([0.2, 1.0, -1.0], dtype=torch.float64)
    g = gain.view(3, 1, 1)
    assert relative_rms(seeded(q, k, v, gain=gain, **options), (1 + g) * dropped @ v - g * dropped @ (dropped @ v)) < (
        FP64_BUDGET
    )


def test_heads_rows_and_calls_drop_different_weights(cut, inputs):
    q, k, _ = inputs
    kept = dropped_matrix(q, k, dropout_p=0.5) != 0
    for pair in ((kept[0, 0], kept[0, 1]), (kept[0, 0], kept[1, 0]), (kept[0, 0, :16], kept[0, 0, 16:32])):
        assert 0.35 < float((pair[0] == pair[1]).double().mean()) < 0.65
    again = call(q, k, torch.eye(N, dtype=torch.float64).expand(2, 3, N, N), gain=0.0, dropout_p=0.5) != 0
    assert 0.4 < float((again == kept).double().mean()) < 0.6


def test_no_two_squares_drop_the_same_weights(monkeypatch, inputs):
    """Of one head, of several, and across the diagonal: seen in their corners, which the last squares have too."""
    monkeypatch.setattr(plan, "DROPOUT_TILE", 8)
    q, k, _ = inputs
    kept = dropped_matrix(q, k, dropout_p=0.5) != 0
    corners = [
        tuple(head[row : row + 5, column : column + 5].flatten().tolist())
        for head in kept.flatten(0, 1)
        for row in range(0, N, 8)
        for column in range(0, N, 8)
    ]
    assert len(set(corners)) == len(corners) == 6 * 5 * 5


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_backward_sees_them_too(is_causal, cut, inputs):
    """The gradients are those of the formula with the dropped A written out."""
    leaves = [tensor.requires_grad_() for tensor in inputs]
    gain = torch.tensor([0.2, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    options = {"dropout_p": 0.3, "is_causal": is_causal}
    upstream = torch.randn(2, 3, N, 8, dtype=torch.float64)
    found = torch.autograd.grad(seeded(*leaves, gain=gain, **options), [*leaves, gain], upstream)
    q, k, v = leaves
    kept = (dropped_matrix(q, k, **options) != 0).double().detach()
    dropped = attention_matrix(q, k, is_causal=is_causal) * kept / 0.7
    g = gain.view(3, 1, 1)
    written_out = (1 + g) * dropped @ v - g * dropped @ (dropped @ v)
    for gradient, expected in zip(found, torch.autograd.grad(written_out, [*leaves, gain], upstream), strict=True):
        assert relative_rms(gradient, expected) < 4 * FP64_BUDGET


def test_gradients_with_dropout_and_a_mask():
    generator = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in make_inputs((1, 2, 5, 3), generator=generator, dtype=torch.float64)]
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: seeded(*inputs, 0.4), (*leaves, bias))


def test_all_weights_dropped(inputs):
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = call(*leaves, dropout_p=1.0)
    assert torch.equal(output, torch.zeros_like(output))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(output.sum(), leaves))


def test_the_seed_comes_from_torchs_default_generator(inputs):
    outputs = [seeded(*inputs, dropout_p=0.5) for _ in range(2)]
    assert torch.equal(*outputs)
    assert not torch.equal(call(*inputs, dropout_p=0.5), outputs[0])
    state = torch.get_rng_state()
    call(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_short_sequences_draw_no_more_than_they_have(monkeypatch):
    """A square that reaches beyond the last token is drawn only as far as that."""
    drawn = []
    bernoulli = torch.Tensor.bernoulli_

    def counted(self, *args, **options):
        drawn.append(self.numel())
        return bernoulli(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", counted)
    x = torch.randn(2, 3, 16, 8)
    call(x, x, x, dropout_p=0.5)
    # Once for each head and product.
    assert drawn == [16 * 16] * 12
