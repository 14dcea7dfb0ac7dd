"""Every number of a job, computed again by hand from its last checkpoint: the right model, images, sizes and layers."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments import vision_job
from twicing.experiments.arms import Arm, arms_under_test
from twicing.experiments.controls import controls_of
from twicing.experiments.job import part_file, parts_of, read_job, read_verdict, run_job, share_done
from twicing.experiments.parts import Part
from twicing.experiments.plan import Job, Plan, Resources
from twicing.experiments.results import environment, select
from twicing.experiments.vision_job import ADVERSARIAL, VISION, converted_model
from twicing.mechanisms.base import Mechanism
from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.eps50 import eps50
from twicing.robustness.masking import MaskingVerdict, masking_verdict
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.robustness.transfer import transfer
from twicing.training.choice import balanced_order
from twicing.training.classification import build_model, load_trained
from twicing.training.hardware import Hardware
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import load_split, stream_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

RECIPE = apply_settings(
    digits(),
    [
        *("epochs=4", "depth=3", "width=16", "heads=2", "batch_size=32", "learning_rate=4e-3"),
        *(
            "evaluation.eps=1/32,1/16",
            "evaluation.noise=1/8,1/2",
            "evaluation.pgd_steps=3",
            "evaluation.pgd_restarts=2",
            "evaluation.probes=60",
            "evaluation.verdict_seeds=0",
        ),
    ],
)
TESTED = arms_under_test(["twicing"], ["all"])
ARMS = {arm.label: arm for arm in [*TESTED, *controls_of(RECIPE, TESTED, 1.5)]}
SEED = 2


def finished_job(folder, arm, seed=SEED):
    job = Job(RECIPE, arm, seed, folder)
    run_job(job, environment(), lambda part, share: None)
    return job


@pytest.fixture(scope="module")
def twiced(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        return finished_job(tmp_path_factory.mktemp("job"), ARMS["twicing"])


@pytest.fixture
def by_hand(twiced):
    """The trained model, rebuilt from the checkpoint alone, and the images it has not seen."""
    model = converted_model(twiced, SEED)
    load_trained(model, SEED, twiced.folder)
    split = load_split(RECIPE, SEED)
    return model.eval(), split


def everything(split):
    return split.test.load(range(len(split.test))), split.test.labels


def probes(split):
    assert len(split.probes) == 60, "attacks on all images would hide that the probes are meant"
    return split.test.load(split.probes.tolist()), split.test.labels[split.probes]


def found(job, metric, conditions):
    records, _ = read_job(job)
    [record] = [r for r in select(records, metric=metric) if r.conditions == conditions]
    return record.value


ACCURACY = "accuracy [share of images]"


def generator(stream, count):
    return torch.Generator().manual_seed(stream_seed(SEED, stream, count))


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def test_a_training_in_half_precision_is_evaluated_as_after_an_interruption(tmp_path):
    recipe = apply_settings(RECIPE, ["epochs=1", "train_images=320"])
    resources = Resources(hardware=Hardware(precision="bf16-true"))
    job = Job(recipe, ARMS["standard"], SEED, tmp_path, resources=resources)
    at_once, later = (VISION.open(job, lambda part, share: None) for _ in range(2))
    at_once.train()
    for bench in (at_once, later):
        bench.restore()
        # It failed in the process that had trained: an image in fp32 cannot be shown to weights in bf16.
        bench.clean()
    with torch.no_grad():
        assert torch.equal(at_once.model(at_once.images), later.model(later.images))


def test_clean_accuracy_is_that_of_the_held_out_images(twiced, by_hand):
    model, split = by_hand
    clean = found(twiced, ACCURACY, {"threat": "clean"})
    assert clean == accuracy(model, *everything(split))
    assert clean > 0.5, "it has learned too little for this file's numbers to differ"
    assert found(twiced, "held-out accuracy [share of images]", {"epoch": 4}) == pytest.approx(clean)
    _, correct = read_job(twiced)
    assert correct.index.tolist() == split.test_index.tolist()
    assert correct.positions("clean").tolist() == split.test_index.tolist()
    assert correct.positions("pgd eps=1/16").tolist() == split.test_index[split.probes].tolist()


def test_noise_is_of_each_size_and_of_the_pair(twiced, by_hand):
    model, split = by_hand
    images, labels = probes(split)
    for count, sd in enumerate(("1/8", "1/2")):
        noisy = gaussian_noise(images, sd, generator=generator(3, count))
        assert found(twiced, ACCURACY, {"threat": "noise", "sd": sd}) == accuracy(model, noisy, labels)


def test_fgsm_is_of_each_size(twiced, by_hand):
    model, split = by_hand
    values = []
    for eps in ("1/32", "1/16"):
        result = fgsm(model, *probes(split), Threat(eps))
        values.append(found(twiced, ACCURACY, {"threat": "fgsm", "eps": eps}))
        assert values[-1] == result.accuracy
        zeros = found(twiced, "share of zero gradients", {"threat": "fgsm", "eps": eps})
        assert zeros == pytest.approx(result.zero_gradient_share)
    assert values[0] > values[1]


def test_pgd_has_the_recipes_steps_and_restarts(twiced, by_hand):
    model, split = by_hand

    def sweep(**options):
        settings = {"steps": 3, "restarts": 2, **options}
        return pgd_sweep(model, *probes(split), ("1/32", "1/16"), generator=generator(4, 0), **settings)

    measured = [found(twiced, ACCURACY, {"threat": "pgd", "eps": eps}) for eps in ("1/32", "1/16")]
    assert measured == sweep().accuracies
    _, correct = read_job(twiced)
    assert correct.correct["pgd eps=1/16"].tolist() == sweep().correct[1].tolist()
    # The settings matter here, so that passing others would be seen.
    assert not torch.equal(sweep().correct, sweep(steps=1, restarts=1).correct)
    median = eps50(model, *probes(split), sweep(), steps=3, restarts=2, generator=generator(4, 1))
    assert found(twiced, "eps50 [share of pixel range]", {"threat": "pgd"}) == median.value > 0


@pytest.mark.parametrize("when", ["initialisation", "trained"])
def test_similarity_is_of_the_right_weights_places_and_layers(twiced, by_hand, when):
    model, split = by_hand
    if when == "initialisation":
        model = converted_model(twiced, SEED).eval()
    expected = layer_similarity(model, probes(split)[0])
    checked = 0
    for (where, metric), values in expected.items():
        assert len(set(values.tolist())) == 3, "layers that do not differ would hide a shift"
        for layer, value in enumerate(values.tolist(), start=1):
            assert found(twiced, metric, {"layer": layer, "where": where, "when": when}) == pytest.approx(value)
            checked += 1
    assert checked == 18


def test_time_per_step_is_the_whole_over_the_steps(twiced):
    seconds = [found(twiced, "training time [s]", {"epoch": epoch}) for epoch in (1, 2, 3, 4)]
    assert seconds == sorted(seconds)
    steps = 4 * -(-len(load_split(RECIPE, SEED).train) // 32)
    assert found(twiced, "training time [s per step]", {}) == pytest.approx(seconds[-1] / steps)
    assert all(record.seconds > 0 for record in read_job(twiced)[0])


@pytest.mark.parametrize("missing", ["initialisation", "training", "clean", "noise", "fgsm", "pgd", "similarity"])
def test_a_part_that_is_lost_is_computed_again_to_the_same_numbers(twiced, tmp_path, missing):
    job = dataclasses.replace(twiced, folder=tmp_path)
    for path in twiced.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    part_file(job, missing).unlink()
    assert share_done(job) < 1
    run_job(job, environment(), lambda part, share: None)
    assert share_done(job) == 1
    values = [[(r.metric, r.value) for r in read_job(one)[0] if "time" not in r.metric] for one in (twiced, job)]
    assert values[0] == values[1]


@pytest.mark.parametrize("content", ['{"records": [', "{}", "[1]", '{"records": [{}], "correct": {}, "index": []}'])
def test_a_damaged_part_is_named(twiced, tmp_path, content):
    job = dataclasses.replace(twiced, folder=tmp_path)
    for path in twiced.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    part_file(job, "noise").write_text(content)
    with pytest.raises(ValueError, match=r"noise\.json.*delete it and run the same command again"):
        read_job(job)


def test_the_noise_floor_is_another_model_on_the_same_images(tmp_path):
    floor = ARMS["standard (other seeds)"]
    job = Job(RECIPE, floor, SEED, tmp_path)
    other = converted_model(job, SEED + floor.seed_offset).network.blocks[0].attn.qkv.weight
    assert not torch.equal(other, build_model(RECIPE, SEED).network.blocks[0].attn.qkv.weight)
    job = dataclasses.replace(job, recipe=apply_settings(RECIPE, ["epochs=1", "evaluation.pgd_steps=1"]))
    run_job(job, environment(), lambda part, share: None)
    records, correct = read_job(job)
    assert {record.seed for record in records} == {SEED}, "it has to be paired by the seed of its pair"
    assert correct.index.tolist() == load_split(RECIPE, SEED).test_index.tolist()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["twicing"]["seed"] == SEED + floor.seed_offset


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Two arms of one seed, with a verdict each."""
    settings = ["epochs=2", "evaluation.verdict_seeds=1", "evaluation.verdict_images=30", "evaluation.spsa_images=4"]
    recipe = apply_settings(RECIPE, [*settings, "evaluation.spsa_samples=8", "evaluation.spsa_iterations=3"])
    jobs = Plan(recipe, tuple(TESTED), (SEED,)).jobs(tmp_path_factory.mktemp("judged"))
    with torch.random.fork_rng(devices=[]):
        for last in (False, True):
            for job in jobs:
                run_job(job, environment(), lambda part, share: None, last=last)
    return {job.arm.label: job for job in jobs}


