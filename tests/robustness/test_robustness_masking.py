"""The verdict on gradient masking: honest models pass, each planted mask fails for its own reason."""

import re

import pytest
import torch
from torch import nn

from twicing.data.digits import load_digits
from twicing.robustness import masking
from twicing.robustness.attacks import PgdPlan, fgsm, pgd
from twicing.robustness.masking import GRADIENT_CHECKS, MaskingCheck, MaskingVerdict, masking_verdict
from twicing.robustness.search import AttackResult
from twicing.robustness.spsa import spsa
from twicing.robustness.threat import Threat
from twicing.robustness.transfer import transfer

NAMES = ["images", "same answer twice", *GRADIENT_CHECKS]
QUICK = {"spsa_iterations": 10, "spsa_samples": 32, "strong_steps": 40, "strong_restarts": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def half(digits):
    """The first 60 digits."""
    return digits[0][:60], digits[1][:60]


@pytest.fixture(scope="module")
def other(linear_model, half):
    """Images made against another, honest model."""
    return pgd(linear_model, *half, Threat("1/16"), generator=seeded()).adversarial


def examine(model, half, other, eps="1/16", **options):
    threat = Threat(eps)
    transferred = {"linear": transfer(model, other, *half, threat)}
    return masking_verdict(model, *half, threat, transferred=transferred, generator=seeded(), **(QUICK | options))


def failed(verdict):
    return {check.name for check in verdict.checks if not check.passed}


class Masked(nn.Module):
    """A network behind a mask: before(images) goes in, after(logits) comes out."""

    def __init__(self, network, before=None, after=None):
        super().__init__()
        self.network = network
        self.before = before or (lambda images: images)
        self.after = after or (lambda logits: logits)

    def forward(self, images):
        return self.after(self.network(self.before(images)))


def test_an_honest_network_passes(network, half, other):
    verdict = examine(network, half, other)
    assert [check.name for check in verdict.checks] == NAMES
    assert verdict.passed, verdict.sentence
    assert verdict.sentence == "no sign of gradient masking"
    # It is no pass for want of anything to see.
    assert 0.2 < verdict.accuracies["PGD-20"] < verdict.accuracies["clean"] - 0.15


def test_an_honest_linear_model_passes(network, half):
    images, labels = load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[200:].double()), labels[200:]).backward()
        optimiser.step()
    made = pgd(network, *half, Threat("1/32"), generator=seeded()).adversarial
    verdict = examine(model.eval(), half, made, eps="1/32")
    assert verdict.passed, verdict.sentence
    assert 0.2 < verdict.accuracies["PGD-20"] < verdict.accuracies["clean"] - 0.05


def test_the_numbers_are_those_of_the_attacks(network, half, other):
    verdict = examine(network, half, other)
    n, threat = len(half[0]), Threat("1/16")
    weak = pgd(network, *half, threat, generator=seeded())
    assert abs(verdict.accuracies["PGD-20"] - weak.accuracy) <= 2 / n
    assert verdict.accuracies["clean"] == weak.accuracy_before
    assert verdict.accuracies["FGSM"] == fgsm(network, *half, threat).accuracy
    right = transfer(network, other, *half, threat)
    assert verdict.accuracies["transfer from linear"] == right.double().mean().item()
    assert verdict.accuracies["PGD, any change"] == 0
    assert verdict.accuracies["PGD-40 x 2"] <= verdict.accuracies["PGD-20"]
    together = min(verdict.accuracies["PGD-20, cross-entropy"], verdict.accuracies["PGD-20, margin"])
    assert verdict.accuracies["PGD-20"] <= together
    noise = verdict.accuracies["uniform noise"]
    assert verdict.accuracies["FGSM"] < noise <= verdict.accuracies["clean"]
    counts = [round(n * verdict.accuracies[key]) for key in ("PGD-20", "FGSM", "uniform noise")]
    assert verdict.checks[4].seen == (
        f"PGD-20 leaves {counts[0]} of 60 images right, FGSM {counts[1]}, uniform noise of the same size {counts[2]}"
    )


