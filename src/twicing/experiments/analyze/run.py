"""`twicing analyze`: look into every model that the options name, write the page and the numbers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from twicing.adapters.surgery import convert
from twicing.analysis.bandwidth import FACTORS, answers_by_factor
from twicing.analysis.spectrum import ROUNDING
from twicing.experiments.analyze.keep import ANALYSIS, NUMBERS, Analysis, write_analysis
from twicing.experiments.analyze.measure import look_into
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.page import print_results, read_section, write_page
from twicing.experiments.analyze.pictures import Pictures
from twicing.experiments.analyze.subjects import Looked, looked_at
from twicing.experiments.report import REPORT, write_report
from twicing.experiments.results import BASELINE, environment


def run(options: Analyze, command: str, console: Console) -> Path:
    """Look into what the options name and return the page, analysis.html; nothing is kept of an interrupted run.

    command: what was typed, kept beside the numbers. An earlier analysis in the folder is replaced.
    Raises ValueError, one sentence, for whatever of the options, the models or the pictures does not fit.
    """
    _check(options)
    device = _device(options.device)
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
        "title": ", ".join(options.models),
        "command": command,
        "pictures": analysis.about["pictures"],
        "spectrum_images": analysis.about["spectrum_images"],
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
    if folder.name == ANALYSIS and (folder.parent / REPORT).exists():
        # The comparison's report has a section for it.
        write_report(folder.parent)
    print_results(section, console)
    _tell(console, f"Page: {page}")
    return page


def _look(analysis: Analysis, looked: Looked, options: Analyze, device: torch.device, display: "_Display") -> None:
    subject = looked.subject
    model = looked.build().to(device).eval()
    pictures = looked.pictures(max(options.spectrum_images, options.map_images, options.bandwidth_images))
    seen = pictures.pixels[: max(options.spectrum_images, options.map_images)]
    try:
        found = look_into(model, seen, device, maps=options.map_images, draw=looked.shown, passed=display.passed)
    except ValueError as error:
        analysis.left_out.append(f"{looked.name}: {error}")
        return
    analysis.about.setdefault("pictures", pictures.words)
    analysis.about.setdefault("spectrum_images", len(seen))
    who = {"model": looked.name, "label": subject.label, "seed": subject.seed}
    about = subject.as_json()
    converted = about.pop("layers")
    about["layers_converted"] = "none" if subject.mechanism == BASELINE else converted
    analysis.models[looked.name] = about | found.about | {"shown": looked.shown, "notes": found.notes}
    analysis.spectrum += [who | row for row in found.spectrum]
    analysis.products += [who | row for row in found.products]
    analysis.logit_parts += [who | row for row in found.logit_parts]
    if looked.shown:
        analysis.arrays[looked.name] = found.arrays
    if options.bandwidth_images:
        _scale(analysis, model, pictures, who, options, device, display)
        if looked.twice:
            conversion = convert(model, "twicing")
            label = f"{subject.label}, twiced in every layer with the same weights"
            try:
                _scale(analysis, model, pictures, who | {"label": label}, options, device, display)
            finally:
                conversion.undo()


def _scale(
    analysis: Analysis,
    model: nn.Module,
    pictures: Pictures,
    who: dict[str, object],
    options: Analyze,
    device: torch.device,
    display: "_Display",
) -> None:
    images = pictures.pixels[: options.bandwidth_images].to(device)
    answers = answers_by_factor(model, images, batch_size=options.batch_size, passed=display.passed)
    labels = answers[FACTORS.index(1.0)] if pictures.labels is None else pictures.labels[: len(images)]
    measure = "agreement" if pictures.labels is None else "accuracy"
    right = (answers == labels).double().mean(1).tolist()
    analysis.bandwidth += [
        who | {"factor": factor, "measure": measure, "value": value, "n": len(images)}
        for factor, value in zip(FACTORS, right, strict=True)
    ]


def _check(options: Analyze) -> None:
    least = {"--spectrum-images": (options.spectrum_images, 1), "--map-images": (options.map_images, 0)}
    least |= {"--bandwidth-images": (options.bandwidth_images, 0), "--batch-size": (options.batch_size, 1)}
    for name, (given, fewest) in least.items():
        if given < fewest:
            raise ValueError(f"{name} is {fewest} or more: got {given}.")


def _refuse_other(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NUMBERS).exists():
        raise ValueError(f"{folder} is not empty and holds no analysis: name another folder with --out.")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is cpu, cuda or auto: got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use cpu.")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def _tell(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


class _Display:
    """The models together and the one at work, by images; plain lines where there is no terminal."""

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
        self._bars.reset(self._one, total=total, description=model.name)
        if not self._console.is_terminal:
            _tell(self._console, f"[{self._begun} of {self._total}] {model.name}")

    def passed(self, images: int) -> None:
        """So many images were shown."""
        self._bars.advance(self._one, images)
