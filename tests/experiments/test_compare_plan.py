"""Arms, controls and plans: what is compared with what."""

import dataclasses
import io
import re

import pytest
import torch
from rich.console import Console

from twicing.experiments.arms import Arm, arms_under_test, refuse_nothing_to_compare
from twicing.experiments.compare import compare
from twicing.experiments.controls import controlled_arm, controls_of, with_equal_time
from twicing.experiments.equal_time import step_time_ratio
from twicing.experiments.job import parts_of
from twicing.experiments.plan import Plan, first_difference
from twicing.experiments.progress import JobProgress
from twicing.ops.reference import attention_matrix
from twicing.training.classification import build_model
from twicing.training.cost import multiply_adds
from twicing.training.language_recipes import text_demo
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings

SMALL = apply_settings(digits(), ["depth=2", "width=16", "heads=2"])


CONTROLS = ["standard-equal-time", "standard-wide", "two-attentions", "smooth-more", "standard (other seeds)"]


def arms_with_controls(mechanisms=("twicing",), layers=("all",), recipe=SMALL, equal_time=1.25):
    tested = arms_under_test(mechanisms, layers)
    return [*tested, *controls_of(recipe, tested, equal_time)]


def control(label, **options):
    return next(arm for arm in arms_with_controls(**options) if arm.label == label)


def test_standard_comes_first_and_controls_last():
    arms = arms_with_controls()
    assert [arm.label for arm in arms] == ["standard", "twicing", *CONTROLS]
    assert [arm.control for arm in arms] == [False, False, *[True] * 5]
    assert [arm.label for arm in arms_under_test(["standard", "twicing"], ["all"])] == ["standard", "twicing"]


def test_standard_of_another_baseline_is_called_what_it_is():
    standard, twiced = arms_under_test(["twicing-linear"], ["all"], baseline="linear")
    assert standard.meaning == "The model as it is, with the mechanism linear in all layers."
    assert twiced.meaning == "twicing-linear with its published defaults in all layers, the rest standard."
    assert arms_under_test(["twicing"], ["all"])[0].meaning == "The model as it is, with softmax attention A V."


def test_controls_of_softmax_attention_are_refused_where_standard_is_another(tmp_path):
    message = "made for softmax attention, and standard of text_demo is 'linear': leave --controls out"
    sizes = {"depth": 1, "width": 8, "heads": 1, "inner": 8, "length": 8, "batch_size": 2}
    steps = {"epochs": 1, "steps_per_epoch": 2, "warmup_steps": 1}
    with pytest.raises(ValueError, match=message):
        compare(
            dataclasses.replace(text_demo(), baseline="linear", **sizes, **steps),
            ["twicing-linear"],
            seeds=1,
            layers=["all"],
            controls=True,
            side_by_side=1,
            folder=tmp_path / "run",
            command="",
            console=Console(file=io.StringIO()),
        )
    assert not (tmp_path / "run").exists()


def test_placements_are_arms_of_their_own():
    arms = arms_under_test(["standard", "twicing", "twicing@1"], ["2", "1-2"])
    assert [(arm.label, arm.layers) for arm in arms[1:]] == [
        ("twicing [2]", "2"),
        ("twicing [1-2]", "1-2"),
        ("twicing [1]", "1"),
    ]
    assert len({arm.folder_name for arm in arms}) == 4


