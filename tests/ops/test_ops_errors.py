"""What the call refuses, and the sentence that it says: expected, came, what to do."""

import pytest
import torch

from twicing import attention_matrix, effective_matrix, twicing_attention

Q = torch.zeros(2, 4, 6, 8)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


REFUSED = {
    "decoding": (
        {"query": zeros(2, 4, 1, 8)},
        "Twicing needs as many queries as keys, since it smooths what smoothing left of the values: got 1 and 6 "
        "tokens. Cross-attention leaves nothing that could be smoothed again: use order=1. To decode with a cache, "
        "which has to keep the boosted values beside the keys, use decode_step().",
    ),
    "cross-attention": ({"query": zeros(2, 4, 9, 8)}, "Twicing needs as many queries as keys"),
    "key and value lengths": (
        {"value": zeros(2, 4, 5, 8)},
        "key and value must have the same number of tokens (axis -2): got query [2, 4, 6, 8], key [2, 4, 6, 8], value "
        "[2, 4, 5, 8].",
    ),
    "one value token, which would broadcast": (
        {"value": zeros(2, 4, 1, 8)},
        "key and value must have the same number of tokens (axis -2)",
    ),
    "widths": ({"key": zeros(2, 4, 6, 7)}, "query and key must have the same width (last axis): got"),
    "rank": (
        {"query": zeros(8)},
        "query, key and value must have the layout [..., tokens, width]: got query [8], key [2, 4, 6, 8]",
    ),
    "heads": (
        {"key": zeros(2, 2, 6, 8), "value": zeros(2, 2, 6, 8)},
        "The axes before tokens and width must be equal or broadcast: got query [2, 4, 6, 8], key [2, 2, 6, 8], value "
        "[2, 2, 6, 8]. Where keys and values have fewer heads than queries, pass enable_gqa=True.",
    ),
    "batch": ({"value": zeros(3, 4, 6, 8)}, "The axes before tokens and width must be equal or broadcast"),
    "grouped heads that do not divide": (
        {"key": zeros(2, 3, 6, 8), "value": zeros(2, 3, 6, 8), "enable_gqa": True},
        "With enable_gqa, key and value must have the same number of heads (axis -3), a divisor of the query's: got "
        "query [2, 4, 6, 8], key [2, 3, 6, 8], value [2, 3, 6, 8].",
    ),
    "grouped heads that differ": (
        {"key": zeros(2, 2, 6, 8), "value": zeros(2, 1, 6, 8), "enable_gqa": True},
        "With enable_gqa, key and value must have the same number of heads",
    ),
    "grouped without a head axis": (
        {"query": zeros(6, 8), "key": zeros(6, 8), "value": zeros(6, 8), "enable_gqa": True},
        "query, key and value must have the layout [..., heads, tokens, width]: got query [6, 8]",
    ),
    "grouped with another batch": (
        {"key": zeros(3, 2, 6, 8), "value": zeros(3, 2, 6, 8), "enable_gqa": True},
        "The axes before heads, tokens and width must be equal or broadcast: got",
    ),
    "dtypes": (
        {"key": Q.double()},
        "query, key, value must have one floating-point dtype and one device: query is torch.float32 on cpu, key is "
        "torch.float64 on cpu, value is torch.float32 on cpu.",
    ),
    "integers": (
        {"query": Q.long(), "key": Q.long(), "value": Q.long()},
        "query, key, value must have one floating-point dtype and one device: query is torch.int64 on cpu",
    ),
    "devices": (
        {"value": Q.to("meta")},
        "query, key, value must have one floating-point dtype and one device: query is torch.float32 on cpu, key is "
        "torch.float32 on cpu, value is torch.float32 on meta.",
    ),
    "order 0": ({"order": 0}, "order must be at least 1 (1 is plain smoothing, 2 is twicing): got 0."),
    "order 1.5": ({"order": 1.5}, "order must be an integer, how many times to smooth: got 1.5, a float."),
    "gain nan": ({"gain": float("nan")}, "gain must be finite (1 is twicing, 0 is plain smoothing): got nan."),
    "gain with order 1": (
        {"order": 1, "gain": 0.5},
        "gain has no effect with order=1, which is plain attention: leave it out, or use order=2.",
    ),
    "gain tensor with order 1": (
        {"order": 1, "gain": torch.tensor(1.0), "backend": "reference"},
        "gain has no effect with order=1",
    ),
    "gain per head of another number": (
        {"gain": zeros(3)},
        "A gain given as a tensor must have one element, or one for each of the 4 query heads: got shape [3].",
    ),
    "gain per token": (
        {"gain": zeros(4, 1, 1)},
        "A gain given as a tensor must have one element, or one for each of the 4 query heads: got shape [4, 1, 1].",
    ),
    "gain per head without heads": (
        {"query": zeros(6, 8), "key": zeros(6, 8), "value": zeros(6, 8), "gain": zeros(4)},
        "A gain per head needs queries with heads, [..., H, N, D]: got a gain of shape [4] and a query of shape "
        "[6, 8].",
    ),
    "gain of integers": (
        {"gain": torch.tensor(1)},
        "A gain given as a tensor must be of a floating-point dtype: got torch.int64.",
    ),
    "gain elsewhere": (
        {"gain": zeros(4, device="meta")},
        "A gain per head must be on the query's device cpu: it is on meta.",
    ),
    "mask and is_causal": (
        {"attn_mask": zeros(6, 6, dtype=torch.bool), "is_causal": True},
        "attn_mask and is_causal=True cannot be given together: put the causal part into the mask, as in "
        "attn_mask & torch.ones(N, N, dtype=torch.bool).tril().",
    ),
    "mask shape": (
        {"attn_mask": zeros(6, 5)},
        "attn_mask must have at least 2 axes and broadcast to [2, 4, 6, 6]: got [6, 5].",
    ),
    "mask with an axis too many": (
        {"attn_mask": zeros(1, 2, 4, 6, 6)},
        "attn_mask must have at least 2 axes and broadcast to [2, 4, 6, 6]: got [1, 2, 4, 6, 6].",
    ),
    "mask of one axis": (
        {"attn_mask": zeros(6)},
        "attn_mask must have at least 2 axes and broadcast to [2, 4, 6, 6]: got [6].",
    ),
    "mask dtype": (
        {"attn_mask": zeros(6, 6, dtype=torch.int64)},
        "attn_mask must be bool (True = attend), torch.float32 or of the query's dtype torch.float32 (added to the "
        "scores): got torch.int64.",
    ),
    "mask device": (
        {"attn_mask": zeros(6, 6, device="meta")},
        "attn_mask must be on the query's device cpu: it is on meta.",
    ),
    "dropout above 1": ({"dropout_p": 1.5}, "dropout_p is a probability, between 0 and 1: got 1.5."),
    "dropout below 0": ({"dropout_p": -0.1}, "dropout_p is a probability, between 0 and 1: got -0.1."),
    "dropout by sdpa": (
        {"dropout_p": 0.1, "backend": "sdpa"},
        "backend='sdpa' cannot serve this call: each of its 2 calls of scaled_dot_product_attention would drop other "
        "weights, and twicing needs one A. Use backend='reference' (or 'auto'), or dropout_p=0.",
    ),
    "backend": (
        {"backend": "spda"},
        "Unknown backend 'spda': did you mean 'sdpa'? Known are 'auto', 'sdpa', 'reference', 'blocked', 'triton'.",
    ),
    "backend with order 1": (
        {"backend": "xyz", "order": 1},
        "Unknown backend 'xyz': known are 'auto', 'sdpa', 'reference', 'blocked', 'triton'.",
    ),
    "misspelt option": ({"gian": 0.5}, "unexpected keyword argument 'gian'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence(case):
    options, text = REFUSED[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        twicing_attention(**{"query": Q, "key": Q, "value": Q, **options})
    assert text in str(caught.value)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([zeros(3, 4), zeros(5, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="Nested tensors are not supported: pad them, and mask the padding"):
        twicing_attention(nested, nested, nested)


def test_options_after_enable_gqa_are_keyword_only():
    with pytest.raises(TypeError, match="positional arguments"):
        twicing_attention(Q, Q, Q, None, 0.0, False, None, False, 3)


@pytest.mark.parametrize("function", [attention_matrix, effective_matrix])
def test_the_matrices_check_what_they_get(function):
    with pytest.raises(ValueError, match=r"must have one floating-point dtype and one device"):
        function(Q, Q.double())
    with pytest.raises(ValueError, match=r"query and key must have the same width"):
        function(Q, zeros(2, 4, 6, 7))
    with pytest.raises(ValueError, match=r"attn_mask must have at least 2 axes and broadcast to \[2, 4, 6, 6\]"):
        function(Q, Q, zeros(3, 3))


def test_only_the_boosted_matrix_must_be_square():
    assert attention_matrix(Q, zeros(2, 4, 9, 8)).shape == (2, 4, 6, 9)
    with pytest.raises(ValueError, match="got 6 and 9 tokens"):
        effective_matrix(Q, zeros(2, 4, 9, 8))
