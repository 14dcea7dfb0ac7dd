"""A made-up but realistic run folder. None of its numbers was measured; they exist to see whether a report is right."""

import json
import math
from pathlib import Path

import numpy as np

from twicing.experiments.results import (
    Correctness,
    Record,
    read_records,
    threat_key,
    write_predictions,
    write_records,
)

ACCURACY = "accuracy [share of images]"
EPS = ("1/64", "1/32", "1/16", "1/8", "1/4")
PRIMARY = [
    {
        "name": "PGD accuracy at eps 1/16",
        "metric": ACCURACY,
        "conditions": {"threat": "pgd", "eps": "1/16"},
        "better": "higher",
    },
    {"name": "clean accuracy", "metric": ACCURACY, "conditions": {"threat": "clean"}, "better": "higher"},
    {
        "name": "similarity after the last block",
        "metric": "mean pairwise cosine",
        "conditions": {"layer": 12, "where": "block output", "when": "trained"},
        "better": "neither",
    },
]
MEANING = {
    "standard": "softmax attention, A V.",
    "twicing": "Twicing attention, (2A - A^2) V, in every layer.",
    "smooth-more": "A^2 V: smooths more than attention does, where twicing smooths less.",
    "standard (other seeds)": "standard against standard with other seeds.",
    "standard-equal-time": "standard attention, trained for as many seconds as twicing.",
    "standard-wide": "standard attention, wider, with as many multiply-adds as twicing.",
    "two-attentions": "standard attention applied twice in every block.",
    "neutreno": "NeuTRENO in all layers.",
    "twicing [10-12]": "Twicing attention in the layers 10 to 12.",
    "twicing [1-12]": "Twicing attention in all layers.",
}
CONTROLS = ("standard-equal-time", "standard-wide", "two-attentions", "smooth-more", "standard (other seeds)")
TESTED = ("standard", "neutreno", "twicing [10-12]", "twicing [1-12]")
NINE = (*TESTED, *CONTROLS)
KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "contrast",
    "pixelate",
    "jpeg",
)
EPS50_PRIMARY = {
    "name": "eps50",
    "metric": "eps50 [share of pixel range]",
    "conditions": {"threat": "pgd"},
    "better": "higher",
}


def one_record(metric, value, seed=0, arm="standard", conditions=None, **changes):
    """One record by hand; its seconds and versions are values that no other number of a test has."""
    fields = {
        "n": 300,
        "recipe": "digits",
        "mechanism": "standard",
        "layers": "all",
        "spec": [],
        "versions": {"torch": "7.1", "numpy": "9.2"},
        "commit": "c0ffee",
        "device": "CPU, made up",
        "seconds": 777.0,
    }
    return Record(
        **(
            fields
            | {"metric": metric, "value": value, "seed": seed, "arm": arm, "conditions": conditions or {}}
            | changes
        )
    )


def one_by_seed(metric, values, arm="standard", conditions=None, **changes):
    """Records of the seeds 0, 1, 2, ... with these values."""
    return [one_record(metric, value, seed, arm, conditions, **changes) for seed, value in enumerate(values)]


