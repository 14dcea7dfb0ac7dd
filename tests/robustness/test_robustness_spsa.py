"""SPSA: an estimator of gradients that is exact where it must be, and an attack that needs no gradient."""

from itertools import product

import pytest
import torch
from linear_worst_case import two_classes, worst_margins
from torch import nn

from twicing.robustness.attacks import pgd
from twicing.robustness.search import margin_loss
from twicing.robustness.spsa import spsa, spsa_gradient
from twicing.robustness.threat import Threat


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def every_direction(dimensions):
    """All 2^D directions, [1, 2^D, D]: over these v v^T averages to the identity, so the estimate is its own mean."""
    return torch.tensor(list(product([-1.0, 1.0], repeat=dimensions)), dtype=torch.float64).unsqueeze(0)


def one_sided(values, points, directions, delta):
    slopes = (values(points.unsqueeze(1) + delta * directions) - values(points.unsqueeze(1))) / delta
    return torch.einsum("bm,bm...->b...", slopes, directions) / directions.shape[1]


WRONG_ESTIMATORS = {
    "factor 4": lambda *arguments: 4 * spsa_gradient(*arguments),
    "factor 2": lambda *arguments: 2 * spsa_gradient(*arguments),
    "half": lambda *arguments: spsa_gradient(*arguments) / 2,
    "wrong sign": lambda *arguments: -spsa_gradient(*arguments),
    "sum over directions": lambda *arguments: spsa_gradient(*arguments) * arguments[2].shape[1],
    "one-sided": one_sided,
}


def check_exact_on_polynomials(estimate):
    generator = seeded()
    x, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    half = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = half + half.T
    directions = every_direction(6)

    def linear(points):
        return points @ b

    def quadratic(points):
        return ((points @ matrix) * points).sum(-1) / 2 + points @ b

    for delta in (0.01, 0.5):
        torch.testing.assert_close(estimate(linear, x.unsqueeze(0), directions, delta)[0], b)
        torch.testing.assert_close(estimate(quadratic, x.unsqueeze(0), directions, delta)[0], matrix @ x + b)
        # One direction sees the slope along itself; from one side it would see the curvature too.
        one = directions[:, 5:6]
        slope = (matrix @ x + b) @ one[0, 0]
        torch.testing.assert_close(estimate(quadratic, x.unsqueeze(0), one, delta)[0], slope * one[0, 0])


def test_the_mean_estimate_is_the_gradient_of_linear_and_quadratic_functions():
    check_exact_on_polynomials(spsa_gradient)


@pytest.mark.parametrize("wrong", WRONG_ESTIMATORS)
def test_a_wrong_estimator_is_rejected(wrong):
    """A public estimator was off by 4 for years, as only the sign of what it gave was ever looked at."""
    with pytest.raises(AssertionError):
        check_exact_on_polynomials(WRONG_ESTIMATORS[wrong])


def test_the_bias_of_a_cubic_is_delta_squared():
    """[(x + d)^3 - (x - d)^3] / 2d = 3 x^2 + d^2: both sides are asked, at the distance that was said."""
    x = torch.tensor([[0.7]], dtype=torch.float64)
    found = spsa_gradient(lambda points: points[..., 0] ** 3, x, every_direction(1), 0.25)
    torch.testing.assert_close(found, 3 * x**2 + 0.25**2)


def test_the_variance_is_what_the_docstring_says():
    gradient = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    samples, repeats = 8, 20_000
    directions = 2.0 * torch.randint(0, 2, (repeats, samples, 5), generator=seeded()).double() - 1
    found = spsa_gradient(lambda points: points @ gradient, torch.zeros(repeats, 5).double(), directions, 0.01)
    variance = (gradient.square().sum() - gradient.square()) / samples
    # The mean's standard error is sd / sqrt(repeats); the variance's about sqrt(2 / repeats) of it. Four of each.
    assert ((found.mean(0) - gradient).abs() < 4 * (variance / repeats).sqrt()).all()
    assert ((found.var(0) / variance - 1).abs() < 4 * (2 / repeats) ** 0.5).all()


def test_images_keep_their_shape():
    x = torch.rand(2, 1, 3, 3).double()
    directions = every_direction(9).view(1, -1, 1, 3, 3).expand(2, -1, -1, -1, -1)
    weight = torch.rand(1, 3, 3).double()
    found = spsa_gradient(lambda points: (points * weight).sum((-1, -2, -3)), x, directions, 0.1)
    torch.testing.assert_close(found, weight.expand(2, -1, -1, -1))


