"""Compile every kernel for a Hopper GPU (sm_90), as the launcher would start it, on a machine that has none.

Triton's interpreter, in which the kernels are tested here, takes what the compiler refuses. Only one thing is put in
the place of the real one: a driver that says which GPU there is. Prints one JSON line for each kernel that was
compiled; test_triton_compiles.py runs it in a process of its own, without the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from twicing.ops.triton import launch, tuning
from twicing.ops.triton.launch import Problem

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Case:
    """One call that is compiled, forward and backward."""

    schedule: str = "blocks"
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    value_width: int = 64
    is_causal: bool = False
    order: int = 2
    has_mask: bool = False
    dropout_p: float = 0.0
    key_heads: int = 4


PLAIN = Case()
CASES = (
    PLAIN,
    replace(PLAIN, is_causal=True),
    replace(PLAIN, schedule="heads"),
    replace(PLAIN, schedule="heads", is_causal=True),
    replace(PLAIN, width=256, value_width=256),
    replace(PLAIN, schedule="heads", dtype=torch.float16, width=80, has_mask=True, dropout_p=0.1, key_heads=2),
    replace(PLAIN, schedule="heads", dtype=torch.float32, is_causal=True, dropout_p=0.1),
)


class HopperWithoutOne:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def compiling_only() -> Iterator[list[Any]]:
    """Kernels that are started here are compiled, kept in the list, and not run."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    driver.set_active(HopperWithoutOne())
    try:
        yield compiled
    finally:
        JITFunction.run = run


def problem_of(case: Case, tokens: int = 197) -> Problem:
    """The call, on tensors that nobody reads."""

    def of(heads: int, width: int) -> torch.Tensor:
        return torch.zeros(2, heads, tokens, width, dtype=case.dtype)

    return Problem(
        query=of(4, case.width),
        key=of(case.key_heads, case.width),
        value=of(case.key_heads, case.value_width),
        key_mask=torch.ones(2, 1, tokens, dtype=torch.bool) if case.has_mask else None,
        gain=torch.ones(1),
        seed=torch.zeros(1, dtype=torch.int64) if case.dropout_p else None,
        dropout_p=case.dropout_p,
        is_causal=case.is_causal,
        scale=0.125,
        order=case.order,
    )


def resources(kernel: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What a compiled kernel takes of a GPU, in bytes and registers for each thread, and what its code has in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    code = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "dtype": str(dtype).removeprefix("torch."),
        "shared": kernel.metadata.shared,
        "registers": max(map(int, re.findall(r"REG:(\d+)", told))),
        "spilled": max(map(int, re.findall(r"STACK:(\d+)", told))),
        "tensor cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", code)),
        "tf32": code.count("tf32"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", code)),
    }


def main() -> None:
    for case in CASES:
        problem = problem_of(case)
        with compiling_only() as kernels, tuning.tried(case.schedule):
            output, smoothed, terms = launch.forward(problem, is_training=True)
            launch.backward(problem, output, output, smoothed, terms)
        for kernel in kernels:
            sys.stdout.write(json.dumps(resources(kernel, case.dtype)) + "\n")


if __name__ == "__main__":
    main()