def test_images_made_on_one_arm_are_shown_to_the_other(judged):
    split = load_split(RECIPE, SEED)
    chosen = balanced_order(split.test.labels)[:30]
    images, labels = split.test.load(chosen.tolist()), split.test.labels[chosen]
    models = {}
    for label, job in judged.items():
        models[label] = converted_model(job, SEED)
        load_trained(models[label], SEED, job.folder)
        models[label].eval()
    made = {
        label: pgd(model, images, labels, Threat("1/16"), steps=3, generator=generator(20, 0)).adversarial
        for label, model in models.items()
    }
    for label, other in (("standard", "twicing"), ("twicing", "standard")):
        saved = torch.from_numpy(np.load(judged[label].folder / ADVERSARIAL))
        assert torch.equal(saved, made[label])
        right = transfer(models[label], made[other], images, labels, Threat("1/16"))
        conditions = {"threat": "transfer", "eps": "1/16", "from": other}
        assert found(judged[label], ACCURACY, conditions) == right.double().mean().item()
    verdict = masking_verdict(
        models["twicing"],
        images,
        labels,
        Threat("1/16"),
        transferred={"standard": transfer(models["twicing"], made["standard"], images, labels, Threat("1/16"))},
        spsa_images=4,
        spsa_samples=8,
        spsa_iterations=3,
        generator=generator(21, 0),
    )
    kept = read_verdict(judged["twicing"])
    assert (kept["passed"], kept["sentence"]) == (verdict.passed, verdict.sentence)
    assert [check["name"] for check in kept["checks"]] == [check.name for check in verdict.checks]
    assert (kept["eps"], kept["images"]) == ("1/16", 30)


