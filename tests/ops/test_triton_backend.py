"""The triton backend without a GPU: what it refuses, fakes that need no triton, tuning, and the count of FLOPs."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from twicing import explain_backend, twicing_attention
from twicing.ops import triton
from twicing.ops.call import checked_call
from twicing.ops.triton import tuning
from twicing.ops.triton.tuning import Blocks


def fake_call(*, device="cuda", dtype=torch.bfloat16, width=16, value_width=16, tokens=9, mask=None, **options):
    """A call on a device that need not be there."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 4, tokens, width, dtype=dtype, device=device) for _ in range(2))
        v = torch.empty(2, 4, tokens, value_width, dtype=dtype, device=device)
        if mask is not None:
            shape, mask_dtype = mask
            mask = torch.ones(shape, dtype=mask_dtype, device=device)
        return checked_call(q, k, v, mask, 0.0, False, None, False, options.get("order", 2), 1.0)


PADDING = (2, 1, 1, 9), torch.bool


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(triton, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"order": 1},
        {"mask": PADDING},
        {"value_width": 256},
        {"width": 1},
        {"tokens": 1, "mask": ((1, 1), torch.bool)},
    ],
    ids=str,
)
def test_what_it_serves(options, there):
    assert triton.refuses(fake_call(**options)) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cpu"}, "it works on CUDA devices, and the query is on cpu."),
        ({"device": "meta"}, "it works on CUDA devices, and the query is on meta."),
        ({"dtype": torch.float64}, "it computes in torch.bfloat16, torch.float16, torch.float32, and the query is"),
        ({"order": 3}, "it has orders 1 and 2 only, and the order is 3."),
        ({"width": 257}, "heads may be 1 to 256 wide, and these are 257 and 16."),
        ({"value_width": 0}, "heads may be 1 to 256 wide, and these are 16 and 0."),
        (
            {"mask": ((2, 1, 1, 9), torch.float32)},
            "it takes boolean masks of keys, [..., 1, 9], and this one is torch.float32 of",
        ),
        ({"mask": ((2, 1, 9, 9), torch.bool)}, "this one is torch.bool of shape [2, 1, 9, 9]."),
    ],
    ids=str,
)
def test_what_it_refuses(options, sentence, there):
    reason = triton.refuses(fake_call(**options))
    assert sentence in reason
    assert reason.endswith("Use backend='sdpa' or 'reference' (or 'auto').")


def test_cross_attention_is_refused(there):
    call = fake_call(order=1)
    with FakeTensorMode():
        shorter = replace(call, query=torch.empty(2, 4, 5, 16, dtype=torch.bfloat16, device="cuda"))
    assert "it takes as many keys as queries, not 9 and 5." in triton.refuses(shorter)


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton, "HAS_TRITON", False)
    assert "it needs triton, which comes with torch for CUDA on Linux (pip install triton)." in triton.refuses(
        fake_call()
    )


def test_on_the_cpu_it_is_refused_by_name_with_a_sentence(there):
    q = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: it works on CUDA devices, and the"):
        twicing_attention(q, q, q, backend="triton")
    assert "not 'triton': it works on CUDA devices" in explain_backend(q, q, q)


WITHOUT_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import twicing
from torch._subclasses.fake_tensor import FakeTensorMode
from twicing.ops.triton.operator import triton_backward, triton_forward

with FakeTensorMode():
    q, k = torch.empty(2, 4, 9, 16, device="cuda"), torch.empty(2, 2, 9, 16, device="cuda")
    v, gain = torch.empty(2, 2, 9, 24, device="cuda"), torch.ones(4, device="cuda")
    call = (q, k, v, None, gain, None, 0.0, True, 0.3, 2)
    saved = triton_forward(*call, True)
    print([tuple(one.shape) for one in (*saved, *triton_backward(torch.empty_like(saved[0]), *saved, *call))])
    print([tuple(one.shape) for one in triton_forward(*call, False)])
