"""diagnosis.html: one self-contained page in the look of the report. No JavaScript, nothing to load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from twicing.analysis.capture import BLOCK_OUTPUT
from twicing.analysis.collapse import ATTENTION, COSINE, DISTANCE, ENTROPY, ENTROPY_SHARE, RANK, SHARE
from twicing.analysis.collapse_bands import RESAMPLES
from twicing.experiments.diagnose.diagnosis import INITIAL, MODEL, Diagnosis
from twicing.experiments.diagnose.figures import INITIAL_STYLE, model_styles, pictures, side_by_side
from twicing.experiments.diagnose.words import IN_TABLES, RULES, headline, reasons, with_band
from twicing.experiments.drawing import Style
from twicing.experiments.report import PAPERS, typeset
from twicing.experiments.statistics import number

COLUMNS = (
    ("cosine", (BLOCK_OUTPUT, COSINE)),
    ("||X - mean|| / ||X||", (BLOCK_OUTPUT, SHARE)),
    ("effective rank", (BLOCK_OUTPUT, RANK)),
    (DISTANCE, (BLOCK_OUTPUT, DISTANCE)),
    ("entropy, nats", (ATTENTION, ENTROPY)),
    ("entropy, share", (ATTENTION, ENTROPY_SHARE)),
)
MINUS = SHARE.replace(" - ", " − ")  # noqa: RUF001
SOURCES = (
    ("2103.03404", "Y. Dong, J.-B. Cordonnier and A. Loukas: Attention is Not All You Need"),
    *PAPERS[:1],
)


def diagnosis_page(
    title: str,
    diagnoses: Sequence[Diagnosis],
    notes: Sequence[str],
    made_with: Mapping[str, str],
    command: str,
    report: Path | None,
) -> str:
    """The page of these diagnoses, as HTML; the same diagnoses give the same bytes.

    report: of the comparison, in the folder above, where there is one.
    """
    environment = Environment(
        # The style sheet is the report's; the page is ours.
        loader=ChoiceLoader([PackageLoader("twicing.experiments.diagnose"), PackageLoader("twicing.experiments")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typeset": _typeset}
    styles = model_styles(diagnoses)
    return environment.get_template("diagnosis.html").render(
        title=title,
        findings=[_finding(one, place, styles[one.case.name]) for place, one in enumerate(diagnoses, start=1)],
        inputs=dict.fromkeys(one.inputs.words for one in diagnoses),
        notes=[*notes, *dict.fromkeys(one.inputs.caution for one in diagnoses if one.inputs.caution)],
        together=side_by_side(diagnoses, styles) if len(diagnoses) > 1 else None,
        styles=styles,
        columns=[name for name, _ in COLUMNS],
        rules=RULES,
        resamples=RESAMPLES,
        made_with=made_with,
        command=command,
        report=report,
        papers=SOURCES,
    )


def _typeset(text: object) -> Markup:
    """As in the report, with formulas kept on one line."""
    formula = escape(SHARE)
    return Markup(typeset(text).replace(formula, Markup('<span class="formula">{}</span>').format(MINUS)))


def _finding(diagnosis: Diagnosis, place: int, style: Style) -> dict[str, Any]:
    facts, case = diagnosis.verdict.facts, diagnosis.case
    named = {"rank": facts.rank, "kept": facts.kept, "against": facts.against, "share": facts.share}
    return {
        "name": case.name,
        "kind": IN_TABLES[diagnosis.verdict.kind],
        "headline": headline(diagnosis),
        "reasons": reasons(diagnosis),
        "facts": {name: with_band(one) for name, one in named.items()},
        "pictures": pictures(diagnosis, place, style),
        "key": {MODEL: style, INITIAL: INITIAL_STYLE},
        "layers": _by_layer(diagnosis),
        "about": (
            ("mechanism", case.mechanism),
            ("layers", case.layers),
            ("weights", case.weights),
            ("tokens", f"{diagnosis.model.tokens} of width {diagnosis.model.width}"),
        ),
    }


def _by_layer(diagnosis: Diagnosis) -> list[list[tuple[str, str]]]:
    """For each layer the cells of the columns: the model's number and that of its random initialisation."""
    curves = [(diagnosis.curve(MODEL, key).value, diagnosis.curve(INITIAL, key).value) for _, key in COLUMNS]
    return [
        [(number(float(model[layer])), number(float(initial[layer]))) for model, initial in curves]
        for layer in range(diagnosis.model.layers)
    ]