def test_a_job_is_done_only_with_its_verdict(judged, tmp_path):
    job = judged["standard"]
    assert share_done(job) == 1
    assert list(parts_of(job, last=True)) == ["masking"]
    shutil.copytree(job.folder, tmp_path / "copy")
    copy = dataclasses.replace(job, folder=tmp_path / "copy")
    part_file(copy, "masking").unlink()
    assert 0.5 < share_done(copy) < 1
    run_job(copy, environment(), lambda part, share: None)
    assert not part_file(copy, "masking").exists(), "it has to wait for the other arms"
    run_job(copy, environment(), lambda part, share: None, last=True)
    assert read_verdict(copy) == read_verdict(job)


def test_a_block_that_attends_twice_has_no_layers_to_look_at(tmp_path):
    recipe = apply_settings(RECIPE, ["epochs=1", "evaluation.pgd_steps=1"])
    [job] = Plan(recipe, (ARMS["two-attentions"],), (SEED,)).jobs(tmp_path)
    run_job(job, environment(), lambda part, share: None)
    records, _ = read_job(job)
    assert not select(records, metric="mean pairwise cosine")
    assert select(records, metric=ACCURACY, conditions={"threat": "clean"})
    assert share_done(job) == 1
    assert {record.spec[0]["mechanism"] for record in records} == {"two attentions a block"}


