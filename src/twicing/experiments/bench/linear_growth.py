"""How time and memory grow with the tokens, from the rows of a record: slopes, the ratio of twicing, and crossings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from twicing.experiments.bench.rows import OpsRow
from twicing.experiments.bench.tables import Table

LINEAR, TWICED = "linear", "twicing-linear"
# Slopes are fitted to lengths of at least this share of the longest; below, the fixed cost of a call shows.
FITTED_SHARE = 1 / 16
# (what is meant to be faster, what it is held against): who crosses whom.
_RIVALS = ((LINEAR, "SDPA"), (TWICED, "SDPA"), (TWICED, "two SDPA calls"))

Points = list[tuple[int, float]]


def slope(points: Points) -> float | None:
    """The exponent p of the power law value = c N^p, by least squares of the logarithms; None for fewer than two N."""
    if len({tokens for tokens, _ in points}) < 2:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in zip(*points, strict=True))
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def crossing(ratios: Points) -> str:
    """From how many tokens on a ratio stays below 1, in words: between two lengths as a power law has it."""
    if not ratios:
        return "not measured"
    ratios = sorted(ratios)
    above = [place for place, (_, ratio) in enumerate(ratios) if ratio >= 1.0]
    if not above:
        return f"below {ratios[0][0]:,}"
    if above[-1] == len(ratios) - 1:
        return f"beyond {ratios[-1][0]:,}"
    (before, over), (after, under) = ratios[above[-1] : above[-1] + 2]
    share = math.log(over) / (math.log(over) - math.log(under))
    return f"about {before * (after / before) ** share:,.0f}"


def growth_tables(rows: Sequence[OpsRow]) -> list[Table]:
    """The slopes of every contender for each kind of call, with the ratio to plain linear attention; the crossings."""
    measured = [row for row in rows if row.median_ms is not None]
    if not measured:
        return []
    kinds = list(dict.fromkeys((row.is_causal, row.passes) for row in measured))
    slopes = [_slopes([row for row in measured if _kind(row) == kind]) for kind in kinds]
    crossings = [line for kind in kinds for line in _crossing_lines([row for row in measured if _kind(row) == kind])]
    notes = (
        "Slopes in log-log: 1 is linear, 2 is quadratic. Ratio of times to plain linear attention at the most tokens, "
        "and the largest at any number of them.",
    )
    # What they explain is the same in all: they stand below the last one alone.
    slopes[-1] = replace(slopes[-1], notes=notes)
    headers = ("attention", "pass", "faster", "than", "tokens")
    return [*slopes, Table("Faster from how many tokens on", headers, tuple(crossings), words=4)]


def _kind(row: OpsRow) -> tuple[bool, str]:
    return row.is_causal, row.passes


def _slopes(rows: list[OpsRow]) -> Table:
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.contender for row in rows):
        own = [row for row in rows if row.contender == name]
        longest = max(row.tokens for row in own)
        fitted = [row for row in own if row.tokens >= FITTED_SHARE * longest]
        shortest = min(row.tokens for row in fitted)
        time, memory = (slope(_points(fitted, value)) for value in (_time, _memory))
        ratios = [ratio for _, ratio in _ratios(rows, name, LINEAR)] if name == TWICED else []
        at_longest, largest = (f"{ratios[-1]:.2f}", f"{max(ratios):.2f}") if ratios else ("", "")
        span = f"{shortest:,} to {longest:,}"
        lines.append((name, span, _cell(time), _cell(memory), at_longest, largest))
    title = f"Growth by number of tokens, {', '.join(_kind_in_words(rows[0]))}"
    headers = ("contender", "tokens", "slope of time", "of memory", "ratio to linear", "at most")
    return Table(title, headers, tuple(lines), words=2)


def _crossing_lines(rows: list[OpsRow]) -> list[tuple[str, ...]]:
    return [(*_kind_in_words(rows[0]), one, other, crossing(_ratios(rows, one, other))) for one, other in _RIVALS]


def _ratios(rows: list[OpsRow], one: str, other: str) -> Points:
    """Ratios of medians by the number of tokens, where both were measured."""
    times = {(row.contender, row.tokens): row.median_ms for row in rows}
    found = []
    for tokens in sorted({row.tokens for row in rows}):
        mine, theirs = times.get((one, tokens)), times.get((other, tokens))
        if mine is not None and theirs is not None:
            found.append((tokens, mine / theirs))
    return found


def _points(rows: list[OpsRow], value: Callable[[OpsRow], float | None]) -> Points:
    # Growth of a resident set can be measured as nothing, which has no logarithm.
    return [(row.tokens, found) for row in rows if (found := value(row)) is not None and found > 0.0]


def _time(row: OpsRow) -> float | None:
    return row.median_ms


def _memory(row: OpsRow) -> float | None:
    return row.peak_memory_mb


def _kind_in_words(row: OpsRow) -> tuple[str, str]:
    return "causal" if row.is_causal else "not causal", row.passes


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