def write_folder(folder, records, answers=(), **changes):
    """A run folder of records made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = tuple(dict.fromkeys(record.arm for record in records))
    seeds = sorted({record.seed for record in records})
    (folder / "config.json").write_text(json.dumps(make_config(arms, seeds) | changes))
    write_records(folder / "results.jsonl", records)
    if answers:
        write_predictions(folder / "predictions.npz", answers)
    return folder


def conditions_of(threat):
    if threat == "clean":
        return [{"threat": "clean"}]
    return [{"threat": threat, "sd" if threat == "noise" else "eps": eps} for eps in EPS]


def mechanism_of(arm):
    return "standard" if arm.startswith(("standard", "two")) else "neutreno" if arm == "neutreno" else "twicing"


def layers_of(arm):
    return arm.partition("[")[2].rstrip("]") or "all"


def make_attacks(arms=NINE, seeds=range(3), probes=200):
    """What the attacks and corruptions beyond FGSM and PGD leave, as records."""
    records = []
    for place, arm in enumerate(arms):
        for seed in seeds:
            own = np.random.default_rng([7, place, seed])
            base = 0.5 + 0.01 * own.normal() + (0.04 if arm == "twicing [1-12]" else 0.0)

            def add(metric, value, conditions, n=probes, *, arm=arm, seed=seed):
                fields = {"n": n, "mechanism": mechanism_of(arm), "layers": layers_of(arm)}
                records.append(one_record(metric, float(value), seed, arm, conditions, **fields))

            add("eps50 [share of pixel range]", base / 16, {"threat": "pgd"})
            add(ACCURACY, base - 0.02, {"threat": "autoattack", "eps": "1/16"}, 100)
            for eps in EPS[1:4]:
                add(ACCURACY, base + 0.05 - float(strength_of({"eps": eps})), {"threat": "spsa", "eps": eps}, 100)
            for other in arms:
                if other != arm:
                    add(ACCURACY, base + 0.2, {"threat": "transfer", "eps": "1/16", "from": other}, 300)
            total = []
            for number, kind in enumerate(KINDS):
                for severity in range(1, 6):
                    value = max(0.1, 0.95 - 0.03 * severity * (1 + number / 3) + 0.01 * own.normal())
                    total.append(value)
                    add(ACCURACY, value, {"threat": "corruption", "kind": kind, "severity": severity})
            add("mean corruption accuracy [share of images]", np.mean(total), {})
            for step in range(1, 7):
                compat = {"threat": "pgd, paper_compat (unverified)", "eps": f"{step}/255 normalised"}
                add(ACCURACY, base / step, compat)
    return records


def make_verdicts(arms=NINE, seeds=(0, 1), failed=("two-attentions",)):
    """verdicts.json: the arms in `failed` fail one check on seed 0."""

    def one(arm, seed):
        blind = arm in failed and seed == 0
        checks = [
            {"name": "longer attack", "passed": True, "seen": "PGD-100 with 5 restarts leaves 31 of 100 images right"},
            {"name": "SPSA", "passed": not blind, "seen": f"SPSA leaves {20 if blind else 35} of 100 images right"},
        ]
        return {"passed": not blind, "eps": "1/16", "images": 100, "sentence": "made up", "checks": checks}

    return {arm: {str(seed): one(arm, seed) for seed in seeds} for arm in arms}


def make_nine(folder, seeds=range(3), failed=("two-attentions",), **changes):
    """A run folder of nine arms that has everything that a report knows of."""
    primary = [EPS50_PRIMARY, PRIMARY[1], PRIMARY[2]]
    recipe = {"epochs": 8, "std": [0.25], "folds": 6}
    make_run_folder(folder, NINE, seeds, **{"primary": primary, "recipe": recipe} | changes)
    records = read_records(folder / "results.jsonl")
    write_records(folder / "results.jsonl", [*records, *make_attacks(NINE, seeds)])
    (folder / "verdicts.json").write_text(json.dumps(make_verdicts(failed=failed)))
    return folder


def make_records(arms=("standard", "twicing"), seeds=range(6), epochs=8, layers=12, images=300):
    records, answers = [], []
    for place, arm in enumerate(arms):
        for seed in seeds:
            # The seed's own luck is shared by the arms, as real pairs share images and weights; the rest is the arm's.
            luck = np.random.default_rng(seed).normal()
            own = np.random.default_rng([place + 1, seed])

            def add(metric, value, conditions, n=images, *, arm=arm, seed=seed):
                records.append(
                    Record(
                        metric=metric,
                        value=float(value),
                        n=n,
                        seed=seed,
                        arm=arm,
                        recipe="digits",
                        mechanism=mechanism_of(arm),
                        layers=layers_of(arm),
                        spec=[],
                        conditions=conditions,
                        versions={"torch": "0.0"},
                        commit=None,
                        device="CPU, made up",
                        seconds=0.5,
                    )
                )

            correct = {}
            for threat, steep in (("clean", 0), ("noise", 3.0), ("fgsm", 9.0), ("pgd", 14.0)):
                for conditions in conditions_of(threat):
                    size = float(strength_of(conditions))
                    bonus = 0.08 if arm == "twicing" and threat == "fgsm" else 0.0
                    share = 0.962 * math.exp(-steep * size * (1 + 3 * size)) + bonus * min(1, 16 * size)
                    share = min(1.0, max(0.0, share + 0.012 * luck * (threat != "clean") + 0.008 * own.normal()))
                    right = own.permutation(images) < round(share * images)
                    correct[threat_key(conditions)] = right
                    add(ACCURACY, right.mean(), conditions)
            answers.append(Correctness(arm, seed, np.arange(seed * images, (seed + 1) * images), correct))
            for when in ("initialisation", "trained"):
                for where in ("attention output", "block output"):
                    for layer in range(1, layers + 1):
                        end = (
                            0.95
                            if when == "initialisation"
                            else {"twicing": 0.25, "twicing [1-12]": 0.25, "smooth-more": 0.92}.get(arm, 0.65)
                        )
                        cosine = 0.3 + (end - 0.3) * layer / layers + 0.02 * luck + 0.02 * own.normal()
                        at = {"layer": layer, "where": where, "when": when}
                        add("mean pairwise cosine", cosine, at)
                        add("distance to the mean token", math.sqrt(max(0.0, 1 - cosine)), at)
                        add("effective rank of centred tokens", 7 - 0.2 * layer + 0.3 * own.normal(), at)
            step = {"standard": 0.021, "standard (other seeds)": 0.021}.get(arm, 0.031) * (1 + 0.01 * own.normal())
            add("training time [s per step]", step, {})
            for epoch in range(1, epochs + 1):
                add("training loss [nats]", 2.3 * math.exp(-0.5 * epoch) + 0.01 * own.random(), {"epoch": epoch})
                held_out = 0.965 - 0.85 * math.exp(-0.6 * epoch) + 0.008 * own.normal()
                add("held-out accuracy [share of images]", held_out, {"epoch": epoch})
                add("training time [s]", step * 24 * epoch, {"epoch": epoch})
    return records, answers


def strength_of(conditions):
    top, _, bottom = str(conditions.get("eps", conditions.get("sd", "0/1"))).partition("/")
    return int(top) / int(bottom)


def make_config(arms=("standard", "twicing"), seeds=range(6), **changes):
    config = {
        "name": "made-up",
        "recipe_name": "digits",
        "title": "Standard and twicing attention on handwritten digits",
        "limits": "smoke demonstration: 1,797 images of 8 x 8 pixels; it says nothing about ImageNet.",
        "recipe": {"epochs": 8, "batch_size": 64, "attack": {"steps": 40, "eps": list(EPS), "restarts": 2}},
        "arms": [
            {
                "label": arm,
                "mechanism": mechanism_of(arm),
                "layers": layers_of(arm),
                "options": {"gain": -1.0} if arm == "smooth-more" else {},
                "control": arm in CONTROLS,
                "meaning": MEANING.get(arm, "An arm of this test."),
            }
            for arm in arms
        ],
        "seeds": list(seeds),
        "primary": PRIMARY,
        "headline": {"threat": "pgd"},
        "command": "twicing compare digits --mechanisms standard twicing --seeds 6",
        "versions": {"python": "3.11.2", "torch": "0.0"},
        "commit": None,
        "device": "CPU, made up",
        "jobs": 2,
        "started": "2000-01-01T00:00:00",
    }
    return config | changes


def make_run_folder(folder: Path, arms=("standard", "twicing"), seeds=range(6), keep=None, predictions=True, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    records, answers = make_records(arms, seeds)
    (folder / "config.json").write_text(json.dumps(make_config(arms, seeds, **changes)))
    write_records(folder / "results.jsonl", [record for record in records if keep is None or keep(record)])
    if predictions:
        write_predictions(folder / "predictions.npz", answers)
    return folder
