"""`twicing bench ops`: one attention call, every way there is to compute it, against one SDPA call of the same run."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from twicing.experiments.bench.cases import FORWARD, PASSES, Case, parse_case, parse_device, parse_dtype
from twicing.experiments.bench.contenders import Contender, chosen_contenders
from twicing.experiments.bench.floor import forward_floor, product_of, training_floor
from twicing.experiments.bench.gate import Gate, refuse_uncheckable
from twicing.experiments.bench.memory import Measurement, one_call, peak_growth
from twicing.experiments.bench.options import OpsOptions
from twicing.experiments.bench.plot import draw
from twicing.experiments.bench.rows import MEASURED, OpsRow, Row, Timed, ops_row, timed
from twicing.experiments.bench.run import check_effort, record, record_name, threads
from twicing.experiments.bench.screen import Screen
from twicing.experiments.bench.timing import Spread, interleaved

_PRODUCT = "one product A R"


def bench_ops(options: OpsOptions, screen: Screen) -> bool:
    """Measure, show tables, and write options.out/ops-....csv and .svg; returns whether it came to the end.

    Raises ValueError for options that mean nothing.
    """
    check_effort(options.repeats, options.seconds)
    if not options.shapes:
        raise ValueError("--shapes must name one at least, as in --shapes 32x3x197x64.")
    dtype, device = parse_dtype(options.dtype), parse_device(options.device)
    cases = [parse_case(shape, dtype, device) for shape in options.shapes]
    for case in cases:
        refuse_uncheckable(case)
    contenders = chosen_contenders(options.contenders, device)
    with threads(options.threads):
        path = options.out / f"{record_name('ops', device, options.dtype)}.csv"
        steps_per_pass = 2 if options.memory else 1
        with screen.progress(len(cases) * (1 + len(PASSES) * steps_per_pass)) as step:
            rows, finished = record(_measured(cases, contenders, options, step), path, device, screen)
    if rows:
        draw([row for row in rows if isinstance(row, OpsRow)], path.with_suffix(".svg"), screen)
    return finished


def _measured(
    cases: list[Case], contenders: dict[str, Contender], options: OpsOptions, step: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of each case and pass."""
    for case in cases:
        step(f"{case}: correctness")
        if any(contender.compiles for contender in contenders.values()):
            # Without it, torch.compile() gives up after eight shapes, and would time the plain form without a word.
            torch.compiler.reset()
        gate = Gate(case)
        status = {name: gate.complaint(contender) or MEASURED for name, contender in contenders.items()}
        # It holds fp64 truths and gradients, which would be in the way of what is timed.
        del gate
        for passes in PASSES:
            step(f"{case}: time, {passes}")
            spreads = _times(case, passes, contenders, status, options)
            memory: dict[str, int | None] = {}
            if options.memory:
                step(f"{case}: memory, {passes}")
                for name, contender in contenders.items():
                    if name in spreads:
                        memory[name] = peak_growth(Measurement(contender, case, passes, torch.get_num_threads()))
            yield _rows(case, passes, contenders, status, spreads, memory)


def _times(
    case: Case, passes: str, contenders: dict[str, Contender], status: dict[str, str], options: OpsOptions
) -> dict[str, Spread]:
    """The times of those whose status is good, and of the product that the floor is made of."""
    sound = {name: contender for name, contender in contenders.items() if status[name] == MEASURED}
    calls = {name: one_call(contender, case, passes) for name, contender in sound.items()}
    calls[_PRODUCT] = product_of(case)
    return interleaved(calls, case.device, repeats=options.repeats, seconds=options.seconds)


def _rows(
    case: Case,
    passes: str,
    contenders: dict[str, Contender],
    status: dict[str, str],
    spreads: dict[str, Spread],
    memory: dict[str, int | None],
) -> list[Row]:
    baselines = [spreads[name].median for name, one in contenders.items() if one.is_baseline and name in spreads]
    # The fastest SDPA call; without a sound one there is nothing to hold the others against.
    sdpa = min(baselines) if baselines else None
    floor = None
    if sdpa is not None:
        least = forward_floor if passes == FORWARD else training_floor
        floor = least(sdpa, spreads[_PRODUCT].median)
    rows: list[Row] = []
    for name, contender in contenders.items():
        time = timed(spreads[name]) if name in spreads else Timed(status[name])
        row = ops_row(case, passes, contender, time, sdpa=sdpa, peak=memory.get(name))
        share = None if row.ratio is None or floor is None or contender.order == 1 else floor / row.ratio
        rows.append(replace(row, floor=floor, share_of_floor=share))
    return rows
