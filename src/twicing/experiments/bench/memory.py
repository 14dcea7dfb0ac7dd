"""Peak memory of one call, beyond its inputs: outputs, gradients and everything between.

On a GPU torch counts. On the CPU it is the growth of the resident set in a fresh process, which Linux alone can tell.
"""

import ctypes
import multiprocessing
import signal
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from twicing.experiments.bench.cases import TRAINING, Case
from twicing.experiments.bench.contenders import Contender

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Written to _CLEAR, it makes the peak the present size.
_RESET_PEAK = "5"
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Measurement:
    """One call whose memory is wanted. On the CPU a process of its own is handed it, so that it must be picklable."""

    contender: Contender
    case: Case
    passes: str
    threads: int


def peak_growth(measurement: Measurement) -> int | None:
    """Bytes by which memory grew at its peak, or None where it cannot be told.

    On the CPU that is without Linux, where the process died, and for what is compiled: a compiler takes far more.
    """
    device = measurement.case.device
    if device.type == "cuda":
        return _growth_on_gpu(measurement)
    if measurement.contender.compiles or not _CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    # The server has imported torch, and its children have nothing else in them.
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell_growth, args=(measurement, there), daemon=True)
    process.start()
    there.close()
    try:
        growth: int | None = here.recv()
    except EOFError:
        growth = None
    finally:
        # After Ctrl-C it may still be at work.
        process.terminate()
        process.join()
    return growth


def one_call(contender: Contender, case: Case, passes: str) -> Any:
    """A function of no arguments that makes the one call: the forward without a graph, or both passes."""
    inputs = case.inputs(needs_grad=passes == TRAINING)
    if passes == TRAINING:
        upstream = case.upstream()

        def both() -> object:
            output = contender.attend(*inputs, case.is_causal)
            return output, torch.autograd.grad(output, inputs, upstream)

        return both

    def forward() -> object:
        with torch.no_grad():
            return contender.attend(*inputs, case.is_causal)

    return forward


def _growth_on_gpu(measurement: Measurement) -> int:
    device = measurement.case.device
    call = one_call(measurement.contender, measurement.case, measurement.passes)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _tell_growth(measurement: Measurement, answer: Connection) -> None:
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(measurement.threads)
    contender, case, passes = measurement.contender, measurement.case, measurement.passes
    # Threads and libraries take memory once.
    small = replace(case, batch=1, heads=1, tokens=min(case.tokens, WARM_UP_TOKENS))
    one_call(contender, small, passes)()
    call = one_call(contender, case, passes)
    _give_back_freed_memory()
    _CLEAR.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    result = call()
    answer.send(1024 * (_kilobytes("VmHWM") - before))
    del result


def _give_back_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