try:
    twicing.twicing_attention(q, k, v, enable_gqa=True, backend="triton")
except ValueError as error:
    print(error)
print("triton" in sys.modules)
"""


def test_the_operator_registers_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    training, inference, refusal, loaded = done.stdout.splitlines()
    output = "(2, 4, 9, 24)"
    gradients = "(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 24), (4,)"
    assert training == f"[{output}, {output}, (2, 2, 4, 9), {gradients}]"
    assert inference == f"[{output}, (0,), (0,)]"
    assert "backend='triton' cannot serve this call: it needs triton" in refusal
    assert loaded == "False"


@pytest.mark.parametrize("kernel", tuning.TABLE)
def test_blocks_are_what_the_kernels_assume(kernel):
    entries = tuning.TABLE[kernel]
    assert [entry.width for entry in entries] == sorted({entry.width for entry in entries})
    assert kernel == "small_head" or entries[-1].width == triton.MOST_WIDTH
    for blocks in (blocks for entry in entries for blocks in (entry.half, entry.single) if blocks is not None):
        for side in (blocks.rows, blocks.columns, 16 * blocks.warps):
            assert side >= 16
            assert side & (side - 1) == 0
        if kernel == "causal_head":
            assert blocks.rows % blocks.columns == 0
        if kernel == "head_backward":
            assert blocks.rows == blocks.columns


def test_which_kernel_serves_a_call():
    many, few = tuning.LEAST_HEADS, tuning.LEAST_HEADS - 1
    assert tuning.forward_kernel(197, many, 64, 2, False, 2) == "small_head"
    assert tuning.forward_kernel(257, many, 64, 2, False, 2) == "smooth"
    assert tuning.forward_kernel(197, many, 65, 2, False, 2) == "smooth"
    assert tuning.forward_kernel(197, many, 64, 4, False, 2) == "smooth"
    assert tuning.forward_kernel(197, few, 64, 2, False, 2) == "smooth"
    assert tuning.forward_kernel(9000, many, 64, 2, True, 2) == "causal_head"
    assert tuning.forward_kernel(9000, few, 64, 2, True, 2) == "smooth"
    assert tuning.forward_kernel(9000, many, 64, 2, True, 1) == "smooth"
    assert tuning.backward_kernel(9000, many, True) == "head_backward"
    assert tuning.backward_kernel(9000, few, True) == "key_gradients"
    assert tuning.backward_kernel(tuning.HEAD_BACKWARD_TOKENS, many, False) == "head_backward"
    assert tuning.backward_kernel(tuning.HEAD_BACKWARD_TOKENS + 1, many, False) == "key_gradients"


def test_other_blocks_and_schedules_are_tried_and_left_again():
    other = Blocks(16, 16, 1, 1)
    with tuning.tried("heads", smooth=other):
        assert tuning.blocks_of("smooth", 64, 2) is other
        assert tuning.backward_kernel(9000, 1, False) == "head_backward"
        with tuning.tried("blocks"):
            assert tuning.blocks_of("smooth", 64, 2) is other
            assert tuning.forward_kernel(9000, 500, 64, 2, True, 2) == "smooth"
    assert tuning.blocks_of("smooth", 64, 2) is tuning.TABLE["smooth"][0].half
    assert tuning.forward_kernel(9000, 500, 64, 2, True, 2) == "causal_head"
    for wrong in ({"schedule": "head"}, {"smoothe": other}):
        with pytest.raises(ValueError, match="No kernel or schedule"), tuning.tried(**wrong):
            pass


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_flops_of_the_blocked_backend_are_counted(is_causal):
    """(D + 2 Dv) forward and (3 D + 4 Dv) backward for each entry of A, two operations per multiply-add."""
    q, k = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, 17, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = twicing_attention(q, k, v, is_causal=is_causal, backend="blocked")
    entries = 2 * 2 * 3 * 17 * 17
    assert counter.get_total_flops() == entries * (8 + 2 * 12)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == entries * (3 * 8 + 4 * 12)
