"""AutoAttack by pyautoattack: judged by us, repeatable, and without a trace in model, random state or interpreter."""

import copy
import logging
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from linear_worst_case import two_classes, worst_margins
from torch import nn

from twicing.robustness import auto_attack as module
from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.auto_attack import FEWEST_CLASSES, auto_attack
from twicing.robustness.threat import Threat

# One attack that follows gradients: what is promised for all of them is tested with it, as the ensemble takes long.
quick = partial(auto_attack, attacks=["apgd-ce"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def few(digits):
    """The first 20 digits."""
    return digits[0][:20], digits[1][:20]


@pytest.fixture(scope="module")
def standard(trained_network, few):
    """The whole ensemble, once."""
    return auto_attack(copy.deepcopy(trained_network), *few, Threat("1/8"), generator=seeded())


def test_the_ensemble_is_no_weaker_than_pgd(standard, network, few):
    assert standard.attack == "autoattack, standard"
    white_box = pgd(network, *few, Threat("1/8"), steps=100, restarts=3, generator=seeded())
    assert not (standard.correct & ~white_box.correct).any()
    assert standard.accuracy < fgsm(network, *few, Threat("1/8")).accuracy
    assert standard.notes == ()


def test_what_is_reported_is_what_the_model_says_to_images_of_the_threat(standard, network, few):
    images, labels = few
    change = (standard.adversarial - images).abs()
    assert change.max() <= 1 / 8 + 1e-7
    assert standard.adversarial.min() >= 0
    assert standard.adversarial.max() <= 1
    assert standard.adversarial.dtype == images.dtype
    assert torch.equal(network(standard.adversarial).argmax(1) == labels, standard.correct)
    assert torch.equal(network(images).argmax(1) == labels, standard.correct_before)
    assert change.flatten(1).amax(1)[~standard.correct_before].sum() == 0


def test_of_an_image_that_stands_the_image_itself_is_returned(network, few):
    result = quick(network, *few, Threat("1/32"), generator=seeded())
    assert result.correct.any()
    assert (result.adversarial - few[0]).abs().flatten(1).amax(1)[result.correct].max() < 1e-7


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_every_attack_alone_finds_what_there_is(attack, linear_model, digits):
    images, labels = digits[0][:5], digits[1][:5]
    result = auto_attack(linear_model, images, labels, Threat("3/8"), attacks=[attack], generator=seeded())
    assert result.attack == f"autoattack, {attack}"
    assert torch.equal(result.correct, worst_margins(linear_model, images, labels, 3 / 8).amin(1) > 0)
    assert result.accuracy < result.accuracy_before


def test_two_class_linear_model_is_attacked_optimally(linear_model, digits):
    model, images, labels = two_classes(linear_model, *digits)
    result = quick(model, images, labels, Threat("1/4"), generator=seeded())
    assert torch.equal(result.correct, worst_margins(model, images, labels, 1 / 4).amin(1) > 0)


@pytest.mark.parametrize("name", ["apgd-ce", "square"])
def test_the_seed_decides_and_nothing_else_is_drawn(name, network, few):
    state = torch.random.get_rng_state()
    # At so large an eps all fall soon, and Square need not use its 5,000 queries.
    attack = partial(auto_attack, network, *few, Threat("1/4"), attacks=[name])
    runs = [attack(generator=seeded(k)).adversarial for k in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_batch_of_one_is_a_batch(network, few):
    images, labels = few[0][:3], few[1][:3]
    result = quick(network, images, labels, Threat("1/8"), batch_size=1, generator=seeded())
    assert torch.equal(network(result.adversarial).argmax(1) == labels, result.correct)
    assert result.accuracy < result.accuracy_before


def test_other_bounds_are_scaled(network, few):
    images, labels = few
    expected = quick(network, images, labels, Threat("1/16"), generator=seeded())
    scaled = quick(
        lambda x: network((x + 1) / 2), images * 2 - 1, labels, Threat("1/8", bounds=(-1, 1)), generator=seeded()
    )
    assert torch.equal(scaled.correct, expected.correct)
    torch.testing.assert_close((scaled.adversarial + 1) / 2, expected.adversarial, rtol=0, atol=1e-5)


def test_nothing_is_left_behind(network, few):
    model = copy.deepcopy(network)
    model.zero_grad()
    model[1].weight.requires_grad_(False)
    model[1].bias.grad = torch.full((24,), 7.0, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logger = logging.getLogger("auto-attack")
    logging_before = (list(logger.handlers), logger.propagate, logger.level)

    def trace(frame, event, argument):
        return None

    kept = sys.gettrace()
    sys.settrace(trace)
    try:
        auto_attack(model, *few, Threat("1/8"), attacks=["apgd-ce", "fab-t"], generator=seeded())
        assert sys.gettrace() is trace
    finally:
        sys.settrace(kept)
    assert (logger.handlers, logger.propagate, logger.level) == logging_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, False, True, True]
    assert model[1].bias.grad.eq(7).all()
    assert not few[0].requires_grad


class _EnoughError(Exception):
    pass


def _stop(self, iteration):
    raise _EnoughError


def test_it_works_inside_an_evaluation_loop_and_on_a_model_that_shares_its_output(network, few, monkeypatch):
    expected = quick(network, *few, Threat("1/16"), generator=seeded())
    with torch.inference_mode():
        result = quick(network, few[0].clone(), few[1].clone(), Threat("1/16"), generator=seeded())
    assert torch.equal(result.adversarial, expected.adversarial)
    # In float32, which the package computes in: logits of another dtype are copied anyway.
    kept = network(few[0]).detach().float()

    def table(images):
        """Whatever it is shown, its answer is the same tensor: Square writes into it."""
        return kept[: len(images)]

    with monkeypatch.context() as patched:
        patched.setattr("pyautoattack.square.SquareAttack.p_selection", _stop)
        with pytest.raises(_EnoughError):
            auto_attack(table, *few, Threat("1/16"), attacks=["square"], generator=seeded())
    assert torch.equal(kept, network(few[0]).float())


def test_its_doubts_are_notes_and_not_on_the_screen(network, few, capfd):
    def random(images):
        return network(images + 0.1 * torch.randn_like(images))

    result = quick(random, *few, Threat("1/16"), generator=seeded())
    assert result.notes == ('it seems to be a randomized defense! Please use version="rand".',)

    def probabilities(images):
        return network(images).softmax(1)

    result = quick(probabilities, *few, Threat("1/16"), generator=seeded(), batch_size=7)
    assert result.notes == (
        "it seems that the output is a probability distribution, please be sure that the logits are used!",
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("classes", "attack"),
    [(2, "apgd-dlr"), (3, "apgd-t"), (2, "apgd-t")],
)
def test_too_few_classes_are_refused(classes, attack, few):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes).double()).eval()
    images, labels = few[0], few[1] % classes
    need = FEWEST_CLASSES[attack]
    with pytest.raises(
        ValueError, match=rf"{attack} needs {need} classes or more: got a model of {classes}\. With these"
    ):
        auto_attack(model, images, labels, Threat("1/16"), attacks=[attack])


def test_the_standard_ensemble_needs_four_classes_and_tries_them_all(few):
    images, labels = few[0], few[1] % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3).double()).eval()
    with pytest.raises(
        ValueError, match=r"apgd-t needs 4 classes.*choose attacks from apgd-ce, apgd-dlr, fab, fab-t, sq"
    ):
        auto_attack(model, images, labels, Threat("1/16"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4).double()).eval()
    labels = model(images).argmax(1)
    targeted = auto_attack(model, images, labels, Threat("1/16"), attacks=["apgd-t"], generator=seeded())
    assert targeted.notes == ()
    exact = worst_margins(model, images, labels, 1 / 16).amin(1) > 0
    assert torch.equal(targeted.correct, exact)
    assert 0 < targeted.accuracy < 1


