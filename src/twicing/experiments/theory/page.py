"""theory.html: one self-contained page in the look of the report. No JavaScript, nothing to load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from twicing.experiments.curves import Picture
from twicing.experiments.report import PAPERS, typeset
from twicing.experiments.theory.experiment import LIMIT, Claim, Experiment


@dataclass(frozen=True)
class Finding:
    """An experiment that has run: its numbers, and what they show."""

    experiment: Experiment
    numbers: Any
    claims: Sequence[Claim]
    picture: Picture


def theory_page(findings: Sequence[Finding], made_with: Mapping[str, str]) -> str:
    """The page of these findings, as HTML; the same findings give the same bytes."""
    environment = Environment(
        # The style sheet is the report's; the page is ours.
        loader=ChoiceLoader([PackageLoader("twicing.experiments.theory"), PackageLoader("twicing.experiments")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typeset": typeset}
    claims = [claim for finding in findings for claim in finding.claims]
    return environment.get_template("theory.html").render(
        findings=findings,
        total=len(claims),
        failed=[claim for claim in claims if not claim.holds],
        limits=[claim for claim in claims if claim.reading == LIMIT],
        made_with=made_with,
        papers=PAPERS,
    )
