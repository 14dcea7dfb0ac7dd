"""Sequences, and decoding them in steps, for the tests of cached decoding."""

import pytest
import torch

from twicing.ops.decode import decode_step
from twicing.ops.decode_state import DecodeState
from twicing.testing import make_inputs

HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
GROUPED = {"enable_gqa": True}
storage = pytest.mark.parametrize("capacity", [None, 32], ids=["growing", "allocated"])


def tokens_of(batch, tokens, dtype=torch.float64, seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"key_heads": KEY_HEADS, "value_width": VALUE_WIDTH, **shapes}
    return list(make_inputs((batch, HEADS, tokens, WIDTH), generator=generator, dtype=dtype, **shapes))


def cut(inputs, start, end):
    return [tensor[:, :, start:end] for tensor in inputs]


def after_prompt(prompt, **options):
    state = DecodeState(**options)
    decode_step(*prompt, state, **GROUPED)
    return state


def decode_in_steps(inputs, steps, state, step=decode_step, **options):
    """The outputs of all tokens, where steps are the numbers of tokens that are given at a time."""
    query, key, value = inputs
    assert sum(steps) == query.shape[2]
    outputs, done = [], 0
    for tokens in steps:
        new = slice(done, done + tokens)
        outputs.append(step(query[:, :, new], key[:, :, new], value[:, :, new], state, **options))
        done += tokens
    return torch.cat(outputs, dim=2)


def causal_mask(tokens, padding=None):
    """What a DecodeState stands for, as a mask of the full forward: [N, N], or [B, 1, N, N] with padding."""
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return allowed if padding is None else allowed & (torch.arange(tokens) >= padding[:, None, None, None])
