"""Arms, controls and plans: what is compared with what."""

import io

import pytest
import torch
from rich.console import Console

from twicing.experiments.arms import Arm, arms_of
from twicing.experiments.job import PARTS
from twicing.experiments.plan import Plan, first_difference
from twicing.experiments.progress import JobProgress
from twicing.ops.reference import attention_matrix
from twicing.training.classification import build_model
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings

SMALL = apply_settings(digits(), ["depth=2", "width=16", "heads=2"])


def test_standard_comes_first_and_controls_last():
    labels = [arm.label for arm in arms_of(["twicing"], "all", controls=True)]
    assert labels == ["standard", "twicing", "smooth-more", "standard (other seeds)"]
    assert [arm.control for arm in arms_of(["twicing"], "all", controls=True)] == [False, False, True, True]
    assert [arm.label for arm in arms_of(["standard", "twicing"], "all", controls=False)] == ["standard", "twicing"]


def test_standard_is_the_untouched_model():
    arm = arms_of(["twicing"], "all", controls=False)[0]
    model = build_model(SMALL, 0)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in arm.apply(model).modules()] == kinds


def test_smooth_more_is_a_squared():
    arm = next(arm for arm in arms_of(["twicing"], "2", controls=True) if arm.label == "smooth-more")
    model = arm.apply(build_model(SMALL, 0)).double()
    mechanism = model.network.blocks[1].attn.twicing_mechanism
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    matrix = attention_matrix(query, key)
    torch.testing.assert_close(mechanism(query, key, value), matrix @ (matrix @ value))
    assert arm.control


def test_the_noise_floor_has_other_weights_and_the_same_images():
    plan = Plan(SMALL, tuple(arms_of(["twicing"], "all", controls=True)), (0, 1))
    floor = plan.arms[-1]
    assert floor.mechanism == "standard"
    assert floor.seed_offset > 1000
    offsets = {arm.label: arm.seed_offset for arm in plan.arms[:-1]}
    assert set(offsets.values()) == {0}


def test_every_job_has_a_folder_of_its_own(tmp_path):
    plan = Plan(SMALL, tuple(arms_of(["twicing"], "all", controls=True)), (0, 1, 2))
    jobs = plan.jobs(tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 12
    assert [(job.arm.label, job.seed) for job in jobs[:5]] == [
        ("standard (other seeds)", 0),
        ("smooth-more", 0),
        ("twicing", 0),
        ("standard", 0),
        ("standard (other seeds)", 1),
    ]


def test_the_deepest_layer_is_filled_in():
    plan = Plan(SMALL, tuple(arms_of(["twicing"], "all", controls=False)), (0,))
    layers = [p["conditions"]["layer"] for p in plan.identity()["primary"] if "layer" in p["conditions"]]
    assert layers == [2]
    assert plan.identity()["title"].startswith("a vision transformer of 2 layers")


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1, "more": 2}, {"a": 1}, None),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b: 1 there, 2 here"),
        ({}, {"a": 1}, "a is missing there"),
        ({"arms": [{"label": "x"}]}, {"arms": [{"label": "y"}]}, "arms: x there, y here"),
    ],
)
def test_the_first_difference_is_named(found, wanted, difference):
    assert first_difference(found, wanted) == difference


def test_no_seeds_is_refused():
    with pytest.raises(ValueError, match="a comparison needs at least one seed: got none"):
        Plan(SMALL, (Arm("standard", "standard", "all", ""),), ())


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
def test_progress_tells_every_finished_training_and_the_time_left(tmp_path, terminal):
    jobs = Plan(SMALL, tuple(arms_of(["twicing"], "all", controls=False)), (0,)).jobs(tmp_path)
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100)
    with JobProgress(jobs, console) as progress:
        progress.report(jobs[1], "training", 0.4)
        progress.report(jobs[0], "pgd", 0.9)
        progress.report(jobs[1], "done", 1.0)
    text = written.getvalue()
    if terminal:
        for shown in ("all 2 trainings", "twicing, seed 0", "pgd", "time left)"):
            assert shown in text
    else:
        assert text == "[0:00] 1 of 2 finished: standard, seed 0\n"


def test_the_shares_of_a_job_are_all_of_it():
    assert sum(percent for _, percent in PARTS.values()) == 100