@pytest.mark.parametrize("eps", ["1/8", "1/4"])
def test_a_linear_model_is_attacked_nearly_optimally_and_never_beyond(eps, linear_model, digits):
    model, images, labels = two_classes(linear_model, *digits)
    result = spsa(model, images, labels, Threat(eps), samples=64, generator=seeded())
    size = float(Threat(eps).eps)
    possible = worst_margins(model, images, labels, size).amin(1)
    assert not (~result.correct & (possible > 0)).any()
    # What stands was pushed at least nine tenths of the way; pixels of small weight have estimates of either sign.
    before = margin_loss(model(images), labels)
    reached = (margin_loss(model(result.adversarial), labels) - before) / (-possible - before)
    assert reached[result.correct].min() > 0.9
    assert result.correct.any()
    within_reach = result.correct_before & (worst_margins(model, images, labels, 0.9 * size).amin(1) < 0)
    assert not (result.correct & within_reach).any()
    assert within_reach.any() or eps == "1/8"


def test_a_model_without_gradients_falls(network, digits):
    """Rounding stops PGD, which is told so, and not SPSA."""
    images, labels = digits[0][:40], digits[1][:40]

    def rounded(images):
        with torch.no_grad():
            return network(images).mul(16).round() / 16

    with pytest.raises(ValueError, match="carry no gradient"):
        pgd(rounded, images, labels, Threat("1/8"))
    result = spsa(rounded, images, labels, Threat("1/8"), iterations=40, samples=64, generator=seeded())
    white_box = pgd(network, images, labels, Threat("1/8"), generator=seeded())
    assert result.accuracy <= white_box.accuracy + 0.1
    assert result.accuracy < result.accuracy_before - 0.5


def test_constant_answers_are_counted_as_zero_gradients():
    def constant(images):
        return images.new_tensor([1.0, 0.0]).expand(len(images), 2)

    images, labels = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    result = spsa(constant, images, labels, Threat("1/8"), iterations=2, samples=4, generator=seeded())
    assert (result.zero_gradient_share, result.accuracy) == (1, 1)
    assert torch.equal(result.adversarial, images)
    sloped = spsa(lambda x: x[:, :2] + constant(x), images, labels, Threat("1/8"), iterations=2, samples=4)
    assert sloped.zero_gradient_share < 1


def test_queries_are_as_many_as_stated():
    asked = []

    def model(images):
        asked.append(len(images))
        return torch.stack([images.sum(1) + 100, images.sum(1)], dim=1)

    images = torch.full((2, 4), 0.5)
    spsa(model, images, torch.tensor([0, 0]), Threat("1/8"), iterations=3, samples=5, batch_size=7)
    assert sum(asked) == 2 * (1 + 3 * (2 * 5 + 1))
    assert max(asked) <= 7


