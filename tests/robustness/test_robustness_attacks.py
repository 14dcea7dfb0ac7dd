"""FGSM and PGD against closed forms on a linear model, against foolbox, and against attacks wrong on purpose."""

from functools import partial

import pytest
import torch
from linear_worst_case import two_classes, worst_margins
from torch import nn

from twicing.robustness.attacks import LOSSES, fgsm, pgd
from twicing.robustness.search import cross_entropy_loss, margin_loss
from twicing.robustness.threat import Threat


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Reversed(nn.Module):
    """The same answers as the model, but a gradient of the wrong sign: an attack that follows it descends."""

    class _Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(self._Reverse.apply(images))


def check_optimal(attack, model, exact_model, images, labels, eps):
    result = attack(model, images, labels, Threat(eps))
    margins = worst_margins(exact_model, images, labels, float(Threat(eps).eps)).amin(1)
    assert torch.equal(result.correct, margins > 0)


@pytest.mark.parametrize("eps", ["1/32", "1/16", "1/8", "1/4"])
def test_two_class_linear_model_is_attacked_optimally(attack, eps, linear_model, digits):
    model, images, labels = two_classes(linear_model, *digits)
    check_optimal(attack, model, model, images, labels, eps)


def test_the_optimality_test_rejects_an_attack_that_descends(attack, linear_model, digits):
    model, images, labels = two_classes(linear_model, *digits)
    with pytest.raises(AssertionError):
        check_optimal(attack, Reversed(model).eval(), model, images, labels, "1/8")


@pytest.mark.parametrize("eps", ["1/16", "1/8"])
def test_ten_class_linear_model_is_nearly_optimal_and_never_beyond(eps, linear_model, digits):
    images, labels = digits
    possible = worst_margins(linear_model, images, labels, float(Threat(eps).eps)).amin(1) > 0
    found = pgd(linear_model, images, labels, Threat(eps), generator=seeded()).correct
    assert not (possible & ~found).any()
    # Signed steps on the loss need not find the optimum among ten classes, but nearly always do.
    assert (found & ~possible).sum() <= 5
    assert (~possible).sum() >= 25


@pytest.mark.parametrize("eps", ["1/16", "1/8"])
def test_fgsm_agrees_with_foolbox(eps, foolbox, network, digits):
    images, labels = digits
    result = fgsm(network, images, labels, Threat(eps))
    judge = foolbox.PyTorchModel(network, bounds=(0, 1))
    _, clipped, success = foolbox.attacks.LinfFastGradientAttack()(
        judge, images, labels, epsilons=float(Threat(eps).eps)
    )
    attacked = result.correct_before
    torch.testing.assert_close(result.adversarial[attacked], clipped[attacked], rtol=0, atol=1e-12)
    assert torch.equal(result.correct[attacked], ~success[attacked])
    assert 0.05 < result.accuracy < result.accuracy_before - 0.05


@pytest.mark.parametrize("eps", ["1/32", "1/16", "1/8"])
def test_pgd_agrees_with_foolbox(eps, foolbox, network, digits):
    images, labels = digits
    result = pgd(network, images, labels, Threat(eps), losses=("cross-entropy",), random_start=False, steps=20)
    judge = foolbox.PyTorchModel(network, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.15, steps=20, random_start=False)
    _, clipped, success = attack(judge, images, labels, epsilons=float(Threat(eps).eps))
    # Ours stops at the first image that fools the model, foolbox's goes on: the same images where none did.
    torch.testing.assert_close(result.adversarial[result.correct], clipped[result.correct], rtol=0, atol=1e-12)
    assert torch.equal(result.correct, ~success)
    assert 0 < result.accuracy < result.accuracy_before - 0.02


def test_pgd_is_stronger_than_fgsm_and_restarts_never_weaken_it(network, digits):
    images, labels = digits
    threat = Threat("1/16")
    weak = pgd(network, images, labels, threat, steps=2, relative_step_size=0.3, generator=seeded())
    kept = weak.correct
    for restarts in (2, 4):
        more = pgd(
            network, images, labels, threat, steps=2, relative_step_size=0.3, restarts=restarts, generator=seeded()
        )
        assert not (more.correct & ~kept).any()
        # Of several runs the image that came nearest to fooling the model is the one returned.
        nearer = margin_loss(network(more.adversarial), labels) - margin_loss(network(weak.adversarial), labels)
        assert nearer[more.correct].min() >= 0
        assert nearer[more.correct].max() > 0
        kept = more.correct
    assert kept.sum() < weak.correct.sum()
    assert (
        pgd(network, images, labels, threat, generator=seeded()).accuracy
        <= fgsm(network, images, labels, threat).accuracy
    )


