"""What a comparison is, as a value: recipe, arms and seeds. It is kept in config.json, and a folder holds one only."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from twicing.experiments.arms import Arm
from twicing.experiments.results import Environment, read_json, write_json
from twicing.training.hardware import Hardware
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.recipe import Recipe

AnyRecipe = Recipe | LanguageRecipe

CONFIG = "config.json"


@dataclass(frozen=True)
class Resources:
    """Where the data lie and what trainings run on: none of it is part of what is compared.

    data_dir: what --data-dir named. cache: where decoded images are kept.
    """

    data_dir: Path | None = None
    cache: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)

    @property
    def device(self) -> torch.device:
        """What models are evaluated on: the GPU where trainings may use one and there is one."""
        wanted = self.hardware.accelerator
        return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """One training and its evaluation: an arm and a seed. Seed k holds out fold k.

    recipe: as the arm follows it. place: which of the comparison's seeds it is, counted from 0.
    others: label -> folder of the seed's other arms.
    """

    recipe: AnyRecipe
    arm: Arm
    seed: int
    folder: Path
    place: int = 0
    others: Mapping[str, Path] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)

    @property
    def name(self) -> str:
        """What progress and errors call it."""
        return f"{self.arm.label}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison: every arm is trained with every seed. With the same machine and versions it decides all numbers."""

    recipe: AnyRecipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("a comparison needs at least one seed: got none.")

    def jobs(self, folder: Path, resources: Resources | None = None) -> list[Job]:
        """All trainings, in the order in which they are started.

        Arms vary fastest, so that a seed's pair is complete before the next seed starts. The baseline comes last, as it
        is the quickest: with the longest job started last, all cores but one would wait for it.
        """
        jobs = []
        for place, seed in enumerate(self.seeds):
            folders = {arm.label: folder / f"{arm.folder_name}-seed{seed}" for arm in self.arms}
            for arm in reversed(self.arms):
                others = {label: other for label, other in folders.items() if label != arm.label}
                own = folders[arm.label]
                jobs.append(Job(arm.recipe(self.recipe), arm, seed, own, place, others, resources or Resources()))
        return jobs

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers, as JSON holds it."""
        recipe = dataclasses.asdict(self.recipe)
        del recipe["title"]
        plan = {
            "name": self.recipe.name,
            "recipe_name": self.recipe.name,
            "title": self.recipe.headline,
            "limits": recipe.pop("limits"),
            "primary": [self._with_layer_number(primary) for primary in recipe.pop("primary")],
            "recipe": recipe,
            "arms": [arm.as_json() for arm in self.arms],
            "seeds": self.seeds,
        }
        return json.loads(json.dumps(plan))

    def _with_layer_number(self, primary: dict[str, Any]) -> dict[str, Any]:
        conditions = {
            key: self.recipe.depth if value == "last" else value for key, value in primary["conditions"].items()
        }
        return primary | {"conditions": conditions}


def open_folder(
    folder: Path,
    plan: Plan,
    command: str,
    jobs: int,
    environment: Environment,
    started: str,
    resources: Resources | None = None,
) -> str | None:
    """Make the run folder with its config.json, or check that the one that is there is of the same plan.

    Returns a sentence where it was begun with other versions or another commit of this library, else None.
    Raises ValueError where it holds another comparison, saying in what it differs, or something else altogether.
    """
    path = folder / CONFIG
    if path.exists():
        found = read_json(path, remedy="name another folder with --out")
        if not isinstance(found, dict):
            raise ValueError(f"{path} is not of a comparison: name another folder with --out.")
        difference = first_difference(found, plan.identity())
        if difference:
            raise ValueError(
                f"{folder} holds another comparison ({difference}): "
                "name another folder with --out, or give the command that made it to go on."
            )
        here = {"versions": environment.versions, "commit": environment.commit}
        difference = first_difference({"versions": {}, "commit": None} | found, here)
        return difference and f"{folder} was begun elsewhere ({difference}): numbers may differ in their last digits."
    if folder.exists() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no comparison: name another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "command": command,
        "jobs": jobs,
        "data_dir": str(resources.data_dir.absolute()) if resources and resources.data_dir else None,
        "hardware": dataclasses.asdict(resources.hardware) if resources else None,
        "versions": environment.versions,
        "commit": environment.commit,
        "device": environment.device,
        "started": started,
    }
    write_json(path, plan.identity() | where)
    return None


def first_difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first thing of `wanted` that `found` has otherwise, in words; None where there is none."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            if key not in found:
                return f"{where}{key} is missing there"
            difference = first_difference(found[key], value, f"{where}{key}.")
            if difference:
                return difference
        return None
    if found == wanted:
        return None
    return f"{where.rstrip('.')}: {_short(found)} there, {_short(wanted)} here"


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(str(entry.get("label", entry)) for entry in value)
    return json.dumps(value)