def test_restarts_of_chosen_attacks_are_those_of_standard(few, network):
    asked = []

    def count(images):
        asked.append(len(images))
        return network(images)

    # So small an eps that no image falls: 100 iterations, whatever the images.
    quick(count, *few, Threat("1/10000"), generator=seeded())
    assert 100 <= len([n for n in asked if n]) <= 120


def test_an_image_that_was_wrong_is_not_attacked(network, few):
    images, _ = few
    wrong = (network(images).argmax(1) + 1) % 10
    result = quick(network, images, wrong, Threat("1/16"), generator=seeded())
    assert (result.accuracy, result.accuracy_before, result.notes) == (0, 0, ())
    assert torch.equal(result.adversarial, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "custom"}, "version must be one of standard, plus, rand: got 'custom'"),
        ({"version": "rand", "attacks": ["fab"]}, r"give either version or attacks: got 'rand' and \['fab'\]"),
        ({"attacks": ["apgd"]}, r"some of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square: got \['apgd'\]"),
        ({"attacks": "fab"}, "attacks must be a list of some of .*: got 'fab'"),
        ({"batch_size": 0}, "batch_size must be 1 or larger"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(options, message, network, few):
    with pytest.raises(ValueError, match=message):
        auto_attack(network, *few, Threat("1/16"), **options)


def test_images_without_height_and_width_are_refused(network, few):
    with pytest.raises(ValueError, match=r"\[n, channels, height, width\] .*: got \[20, 64\]"):
        auto_attack(network, few[0].flatten(1), few[1], Threat("1/16"))


def test_without_the_package_the_error_names_the_extra(network, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"AutoAttack needs pyautoattack: pip install 'twicing\[lab\]'"):
        auto_attack(network, *few, Threat("1/16"))


@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (10, 9), (12, 9)])
@pytest.mark.parametrize(
    ("options", "version", "attacks"),
    [
        ({}, "standard", None),
        ({"version": "plus"}, "plus", None),
        ({"version": "rand"}, "rand", None),
        ({"attacks": ["square", "apgd-ce"]}, "custom", ["square", "apgd-ce"]),
    ],
    ids=str,
)
def test_the_package_is_asked_for_what_was_asked_for(options, version, attacks, classes, targets, few, monkeypatch):
    """The version or the attacks in their order, and for fab-t as many targets as for apgd-t."""
    asked = []

    class Package:
        def __init__(self, model, **settings):
            self.apgd, self.fab, self.apgd_targeted = (SimpleNamespace() for _ in range(3))
            asked.append((self, settings))

        def run_standard_evaluation(self, images, labels, batch_size):
            return images, labels

    monkeypatch.setattr(module, "_package", lambda: Package)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes).double()).eval()
    labels = model(few[0]).argmax(1)
    auto_attack(model, few[0], labels, Threat("1/16"), generator=seeded(), **options)
    [(package, settings)] = asked
    assert (settings["version"], settings["attacks"]) == (version, attacks)
    assert (settings["norm"], settings["eps"]) == ("Linf", 1 / 16)
    assert (package.apgd_targeted.n_target_classes, package.fab.n_target_classes) == (targets, targets)