def test_an_image_is_broken_if_any_loss_breaks_it(network, digits):
    images, labels = digits
    # Few small steps, so that the two losses break different images.
    weak = {"steps": 1, "random_start": False, "relative_step_size": 1.0}
    found = {
        losses: pgd(network, images, labels, Threat("1/16"), losses=losses, **weak).correct
        for losses in [("cross-entropy",), ("margin",), ("cross-entropy", "margin")]
    }
    assert not torch.equal(found["cross-entropy",], found["margin",])
    assert torch.equal(found["cross-entropy", "margin"], found["cross-entropy",] & found["margin",])


def test_a_saturated_loss_blinds_cross_entropy_but_not_the_margin(linear_model, digits):
    """Logits x 2000 in float64 make the softmax exactly one-hot: the defence that is none (arXiv 1802.00420)."""
    model, images, labels = two_classes(linear_model, *digits)
    images, labels = images[model(images).argmax(1) == labels], labels[model(images).argmax(1) == labels]
    with torch.no_grad():
        model[1].weight *= 2000
        model[1].bias *= 2000
    blind = fgsm(model, images, labels, Threat("1/4"))
    assert blind.zero_gradient_share > 0.5
    assert blind.accuracy > 0.5
    check_optimal(partial(pgd, losses=("margin",), generator=seeded()), model, model, images, labels, "1/4")


def test_every_image_loss_and_restart_has_its_own_start():
    starts = []

    class Recorder(nn.Module):
        def forward(self, images):
            if images.requires_grad:
                starts.append(images.detach().clone())
            return torch.stack([images.sum((1, 2)) + 100, images.sum((1, 2))], dim=1)

    pgd(
        Recorder().eval(),
        torch.full((3, 5, 5), 0.5),
        torch.zeros(3, dtype=torch.int64),
        Threat("1/4"),
        steps=1,
        restarts=2,
        generator=seeded(),
    )
    drawn = (torch.cat(starts) - 0.5) / 0.25
    assert len(drawn.flatten(1).unique(dim=0)) == 3 * 2 * 2
    # Uniform in [-1, 1]: 300 draws reach near both ends, their mean has a standard error of 1/30.
    assert drawn.abs().max() <= 1
    assert drawn.min() < -0.95
    assert drawn.max() > 0.95
    assert drawn.mean().abs() < 4 / 30


def test_losses_in_closed_form():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]], requires_grad=True)
    labels = torch.tensor([1, 2])
    assert margin_loss(logits, labels).tolist() == [-1.0, 1.0]
    total = torch.tensor([1.0, 3.0, 2.0]).exp().sum().log()
    torch.testing.assert_close(cross_entropy_loss(logits, labels), torch.stack([total - 3, total - 2]))
    (gradient,) = torch.autograd.grad(margin_loss(logits, labels).sum(), logits)
    assert gradient.tolist() == [[0, -1, 1], [0, 1, -1]]
    assert list(LOSSES) == ["cross-entropy", "margin"]


def test_more_steps_take_smaller_ones_by_default():
    """20 steps are of 0.15 eps; few steps still cross the ball."""
    images = torch.full((1, 4), 0.5, dtype=torch.float64)
    seen = []

    def model(images):
        seen.append(images.detach().clone())
        return torch.stack([images.sum(1) + 100, 0 * images.sum(1)], dim=1)

    for steps, step in [(20, 0.15), (40, 0.075), (4, 0.75)]:
        seen.clear()
        pgd(model, images, torch.tensor([0]), Threat("1/10"), steps=steps, losses=("margin",), random_start=False)
        # Clean, then the first two steps' forwards.
        torch.testing.assert_close(seen[1] - seen[2], torch.full_like(images, step / 10))
        torch.testing.assert_close(seen[-1], images - 0.1)
