"""The arms and seeds of a run folder that are diagnosed."""

from pathlib import Path

from twicing.experiments.cases.case import Case, refuse
from twicing.experiments.cases.run_folder import OF_OTHERS, OWN, hidden, job_case
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.trained import trained_jobs
from twicing.names import few, listed


def run_folder_cases(run: Path, options: Diagnose) -> tuple[list[Case], list[str]]:
    """The arms and seeds that the options name, and what is left out, in sentences.

    Raises ValueError for an unknown arm or seed, a folder of something else, or one without a trained model.
    """
    refuse(options, OF_OTHERS, f"{run} {OWN}")
    jobs, untrained = trained_jobs(run, options.data_dir)
    notes = [f"Not trained yet, and left out: {few(untrained)}."] if untrained else []
    labels = list(dict.fromkeys(job.arm.label for job in jobs))
    seeds = sorted({job.seed for job in jobs})
    for label in options.arms:
        if label not in labels:
            raise ValueError(f"{run} has no trained arm {label!r}: {listed(label, labels)}")
    for seed in options.seeds:
        if seed not in seeds:
            raise ValueError(f"{run} has no trained seed {seed}: it has {', '.join(map(str, seeds))}.")
    wanted = options.seeds or seeds[:1]
    if not options.seeds and len(seeds) > 1:
        notes.append(f"Only seed {seeds[0]} is shown: the run has {few(list(map(str, seeds)))}, see --seeds.")
    cases = []
    for job in jobs:
        if job.seed not in wanted or (options.arms and job.arm.label not in options.arms):
            continue
        reason = hidden(job)
        if reason:
            notes.append(f"{job.name} is left out: {reason}")
        else:
            cases.append(job_case(job, options.inputs, answers=False))
    if not cases:
        raise ValueError(f"nothing is left to diagnose in {run}. {' '.join(notes)}")
    return cases, notes
