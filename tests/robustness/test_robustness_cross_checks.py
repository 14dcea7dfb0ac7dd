"""The attacks beside those of torchattacks and foolbox, on the same model and images."""

import copy

import pytest
import torch

from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.auto_attack import auto_attack
from twicing.robustness.draws import draw_seed, image_streams, uniform
from twicing.robustness.spsa import spsa
from twicing.robustness.threat import Threat
from twicing.torchvision_import import mend_torchvision_import


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def torchattacks():
    """The other independent implementation."""
    mend_torchvision_import()
    import torchattacks

    return torchattacks


@pytest.mark.parametrize("eps", ["1/32", "1/16", "1/8"])
def test_fgsm_is_that_of_torchattacks(eps, torchattacks, network, digits):
    images, labels = digits
    expected = torchattacks.FGSM(network, eps=float(Threat(eps).eps))(images, labels)
    result = fgsm(network, images, labels, Threat(eps))
    attacked = result.correct_before
    torch.testing.assert_close(result.adversarial[attacked], expected[attacked], rtol=0, atol=1e-15)
    assert torch.equal(result.correct, attacked & (network(expected).argmax(1) == labels))


@pytest.mark.parametrize("eps", ["1/32", "1/16", "1/8"])
def test_pgd_is_that_of_torchattacks_from_the_same_start(eps, torchattacks, network, digits, monkeypatch):
    images, labels = digits
    size = float(Threat(eps).eps)
    result = pgd(network, images, labels, Threat(eps), losses=("cross-entropy",), steps=20, generator=seeded())
    starts = size * uniform(list(image_streams(draw_seed(seeded()), torch.arange(len(images)))), images)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high: starts)
    expected = torchattacks.PGD(network, eps=size, alpha=0.15 * size, steps=20, random_start=True)(images, labels)
    # Ours stops at the first image that fools the model, theirs goes on (and may come back): the same where none did.
    torch.testing.assert_close(result.adversarial[result.correct], expected[result.correct], rtol=0, atol=1e-12)
    theirs = result.correct_before & (network(expected).argmax(1) == labels)
    assert not (result.correct & ~theirs).any()
    assert (theirs & ~result.correct).sum() <= 1
    assert 0 < result.accuracy < result.accuracy_before - 0.02


def test_apgd_of_our_autoattack_finds_as_much_as_that_of_torchattacks(torchattacks, network, digits):
    images, labels = digits[0].float(), digits[1]

    model = copy.deepcopy(network).float()
    theirs = torchattacks.APGD(model, eps=1 / 16, steps=100, n_restarts=1, seed=0)(images, labels)
    result = auto_attack(model, images, labels, Threat("1/16"), attacks=["apgd-ce"], generator=seeded())
    found = result.correct_before & (model(theirs).argmax(1) == labels)
    assert (result.correct != found).sum() <= 2
    assert result.accuracy < result.accuracy_before - 0.1


def test_spsa_finds_as_much_as_the_gradient_free_pgd_of_foolbox(foolbox, network, digits):
    """torchattacks has no SPSA any more; foolbox estimates with normal directions, for as many queries."""
    images, labels = digits[0][:10], digits[1][:10]
    attack = foolbox.gradient_estimators.es_gradient_estimator(
        foolbox.attacks.LinfPGD, samples=48, sigma=0.01, bounds=(0, 1), clip=False
    )(rel_stepsize=0.15, steps=20, random_start=False)
    judge = foolbox.PyTorchModel(network, bounds=(0, 1))
    # One by one, as it estimates the gradient of the sum over the images it is given.
    found = [attack(judge, x, y, epsilons=1 / 12)[2] for x, y in zip(images.split(1), labels.split(1), strict=True)]
    result = spsa(network, images, labels, Threat("1/12"), iterations=20, samples=24, generator=seeded())
    assert (result.correct != ~torch.cat(found)).sum() <= 1
    white_box = pgd(network, images, labels, Threat("1/12"), generator=seeded())
    assert white_box.accuracy <= result.accuracy <= white_box.accuracy + 0.15
    assert result.accuracy < result.accuracy_before
