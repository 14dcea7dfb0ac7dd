"""`twicing analyze`: look into every model that the options name, write the page and the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from twicing.adapters.surgery import convert
from twicing.analysis.bandwidth import FACTORS, answers_by_factor, log_probabilities_by_factor
from twicing.analysis.spectrum import ROUNDING
from twicing.experiments.analyze.keep import (
    ACCURACY,
    AGREEMENT,
    ANALYSIS,
    LOG_PROBABILITY,
    NUMBERS,
    Analysis,
    write_analysis,
)
from twicing.experiments.analyze.measure import Passed, look_into
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.page import print_results, read_section, write_page
from twicing.experiments.analyze.subjects import Looked, looked_at
from twicing.experiments.cases.inputs import IMAGES
from twicing.experiments.cases.windows import FEWEST_TOKENS
from twicing.experiments.devices import chosen_device
from twicing.experiments.report import report_above, write_report
from twicing.experiments.results import BASELINE, environment
from twicing.experiments.telling import tell


def run(options: Analyze, command: str, console: Console) -> Path:
    """Look into what the options name and return the page, analysis.html; nothing is kept of an interrupted run.

    command: what was typed, kept beside the numbers. An earlier analysis in the folder is replaced.
    Raises ValueError, one sentence, for whatever of the options, the models or the inputs does not fit.
    """
    _check(options)
    device = chosen_device(options.device)
    models, folder, left_out = looked_at(options)
    _refuse_other(folder)
    analysis = Analysis(left_out=left_out)
    with _Display(console, models, options) as display:
        for model in models:
            display.begin(model)
            _look(analysis, model, options, device, display)
    if not analysis.models:
        raise ValueError(f"nothing could be looked into: {' '.join(analysis.left_out)}")
    where = environment(device)
    analysis.about = {
        # A folder by its own name.
        "title": ", ".join(Path(name).resolve().name if Path(name).is_dir() else name for name in options.models),
        "command": command,
        "shown": analysis.about["shown"],
        "unit": analysis.about["unit"],
        "spectrum_inputs": analysis.about["spectrum_inputs"],
        "causal": all(one["causal"] for one in analysis.models.values()),
        "tolerance": ROUNDING,
        "factors": list(FACTORS),
        "versions": where.versions,
        "commit": where.commit,
        "device": where.device,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_analysis(folder, analysis)
    section = read_section(folder)
    page = write_page(folder, section)
    report = report_above(folder, ANALYSIS)
    if report:
        # It has a section for it.
        write_report(report.parent)
    print_results(section, console)
    tell(console, f"Page: {page}")
    return page


def _look(analysis: Analysis, looked: Looked, options: Analyze, device: torch.device, display: "_Display") -> None:
    case = looked.case
    model = looked.build().to(device).eval()
    inputs = case.inputs()
    pictures = inputs.unit == IMAGES
    shown, labels = inputs.sampled()
    # A text has no heat maps.
    seen = shown[: max(options.spectrum_images, options.map_images if pictures else 0)]
    try:
        found = look_into(
            model, seen, device, pictures=pictures, maps=options.map_images, draw=looked.shown, passed=display.passed
        )
    except ValueError as error:
        analysis.left_out.append(f"{case.name}: {error}")
        return
    analysis.about.setdefault("shown", inputs.words)
    analysis.about.setdefault("unit", inputs.unit)
    analysis.about.setdefault("spectrum_inputs", len(seen))
    who = {"model": case.name, "label": case.label, "seed": case.seed}
    kept = ("label", "seed", "mechanism", "control", "folder_name", "weights")
    about = {key: getattr(case, key) for key in kept}
    about["layers_converted"] = "none" if case.mechanism == BASELINE else case.layers
    analysis.models[case.name] = about | found.about | {"shown": looked.shown, "notes": found.notes}
    analysis.spectrum += [who | row for row in found.spectrum]
    analysis.products += [who | row for row in found.products]
    analysis.logit_parts += [who | row for row in found.logit_parts]
    if looked.shown:
        analysis.arrays[case.name] = found.arrays
    if options.bandwidth_images and case.silent:
        found.notes.append(f"No bandwidth test: {case.silent}.")
    elif options.bandwidth_images:
        asked = shown[: options.bandwidth_images]
        test = _Bandwidth(asked, None if labels is None else labels[: len(asked)], pictures, options.batch_size)
        analysis.bandwidth += [who | row for row in test.rows(model, device, display.passed)]
        if looked.twice:
            conversion = convert(model, "twicing")
            label = f"{case.label}, twiced in every layer with the same weights"
            try:
                rows = test.rows(model, device, display.passed)
            finally:
                conversion.undo()
            analysis.bandwidth += [who | {"label": label} | row for row in rows]


@dataclass(frozen=True, eq=False)
class _Bandwidth:
    """What a model is asked with scaled logits: the classes of pictures, or the last token of each window of a text.

    labels: of the pictures; without them its own answer with unscaled logits is what is held against.
    """

    inputs: Tensor
    labels: Tensor | None
    pictures: bool
    batch_size: int

    def rows(self, model: nn.Module, device: torch.device, passed: Passed) -> list[dict[str, Any]]:
        """A row for each factor."""
        inputs = self.inputs.to(device)
        if not self.pictures:
            # The last token is what is asked for.
            found = log_probabilities_by_factor(
                model, inputs[:, :-1], inputs[:, -1], batch_size=self.batch_size, passed=passed
            )
            return _rows(LOG_PROBABILITY, found)
        answers = answers_by_factor(model, inputs, batch_size=self.batch_size, passed=passed)
        if self.labels is None:
            return _rows(AGREEMENT, answers == answers[FACTORS.index(1.0)])
        return _rows(ACCURACY, answers == self.labels)


def _rows(measure: str, values: Tensor) -> list[dict[str, Any]]:
    """Rows of the means over the inputs, values: [factors, n]."""
    return [
        {"factor": factor, "measure": measure, "value": value, "n": values.shape[1]}
        for factor, value in zip(FACTORS, values.double().mean(1).tolist(), strict=True)
    ]


def _check(options: Analyze) -> None:
    least = {"--spectrum-images": (options.spectrum_images, 1), "--map-images": (options.map_images, 0)}
    least |= {"--bandwidth-images": (options.bandwidth_images, 0), "--batch-size": (options.batch_size, 1)}
    least |= {"--tokens": (options.tokens, FEWEST_TOKENS)}
    for name, (given, fewest) in least.items():
        if given < fewest:
            raise ValueError(f"{name} is {fewest} or more: got {given}.")


def _refuse_other(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NUMBERS).exists():
        raise ValueError(f"{folder} is not empty and holds no analysis: name another folder with --out.")


class _Display:
    """The models together and the one at work, by inputs; plain lines where there is no terminal."""

    def __init__(self, console: Console, models: Sequence[Looked], options: Analyze):
        self._console, self._total, self._begun = console, len(models), 0
        self._each = max(options.spectrum_images, options.map_images)
        self._scaled = options.bandwidth_images * len(FACTORS)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bars.add_task("all models", total=len(models))
        self._one = self._bars.add_task("", total=1)

    def __enter__(self) -> "_Display":
        self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def begin(self, model: Looked) -> None:
        """The next model's turn."""
        self._bars.update(self._all, completed=self._begun)
        self._begun += 1
        total = self._each + self._scaled * (2 if model.twice else 1)
        self._bars.reset(self._one, total=total, description=model.case.name)
        if not self._console.is_terminal:
            tell(self._console, f"[{self._begun} of {self._total}] {model.case.name}")

    def passed(self, inputs: int) -> None:
        """So many inputs were shown."""
        self._bars.advance(self._one, inputs)
