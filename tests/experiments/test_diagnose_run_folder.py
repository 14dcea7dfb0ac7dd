"""twicing diagnose on a run folder: its arms and seeds, against weights that its recipe draws, on held-out images."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from twicing.adapters.surgery import spec
from twicing.analysis.collapse import CURVES, measure_collapse
from twicing.experiments.arms import Arm
from twicing.experiments.diagnose.cases import cases_of
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.run import run
from twicing.experiments.job import part_file
from twicing.experiments.plan import Plan, open_folder
from twicing.experiments.results import environment, write_json
from twicing.experiments.vision_job import converted_model
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained, train_classifier
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import load_split

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

RECIPE = apply_settings(digits(), ["epochs=1", "depth=2", "width=16", "heads=2", "batch_size=128"])
ARMS = (
    Arm("standard", "standard", "all", ""),
    Arm("twicing [2]", "twicing", "2", "", {"gain": 0.5}),
    Arm("standard (other seeds)", "standard", "all", "", control=True, seed_offset=100_000),
)
TRAINED = (("standard", 0), ("twicing [2]", 0), ("twicing [2]", 1), ("standard (other seeds)", 0))
INPUTS = 10


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plan = Plan(RECIPE, ARMS, (0, 1))
    open_folder(folder, plan, "twicing compare", 1, environment(), "now")
    for job in plan.jobs(folder):
        if (job.arm.label, job.seed) in TRAINED:
            draw_seed = job.seed + job.arm.seed_offset
            job.folder.mkdir()
            split = load_split(RECIPE, job.seed)
            train_classifier(converted_model(job, draw_seed), RECIPE, split, draw_seed, job.folder, lambda _: None)
            write_json(part_file(job, "training"), {})
    return folder


def job_of(run_folder, label, seed):
    jobs = Plan(RECIPE, ARMS, (0, 1)).jobs(run_folder)
    return next(job for job in jobs if (job.arm.label, job.seed) == (label, seed))


def options_for(run_folder, **changes):
    return replace(Diagnose(str(run_folder), inputs=INPUTS, draws=2, device="cpu"), **changes)


def test_arms_of_the_first_seed_are_taken_and_the_rest_is_named(run_folder):
    cases, folder, notes = cases_of(options_for(run_folder))
    assert [case.name for case in cases] == [
        "standard, seed 0",
        "twicing [2], seed 0",
        "standard (other seeds), seed 0",
    ]
    assert folder == run_folder / "diagnosis"
    # Checkpoints know their seed, which the control's arm has moved.
    assert not any(case.build().training for case in cases)
    assert notes == [
        "Not trained yet, and left out: standard (other seeds), seed 1, standard, seed 1.",
        "Only seed 0 is shown: the run has 0, 1, see --seeds.",
    ]
    cases, _, notes = cases_of(options_for(run_folder, arms=("twicing [2]",), seeds=(1, 0)))
    assert [case.name for case in cases] == ["twicing [2], seed 0", "twicing [2], seed 1"]
    assert len(notes) == 1


def test_it_is_measured_on_the_images_that_the_seed_held_out(run_folder):
    (case,), _, _ = cases_of(options_for(run_folder, arms=("twicing [2]",), seeds=(1,)))
    split = load_split(RECIPE, 1)
    expected = split.test.load(balanced_order(split.test.labels)[:INPUTS].tolist())
    assert torch.equal(case.inputs().load(range(INPUTS)), expected)
    assert torch.equal(torch.cat(list(case.inputs().batches(3, torch.device("cpu")))), expected)
    assert case.inputs().words == "10 images that were held out from training, every class in its share"


def test_the_trained_model_stands_beside_fresh_weights_of_its_arm(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("twicing.experiments.diagnose.run.diagnosis_page", lambda *_: "")
    run(
        options_for(run_folder, arms=("twicing [2]", "standard"), out=tmp_path), "twicing diagnose", Console(quiet=True)
    )
    models = json.loads((tmp_path / "diagnosis.json").read_text())["models"]
    assert [(one["label"], one["seed"]) for one in models] == [("standard", 0), ("twicing [2]", 0)]
    job = job_of(run_folder, "twicing [2]", 0)
    trained = converted_model(job, 0)
    load_trained(trained, 0, job.folder)
    split = load_split(RECIPE, 0)
    images = split.test.load(balanced_order(split.test.labels)[:INPUTS].tolist())
    expected = measure_collapse(trained.eval(), [images])
    # The seeds of the draws are those after --seed.
    draws = [measure_collapse(converted_model(job, seed).eval(), [images]) for seed in (1, 2)]
    curves = {(e["weights"], e["where"], e["metric"], e["layer"]): e for e in models[1]["curves"]}
    for key in CURVES:
        for layer in (1, 2):
            own = float(expected.values[key][:, layer - 1].mean())
            assert curves["model", *key, layer]["mean"] == pytest.approx(own, rel=1e-6)
            alone = [float(one.values[key][:, layer - 1].mean()) for one in draws]
            assert curves["random initialisation", *key, layer]["draws"] == pytest.approx(alone, rel=1e-6)


def test_page_and_report_link_each_other(run_folder, tmp_path, monkeypatch):
    copied = tmp_path / "run"
    shutil.copytree(run_folder, copied)
    written = []

    def seen(folder):
        # A link is only to what is there.
        written.append((folder, (folder / "diagnosis" / "diagnosis.html").exists()))

    monkeypatch.setattr("twicing.experiments.diagnose.run.write_report", seen)
    options = options_for(copied, arms=("standard",), inputs=4, draws=1)
    assert "report.html" not in run(options, "", Console(quiet=True)).read_text()
    assert written == []
    (copied / "report.html").write_text("")
    assert '<a href="../report.html">' in run(options, "", Console(quiet=True)).read_text()
    assert written == [(copied, True)]
    elsewhere = run(replace(options, out=copied / "again"), "", Console(quiet=True))
    assert "report.html" not in elsewhere.read_text()
    assert len(written) == 1


def test_an_arm_that_the_library_cannot_look_into_is_left_out_with_its_reason(run_folder, monkeypatch):
    from twicing.experiments.cases import run_folder as module

    real = module.find_sites

    def unknown_where_converted(model):
        if spec(model):
            raise ValueError("The attention of PixelModel is not known to the library.")
        return real(model)

    monkeypatch.setattr(module, "find_sites", unknown_where_converted)
    cases, _, notes = cases_of(options_for(run_folder))
    assert [case.label for case in cases] == ["standard", "standard (other seeds)"]
    assert notes[-1] == "twicing [2], seed 0 is left out: The attention of PixelModel is not known to the library."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": ("twicing",)}, r"has no trained arm 'twicing': .*twicing \[2\]"),
        ({"seeds": (7,)}, "has no trained seed 7: it has 0, 1"),
        ({"seeds": (1,), "arms": ("standard",)}, "nothing is left to diagnose"),
        ({"convert": "twicing"}, "is a run folder, whose models have weights.*leave --convert out"),
    ],
)
def test_what_does_not_fit_is_told(run_folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        cases_of(options_for(run_folder, **changes))