def quantise(logits):
    return logits.mul(2).round() / 2


def staircase(images):
    return images.mul(16).round() / 16


def shatter(images):
    """A ripple of 1/24 whose slope is far steeper than the image's own, and points anywhere."""
    return images + torch.sin(images * 2000) / 24


class _Stop(torch.autograd.Function):
    """The identity, with a gradient of exactly zero: a "defence" by stop-gradient that autograd does not notice."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def saturate(logits):
    return logits * 1e4


def noisy(images):
    return images + 0.1 * torch.randn_like(images)


ALL_ZERO = r"^100.00% of the gradients' entries are exactly 0 for cross-entropy, 100.00% for the margin"
UNDER_NOISE = "PGD-20 leaves 50 of 60 images right, FGSM 51, uniform noise of the same size 50"
MASKS = {
    # name: (before, after, what must fail and what it must have seen)
    "quantised logits": (None, quantise, {"gradients": ALL_ZERO, "SPSA": "SPSA leaves .* right, PGD"}),
    "saturated loss": (
        None,
        saturate,
        {
            "gradients": r"^9\d.*% of .* exactly 0 for cross-entropy, 0.00% for the margin",
            "losses": "by cross-entropy alone leaves .* by the margin",
        },
    ),
    "noise on the input": (
        noisy,
        None,
        {"same answer twice": "two forwards of the same images differ by", "longer attack": "PGD-40"},
    ),
    "staircase": (staircase, None, {"gradients": ALL_ZERO, "transfer": "images made against linear"}),
    "stopped gradient": (_Stop.apply, None, {"gradients": ALL_ZERO, "unbounded attack": "with eps = 1.* leaves"}),
    "shattered gradient": (
        shatter,
        None,
        {"order of attacks": UNDER_NOISE, "SPSA": "SPSA leaves", "transfer": "images made against linear"},
    ),
    "detached": (
        lambda images: images.detach(),
        None,
        dict.fromkeys(GRADIENT_CHECKS, "the logits carry no gradient to the images"),
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_planted_mask_fails_for_its_own_reason(mask, network, half, other):
    before, after, reasons = MASKS[mask]
    verdict = examine(Masked(network, before, after).eval(), half, other)
    assert not verdict.passed
    assert verdict.sentence.startswith("robustness not established: ")
    # More than one each: a mask that learns to pass one check still meets the others.
    assert len(reasons) >= 2
    for name, reason in reasons.items():
        check = next(check for check in verdict.checks if check.name == name)
        assert not check.passed, name
        assert re.search(reason, check.seen), check.seen
        assert check.seen in verdict.sentence


def test_a_mask_over_one_image_in_five_is_enough(network, half, other):
    """Logits that saturate for some images only, by which most gradients stay as they are."""

    class Partly(nn.Module):
        def forward(self, images):
            logits = network(images)
            chosen = (images.mean((1, 2, 3), keepdim=True).flatten(1) * 997).frac() < 0.2
            return torch.where(chosen, logits * 1e4, logits)

    found = failed(examine(Partly().eval(), half, other))
    assert "gradients" in found


def test_transfer_that_was_not_tried_is_no_pass(network, half):
    verdict = masking_verdict(network, *half, Threat("1/16"), transferred={}, generator=seeded(), **QUICK)
    assert failed(verdict) == {"transfer"}
    assert verdict.sentence == (
        "robustness not established: transfer was not tried, as there is no other model to make images"
    )


def test_too_few_images_are_no_pass(network, digits, other):
    images, labels = digits[0][:24], digits[1][:24]
    right = (network(images).argmax(1) == labels).nonzero().squeeze(1)
    assert len(right) >= 20
    for n, enough in ((19, False), (20, True)):
        chosen = right[:n]
        verdict = examine(network, (images[chosen], labels[chosen]), other[chosen])
        assert ("images" not in failed(verdict)) == enough
        assert verdict.checks[0].seen == f"{n} of {n} images are right without an attack (20 are needed)"


SCRIPT = {
    "clean": 150,
    "cross-entropy": 80,
    "margin": 80,
    "long": 80,
    "whole": 0,
    "fgsm": 90,
    "noise": 140,
    "spsa breaks": 0,
    "spsa keeps": 0,
    "transfer": 80,
    "zeros": (0.0, 0.0),
}


def scripted(monkeypatch, n, changes):
    """The verdict on n images where every attack leaves as many right as the script says."""
    script = SCRIPT | changes
    counts = {name: value for name, value in script.items() if isinstance(value, int)}

    def first(count):
        return torch.arange(n) < count

    def attack(case, plan, seed, standing, threat=None):
        zeros = 0.0
        if isinstance(plan, masking.SpsaPlan):
            # Broken are the last of those that stood; kept are the first of those that did not.
            stood = bool(standing[0])
            correct = standing & (first(int(standing.sum()) - counts["spsa breaks"]) if stood else ~first(0))
            if not stood:
                correct &= first(int((~standing).long().cumprod(0).sum()) + counts["spsa keeps"])
        elif threat is not None:
            correct = first(counts["whole"])
        elif plan.restarts > 1:
            correct = standing & first(counts["long"])
        else:
            (loss,) = plan.losses
            correct = first(counts[loss])
            zeros = script["zeros"][masking.LOSSES.index(loss)]
        return AttackResult("", case.threat, case.images, correct, first(counts["clean"]), zeros)

    def one_step(*arguments, **options):
        return AttackResult("fgsm", Threat("1/8"), images, first(counts["fgsm"]), first(counts["clean"]), 0.0)

    monkeypatch.setattr(masking._Case, "attack", attack)
    monkeypatch.setattr(masking._Case, "_under_noise", lambda case: first(counts["noise"]))
    monkeypatch.setattr(masking, "fgsm", one_step)
    images = (torch.arange(n) >= counts["clean"]).double().unsqueeze(1)
    return masking_verdict(
        lambda x: torch.cat([1 - x, x], dim=1),
        images,
        torch.zeros(n, dtype=torch.int64),
        Threat("1/8"),
        transferred={"worst": first(counts["transfer"]), "best": first(counts["clean"])},
    )


@pytest.mark.parametrize(
    ("n", "changes", "expected"),
    [
        (200, {}, set()),
        # One point of 200 images is two of them.
        (200, {"long": 78, "transfer": 78}, set()),
        (200, {"long": 77}, {"longer attack"}),
        (200, {"cross-entropy": 82}, set()),
        (200, {"cross-entropy": 83}, {"losses"}),
        (200, {"margin": 83}, {"losses"}),
        # Of 199 images it is one: two would be more than a point.
        (199, {"long": 79}, set()),
        (199, {"long": 78}, {"longer attack"}),
        (199, {"margin": 82}, {"losses"}),
        # Of fewer than 100 images, one image is more than a point and is allowed all the same.
        (160, {"long": 79}, set()),
        (160, {"long": 78}, {"longer attack"}),
        (200, {"whole": 1}, {"unbounded attack"}),
        (200, {"fgsm": 80}, set()),
        (200, {"fgsm": 79}, {"order of attacks"}),
        (200, {"noise": 90}, set()),
        (200, {"noise": 89}, {"order of attacks"}),
        (200, {"transfer": 79}, {"transfer"}),
        # The long attack is white-box too: what is above it is not below the white-box attack.
        (200, {"long": 79, "transfer": 79}, set()),
        (200, {"zeros": (0.0099, 0.0)}, set()),
        (200, {"zeros": (0.01, 0.0)}, {"gradients"}),
        (200, {"zeros": (0.0, 0.01)}, {"gradients"}),
        # SPSA breaks three that PGD did not, and fails on three others that PGD broke: it is not the better attack.
        (200, {"spsa breaks": 3, "spsa keeps": 3}, set()),
        (200, {"spsa breaks": 3, "spsa keeps": 2}, {"SPSA"}),
        (200, {"clean": 19, "cross-entropy": 5, "margin": 5, "long": 5, "fgsm": 6, "noise": 7}, {"images"}),
    ],
    ids=str,
)
def test_the_rules_at_their_edges(n, changes, expected, monkeypatch):
    verdict = scripted(monkeypatch, n, changes)
    assert failed(verdict) == expected
    assert verdict.passed == (not expected)


def test_the_rule_below_a_hundred_images(monkeypatch):
    small = {"clean": 45, "cross-entropy": 30, "margin": 30, "fgsm": 31, "noise": 40, "transfer": 30}
    assert failed(scripted(monkeypatch, 50, small | {"long": 29})) == set()
    assert failed(scripted(monkeypatch, 50, small | {"long": 28})) == {"longer attack"}


def test_what_is_seen_has_the_numbers(monkeypatch):
    verdict = scripted(
        monkeypatch,
        200,
        {"long": 70, "whole": 4, "noise": 60, "transfer": 60, "margin": 85, "spsa breaks": 5, "zeros": (0.5, 0.02)},
    )
    assert [check.seen for check in verdict.checks] == [
        "150 of 200 images are right without an attack (20 are needed)",
        "two forwards of the same images differ by 0 in logits that span 1",
        "PGD-100 with 5 restarts leaves 70 of 200 images right, PGD-20 80 (at most 2 apart is allowed)",
        "with eps = 1, where any image may be shown, PGD-20 leaves 4 of 200 right",
        "PGD-20 leaves 80 of 200 images right, FGSM 90, uniform noise of the same size 60",
        "SPSA leaves 65 of 200 images right, PGD 70 (of which SPSA breaks 5)",
        "images made against worst, the worst of 2, leave 60 of 200 right, PGD 70",
        "PGD-20 by cross-entropy alone leaves 80 of 200 images right, by the margin alone 85 "
        "(at most 2 apart is allowed)",
        "50.00% of the gradients' entries are exactly 0 for cross-entropy, 2.00% for the margin",
    ]
    failing = [check.seen for check in verdict.checks[2:]]
    assert verdict.sentence == f"robustness not established: {'; '.join(failing)}"


def test_spsa_attacks_as_many_images_as_asked_for(network, half, monkeypatch):
    attacked = []

    class Recorder(masking.SpsaPlan):
        def run(self, search, seed):
            attacked.append(search.correct.clone())

    monkeypatch.setattr(masking, "SpsaPlan", Recorder)
    standing = None
    for most in (0, 1, 7, 1000):
        verdict = masking_verdict(
            network, *half, Threat("1/16"), transferred={}, spsa_images=most, generator=seeded(), steps=20, **QUICK
        )
        if standing is None:
            standing = attacked[-1]
        assert torch.equal(attacked[-1], standing & (standing.cumsum(0) <= (most or 1000)))
        seen = min(most or 1000, int(standing.sum()))
        assert verdict.checks[5] == MaskingCheck(
            "SPSA", True, f"SPSA breaks none of {seen} images that PGD leaves right"
        )


@pytest.mark.parametrize("most", [15, 20])
def test_part_of_spsa_is_compared_on_the_same_images(monkeypatch, network, half, most):
    """Of the images up to the last that stands, SPSA breaks all but one, and spares one that PGD broke."""
    runs = []

    class Script(masking.SpsaPlan):
        def run(self, search, seed):
            runs.append(search.correct.nonzero().squeeze(1))
            search.correct[runs[-1][1:]] = False

    monkeypatch.setattr(masking, "SpsaPlan", Script)
    verdict = masking_verdict(
        network, *half, Threat("1/16"), transferred={}, spsa_images=most, generator=seeded(), **QUICK
    )
    standing, others = runs
    assert len(standing) == most
    assert 1 <= len(others) < most
    assert others.max() < standing[-1]
    asked = int(standing[-1]) + 1
    assert verdict.checks[5] == MaskingCheck(
        "SPSA", False, f"SPSA leaves 2 of {asked} images right, PGD {most} (of which SPSA breaks {most - 1})"
    )


def test_spsa_is_the_attack_of_that_name(network, half, other):
    """On a model that PGD cannot break, SPSA's part of the verdict is what spsa() finds."""
    model = Masked(network, _Stop.apply).eval()
    threat = Threat("1/8")
    made = torch.where(other > half[0], other, half[0])
    generator = seeded()
    transferred = {"linear": transfer(model, made, *half, threat)}
    verdict = masking_verdict(model, *half, threat, transferred=transferred, generator=generator, **QUICK)
    alone = spsa(model, *half, threat, iterations=10, samples=32, generator=seeded(3))
    assert abs(int(alone.correct.sum()) - int(re.search(r"leaves (\d+)", verdict.checks[5].seen)[1])) <= 5


