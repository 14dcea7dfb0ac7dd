"""`twicing diagnose`: measure the models and their random initialisations, judge, and write page and numbers."""

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twicing.experiments.cases.case import Case
from twicing.experiments.cases.windows import FEWEST_TOKENS
from twicing.experiments.devices import chosen_device
from twicing.experiments.diagnose.cases import cases_of
from twicing.experiments.diagnose.diagnosis import Diagnosis, diagnose_case
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.page import diagnosis_page
from twicing.experiments.diagnose.words import headline, reasons
from twicing.experiments.report import DIAGNOSIS, report_above, write_report
from twicing.experiments.results import environment, replace_file, write_json
from twicing.experiments.telling import tell

PAGE = "diagnosis.html"


def run(options: Diagnose, command: str, console: Console) -> Path:
    """Diagnose what the options name, print the verdicts, and return the page, diagnosis.html.

    command: what was typed, kept on the page. The same command on the same machine gives the same files.
    Raises ValueError, one sentence, for whatever of the options, the model or the inputs does not fit; OSError where
    the folder cannot be written.
    """
    _check(options)
    device = chosen_device(options.device)
    if options.pretrained:
        tell(console, "timm's own weights were asked for: it downloads them if they are not in its cache.")
    cases, folder, notes = cases_of(options)
    # Before the work, so that a folder that cannot be made is told at once.
    folder.mkdir(parents=True, exist_ok=True)
    diagnoses = _diagnosed(cases, options, device, console)
    _write(diagnoses, notes, options, command, folder, device)
    _show(diagnoses, notes, console)
    page = folder / PAGE
    tell(console, f"Page: {page}")
    return page


def _check(options: Diagnose) -> None:
    least = {"inputs": 2, "tokens": FEWEST_TOKENS, "draws": 1, "batch_size": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be {smallest} or more: got {value}.")


def _diagnosed(cases: Sequence[Case], options: Diagnose, device: torch.device, console: Console) -> list[Diagnosis]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    found: list[Diagnosis] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cases))

        def passed(share: float) -> None:
            bar.update(task, completed=len(found) + share)

        for case in cases:
            bar.update(task, description=case.name)
            found.append(
                diagnose_case(
                    case,
                    draws=options.draws,
                    seed=options.seed,
                    batch_size=options.batch_size,
                    device=device,
                    progress=passed,
                )
            )
    return found


def _write(
    diagnoses: Sequence[Diagnosis],
    notes: Sequence[str],
    options: Diagnose,
    command: str,
    folder: Path,
    device: torch.device,
) -> None:
    here = environment(device)
    made_with = {
        **here.versions,
        **({"transformers": metadata.version("transformers")} if "transformers" in sys.modules else {}),
        "commit": here.commit or "not known (installed without git)",
        "device": here.device,
        "seed": str(options.seed),
    }
    write_json(
        folder / "diagnosis.json",
        {
            "command": command,
            "made_with": made_with,
            "notes": list(notes),
            "models": [_as_json(one) for one in diagnoses],
        },
    )
    rows = [_flat(row, options.draws) for one in diagnoses for row in one.rows()]
    _write_csv(folder / "diagnosis.csv", rows)
    _write_csv(folder / "inputs.csv", (row for one in diagnoses for row in one.input_rows()))
    report = report_above(folder, DIAGNOSIS)
    page = diagnosis_page(_title(options.model), diagnoses, notes, made_with, command, report)
    replace_file(folder / PAGE, lambda file: file.write(page.encode()))
    if report:
        # It has a link to the page.
        write_report(report.parent)


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    case, verdict = diagnosis.case, diagnosis.verdict
    return {
        "label": case.label,
        "seed": case.seed,
        "mechanism": case.mechanism,
        "layers": case.layers,
        "weights": case.weights,
        "inputs": {
            "count": diagnosis.inputs.count,
            "what": diagnosis.inputs.words,
            "caution": diagnosis.inputs.caution,
        },
        "tokens": diagnosis.model.tokens,
        "width": diagnosis.model.width,
        "verdict": {
            "kind": verdict.kind,
            "headline": headline(diagnosis),
            "reasons": reasons(diagnosis),
            "met": verdict.met,
            "open": verdict.open,
            "facts": diagnosis.facts(),
            "largest_rank_in_block": verdict.facts.peak,
            "random_initialisation": verdict.initial,
            "uniform_attention_in_layers": verdict.uniform,
            "one_key_in_layers": verdict.one_key,
            "same_attention_output_in_layers": verdict.same_output,
        },
        "curves": list(diagnosis.rows()),
    }


def _flat(row: dict[str, Any], draws: int) -> dict[str, Any]:
    """The row with a column for each draw, empty for the model itself."""
    alone = dict(enumerate(row["draws"], start=1))
    return {name: value for name, value in row.items() if name != "draws"} | {
        f"draw {place}": alone.get(place) for place in range(1, draws + 1)
    }


def _title(model: str) -> str:
    """What the page is about: a folder by its own name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


def _show(diagnoses: Sequence[Diagnosis], notes: Sequence[str], console: Console) -> None:
    for words in dict.fromkeys(one.inputs.words for one in diagnoses):
        tell(console, f"Shown: {words}.")
    for note in [*notes, *dict.fromkeys(one.inputs.caution for one in diagnoses if one.inputs.caution)]:
        tell(console, f"Note: {note}")
    for one in diagnoses:
        console.print(f"\n{one.case.name}: {headline(one)}.", style="bold", highlight=False, markup=False)
        for reason in reasons(one):
            tell(console, f"  {reason}")
    console.print()
