"""`twicing bench linear`: linear attention, plain and twiced, against the number of tokens, and against softmax.

What is looked for: slopes of 1 in log-log, twicing at most 2.1 times plain, and the length where softmax falls behind.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from twicing.experiments.bench.cases import PASSES, Case, parse_device, parse_dtype
from twicing.experiments.bench.contenders import SDPA, Contender, all_contenders
from twicing.experiments.bench.gate import Gate, first_line
from twicing.experiments.bench.linear_growth import LINEAR, TWICED, growth_tables
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.memory import Measurement, one_call, peak_growth
from twicing.experiments.bench.rows import MEASURED, OpsRow, Row, Timed, ops_row, timed
from twicing.experiments.bench.run import check_effort, check_numbers, record, record_name, threads
from twicing.experiments.bench.screen import Screen
from twicing.experiments.bench.timing import Spread, interleaved
from twicing.ops.boost import boost
from twicing.ops.linear import linear_attention_matrix, twicing_linear_attention
from twicing.ops.linear_features import find_feature_map
from twicing.testing import relative_rms
from twicing.testing.budget import FP64_BUDGET

# Of so many tokens the dense matrix is formed in fp64, once for every head, with gradients.
CHECKED_TOKENS = 1024
# Among fewer, gradients cancel, and no two right ways agree.
LEAST_TOKENS = 16
# Sums over more tokens are rounded more often. A formula that is wrong is off by far more.
LONGER = 10.0
_NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")

# (query, key, value) -> output.
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench_linear(options: LinearOptions, screen: Screen) -> bool:
    """Measure, show tables, and write options.out/linear-....csv; returns whether it came to the end.

    Raises ValueError for options that mean nothing.
    """
    check_effort(options.repeats, options.seconds)
    cases, contenders = _cases(options), linear_contenders(options.feature_map)
    known, device = all_contenders(cases[0].device), cases[0].device
    softmax = {name: known[name] for name in (SDPA, "two SDPA calls")}
    with threads(options.threads):
        path = options.out / f"{record_name('linear', device, options.dtype)}.csv"
        steps_per_pass = 2 if options.memory else 1
        with screen.progress(len(cases) * (1 + len(PASSES) * steps_per_pass)) as step:
            measured = _measured(cases, contenders, softmax, options, step)
            rows, finished = record(measured, path, device, screen)
    for table in growth_tables([row for row in rows if isinstance(row, OpsRow)]):
        screen.show(table)
    return finished


def linear_contenders(feature_map: str) -> dict[str, Contender]:
    """Plain and twiced linear attention, by name."""
    orders = {LINEAR: 1, TWICED: 2}
    return {name: Contender(name, order, partial(_linear, order, feature_map)) for name, order in orders.items()}


def _linear(order: int, feature_map: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return twicing_linear_attention(query, key, value, None, is_causal, order=order, feature_map=feature_map)


def _cases(options: LinearOptions) -> list[Case]:
    dtype, device = parse_dtype(options.dtype), parse_device(options.device)
    find_feature_map(options.feature_map)
    check_numbers("lengths", options.lengths, least=LEAST_TOKENS)
    if options.softmax_up_to < 0:
        raise ValueError(f"--softmax-up-to must be 0 or larger: got {options.softmax_up_to}.")
    if min(options.batch, options.heads, options.width) < 1:
        raise ValueError(
            f"--batch, --heads and --width must be 1 or larger: got {options.batch}, {options.heads}, {options.width}."
        )
    kinds = (False, True) if options.causal else (False,)
    lengths = sorted(set(options.lengths))
    return [
        Case(options.batch, options.heads, tokens, options.width, is_causal, dtype, device)
        for is_causal in kinds
        for tokens in lengths
    ]


def _measured(
    cases: list[Case],
    contenders: dict[str, Contender],
    softmax: dict[str, Contender],
    options: LinearOptions,
    step: Callable[[str], None],
) -> Iterator[list[Row]]:
    """The rows of each case and pass."""
    for case in cases:
        step(f"{case}: correctness")
        rivals = softmax if case.tokens <= options.softmax_up_to else {}
        status = {name: complaint(one, case, options.feature_map) or MEASURED for name, one in contenders.items()}
        gate = Gate(_short(case))
        status |= {name: gate.complaint(one) or MEASURED for name, one in rivals.items()}
        # It holds fp64 truths and gradients, which would be in the way of what is timed.
        del gate
        every = contenders | rivals
        sound = {name: one for name, one in every.items() if status[name] == MEASURED}
        for passes in PASSES:
            step(f"{case}: time, {passes}")
            calls = {name: one_call(one, case, passes) for name, one in sound.items()}
            spreads = interleaved(calls, case.device, repeats=options.repeats, seconds=options.seconds)
            del calls
            memory: dict[str, int | None] = {}
            if options.memory:
                step(f"{case}: memory, {passes}")
                for name, one in sound.items():
                    memory[name] = peak_growth(Measurement(one, case, passes, torch.get_num_threads()))
            yield _rows(case, passes, every, status, spreads, memory)


def _rows(
    case: Case,
    passes: str,
    contenders: dict[str, Contender],
    status: dict[str, str],
    spreads: dict[str, Spread],
    memory: dict[str, int | None],
) -> list[Row]:
    sdpa = spreads[SDPA].median if SDPA in spreads else None
    rows: list[Row] = []
    for name, contender in contenders.items():
        time = timed(spreads[name]) if name in spreads else Timed(status[name])
        rows.append(ops_row(case, passes, contender, time, sdpa=sdpa, peak=memory.get(name)))
    return rows


def complaint(contender: Contender, case: Case, feature_map: str) -> str | None:
    """Why a form of linear attention gets no time, or None where it is right. Whatever it raises is a complaint too.

    Of the first 1,024 tokens, its output and gradients are held against the dense matrix in fp64, inside twice the
    error of the dense form in the same dtype. At full length no matrix fits: its output is held against the operator
    in fp64, inside ten times that.
    """
    short = _short(case)
    dense = partial(_dense, contender.order, feature_map, short.is_causal)
    try:
        found = _passes(lambda q, k, v: contender.attend(q, k, v, short.is_causal), short, short.dtype)
        expected, honest = _passes(dense, short, torch.float64), _passes(dense, short, short.dtype)
        budgets = [_budget(one, other, case.dtype) for one, other in zip(honest, expected, strict=True)]
        for name, tensor, wanted, budget in zip(_NAMES, found, expected, budgets, strict=True):
            off = relative_rms(tensor, wanted)
            # Not `off > budget`, which NaN would pass.
            if not off <= budget:
                return f"wrong: {name} off by {off:.1e} (relative RMS), the budget is {budget:.1e}"
        with torch.no_grad():
            query, key, value = case.inputs()
            output = contender.attend(query, key, value, case.is_causal)
            in_fp64 = query.double(), key.double(), value.double()
            whole = _linear(contender.order, feature_map, *in_fp64, case.is_causal)
        off, budget = relative_rms(output, whole), LONGER * budgets[0]
        if not off <= budget:
            return f"wrong: output of all tokens off by {off:.1e} (relative RMS), the budget is {budget:.1e}"
    except Exception as error:  # memory that does not suffice, a driver that fails
        return f"failed: {first_line(error)}"
    return None


def _short(case: Case) -> Case:
    return replace(case, tokens=min(case.tokens, CHECKED_TOKENS))


def _dense(order: int, feature_map: str, is_causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition with A formed; for half precision in fp32, else it would be no measure."""
    wide = torch.promote_types(query.dtype, torch.float32)
    attn = linear_attention_matrix(query.to(wide), key.to(wide), is_causal=is_causal, feature_map=feature_map)
    return boost(lambda v: (attn @ v.to(wide)).to(v.dtype), value, order)


def _passes(form: Form, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients by query, key and value."""
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in case.inputs())
    output = form(query, key, value)
    return [output, *torch.autograd.grad(output, (query, key, value), case.upstream().to(dtype))]


def _budget(honest: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    # Of few tokens the dense form can be right to the last bit, which cannot be asked of another one.
    return FP64_BUDGET if dtype == torch.float64 else max(2.0 * relative_rms(honest, expected), torch.finfo(dtype).eps)