def test_noise_is_uniform_in_the_ball(network, half):
    seen = []

    class Recorder(nn.Module):
        def forward(self, images):
            seen.append(images.detach().clone())
            return network(images)

    images = torch.full((40, 1, 8, 8), 0.5, dtype=torch.float64)
    case = masking._Case(Recorder().eval(), images, network(images).argmax(1), Threat("1/8"), 256, seeded(), print)
    case._under_noise()
    change = seen[-1] - images
    assert change.abs().max() <= 0.125
    assert change.max() > 0.12
    assert change.min() < -0.12
    # Uniform in [-1/8, 1/8]: standard deviation 1/8 / sqrt(3); 2,560 draws.
    assert change.std() == pytest.approx(0.125 / 3**0.5, rel=0.05)
    assert len(change.flatten(1).unique(dim=0)) == 40


def test_it_is_deterministic_and_leaves_model_and_random_state_alone(network, half, other):
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = examine(network, half, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.inference_mode():
        again = examine(network, half, other, batch_size=13)
    assert [check.passed for check in again.checks] == [check.passed for check in first.checks]
    assert again.accuracies == first.accuracies


def test_progress_rises_to_one(network, half, other):
    told = []
    examine(network, half, other, progress=told.append)
    # Every step of it moves the bar.
    assert told == sorted(set(told))
    assert len(told) >= 4
    assert told[-1] == 1


def test_a_verdict_without_a_failure_passes_and_one_failure_is_enough():
    good, bad = MaskingCheck("a", True, "fine"), MaskingCheck("b", False, "not fine")
    assert MaskingVerdict((good,), {}).passed
    assert not MaskingVerdict((good, bad), {}).passed
    assert MaskingVerdict((good, bad, bad), {}).sentence == "robustness not established: not fine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transferred": {"a": torch.zeros(60)}}, r"60 booleans for each other model: got torch.float32 of .* for 'a'"),
        ({"transferred": {"a": torch.zeros(9).bool()}}, r"got torch.bool of shape \[9\] for 'a'"),
        ({"threat": Threat(0)}, "an eps above 0, and spsa_images of 0 .all. or more: got 0 and 0"),
        ({"spsa_images": -1}, "got 1/16 and -1"),
        ({"spsa_iterations": 0}, "iterations and samples must be 1 or more"),
        ({"spsa_delta": 0.0}, "delta must be a finite number above 0"),
        ({"spsa_learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"steps": 0}, "steps and restarts must be 1 or more: got 0 and 1"),
        ({"strong_restarts": 0}, "steps and restarts must be 1 or more: got 100 and 0"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(options, message, network, half):
    settings = {"threat": Threat("1/16"), "transferred": {}} | options
    with pytest.raises(ValueError, match=message):
        masking_verdict(network, *half, **settings)


def test_every_plan_has_the_settings_asked_for(network, half, monkeypatch):
    white, black = [], []

    class Recorded(PgdPlan):
        def run(self, search, seed):
            white.append((self.steps, self.restarts, self.losses, self.random_start, search.threat.eps))
            super().run(search, seed)

    class Script(masking.SpsaPlan):
        def run(self, search, seed):
            black.append((self.iterations, self.samples, self.learning_rate, self.delta))

    monkeypatch.setattr(masking, "PgdPlan", Recorded)
    monkeypatch.setattr(masking, "SpsaPlan", Script)
    masking_verdict(
        network,
        *half,
        Threat("1/16"),
        transferred={},
        steps=7,
        strong_steps=9,
        strong_restarts=2,
        spsa_iterations=4,
        spsa_samples=6,
        spsa_learning_rate=0.02,
        spsa_delta=0.03,
        generator=seeded(),
    )
    both, eps = ("cross-entropy", "margin"), Threat("1/16").eps
    assert white == [
        (7, 1, ("cross-entropy",), True, eps),
        (7, 1, ("margin",), True, eps),
        (9, 2, both, True, eps),
        (7, 1, both, True, 1),
    ]
    assert black == [(4, 6, 0.02, 0.03)]


def test_each_attack_gets_those_that_the_one_before_left(network, half, other, monkeypatch):
    """With what it left, and with random numbers of its own: two looks at one start would be one look."""
    calls = []
    attack = masking._Case.attack

    def recorded(case, plan, seed, standing, threat=None):
        result = attack(case, plan, seed, standing, threat)
        calls.append((seed, standing, result.correct))
        return result

    monkeypatch.setattr(masking._Case, "attack", recorded)
    examine(network, half, other)
    seeds, standing, left = zip(*calls, strict=True)
    assert torch.equal(standing[0], standing[1])
    assert torch.equal(standing[2], left[0] & left[1])
    # The unbounded attack and SPSA: on what the longer attack left.
    assert torch.equal(standing[3], left[2])
    assert torch.equal(standing[4], left[2])
    assert seeds[0] == seeds[1]
    assert len({seeds[0], seeds[2], seeds[4]}) == 3


def test_other_bounds_give_the_same_verdict(network, half, other):
    images, labels = half
    expected = examine(network, half, other)
    wide = Threat("255/16", bounds=(0, 255))
    model = Masked(network, lambda x: x / 255).eval()
    right = transfer(model, other * 255, images * 255, labels, wide)
    spsa_scale = {"spsa_learning_rate": 2.55, "spsa_delta": 2.55}
    verdict = masking_verdict(
        model, images * 255, labels, wide, transferred={"linear": right}, generator=seeded(), **QUICK, **spsa_scale
    )
    assert verdict.passed, verdict.sentence
    assert verdict.checks[3].seen.startswith("with eps = 255, where any image may be shown, PGD-20 leaves 0")
    for name, accuracy in expected.accuracies.items():
        assert verdict.accuracies[name] == pytest.approx(accuracy, abs=2 / 60), name


def test_no_forward_is_of_more_images_than_a_batch(network, half, other):
    seen = []

    class Recorder(nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return network(images)

    transferred = {"linear": transfer(network, other, *half, Threat("1/16"))}
    quick = {"steps": 2, "strong_steps": 2, "strong_restarts": 1, "spsa_iterations": 1, "spsa_samples": 2}
    masking_verdict(
        Recorder().eval(), *half, Threat("1/16"), transferred=transferred, batch_size=13, generator=seeded(), **quick
    )
    assert max(seen) == 13


@pytest.mark.parametrize(("size", "same"), [(0.9e-3, True), (1.1e-3, False)])
@pytest.mark.parametrize("offset", [0, 1000])
def test_one_logit_of_one_image_that_moves_is_another_answer(offset, size, same):
    """To 1/1000 of the logits' spread, whatever is added to all of them."""
    flip = []

    def model(images):
        logits = torch.zeros(len(images), 4, dtype=torch.float64)
        logits[:, 0], logits[:, 1] = 1, -1
        # Of the last image, by turns; the spread is 2.
        flip.append(1)
        logits[images.amax((1, 2, 3)) > 0.6, 2] = size * 2 * (len(flip) % 2)
        return logits + offset

    images = torch.full((40, 1, 2, 2), 0.5, dtype=torch.float64)
    images[-1] = 0.7
    labels = torch.zeros(40, dtype=torch.int64)
    case = masking._Case(model, images, labels, Threat("1/8"), 256, seeded(), print)
    check = case.same_answer()
    assert check.passed == same
    assert check.seen.endswith("in logits that span 2")


def test_one_image_that_spsa_breaks_is_enough(monkeypatch):
    assert failed(scripted(monkeypatch, 200, {"spsa breaks": 1})) == {"SPSA"}
