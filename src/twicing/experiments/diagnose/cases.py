"""What is diagnosed: a model, how its random initialisation is drawn anew, and what it is shown."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from twicing.adapters.surgery import convert, spec
from twicing.experiments.diagnose.inputs import Inputs, picture_inputs
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.pretrained import timm_subject
from twicing.experiments.evaluate.subjects import Subject
from twicing.experiments.plan import CONFIG
from twicing.experiments.results import BASELINE
from twicing.training.settings import parse_options

DIAGNOSIS = "diagnosis"


@dataclass(frozen=True)
class Case:
    """One model. label, seed, mechanism, layers, weights: what it is, in words and digits.

    build: the model, in eval mode; it takes one tensor. draw: the same architecture and conversion with weights drawn
    from this seed. inputs: what it is shown.
    """

    label: str
    seed: int | None
    mechanism: str
    layers: str
    weights: str
    folder_name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], nn.Module]
    inputs: Callable[[], Inputs]

    @property
    def name(self) -> str:
        """What the page and progress call it."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def cases_of(options: Diagnose) -> tuple[list[Case], Path, list[str]]:
    """The models that the options name, the folder for what is found, and what is left out, in sentences.

    Raises ValueError where options do not fit together or a model cannot be made.
    """
    folder = Path(options.model)
    if folder.is_dir():
        kind = _kind(folder)
        if kind == "transformers":
            from twicing.experiments.diagnose.hugging_face import hugging_face_case

            case = hugging_face_case(folder, options)
            return [case], options.out or Path("runs") / f"diagnose-{case.folder_name}", []
        from twicing.experiments.diagnose.run_folder import run_folder_cases

        cases, notes = run_folder_cases(folder, options)
        return cases, options.out or folder / DIAGNOSIS, notes
    case, notes = _timm_case(options)
    return [case], options.out or Path("runs") / f"diagnose-{case.folder_name}", notes


def refuse(options: Diagnose, names: tuple[str, ...], why: str) -> None:
    """Raise ValueError where one of these options was given."""
    standard = Diagnose(options.model)
    wrong = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(standard, name)]
    if wrong:
        raise ValueError(f"{options.model} is {why}: leave {', '.join(wrong)} out.")


def drawn(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes with PyTorch's random state set to the seed, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def converted(model: nn.Module, options: Diagnose) -> nn.Module:
    """The model with the mechanism that --convert names, if it names one."""
    if not options.convert:
        if options.layers != "all" or options.options:
            raise ValueError("--layers and --options are of a mechanism: name it with --convert.")
        return model
    try:
        convert(model, options.convert, layers=options.layers, options=parse_options(options.options))
    except TypeError as error:
        raise ValueError(f"The mechanism {options.convert!r} cannot be built: {error}") from error
    return model


def follow(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model, converted as the other one is."""
    if spec(like):
        convert(model, spec=spec(like))
    return model


def _kind(folder: Path) -> str:
    """Whose config.json the folder holds: "transformers" or "ours"."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is a folder without {CONFIG}: name the run folder of a comparison or training, or the folder "
            "that transformers saved a model into."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): name another folder.") from error
    return "transformers" if isinstance(config, dict) and "model_type" in config else "ours"


def _timm_case(options: Diagnose) -> tuple[Case, list[str]]:
    refuse(options, ("text", "tokens", "arms", "seeds", "data_dir"), "a model of timm")
    if parse_options(options.model_args).get("in_chans", 3) != 3:
        raise ValueError("pictures have three colours: leave in_chans out of --model-args.")
    plain = Evaluate(options.model, model_args=options.model_args, seed=options.seed)
    asked = dataclasses.replace(
        plain, mechanism=options.convert or BASELINE, layers=options.layers, options=options.options
    )
    subject = _timm(dataclasses.replace(asked, checkpoint=options.checkpoint, pretrained=options.pretrained))

    def draw(seed: int) -> nn.Module:
        model = _timm(dataclasses.replace(plain, seed=seed)).build()
        # A checkpoint of ours may have brought its conversion along.
        drawn(seed, lambda: follow(model, subject.build()))
        return model.eval()

    inputs = picture_inputs(options.images, options.inputs, subject.image_size, options.seed)
    trained = options.checkpoint is not None or options.pretrained
    notes = [] if trained else ["The weights are random: give --checkpoint FILE or --pretrained for a trained model."]
    case = Case(
        label=subject.label,
        seed=None,
        mechanism=subject.mechanism,
        layers=subject.layers,
        weights=subject.weights,
        folder_name=subject.folder_name,
        build=subject.build,
        draw=draw,
        inputs=lambda: inputs,
    )
    return case, notes


def _timm(options: Evaluate) -> Subject:
    try:
        return timm_subject(options)
    except ValueError as error:
        # Its sentences name the option of `twicing evaluate`, and do not know folders of transformers.
        sentence = str(error).replace("--mechanism", "--convert").replace("to evaluate", "to diagnose")
        raise ValueError(
            sentence.replace("neither a run folder (with a config.json) nor", "neither a folder nor")
        ) from error
