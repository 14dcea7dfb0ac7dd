"""The trainings of a run folder, of images or of text, as its config.json has them."""

import dataclasses
from pathlib import Path
from typing import Any

from twicing.experiments.arms import Arm
from twicing.experiments.job import part_file
from twicing.experiments.plan import CONFIG, Job, Plan, Resources, first_difference
from twicing.experiments.programmes import find_any_recipe
from twicing.experiments.results import read_json
from twicing.experiments.run import DATA_CACHE
from twicing.training.checkpoint import CHECKPOINT


def trained_jobs(run: Path, data_dir: Path | None) -> tuple[list[Job], list[str]]:
    """Every training that is finished, in the order of the arms, and the names of those that are not.

    data_dir: where the recipe's data are now; by default where they were.
    Raises ValueError where the folder is of something else or another version, or holds no trained model.
    """
    config = read_json(run / CONFIG, remedy="name another folder")
    if isinstance(config, dict) and "model_type" in config:
        raise ValueError(
            f"{run} is a folder of transformers, and no run folder of compare or train: diagnose and analyze take it."
        )
    try:
        recipe = _rebuilt(find_any_recipe(config["recipe_name"]), config["recipe"])
        plan = Plan(recipe, tuple(Arm(**arm) for arm in config["arms"]), tuple(config["seeds"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run / CONFIG} is not of a comparison or training of this version ({error!r}): name another folder."
        ) from error
    wanted = {key: value for key, value in plan.identity().items() if key in ("recipe", "arms", "seeds")}
    difference = first_difference(config, wanted)
    if difference:
        raise ValueError(f"{run} was made by another version of twicing ({difference}): use that one.")
    where = data_dir or (Path(config["data_dir"]) if config.get("data_dir") else None)
    jobs = plan.jobs(run, Resources(where, cache=run / DATA_CACHE))
    trained = [job for job in jobs if part_file(job, "training").exists() and (job.folder / CHECKPOINT).exists()]
    if not trained:
        raise ValueError(f"{run} holds no trained model yet: give the command that made it to go on.")
    # In the order of the arms, not of the trainings.
    places = {arm.label: place for place, arm in enumerate(plan.arms)}
    trained.sort(key=lambda job: (places[job.arm.label], job.seed))
    return trained, [job.name for job in jobs if job not in trained]


def _rebuilt(config: Any, values: dict[str, Any]) -> Any:
    """The recipe with the values that a config.json keeps; its parts are dataclasses again, its lists tuples."""
    changes = {}
    for name, value in values.items():
        old = getattr(config, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(old):
            changes[name] = _rebuilt(old, value)
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **changes)