def test_every_step_starts_inside_the_ball():
    """What is asked lies at most delta outside: a step that left the ball was brought back before the next."""
    asked = []

    def model(images):
        asked.append(images)
        return torch.stack([images.sum(1) + 100, -images.sum(1)], dim=1)

    images = torch.tensor([[0.5] * 4, [0.05] * 4], dtype=torch.float64)
    result = spsa(
        model,
        images,
        torch.tensor([0, 0]),
        Threat("1/8"),
        iterations=6,
        samples=8,
        learning_rate=0.1,
        delta=0.01,
        generator=seeded(),
    )
    assert torch.cat(asked).min() >= -0.01 - 1e-12
    middle = torch.cat([points[: len(points) // 2] for points in asked if len(points) > 2])
    assert (middle - 0.5).abs().max() <= 0.125 + 0.01 + 1e-12
    assert (result.adversarial - images).abs().max() <= 0.125 + 1e-12


def test_a_fooled_image_is_left_alone():
    asked = []

    def model(images):
        asked.append(len(images))
        return torch.stack([0.55 - images.mean(1), images.mean(1) - 0.55], dim=1)

    images = torch.tensor([[0.545] * 4, [0.1] * 4, [0.9] * 4])
    result = spsa(
        model, images, torch.zeros(3, dtype=torch.int64), Threat("1/16"), iterations=4, samples=32, generator=seeded()
    )
    assert result.correct.tolist() == [False, True, False]
    assert result.correct_before.tolist() == [True, True, False]
    # Both at once, as 256 // 64 = 4 images have room; the first falls at the first step.
    assert asked == [3, 128, 2, *[64, 1] * 3]


def test_the_first_step_is_the_learning_rate():
    """Adam's first step is the sign of the estimate, whatever the scale of the logits."""
    images = torch.full((1, 6), 0.5, dtype=torch.float64)
    weight = torch.tensor([5.0, -3.0, 1.0, 0.2, -0.1, 7.0], dtype=torch.float64)
    for scale in (1.0, 1e4):

        def model(images, scale=scale):
            return scale * torch.stack([-(images @ weight) + 100, images @ weight], dim=1)

        result = spsa(
            model,
            images,
            torch.tensor([0]),
            Threat("1/2"),
            iterations=1,
            samples=4096,
            learning_rate=0.05,
            batch_size=8192,
            generator=seeded(),
        )
        change = (result.adversarial - images)[0]
        torch.testing.assert_close(change.abs(), torch.full_like(change, 0.05))
        assert torch.equal(change.sign()[[0, 1, 2, 5]], weight.sign()[[0, 1, 2, 5]])
    # Two Adam steps of one gradient are two steps.
    twice = spsa(
        model,
        images,
        torch.tensor([0]),
        Threat("1/2"),
        iterations=2,
        samples=4096,
        learning_rate=0.05,
        generator=seeded(),
    )
    change = (twice.adversarial - images)[0]
    torch.testing.assert_close(change[[0, 1, 5]].abs(), torch.full((3,), 0.1, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("eps", ["0", "1/16", "1"])
def test_ball_bounds_and_success_hold_on_real_digits(eps, network, digits):
    images, labels = digits[0][:30].float(), digits[1][:30]

    def model(images):
        return network(images.double())

    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        result = spsa(model, images, labels, Threat(eps), iterations=4, samples=8, generator=seeded())
    change = (result.adversarial - images).abs()
    assert change.max() <= float(Threat(eps).eps) + 1e-7
    assert (change.max() > 0) == (eps != "0")
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert result.adversarial.dtype == torch.float32
    assert torch.equal(model(result.adversarial).argmax(1) == labels, result.correct)
    assert torch.equal(model(images).argmax(1) == labels, result.correct_before)
    assert not (result.correct & ~result.correct_before).any()
    assert change.flatten(1).amax(1)[~result.correct_before].sum() == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_neither_batch_size_nor_other_images_matter(batch_size, network, digits):
    images, labels = digits[0][:20], digits[1][:20]
    settings = {"iterations": 5, "samples": 16, "generator": seeded()}
    expected = spsa(network, images, labels, Threat("1/16"), **settings)
    settings["generator"] = seeded()
    result = spsa(network, images[:9], labels[:9], Threat("1/16"), **settings, batch_size=batch_size)
    assert torch.equal(result.correct, expected.correct[:9])
    torch.testing.assert_close(result.adversarial, expected.adversarial[:9], rtol=0, atol=1e-9)


def test_directions_come_from_the_generator_and_differ_between_images(network, digits):
    images, labels = digits[0][:1].repeat(3, 1, 1, 1), digits[1][:1].repeat(3)
    runs = [
        spsa(network, images, labels, Threat("1/32"), iterations=1, samples=4, generator=seeded(k)).adversarial
        for k in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len(runs[0].flatten(1).unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations and samples must be 1 or more: got 0 and 128"),
        ({"samples": 0}, "iterations and samples must be 1 or more: got 40 and 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0.*: got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be .*: got inf"),
        ({"delta": -0.01}, "delta must be a finite number above 0, in units of the pixel scale: got -0.01"),
        ({"delta": float("nan")}, "delta must be .*: got nan"),
        ({"batch_size": 0}, "batch_size must be 1 or larger: got 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_attack_are_refused(options, message, network, digits):
    with pytest.raises(ValueError, match=message):
        spsa(network, *digits, Threat("1/16"), **options)


def test_a_model_in_training_mode_is_refused(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double(), nn.Dropout())
    with pytest.raises(ValueError, match="eval mode"):
        spsa(model, *digits, Threat("1/16"))
