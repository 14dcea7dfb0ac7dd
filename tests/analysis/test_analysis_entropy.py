"""Entropy of attention, against sums written out in float64, over exactly the keys that a query may attend to."""

import math

import numpy as np
import pytest
import torch

from twicing.analysis.attention_inputs import AttentionInputs
from twicing.analysis.entropy import attention_entropy, keys_allowed

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 4
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)[:, None, None]
EMPTY_ROW = CAUSAL.clone()
EMPTY_ROW[2] = False
# Masks as hosts write them, and which keys they leave.
MASKS = {
    "none": ({}, torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
    "causal": ({"is_causal": True}, CAUSAL),
    "bool": ({"attn_mask": CAUSAL}, CAUSAL),
    "padding": ({"attn_mask": PADDED}, PADDED),
    "minus infinity": ({"attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, -math.inf)}, CAUSAL),
    "lowest": ({"attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, torch.finfo().min)}, CAUSAL),
    "-1e4": ({"attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, -1e4)}, CAUSAL),
    "bias": ({"attn_mask": torch.linspace(-20, 20, TOKENS).expand(TOKENS, TOKENS)}, torch.ones(TOKENS, TOKENS) > 0),
    "empty row": ({"attn_mask": EMPTY_ROW}, EMPTY_ROW),
    "keys by broadcasting": ({"attn_mask": EMPTY_ROW[:, :1]}, EMPTY_ROW[:, :1].expand(TOKENS, TOKENS)),
}


def inputs_of(options, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    return AttentionInputs(query * 2, key, value, **options)


def written_out(inputs, allowed):
    """[B, 2]: both entropies with loops, softmax and logarithms in float64."""
    query, key = inputs.query.double().numpy(), inputs.key.double().numpy()
    bias = inputs.attn_mask
    bias = np.zeros(1) if bias is None or bias.dtype == torch.bool else bias.double().numpy()
    allowed = np.broadcast_to(allowed.numpy(), (BATCH, HEADS, TOKENS, TOKENS))
    bias = np.broadcast_to(bias, (BATCH, HEADS, TOKENS, TOKENS))
    found = []
    for b in range(BATCH):
        nats, shares = [], []
        for h in range(HEADS):
            for i in range(TOKENS):
                keys = np.flatnonzero(allowed[b, h, i])
                if len(keys) == 0:
                    continue
                scores = np.array([query[b, h, i] @ key[b, h, j] / math.sqrt(WIDTH) + bias[b, h, i, j] for j in keys])
                p = np.exp(scores - scores.max())
                p /= p.sum()
                nats.append(-sum(x * math.log(x) for x in p))
                if len(keys) > 1:
                    shares.append(nats[-1] / math.log(len(keys)))
        found.append((np.mean(nats), np.mean(shares)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_what_sums_say(mask):
    options, allowed = MASKS[mask]
    inputs = inputs_of(options)
    counts = allowed.expand(BATCH, HEADS, TOKENS, TOKENS).sum(-1)
    assert torch.equal(keys_allowed(inputs), counts)
    torch.testing.assert_close(attention_entropy(inputs), written_out(inputs, allowed), rtol=1e-10, atol=1e-10)


def test_of_half_precision_inputs_it_is_computed_in_fp32():
    inputs = inputs_of({"is_causal": True}, torch.bfloat16)
    torch.testing.assert_close(attention_entropy(inputs), written_out(inputs, CAUSAL), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_uniform_attention_has_the_largest_entropy(mask):
    options, allowed = MASKS[mask]
    zeros = torch.zeros(BATCH, HEADS, TOKENS, WIDTH)
    found = attention_entropy(AttentionInputs(zeros, zeros, zeros, **options))
    counts = allowed.expand(BATCH, HEADS, TOKENS, TOKENS).sum(-1).double()
    torch.testing.assert_close(found[:, 1], torch.ones(BATCH, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 0], counts.log().mean((1, 2)), rtol=1e-6, atol=0)


def test_a_query_that_chooses_one_key_has_none():
    identity = 1e4 * torch.eye(TOKENS).expand(BATCH, HEADS, TOKENS, TOKENS)
    assert torch.equal(attention_entropy(AttentionInputs(identity, identity, identity)), torch.zeros(BATCH, 2).double())


def test_where_no_query_has_a_choice_there_is_no_share():
    own = torch.eye(TOKENS, dtype=torch.bool)
    found = attention_entropy(inputs_of({"attn_mask": own}))
    assert torch.equal(found[:, 0], torch.zeros(BATCH).double())
    assert found[:, 1].isnan().all()
    assert attention_entropy(inputs_of({"attn_mask": torch.zeros_like(own)})).isnan().all()


def test_grouped_queries_count_per_query_head():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    grouped = AttentionInputs(query, key, key, is_causal=True, enable_gqa=True)
    wide = key.repeat_interleave(2, dim=1)
    assert torch.equal(keys_allowed(grouped), torch.arange(1, 6).expand(2, 4, 5))
    assert torch.equal(
        attention_entropy(grouped), attention_entropy(AttentionInputs(query, wide, wide, is_causal=True))
    )
