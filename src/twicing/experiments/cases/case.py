"""One model that is looked into: how it is built, how its random initialisation is drawn anew, what it is shown."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twicing.adapters.surgery import convert, spec
from twicing.experiments.cases.inputs import Inputs
from twicing.experiments.plan import CONFIG
from twicing.training.settings import parse_options


@dataclass(frozen=True)
class Case:
    """One model. label, seed, mechanism, layers, control, weights: what it is, in words and digits.

    build: the model, in eval mode; it takes one tensor. draw: the same architecture and conversion with weights drawn
    from this seed. inputs: what it is shown. silent: why it gives no scores of classes or of the next word, as a
    clause; "" where it gives them, [B, scores].
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
    control: bool = False
    silent: str = ""

    @property
    def name(self) -> str:
        """What the page and progress call it."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class Put:
    """The mechanism that --convert puts into a model, where, and its options as they were typed; "" for none."""

    mechanism: str = ""
    layers: str = "all"
    options: tuple[str, ...] = ()


def folder_kind(folder: Path) -> str:
    """Whose config.json the folder holds: "transformers", or "ours" of a comparison or training.

    Raises ValueError where there is none, or it is not JSON.
    """
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


def refuse(options: Any, names: tuple[str, ...], what: str) -> None:
    """Raise ValueError where one of these options of a command, a dataclass, was given. what: is named, and why not."""
    standard = {field.name: field.default for field in dataclasses.fields(options)}
    wrong = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != standard[name]]
    if wrong:
        raise ValueError(f"{what}: leave {', '.join(wrong)} out.")


def drawn(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes with PyTorch's random state set to the seed, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def put_in(model: nn.Module, put: Put) -> nn.Module:
    """The model with the mechanism in it. Raises ValueError where it does not fit, or is not named."""
    if not put.mechanism:
        if put.layers != "all" or put.options:
            raise ValueError("--layers and --options are of a mechanism: name it with --convert.")
        return model
    try:
        convert(model, put.mechanism, layers=put.layers, options=parse_options(put.options))
    except TypeError as error:
        raise ValueError(f"The mechanism {put.mechanism!r} cannot be built: {error}") from error
    return model


def follow(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model, converted as the other one is."""
    if spec(like):
        convert(model, spec=spec(like))
    return model
