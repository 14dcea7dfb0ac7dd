"""The published numbers that stand beside those of a run: same recipe, mechanism, layers, metric and conditions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twicing.experiments.findings import ReportedArm, Run, mean_and_sd
from twicing.experiments.published import Published, protocol_differences, published_of
from twicing.experiments.results import Conditions, value_by_seed


@dataclass(frozen=True)
class Beside:
    """Ours, mean and spread over seeds in the unit of the metric, and what a paper printed for the same quantity."""

    arm: str
    metric: str
    conditions: Conditions
    says: str
    mean: float
    sd: float | None
    seeds: int
    printed: str
    protocol: str
    source: str
    status: str


def published_beside(run: Run) -> tuple[list[Beside], list[str]]:
    """The lines of a report's table of published values, and in what the run's protocol differs from theirs.

    Where it differs there is no line, only the difference. A record's own published value, which its maker put there,
    takes the place of what the file of published values says of the same arm and quantity.
    """
    recipe = str(run.config.get("recipe_name") or "")
    settings: Mapping[str, Any] = run.config.get("recipe", {})
    lines = _of_records(run)
    told = {(line.arm, line.metric, _key(line.conditions)) for line in lines}
    differences: dict[str, None] = {}
    for arm in run.arms:
        if arm.control or arm.options:
            continue
        for one in published_of(recipe, arm.mechanism, arm.layers):
            values = value_by_seed(run.records, str(one.metric), arm.label, one.conditions)
            if not values or (arm.label, one.metric, _key(one.conditions)) in told:
                continue
            other = protocol_differences(one, settings)
            differences |= dict.fromkeys(other)
            if not other:
                lines.append(_line(arm, one, values))
    return lines, list(differences)


def _line(arm: ReportedArm, one: Published, values: Mapping[int, float]) -> Beside:
    mean, sd = mean_and_sd(values)
    said = (one.protocol, one.source, one.status)
    return Beside(arm.label, str(one.metric), one.conditions, one.says, mean, sd, len(values), one.words, *said)


def _of_records(run: Run) -> list[Beside]:
    """The published values that records bring along."""
    lines: dict[tuple[str, str], Beside] = {}
    for record in run.records:
        if record.published is None:
            continue
        says = ", ".join([record.metric, *(f"{key} {value}" for key, value in record.conditions.items())])
        values = value_by_seed(run.records, record.metric, record.arm, record.conditions)
        value, *said = (
            str(record.published.get(key, "not recorded")) for key in ("value", "protocol", "source", "status")
        )
        mean, sd = mean_and_sd(values)
        line = Beside(record.arm, record.metric, record.conditions, says, mean, sd, len(values), value, *said)
        lines.setdefault((record.arm, says), line)
    return list(lines.values())


def _key(conditions: Conditions) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(conditions.items()))
