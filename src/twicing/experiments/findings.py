"""What a run folder holds, and every arm against standard on the same seeds: the numbers of a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twicing.experiments.masking_verdicts import Verdicts, doubt, read_verdicts
from twicing.experiments.metrics import ACCURACY, CORRUPTED, EPS50, STEP_TIME, TOP5, is_perplexity
from twicing.experiments.results import (
    BASELINE,
    Conditions,
    Correctness,
    Record,
    read_json,
    read_predictions,
    read_records,
    threat_key,
    value_by_seed,
)
from twicing.experiments.statistics import (
    PairedDifference,
    bootstrap_over_images,
    check_primaries,
    claims_difference,
    conclusion,
    holm,
    number,
    paired_difference,
    small,
    verdict,
)

NOISE_FLOOR = "standard (other seeds)"
PAPER_COMPAT = "pgd, paper_compat (unverified)"
# Threats that look for the change that hurts most: what withstands them is called robust, if nothing was masked.
ATTACKS = ("pgd", "fgsm", "spsa", "autoattack", "transfer", PAPER_COMPAT)


@dataclass(frozen=True)
class ReportedArm:
    """One side of the comparison as config.json tells it; control: outside the family that Holm corrects."""

    label: str
    mechanism: str
    layers: str
    meaning: str
    options: Mapping[str, Any]
    control: bool


@dataclass(frozen=True)
class Measure:
    """What is compared. better: "higher", "lower" or "neither"."""

    name: str
    metric: str
    conditions: Conditions
    better: str

    @property
    def title(self) -> str:
        """The name with a capital, for the start of a line; eps50 is a symbol and keeps its letter."""
        return self.name if self.name.startswith("eps50") else _capital(self.name)

    @property
    def is_of_attack(self) -> bool:
        """Whether a difference in it would be one of robustness against an attack."""
        return self.metric in (ACCURACY, EPS50, TOP5) and self.conditions.get("threat") in ATTACKS

    def text(self, value: float | None) -> str:
        """A mean of this measure; of eps50, which is small, three significant digits."""
        return small(value, digits=3) if self.metric == EPS50 and value is not None else number(value)


@dataclass(frozen=True)
class Row:
    """One arm on one measure; difference, bootstrap and corrected are against the baseline and None for itself.

    conclusion, verdict: in words, short and with the evidence; both say so where a difference is shown in robustness
    that is not established.
    """

    measure: Measure
    arm: ReportedArm
    values: Mapping[int, float]
    mean: float | None
    sd: float | None
    difference: PairedDifference | None
    bootstrap: tuple[float, float] | None
    corrected: float | None
    conclusion: str
    verdict: str


@dataclass(frozen=True)
class Run:
    """What the files of a run folder hold.

    predictions: (arm, seed) -> which images were right. verdicts: arm -> whether its attacks met masked gradients.
    notes: sentences that its parts left for the reader.
    """

    config: Mapping[str, Any]
    records: Sequence[Record]
    predictions: Mapping[tuple[str, int], Correctness]
    verdicts: Verdicts = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """What was run."""
        return _capital(str(self.config.get("title") or self.config.get("name") or "a comparison"))

    @property
    def limits(self) -> str:
        """What it cannot tell."""
        said = str(self.config.get("limits") or "the configuration does not say what this run cannot tell")
        return f"{_capital(said).rstrip('.')}."

    @property
    def arms(self) -> list[ReportedArm]:
        """The arms that have records, standard first, then in the order of the config."""
        present = {record.arm: record for record in self.records}
        listed = {str(entry["label"]): entry for entry in self.config.get("arms", [])}
        order = [BASELINE, *listed, *present]
        return [
            _arm(label, listed.get(label, {}), present[label]) for label in dict.fromkeys(order) if label in present
        ]

    def values(self, measure: Measure, arm: str) -> dict[int, float]:
        """The value that each seed of an arm has for a measure."""
        return value_by_seed(self._grouped.get((measure.metric, arm), []), measure.metric, arm, measure.conditions)

    @cached_property
    def _grouped(self) -> dict[tuple[str, str], list[Record]]:
        # A page asks for thousands of values; each would otherwise look at every record.
        found: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            found.setdefault((record.metric, record.arm), []).append(record)
        return found

    @property
    def seeds(self) -> list[int]:
        """The seeds that the config asked for."""
        return [int(seed) for seed in self.config.get("seeds", sorted({record.seed for record in self.records}))]

    @property
    def primaries(self) -> list[Measure]:
        """The measures that were declared before the run."""
        return [
            Measure(str(one["name"]), str(one["metric"]), dict(one["conditions"]), str(one.get("better", "neither")))
            for one in self.config.get("primary", [])
        ]


def read_run(folder: Path) -> Run:
    """Read config.json, results.jsonl and, where they are there, predictions.npz and verdicts.json."""
    for name in ("config.json", "results.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"expected a run folder with {name}, found none in {folder}. `twicing compare` writes it."
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is broken ({error}). Make the run anew in another folder."
        ) from error
    predictions = folder / "predictions.npz"
    answers = read_predictions(predictions) if predictions.is_file() else {}
    notes = folder / "notes.json"
    said = read_json(notes) if notes.is_file() else []
    return Run(config, read_records(folder / "results.jsonl"), answers, read_verdicts(folder), said)


def primary_rows(run: Run) -> list[Row]:
    """Every arm on every primary metric; Holm's correction over mechanisms x primaries, controls outside of it."""
    check_primaries(run.config.get("primary", []))
    rows = [_row(run, measure, arm) for measure in run.primaries for arm in run.arms]
    rows = [replace(row, bootstrap=_bootstrap(run, row)) for row in rows]
    family = [place for place, row in enumerate(rows) if not row.arm.control and row.arm.label != BASELINE]
    p_values = [_p(rows[place].difference) for place in family] + [None] * (family_size(run) - len(family))
    corrected = dict(zip(family, holm(p_values), strict=False))
    return [
        _with_verdict(run, row, corrected.get(place), len(p_values) if place in corrected else 0)
        for place, row in enumerate(rows)
    ]