def test_only_images_that_stand_are_shown_to_the_package(few, monkeypatch):
    """In batches of their own: the images of a batch share its random numbers."""
    shown = []

    class Package:
        def __init__(self, model, **settings):
            self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()

        def run_standard_evaluation(self, images, labels, batch_size):
            shown.append(images)
            return images, labels

    monkeypatch.setattr(module, "_package", lambda: Package)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4).double()).eval()
    images = few[0][:9]
    labels = model(images).argmax(1)
    labels[[0, 4, 5]] = (labels[[0, 4, 5]] + 1) % 4
    auto_attack(model, images, labels, Threat("1/16"), batch_size=4)
    assert [len(batch) for batch in shown] == [4, 2]
    assert torch.equal(torch.cat(shown), images[[1, 2, 3, 6, 7, 8]].float())


@pytest.mark.parametrize(("version", "classes"), [("rand", 2), ("plus", 3), ("standard", 3)])
def test_every_version_names_all_its_attacks(version, classes, few):
    """One that left an attack out would let a model through for which the package fails."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes).double()).eval()
    with pytest.raises(ValueError, match=rf"(apgd-dlr|apgd-t) needs {classes + 1} classes or more"):
        auto_attack(model, few[0], few[1] % classes, Threat("1/16"), version=version)