class WithWeights(Mechanism):
    """A mechanism that brings random weights of its own."""

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.mix = nn.Parameter(torch.randn(num_heads, 1, 1))

    def forward(self, query, key, value, *, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0,
                enable_gqa=False, context=None):  # fmt: skip
        return value * self.mix


def test_a_mechanisms_own_weights_follow_the_seed_and_move_nobody_elses(tmp_path):
    arm = Arm("own", f"{__name__}:WithWeights", "all", "")
    standard = build_model(RECIPE, 0).state_dict()
    drawn = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)
        state = converted_model(Job(RECIPE, arm, seed, tmp_path), seed).state_dict()
        drawn.append(state["network.blocks.0.attn.twicing_mechanism.mix"])
        if seed == 0:
            assert all(torch.equal(state[name], standard[name]) for name in standard)
    assert torch.equal(drawn[0], drawn[1]), "they depend on what was drawn before"
    assert not torch.equal(drawn[0], drawn[2]), "they are the same for every seed"


def test_the_primaries_are_what_was_declared():
    plan = Plan(RECIPE, tuple(ARMS.values()), (0,)).identity()
    assert [(p["name"], p["metric"], p["conditions"], p["better"]) for p in plan["primary"]] == [
        ("eps50 under PGD", "eps50 [share of pixel range]", {"threat": "pgd"}, "higher"),
        ("clean accuracy", ACCURACY, {"threat": "clean"}, "higher"),
        (
            "token similarity after the last block",
            "mean pairwise cosine",
            {"layer": 3, "where": "block output", "when": "trained"},
            "neither",
        ),
    ]


@pytest.mark.parametrize("setting", ["epochs=5", "evaluation.pgd_steps=4", "evaluation.noise=1/8", "learning_rate=1"])
def test_every_setting_is_part_of_the_plan(setting):
    arms = tuple(ARMS.values())
    changed = Plan(apply_settings(RECIPE, [setting]), arms, (0,)).identity()
    assert changed != Plan(RECIPE, arms, (0,)).identity()


def test_a_verdict_has_the_settings_of_the_recipe_and_a_stream_of_its_own(tmp_path, monkeypatch):
    asked = {}

    def leave(file, model, images, labels, eps, **settings):
        asked["adversarial"] = (eps, len(images), settings)
        return Part()

    def look(model, images, labels, eps, others, **settings):
        asked["masking"] = (eps, len(images), settings)
        return Part()

    monkeypatch.setattr(vision_job, "leave_adversarial", leave)
    monkeypatch.setattr(vision_job, "look_for_masking", look)
    settings = ["verdict_images=30", "verdict_eps=1/40", "spsa_images=4", "spsa_samples=8", "spsa_iterations=3"]
    recipe = apply_settings(RECIPE, [f"evaluation.{setting}" for setting in settings])
    bench = vision_job.VISION.open(Job(recipe, ARMS["twicing"], SEED, tmp_path), lambda part, share: None)
    bench.adversarial()
    bench.masking()
    eps, n, made = asked["adversarial"]
    assert (eps, n, made["steps"]) == ("1/40", 30, 3)
    assert made["generator"].initial_seed() == stream_seed(SEED, 20, 0)
    eps, n, looked = asked["masking"]
    # 20 steps whatever the recipe's pgd_steps: the verdict's rules are for PGD-20.
    assert (eps, n, looked["steps"]) == ("1/40", 30, 20)
    assert (looked["spsa_images"], looked["spsa_samples"], looked["spsa_iterations"]) == (4, 8, 3)
    assert looked["generator"].initial_seed() == stream_seed(SEED, 21, 0)


