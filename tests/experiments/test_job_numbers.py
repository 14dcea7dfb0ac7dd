"""Every number of a job, computed again by hand from its last checkpoint: the right model, images, sizes and layers."""

import dataclasses

import pytest
import torch
from torch import nn

from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.arms import Arm, arms_of
from twicing.experiments.job import PARTS, converted_model, part_file, read_job, run_job, share_done
from twicing.experiments.plan import Job, Plan
from twicing.experiments.results import environment, select
from twicing.mechanisms.base import Mechanism
from twicing.robustness.attacks import fgsm
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.training.classification import build_model, load_trained
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
        ),
    ],
)
ARMS = {arm.label: arm for arm in arms_of(["twicing"], "all", controls=True)}
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
    return model.eval(), load_split(RECIPE, SEED)


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


def test_clean_accuracy_is_that_of_the_held_out_images(twiced, by_hand):
    model, split = by_hand
    clean = found(twiced, ACCURACY, {"threat": "clean"})
    assert clean == accuracy(model, split.test_images, split.test_labels)
    assert clean > 0.5, "it has learned too little for this file's numbers to differ"
    assert found(twiced, "held-out accuracy [share of images]", {"epoch": 4}) == pytest.approx(clean)
    _, correct = read_job(twiced)
    assert correct.index.tolist() == split.test_index.tolist()


def test_noise_is_of_each_size_and_of_the_pair(twiced, by_hand):
    model, split = by_hand
    for count, sd in enumerate(("1/8", "1/2")):
        noisy = gaussian_noise(split.test_images, sd, generator=generator(3, count))
        assert found(twiced, ACCURACY, {"threat": "noise", "sd": sd}) == accuracy(model, noisy, split.test_labels)


def test_fgsm_is_of_each_size(twiced, by_hand):
    model, split = by_hand
    values = []
    for eps in ("1/32", "1/16"):
        result = fgsm(model, split.test_images, split.test_labels, Threat(eps))
        values.append(found(twiced, ACCURACY, {"threat": "fgsm", "eps": eps}))
        assert values[-1] == result.accuracy
        zeros = found(twiced, "share of zero gradients", {"threat": "fgsm", "eps": eps})
        assert zeros == pytest.approx(result.zero_gradient_share)
    assert values[0] > values[1]


def test_pgd_has_the_recipes_steps_and_restarts(twiced, by_hand):
    model, split = by_hand

    def sweep(**options):
        settings = {"steps": 3, "restarts": 2, **options}
        return pgd_sweep(
            model, split.test_images, split.test_labels, ("1/32", "1/16"), generator=generator(4, 0), **settings
        )

    measured = [found(twiced, ACCURACY, {"threat": "pgd", "eps": eps}) for eps in ("1/32", "1/16")]
    assert measured == sweep().accuracies
    _, correct = read_job(twiced)
    assert correct.correct["pgd eps=1/16"].tolist() == sweep().correct[1].tolist()
    # The settings matter here, so that passing others would be seen.
    assert not torch.equal(sweep().correct, sweep(steps=1, restarts=1).correct)


@pytest.mark.parametrize("when", ["initialisation", "trained"])
def test_similarity_is_of_the_right_weights_places_and_layers(twiced, by_hand, when):
    model, split = by_hand
    if when == "initialisation":
        model = converted_model(twiced, SEED).eval()
    expected = layer_similarity(model, split.test_images)
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
    steps = 4 * -(-len(load_split(RECIPE, SEED).train_labels) // 32)
    assert found(twiced, "training time [s per step]", {}) == pytest.approx(seconds[-1] / steps)
    assert all(record.seconds > 0 for record in read_job(twiced)[0])


@pytest.mark.parametrize("missing", list(PARTS), ids=str)
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
        ("PGD accuracy at eps 1/16", ACCURACY, {"threat": "pgd", "eps": "1/16"}, "higher"),
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
