"""The kernels go through Triton's compiler for a Hopper GPU, and fit on one. What they compute is tested elsewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "src/twicing/ops/triton"
# What one program may take of a Hopper GPU's shared memory (CUDA C++ Programming Guide, compute capability 9.0).
SHARED_BYTES = 227 * 1024

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or sys.platform != "linux", reason="Triton is for Linux only"
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = [sys.executable, str(HERE / "triton_compiled.py")]
    done = subprocess.run(script, env=told, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    files = [KERNELS / "forward_kernels.py", KERNELS / "backward_kernels.py"]
    named = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    assert len(named) == 8
    assert {kernel["kernel"] for kernel in compiled} == named


def test_they_fit_into_shared_memory(compiled):
    assert all(0 < kernel["shared"] <= SHARED_BYTES for kernel in compiled)


def test_half_precision_uses_tensor_cores_and_hardly_spills(compiled):
    halves = [kernel for kernel in compiled if kernel["dtype"] in ("bfloat16", "float16")]
    assert all(kernel["tensor cores"] > 0 for kernel in halves)
    assert all(kernel["spilled"] <= 512 for kernel in halves)
    # Two sweeps in parallel over blocks, at width 64, keep everything in registers.
    assert all(kernel["spilled"] == 0 for kernel in halves if kernel["kernel"] == "smooth_kernel")


def test_fp32_is_not_rounded_to_tf32(compiled):
    singles = [kernel for kernel in compiled if kernel["dtype"] == "float32"]
    assert {kernel["kernel"] for kernel in singles} == {"causal_head_kernel", "head_backward_kernel"}
    assert not any(kernel["tf32"] or kernel["tensor cores"] for kernel in singles)


def test_there_are_no_atomics(compiled):
    """Which would add in another order each time."""
    assert not any(kernel["atomics"] for kernel in compiled)
