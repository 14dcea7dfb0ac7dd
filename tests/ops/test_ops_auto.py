"""The rule of "auto" says what the committed record says, and nothing beyond it."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from twicing import explain_backend, twicing_attention
from twicing.ops import attention

ROOT = Path(__file__).parents[2]


def ratios():
    """(shape, is_causal) to the ratios of forward and forward + backward, for `sdpa` and `blocked`."""
    found = {}
    with (ROOT / attention.BLOCKED_RECORD).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["contender"] in ("twicing: sdpa", "twicing: blocked"):
                sizes = tuple(map(int, row["shape"].removesuffix("-causal").split("x")))
                passes = found.setdefault((sizes, row["is_causal"] == "True"), {}).setdefault(row["passes"], {})
                passes[row["contender"]] = float(row["ratio"])
    return found


RATIOS = ratios()


def taken(shape, **options):
    qkv = [torch.empty(shape, dtype=options.pop("dtype", torch.float32))] * 3
    return explain_backend(*qkv, **options).split("'")[3]


@pytest.mark.parametrize(("shape", "is_causal"), RATIOS, ids=str)
def test_auto_takes_what_the_record_says_is_faster(shape, is_causal):
    passes = RATIOS[shape, is_causal]
    assert set(passes) == {"forward", "forward + backward"}
    is_faster = all(of["twicing: blocked"] < of["twicing: sdpa"] for of in passes.values())
    assert taken(shape, is_causal=is_causal) == ("blocked" if is_faster else "sdpa")


@pytest.mark.parametrize(("name", "is_causal"), [("full", False), ("causal", True)])
def test_the_bounds_are_of_the_record(name, is_causal):
    recorded = {shape[2] for shape, causal in RATIOS if causal == is_causal}
    assert set(attention.BLOCKED_TOKENS[name]) <= recorded
    fewest, most = attention.BLOCKED_TOKENS[name]
    for tokens, inside in ((fewest - 1, False), (fewest, True), (most, True), (most + 1, False)):
        assert taken((1, 8, tokens, 64), is_causal=is_causal) == ("blocked" if inside else "sdpa")
    assert min(shape[0] * shape[1] for shape, _ in RATIOS) == attention.BLOCKED_LEAST_HEADS
    assert taken((1, 7, fewest, 64), is_causal=is_causal) == "sdpa"
    assert taken((8, fewest, 64), is_causal=is_causal) == "blocked"
    assert min(shape[3] for shape, _ in RATIOS) == attention.BLOCKED_LEAST_WIDTH
    assert taken((1, 8, fewest, 15), is_causal=is_causal) == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_not_on_record(dtype):
    assert taken((2, 8, 256, 64), dtype=dtype) == "sdpa"


def test_masks_and_dropout_are_not_on_record():
    assert taken((2, 8, 256, 64), attn_mask=torch.ones(256, 256, dtype=torch.bool)) == "sdpa"
    assert taken((2, 8, 256, 64), dropout_p=0.1) == "reference"
    assert taken((2, 8, 256, 64), order=3) == "sdpa"


def test_explain_backend_names_the_record():
    text = explain_backend(*[torch.empty(2, 8, 256, 64)] * 3)
    assert f"takes 'blocked', faster than 'sdpa' for such a call on record ({attention.BLOCKED_RECORD})" in text


def test_auto_computes_what_it_names():
    q, k, v = torch.randn(3, 1, 8, 197, 64, generator=torch.Generator().manual_seed(0))
    output = twicing_attention(q, k, v)
    assert torch.equal(output, twicing_attention(q, k, v, backend="blocked"))
    assert not torch.equal(output, twicing_attention(q, k, v, backend="sdpa"))


def test_an_exported_program_needs_nothing_but_torch():
    class Smooth(torch.nn.Module):
        def forward(self, q, k, v):
            return twicing_attention(q, k, v)

    inputs = tuple(torch.randn(3, 1, 8, 197, 64, generator=torch.Generator().manual_seed(0)))
    program = torch.export.export(Smooth(), inputs)
    assert "twicing" not in str([node.target for node in program.graph.nodes])
    assert torch.equal(program.module()(*inputs), twicing_attention(*inputs, backend="sdpa"))


def test_auto_leaves_the_choice_of_sdpas_kernel_alone():
    """As a second derivative needs it."""
    q = torch.randn(8, 197, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert explain_backend(q, q, q).split("'")[3] == "sdpa"
        (first,) = torch.autograd.grad(twicing_attention(q, q, q).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q)
    assert second.isfinite().all()
    assert second.norm() > 0


def test_more_threads_than_those_of_the_record_are_not_on_record(monkeypatch):
    assert f"-{attention.BLOCKED_MOST_THREADS}-threads-" in attention.BLOCKED_RECORD
    for threads, backend in ((1, "blocked"), (2, "blocked"), (3, "sdpa")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert taken((2, 8, 256, 64)) == backend


def test_auto_is_compiled_whole():
    q = torch.randn(8, 197, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda q: twicing_attention(q, q, q), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), twicing_attention(q, q, q, backend="blocked"))


def test_torch_func_falls_back_to_what_it_can_differentiate():
    q = torch.randn(8, 197, 64, generator=torch.Generator().manual_seed(0))
    gradient = torch.func.grad(lambda q: twicing_attention(q, q, q).sum())(q)
    assert gradient.isfinite().all()
