"""Attacks side by side, and transfer: which arm falls to images that were made against which other one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twicing.experiments.findings import Run, mean_and_sd
from twicing.experiments.masking_verdicts import verdict_on
from twicing.experiments.metrics import ACCURACY
from twicing.experiments.results import Record, select, value_by_seed
from twicing.robustness.threat import as_fraction

# From the weakest to the strongest of what follows gradients; SPSA does not.
SIDE_BY_SIDE = {"fgsm": "FGSM", "pgd": "PGD", "spsa": "SPSA", "autoattack": "AutoAttack"}


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its spread, None where nothing was measured; own: attacked by its own gradients."""

    mean: float | None
    sd: float | None
    own: bool = False


@dataclass(frozen=True)
class ArmTable:
    """One line per arm. title: what was done. images: how many images the numbers are over, in words."""

    title: str
    images: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]


def stronger_attacks(run: Run) -> list[ArmTable]:
    """For every eps that SPSA or AutoAttack was tried at: the accuracy that each attack leaves, arm by arm."""
    found = select(run.records, metric=ACCURACY)
    sizes = _sizes([one for one in found if one.conditions.get("threat") in ("spsa", "autoattack")])
    tables = []
    for eps in sizes:
        at = {threat: select(found, conditions={"threat": threat, "eps": eps}) for threat in SIDE_BY_SIDE}
        names = {threat: name for threat, name in SIDE_BY_SIDE.items() if at[threat]}
        columns = tuple(f"{name}, {_images(at[threat])}" for threat, name in names.items())
        lines = tuple(
            (arm.label, tuple(_cell(value_by_seed(at[threat], ACCURACY, arm.label, {})) for threat in names))
            for arm in run.arms
        )
        tables.append(ArmTable(f"eps {eps}", "", columns, lines))
    return tables


def transfer_matrices(run: Run) -> list[ArmTable]:
    """For every eps: rows are the arms that were shown the images, columns the arms that these were made on.

    On the diagonal stands what the arm's own white-box attack leaves on as many images: PGD, or where PGD worked on
    other images the longest PGD of the verdict on gradient masking.
    """
    found = select(run.records, metric=ACCURACY)
    moved = select(found, conditions={"threat": "transfer"})
    tables = []
    for eps in _sizes(moved):
        here = select(moved, conditions={"eps": eps})
        sources = {str(one.conditions["from"]) for one in here}
        ordered = [arm.label for arm in run.arms]
        columns = [label for label in ordered if label in sources] + sorted(sources - set(ordered))
        lines = []
        for label in ordered:
            cells = [
                _own(run, label, eps, {one.n for one in here})
                if source == label
                else _cell(value_by_seed(here, ACCURACY, label, {"from": source}))
                for source in columns
            ]
            lines.append((label, tuple(cells)))
        tables.append(ArmTable(f"eps {eps}", _images(here), tuple(columns), tuple(lines)))
    return tables


def _own(run: Run, arm: str, eps: str, images: set[int]) -> Cell:
    at = {"threat": "pgd", "eps": eps}
    if {one.n for one in select(run.records, metric=ACCURACY, arm=arm, conditions=at)} == images:
        return _cell(value_by_seed(run.records, ACCURACY, arm, at), own=True)
    values = {
        one.seed: one.strongest
        for one in verdict_on(run.verdicts, arm).seeds
        if one.eps == eps and {one.images} == images and one.strongest is not None
    }
    return _cell(values, own=True)


def _cell(values: Mapping[int, float], *, own: bool = False) -> Cell:
    return Cell(*mean_and_sd(values), own) if values else Cell(None, None, own)


def _sizes(records: Sequence[Record]) -> list[str]:
    return sorted({str(one.conditions["eps"]) for one in records}, key=lambda eps: as_fraction(eps, "eps"))


def _images(records: Sequence[Record]) -> str:
    counts = sorted({one.n for one in records})
    return f"{' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} images" if counts else ""