def family_size(run: Run) -> int:
    """How many comparisons Holm corrects for: mechanisms x primaries, planned arms without records included."""
    planned = {str(entry["label"]) for entry in run.config.get("arms", []) if not entry.get("control", False)}
    present = {arm.label for arm in run.arms if not arm.control}
    return len((planned | present) - {BASELINE}) * len(run.primaries)


def exploratory_measures(run: Run) -> list[Measure]:
    """Everything that was measured before or after training and is not primary, in the order of the records.

    What was measured by epoch is left out: the figures of the training show it.
    """
    primaries = [(measure.metric, dict(measure.conditions)) for measure in run.primaries]
    seen: dict[str, Measure] = {}
    for record in run.records:
        if "epoch" in record.conditions or (record.metric, record.conditions) in primaries:
            continue
        name = ", ".join([record.metric, *(f"{key} {value}" for key, value in record.conditions.items())])
        seen.setdefault(name, Measure(name, record.metric, record.conditions, _better(record.metric)))
    return list(seen.values())


def exploratory_rows(run: Run, measures: Sequence[Measure]) -> list[Row]:
    """Every arm but standard on these measures, exploratory and uncorrected."""
    rows = [_row(run, measure, arm) for measure in measures for arm in run.arms if arm.label != BASELINE]
    return [_with_verdict(run, row, None, 0) for row in rows if row.values]


def mean_and_sd(values: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for one seed) over seeds."""
    numbers = np.array(list(values.values()))
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def _arm(label: str, entry: Mapping[str, Any], record: Record) -> ReportedArm:
    return ReportedArm(
        label,
        mechanism=str(entry.get("mechanism", record.mechanism)),
        layers=str(entry.get("layers", record.layers)),
        meaning=str(entry.get("meaning", "")),
        options=dict(entry.get("options") or {}),
        control=bool(entry.get("control", label == NOISE_FLOOR)),
    )


def _better(metric: str) -> str:
    if metric == STEP_TIME:
        return "lower"
    if is_perplexity(metric):
        return "lower"
    return "higher" if metric in (ACCURACY, EPS50, TOP5, CORRUPTED) else "neither"


def _row(run: Run, measure: Measure, arm: ReportedArm) -> Row:
    values = run.values(measure, arm.label)
    mean, sd = mean_and_sd(values) if values else (None, None)
    if arm.label == BASELINE:
        return Row(measure, arm, values, mean, sd, None, None, None, "", "")
    baseline = run.values(measure, BASELINE)
    difference = paired_difference(baseline, values)
    return Row(measure, arm, values, mean, sd, difference, None, None, "", "")


def _bootstrap(run: Run, row: Row) -> tuple[float, float] | None:
    threat = row.measure.conditions
    if row.arm.label == BASELINE or "threat" not in threat or row.measure.metric != ACCURACY:
        return None
    standard, other = (
        [one for one in run.predictions.values() if one.arm == label] for label in (BASELINE, row.arm.label)
    )
    # Seeded here, so that the same run folder gives the same report.
    generator = np.random.default_rng(0)
    return bootstrap_over_images(standard, other, threat_key(threat), generator=generator)


def _with_verdict(run: Run, row: Row, corrected: float | None, family: int) -> Row:
    if row.arm.label == BASELINE:
        return row
    better = row.measure.better
    short = conclusion(row.difference, corrected=corrected, family=family, better=better)
    long = verdict(row.difference, corrected=corrected, family=family, better=better)
    doubtful = doubt(run.verdicts, BASELINE, row.arm.label) if row.measure.is_of_attack else ""
    if doubtful and claims_difference(row.difference, corrected=corrected, family=family):
        short, long = f"{short}; {doubtful}", f"{long}; {doubtful}"
    return replace(row, corrected=corrected, conclusion=short, verdict=long)


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _p(difference: PairedDifference | None) -> float | None:
    return None if difference is None else difference.p