@pytest.mark.parametrize("arm", ["twicing", "standard (other seeds)"])
def test_pgd_and_its_bisection_have_the_settings_of_the_recipe(arm, tmp_path, monkeypatch):
    """And the random numbers of the pair's seed, also where the arm's own weights are of another one."""
    asked = {}
    monkeypatch.setattr(vision_job, "under_pgd", lambda *images, **settings: asked.update(settings) or Part())
    bench = vision_job.VISION.open(Job(RECIPE, ARMS[arm], SEED, tmp_path), lambda part, share: None)
    bench.pgd()
    assert (asked["steps"], asked["restarts"]) == (3, 2)
    assert asked["start"].initial_seed() == stream_seed(SEED, 4, 0)
    assert asked["bisection"].initial_seed() == stream_seed(SEED, 4, 1)


def test_eps50_is_refined_with_the_attack_of_the_sweep(monkeypatch):
    from twicing.experiments import attacking

    asked = {}

    def median(model, images, labels, sweep, **settings):
        asked.update(settings)
        return SimpleNamespace(value=0.1, low=0.09, n=len(images))

    monkeypatch.setattr(attacking, "eps50", median)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    start, bisection = generator(4, 0), generator(4, 1)
    part = attacking.under_pgd(
        model,
        torch.rand(5, 1, 2, 2, generator=generator(0, 0)),
        torch.arange(5) % 3,
        ("1/32",),
        steps=2,
        restarts=3,
        batch_size=4,
        start=start,
        bisection=bisection,
    )
    assert asked == {"steps": 2, "restarts": 3, "batch_size": 4, "generator": bisection}
    assert (part.findings[-1].value, part.findings[-1].n) == (0.1, 5)


def test_a_verdict_is_asked_for_with_the_settings_that_were_given(monkeypatch):
    from twicing.experiments import attacking

    asked = {}

    def verdict(model, images, labels, threat, **settings):
        asked.update(settings)
        return MaskingVerdict((), {})

    monkeypatch.setattr(attacking, "masking_verdict", verdict)
    given = {"steps": 7, "spsa_images": 2, "spsa_iterations": 3, "spsa_samples": 4, "batch_size": 5}
    given |= {"generator": generator(0, 0), "progress": lambda share: None}
    attacking.look_for_masking(nn.Flatten(), torch.rand(3, 1, 2, 2), torch.zeros(3).long(), "1/32", {}, **given)
    assert asked == given | {"transferred": {}}


def test_a_verdict_keeps_what_was_seen(judged):
    """Every check's sentence and every accuracy, and each transfer counts the images of the verdict."""
    kept = read_verdict(judged["twicing"])
    accuracies = kept["accuracies"]
    records, _ = read_job(judged["twicing"])
    [record] = select(records, metric=ACCURACY, conditions={"threat": "transfer", "eps": "1/16", "from": "standard"})
    assert (record.n, record.value) == (30, accuracies["transfer from standard"])
    assert {"clean", "PGD-20", "PGD-100 x 5", "FGSM", "uniform noise", "PGD, any change"} <= set(accuracies)
    seen = {check["name"]: check["seen"] for check in kept["checks"]}
    assert f"PGD-20 {round(30 * accuracies['PGD-20'])} " in seen["longer attack"]
    assert f"PGD {round(30 * accuracies['PGD-100 x 5'])}" in seen["transfer"]


@pytest.mark.parametrize("classes", [20, 21])
def test_the_five_best_guesses_count_where_there_are_more_than_twenty_classes(classes):
    logits = torch.arange(classes, 0, -1.0).repeat(8, 1)
    labels = torch.tensor([0, 0, 1, 4, 4, 5, 6, 7])
    part = Part()
    part.judge({"threat": "clean"}, logits, labels)
    found = {finding.metric: (finding.value, finding.n) for finding in part.findings}
    expected = {ACCURACY: (2 / 8, 8)}
    if classes > 20:
        expected["top-5 accuracy [share of images]"] = (5 / 8, 8)
    assert found == expected
    assert part.correct == {"clean": [True, True] + [False] * 6}
