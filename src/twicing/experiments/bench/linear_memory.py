"""Peak memory of one call of a contender that can be handed to a fresh process, as memory.py measures those by name."""

import multiprocessing
import signal
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from twicing.experiments.bench.cases import Case
from twicing.experiments.bench.contenders import Contender
from twicing.experiments.bench.memory import (
    _CLEAR,
    _RESET_PEAK,
    WARM_UP_TOKENS,
    _give_back_freed_memory,
    _kilobytes,
    one_call,
)


@dataclass(frozen=True)
class Call:
    """One call whose memory is wanted. The contender is made of functions of modules, so that it can be pickled."""

    contender: Contender
    case: Case
    passes: str
    threads: int


def peak_growth_of(call: Call) -> int | None:
    """Bytes by which memory grew at its peak, or None where it cannot be told: on a CPU without Linux."""
    device = call.case.device
    if device.type == "cuda":
        return _growth_on_gpu(call)
    if not _CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell_growth, args=(call, there), daemon=True)
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


def _growth_on_gpu(call: Call) -> int:
    device = call.case.device
    run = one_call(call.contender, call.case, call.passes)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _tell_growth(call: Call, answer: Connection) -> None:
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(call.threads)
    small = replace(call.case, batch=1, heads=1, tokens=min(call.case.tokens, WARM_UP_TOKENS))
    one_call(call.contender, small, call.passes)()
    run = one_call(call.contender, call.case, call.passes)
    _give_back_freed_memory()
    _CLEAR.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    result = run()
    answer.send(1024 * (_kilobytes("VmHWM") - before))
    del result
