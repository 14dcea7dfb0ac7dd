"""`twicing theory`: run the experiments one after the other, write the page and the numbers, and say what held."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from twicing.experiments.results import environment, replace_file, write_json
from twicing.experiments.telling import tell
from twicing.experiments.theory.catalogue import chosen
from twicing.experiments.theory.experiment import Claim, Experiment
from twicing.experiments.theory.options import TheoryOptions
from twicing.experiments.theory.page import Finding, theory_page

CLAIM_COLUMNS = ("experiment", *(field.name for field in dataclasses.fields(Claim)))


def run(options: TheoryOptions, console: Console) -> bool:
    """Run the experiments, write theory.html, results.json and claims.csv into options.out, and list the claims.

    The same seed on the same machine gives the same files. Returns whether every claim holds.
    Raises ValueError for an unknown experiment, OSError where the folder cannot be written.
    """
    experiments = chosen(options.only)
    # Before the work, so that a folder that cannot be made is told at once.
    options.out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        findings = _measured(experiments, options.seed, console)
    _write(findings, options)
    _show(findings, console)
    page = options.out / "theory.html"
    tell(console, f"Page: {page}")
    return all(claim.holds for finding in findings for claim in finding.claims)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The arrays are small: a second thread would wait more than it works, and rounding would depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measured(experiments: Sequence[Experiment], seed: int, console: Console) -> list[Finding]:
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(experiments))
        findings = []
        for experiment in experiments:
            bar.update(task, description=experiment.title)
            numbers = experiment.measure(seed)
            findings.append(Finding(experiment, numbers, experiment.claims(numbers), experiment.picture(numbers)))
            bar.advance(task)
    return findings


def _write(findings: Sequence[Finding], options: TheoryOptions) -> None:
    here = environment()
    made_with = {
        **here.versions,
        "commit": here.commit or "not known (installed without git)",
        "device": here.device,
        "threads": "1",
        "seed": str(options.seed),
    }
    write_json(
        options.out / "results.json",
        {
            "made_with": made_with,
            "experiments": {
                finding.experiment.name: {
                    "title": finding.experiment.title,
                    "numbers": dataclasses.asdict(finding.numbers),
                    "claims": [dataclasses.asdict(claim) for claim in finding.claims],
                }
                for finding in findings
            },
        },
    )
    text = io.StringIO()
    rows = csv.DictWriter(text, CLAIM_COLUMNS, lineterminator="\n")
    rows.writeheader()
    for finding in findings:
        rows.writerows({"experiment": finding.experiment.name} | dataclasses.asdict(one) for one in finding.claims)
    replace_file(options.out / "claims.csv", lambda file: file.write(text.getvalue().encode()))
    page = theory_page(findings, made_with)
    replace_file(options.out / "theory.html", lambda file: file.write(page.encode()))


def _show(findings: Sequence[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("experiment")
    table.add_column("statement", ratio=2)
    table.add_column("measured", ratio=3)
    table.add_column("")
    for finding in findings:
        for place, claim in enumerate(finding.claims):
            name = finding.experiment.name if place == 0 else ""
            table.add_row(name, claim.statement, claim.measured, "holds" if claim.holds else "FAILS")
    console.print(table, markup=False)
    claims = [claim for finding in findings for claim in finding.claims]
    failed = sum(not claim.holds for claim in claims)
    verdict = "all hold" if not failed else f"{failed} do not hold, see the page"
    console.print(f"{len(claims)} claims: {verdict}.", markup=False, highlight=False)
