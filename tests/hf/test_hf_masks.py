"""Padding, packed sequences, masks of one's own, dropout and autocast, against the dense formula in fp64."""

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import DenseAttention, by_oracle, dense_matrix, twiced

from twicing.adapters.surgery import convert
from twicing.testing import WRONG_FORMULAS, relative_rms

BUDGET = 1e-12
SIDES = {
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 10]),
    "both": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 8 + [0] * 2]),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("side", SIDES)
def test_padding(side, name, host, inputs_of):
    model, tokens, mask = host(name).double(), inputs_of(name)["input_ids"], SIDES[side]
    kept = mask.bool()

    def run(tokens=tokens):
        with torch.no_grad():
            return model(tokens, attention_mask=mask)[0][kept]

    expected = by_oracle(run)
    wrong = [by_oracle(run, lambda A, v, f=f: f(lambda x: A @ x, v)) for f in WRONG_FORMULAS.values()]
    convert(model, "twicing")
    assert relative_rms(run(), expected) < BUDGET
    assert all(relative_rms(run(), other) > 1e3 * BUDGET for other in wrong)
    # What stands in the padding is nobody's business.
    assert torch.equal(run(torch.where(kept, tokens, 7)), run())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_leaves_gradients_finite(name, host, inputs_of):
    model, tokens, mask = host(name), inputs_of(name)["input_ids"], SIDES["left"]
    convert(model, "twicing")
    model(tokens, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_packed_sequences(host, inputs_of):
    model, tokens = host("llama").double(), inputs_of("llama")["input_ids"]
    convert(model, "twicing")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in tokens.split([4, 6], 1)]
        assert relative_rms(packed, torch.cat(alone, 1)) < BUDGET
        assert relative_rms(model(tokens, use_cache=False).logits, packed) > 1e3 * BUDGET


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_ones_own(kind, host, inputs_of):
    model, tokens = host("llama").double(), inputs_of("llama")["input_ids"]
    allowed = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(5)) > 0.4
    allowed.diagonal(dim1=-2, dim2=-1).fill_(True)
    mask = allowed if kind == "bool" else torch.where(allowed, 0.3, -torch.inf).double()

    def run():
        with torch.no_grad():
            return model(tokens, attention_mask=mask, use_cache=False).logits

    expected = by_oracle(run)
    convert(model, "twicing")
    assert relative_rms(run(), expected) < BUDGET


class DroppedAttention(DenseAttention):
    """The dense formula with dropout: one dropped A for both passes, or one for each."""

    def __init__(self, shared=True):
        super().__init__()
        self.shared = shared

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        A = dense_matrix(query, key, attn_mask, is_causal, scale)
        dropped = F.dropout(A, dropout_p)
        again = dropped if self.shared else F.dropout(A, dropout_p)
        smoothed = dropped @ value
        return smoothed + again @ (value - smoothed)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_dropout_drops_one_matrix_for_both_passes(name, host, inputs_of):
    drop = {
        "gpt2": {"attn_pdrop": 0.4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        "llama": {"attention_dropout": 0.4},
        "bert": {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.0},
    }[name]
    model, inputs = host(name, **drop).double().train(), inputs_of(name)

    def run():
        torch.manual_seed(6)
        with torch.no_grad():
            return model(**inputs)[0]

    with DroppedAttention():
        expected = run()
    with DroppedAttention(shared=False):
        other = run()
    convert(model, "twicing")
    assert relative_rms(run(), expected) < BUDGET
    assert relative_rms(run(), other) > 1e3 * BUDGET
    model.eval()
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_autocast_costs_what_it_costs_the_host(name, use_cache, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    if name in ("gpt2", "llama"):
        inputs["use_cache"] = use_cache

    def autocast():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)[0].double()

    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if k != "use_cache"}
    plain = autocast()
    twin = host(name).double()
    budget = 3 * relative_rms(plain, twin(**exact)[0])
    expected = by_oracle(lambda: twin(**exact)[0], twiced)
    convert(model, "twicing")
    assert relative_rms(autocast(), expected) < budget
    assert relative_rms(plain, expected) > 3 * budget or name in ("bert", "vit")