@pytest.mark.parametrize(
    ("mechanisms", "layers", "message"),
    [
        (["twicing", "twicing"], ["all"], "each mechanism is named once: got twicing more than once"),
        (["twicing", "twicing@1"], ["1"], "each mechanism is named once"),
        (["twicing"], ["1", "1"], "each mechanism is named once"),
        (["standard", "standard"], ["all"], "each mechanism is named once: got standard"),
        (["twicing@"], ["all"], "a placement is NAME@LAYERS, as in twicing@10-12: got 'twicing@'"),
        (["standard@1"], ["all"], "'standard' is the model as it is and takes no layers"),
        (["twicng"], ["all"], "Unknown mechanism 'twicng'"),
    ],
)
def test_arms_that_make_no_sense_are_refused(mechanisms, layers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arms_under_test(mechanisms, layers)


def test_standard_alone_is_nothing_to_compare():
    alone = arms_under_test(["standard"], ["all"])
    with pytest.raises(ValueError, match="there is nothing to compare 'standard' with"):
        refuse_nothing_to_compare(alone)
    refuse_nothing_to_compare([*alone, *controls_of(SMALL, alone, 1.0)])


def test_the_controls_go_by_the_widest_placement_of_twicing():
    assert controlled_arm(arms_under_test(["twicing@1-2", "twicing@1"], ["all"]), 2).layers == "1-2"
    assert controlled_arm(arms_under_test(["twicing@1", "twicing"], ["all"]), 2).layers == "all"
    assert controlled_arm(arms_under_test(["standard"], ["all"]), 2).mechanism == "twicing"


def test_every_control_changes_one_thing():
    assert control("standard-equal-time").changes == {"training_length": 1.25}
    assert control("two-attentions").recipe(SMALL).attention_passes == 2
    wide = control("standard-wide").recipe(SMALL)
    assert multiply_adds(wide) == pytest.approx(multiply_adds(SMALL, twiced_layers=2), rel=0.01)
    assert multiply_adds(wide) > multiply_adds(SMALL)
    assert dataclasses.replace(wide, mlp_ratio=SMALL.mlp_ratio) == SMALL


def test_a_folder_remembers_the_time_that_was_measured():
    plan = Plan(SMALL, tuple(arms_with_controls(equal_time=1.4)), (0,))
    assert with_equal_time(plan.identity()) == 1.4
    assert with_equal_time(Plan(SMALL, tuple(arms_under_test(["twicing"], ["all"])), (0,)).identity()) is None


def test_steps_are_timed_in_turns():
    arm = arms_under_test(["twicing"], ["all"])[1]
    before = torch.get_rng_state()
    ratio = step_time_ratio(apply_settings(digits(), ["batch_size=64"]), arm, steps=5)
    # Twicing takes longer, but five steps on a busy machine need not show it.
    assert 0.7 < ratio < 3
    assert ratio == round(ratio, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_steps_are_timed_in_the_precision_of_the_trainings(monkeypatch):
    arm = arms_under_test(["twicing"], ["all"])[1]
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        monkeypatch.setattr(
            "twicing.experiments.vision_job.F.cross_entropy",
            lambda logits, _labels, of=precision: found.update({of: logits.dtype}) or logits.float().sum(),
        )
        step_time_ratio(SMALL, arm, steps=1, precision=precision)
    assert found == {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def test_standard_is_the_untouched_model():
    arm = arms_under_test(["twicing"], ["all"])[0]
    model = build_model(SMALL, 0)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in arm.apply(model).modules()] == kinds


def test_smooth_more_is_a_squared():
    arm = control("smooth-more", layers=("2",))
    model = arm.apply(build_model(SMALL, 0)).double()
    mechanism = model.network.blocks[1].attn.twicing_mechanism
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    matrix = attention_matrix(query, key)
    torch.testing.assert_close(mechanism(query, key, value), matrix @ (matrix @ value))
    assert arm.control


def test_the_noise_floor_has_other_weights_and_the_same_images():
    plan = Plan(SMALL, tuple(arms_with_controls()), (0, 1))
    floor = plan.arms[-1]
    assert floor.mechanism == "standard"
    assert floor.seed_offset > 1000
    offsets = {arm.label: arm.seed_offset for arm in plan.arms[:-1]}
    assert set(offsets.values()) == {0}


def test_every_job_has_a_folder_of_its_own(tmp_path):
    plan = Plan(SMALL, tuple(arms_with_controls()), (0, 1, 2))
    jobs = plan.jobs(tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 21
    assert [(job.arm.label, job.seed) for job in jobs[:8]] == [
        *((label, 0) for label in reversed(CONTROLS)),
        ("twicing", 0),
        ("standard", 0),
        ("standard (other seeds)", 1),
    ]


def test_a_job_knows_its_arms_recipe_its_place_and_the_seeds_other_arms(tmp_path):
    jobs = Plan(SMALL, tuple(arms_with_controls()), (4, 7)).jobs(tmp_path)
    of_arm = {(job.arm.label, job.seed): job for job in jobs}
    longer = of_arm["standard-equal-time", 7]
    assert (longer.recipe.training_length, longer.place) == (1.25, 1)
    assert len(longer.others) == 6
    assert longer.others["twicing"] == of_arm["twicing", 7].folder
    assert "standard-equal-time" not in longer.others


def test_verdicts_are_for_the_first_seeds_and_two_attentions_have_no_layers_to_look_at(tmp_path):
    jobs = {(job.arm.label, job.seed): job for job in Plan(SMALL, tuple(arms_with_controls()), (4, 7)).jobs(tmp_path)}
    assert "masking" in parts_of(jobs["standard", 4], last=True)
    assert "masking" not in parts_of(jobs["standard", 7])
    assert "adversarial" not in parts_of(jobs["standard", 7])
    assert {"similarity", "initialisation"} <= set(parts_of(jobs["standard", 4]))
    assert not {"similarity", "initialisation"} & set(parts_of(jobs["two-attentions", 4]))


def test_the_deepest_layer_is_filled_in():
    plan = Plan(SMALL, tuple(arms_under_test(["twicing"], ["all"])), (0,))
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
    jobs = Plan(SMALL, tuple(arms_under_test(["twicing"], ["all"])), (0,)).jobs(tmp_path)
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
