"""eps50 by bisection, against linear models whose smallest eps is known image by image, and against brute force."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from linear_worst_case import smallest_eps
from torch import nn

from twicing.robustness.attacks import PgdPlan, pgd
from twicing.robustness.eps50 import FINEST, eps50
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# One signed step reaches the optimal corner of the ball of a two-class linear model.
OPTIMAL = {"steps": 1, "losses": ("margin",), "random_start": False}


def linear_case(n, seed=0, scale=0.1):
    """A two-class linear model, and n grey images within +-.02, so that its ball meets no bound before .4."""
    generator = seeded(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2).double()).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=generator, dtype=torch.float64))
    images = 0.5 + 0.02 * (2 * torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64) - 1)
    # The bias puts the boundary somewhere among them; labels are what the model says but for one in eight.
    with torch.no_grad():
        difference = (model[1].weight[0] - model[1].weight[1]) @ images.flatten(1).T
        model[1].bias.copy_(torch.tensor([-difference.mean() + scale, 0.0]).double())
        labels = model(images).argmax(1)
    labels[::8] = 1 - labels[::8]
    return model, images, labels


def truth(model, images, labels):
    """The lower median over images of the smallest eps."""
    return smallest_eps(model, images, labels).median().item()


def check(found, expected, resolution=0.02):
    assert found.value == found.high
    assert found.low < expected <= found.high * (1 + 1e-9)
    assert found.high - found.low <= max(resolution * found.high, 2**-20) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 40, 41])
@pytest.mark.parametrize(
    "eps", [["1/64", "1/32", "1/16", "1/8"], ["1/3"], ["1/100000"]], ids=["inside", "below", "above"]
)
def test_a_linear_model_in_closed_form(n, eps):
    model, images, labels = linear_case(n + 1)
    # Without the first, whose label is wrong: for n = 1 half would be lost at once.
    images, labels = images[1:], labels[1:]
    sweep = pgd_sweep(model, images, labels, eps, **OPTIMAL)
    found = eps50(model, images, labels, sweep, **OPTIMAL)
    assert found.n == n
    check(found, truth(model, images, labels))


@pytest.mark.parametrize("resolution", [0.5, 0.1, 0.001])
def test_the_resolution_is_kept(resolution):
    model, images, labels = linear_case(41)
    sweep = pgd_sweep(model, images, labels, ["1/64", "1/4"], **OPTIMAL)
    found = eps50(model, images, labels, sweep, **OPTIMAL, resolution=resolution)
    check(found, truth(model, images, labels), resolution)
    # And it is no finer than asked for: one halving less would not do.
    assert 2 * (found.high - found.low) > resolution * found.low


def test_the_resolution_is_a_share_of_the_upper_end():
    model, images, labels = linear_case(41)
    low = Fraction(truth(model, images, labels) / 1.5)
    sweep = pgd_sweep(model, images, labels, [low, 2 * low], **OPTIMAL)
    # (2 - 1) / 2 is 0.5 already; of the lower end the bracket is 1.
    found = eps50(model, images, labels, sweep, **OPTIMAL, resolution=0.5)
    assert (found.low, found.high) == (low, 2 * low)


@pytest.mark.parametrize("copies", [2, 5])
def test_ties(copies):
    """Equal images change sides together; the median is one of them."""
    model, images, labels = linear_case(9)
    images, labels = images.repeat(copies, 1, 1, 1), labels.repeat(copies)
    sweep = pgd_sweep(model, images, labels, ["1/64", "1/4"], **OPTIMAL)
    check(eps50(model, images, labels, sweep, **OPTIMAL), truth(model, images, labels))
    one = (images[:1].repeat(6, 1, 1, 1), 1 - labels[:1].repeat(6))
    sweep = pgd_sweep(model, *one, ["1/4"], **OPTIMAL)
    check(eps50(model, *one, sweep, **OPTIMAL), smallest_eps(model, *one)[0].item())


def test_an_even_number_has_the_lower_median():
    model, images, labels = linear_case(40)
    each = smallest_eps(model, images, labels).sort().values
    sweep = pgd_sweep(model, images, labels, ["1/4"], **OPTIMAL)
    found = eps50(model, images, labels, sweep, **OPTIMAL, resolution=1e-4)
    assert found.low < each[19] <= found.high < each[20]


def test_half_wrong_without_an_attack_is_zero():
    model, images, labels = linear_case(40)
    labels = model(images).argmax(1)
    labels[:20] = 1 - labels[:20]
    sweep = pgd_sweep(model, images, labels, ["1/4"], **OPTIMAL)
    found = eps50(model, images, labels, sweep, **OPTIMAL)
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 40)
    labels[0] = 1 - labels[0]
    sweep = pgd_sweep(model, images, labels, ["1/4"], **OPTIMAL)
    check(eps50(model, images, labels, sweep, **OPTIMAL), truth(model, images, labels))


def test_no_value_where_the_whole_pixel_range_does_not_do():
    def deaf(images):
        return torch.stack([images.sum(1) * 0 + 1, images.sum(1) * 0], dim=1)

    tried = []

    def model(images):
        tried.append(images.detach())
        return deaf(images)

    images, labels = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    sweep = pgd_sweep(deaf, images, labels, ["1/8", "3/16"], steps=1)
    found = eps50(model, images, labels, sweep, steps=1)
    assert (found.value, found.low, found.high) == (None, 1, None)
    # Doubled to 3/8, 3/4 and the whole range, and no further: a check of the clean images, then two losses each.
    assert len(tried) == 1 + 3 * 2 * 2


def test_only_undecided_images_are_attacked_again():
    asked = []

    class Recorder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            if images.requires_grad:
                asked.append(len(images))
            return self.model(images)

    model, images, labels = linear_case(41)
    sweep = pgd_sweep(model, images, labels, ["1/1000", "1/100"], **OPTIMAL)
    low, high, each = 1 / 1000, 1 / 100, smallest_eps(model, images, labels)
    assert torch.equal(sweep.correct, torch.stack([each > low, each > high]))
    eps50(Recorder(model).eval(), images, labels, sweep, **OPTIMAL)
    expected = []
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        expected.append(int(((each > low) & (each <= high)).sum()))
        low, high = (low, middle) if (each > middle).sum() <= 20 else (middle, high)
    assert asked == [count for count in expected if count]
    assert len(asked) > 3
    assert asked[-1] < asked[0]


def test_it_agrees_with_brute_force_on_a_network(network, digits):
    attack = {"steps": 10, "random_start": False}
    sweep = pgd_sweep(network, *digits, ["1/32", "1/8"], **attack)
    found = eps50(network, *digits, sweep, **attack)
    alone = [pgd(network, *digits, Threat(Fraction(size)), **attack).accuracy for size in (found.low, found.high)]
    # Found at the same two sizes from scratch: half lies between them, but for what one image may do by chance.
    assert alone[0] > 0.5 >= alone[1] - 1 / 120
    assert 1 / 32 < found.low < found.value < 1 / 8
    assert found.high - found.low <= 0.02 * found.high


def test_the_sweep_decides_where_it_starts_not_where_it_ends(network, digits):
    values = []
    for eps in (["1/32", "1/16", "1/8"], ["1/4"], ["1/128"]):
        sweep = pgd_sweep(network, *digits, eps, steps=10, generator=seeded())
        values.append(eps50(network, *digits, sweep, steps=10, generator=seeded()).value)
    assert max(values) - min(values) <= 0.06 * max(values)


def test_what_is_broken_in_a_smaller_ball_is_broken_in_a_larger_one():
    """A model that is fooled at 1/4 of the way only, where an attack at the far end looks in vain."""

    class Island(nn.Module):
        def forward(self, images):
            mean = images.mean((1, 2, 3)) - 0.5
            wrong = (mean.abs() > 0.05) & (mean.abs() < 0.1)
            return torch.stack([torch.where(wrong, -1.0, 1.0) + mean * 1e-3, -mean * 1e-3], dim=1)

    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    attack = {"steps": 1, "random_start": False, "losses": ("margin",), "relative_step_size": 1.0}
    sweep = pgd_sweep(Island().eval(), images, labels, ["1/12", "1/2"], **attack)
    assert not sweep.correct.any()
    found = eps50(Island().eval(), images, labels, sweep, **attack)
    assert 0.05 < found.value < 0.052


@pytest.mark.parametrize("start", ["1/100", "1/3"])
def test_an_image_that_was_lost_while_extending_or_halving_stays_lost(start):
    """Accuracy at the end is counted from what was carried: every image has one threshold."""
    model, images, labels = linear_case(33, seed=4)
    sweep = pgd_sweep(model, images, labels, [start], **OPTIMAL)
    check(eps50(model, images, labels, sweep, **OPTIMAL, resolution=1e-3), truth(model, images, labels), 1e-3)


def test_other_bounds_give_the_same_share_of_the_range(network, digits):
    settings = {"steps": 5, "random_start": False}
    sweep = pgd_sweep(network, *digits, ["1/32", "1/8"], **settings)
    wide = pgd_sweep(
        lambda x: network(x / 255), digits[0] * 255, digits[1], ["255/32", "255/8"], bounds=(0, 255), **settings
    )
    found = eps50(network, *digits, sweep, **settings)
    other = eps50(lambda x: network(x / 255), digits[0] * 255, digits[1], wide, **settings)
    assert other.value == pytest.approx(found.value, rel=1e-9)
    assert other.low == pytest.approx(found.low, rel=1e-9)


def test_it_stops_at_the_rounding_of_pixels():
    """More than half of the images lie on the boundary itself: their smallest eps is not 0, and smaller than any."""
    model, images, labels = linear_case(5)
    with torch.no_grad():
        model[1].weight[0] = model[1].weight[1] + 1.0
        model[1].bias.zero_()
        model[1].bias[0] = -8.0 + 1e-12
    images, labels = torch.full((5, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    sweep = pgd_sweep(model, images, labels, ["1/8"], **OPTIMAL)
    found = eps50(model, images, labels, sweep, **OPTIMAL)
    assert found.low == 0
    assert float(FINEST) / 2 < found.high <= float(FINEST)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_generator_and_batches(batch_size, network, digits):
    sweep = pgd_sweep(network, *digits, ["1/16", "1/8"], steps=3, generator=seeded())
    find = partial(eps50, network, *digits, sweep, steps=3)
    with torch.inference_mode():
        assert find(generator=seeded(), batch_size=batch_size) == find(generator=seeded())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0.0}, "resolution must lie between 0 and 1, as a share of the value: got 0.0"),
        ({"resolution": 1.0}, "resolution must lie between 0 and 1.*: got 1.0"),
        ({"resolution": float("nan")}, "got nan"),
        ({"steps": 0}, "steps and restarts must be 1 or more"),
        ({"losses": ()}, "losses must be one or more of"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(options, message, network, digits):
    sweep = pgd_sweep(network, *digits, ["1/16"], steps=1)
    with pytest.raises(ValueError, match=message):
        eps50(network, *digits, sweep, **options)


def test_a_sweep_of_something_else_is_refused(network, linear_model, digits):
    images, labels = digits
    sweep = pgd_sweep(network, images, labels, ["1/16"], steps=1)
    with pytest.raises(ValueError, match="of the same images: got one of 120 images and 50 images"):
        eps50(network, images[:50], labels[:50], sweep)
    with pytest.raises(ValueError, match="same model, images and labels: it has other images right without an attack"):
        eps50(linear_model, images, labels, sweep)


def test_the_attack_is_the_one_asked_for(network, digits, monkeypatch):
    """Its settings, the generator's seed at every size, and no larger batch."""
    images, labels = digits
    attack = {
        "steps": 2,
        "restarts": 3,
        "relative_step_size": 0.7,
        "losses": ("margin",),
        "random_start": True,
        "batch_size": 13,
    }
    sweep = pgd_sweep(network, images, labels, ["1/16", "1/8"], **attack, generator=seeded())
    runs, batches = [], []
    run = PgdPlan.run

    def recorded(plan, search, seed):
        runs.append((plan.steps, plan.restarts, plan.relative_step_size, plan.losses, plan.random_start, seed))
        run(plan, search, seed)

    def model(images):
        batches.append(len(images))
        return network(images)

    monkeypatch.setattr(PgdPlan, "run", recorded)
    eps50(model, images, labels, sweep, **attack, generator=seeded(1))
    expected = int(torch.randint(2**31, (), generator=seeded(1)))
    assert set(runs) == {(2, 3, 0.7, ("margin",), True, expected)}
    assert max(batches) == 13


def test_a_sweep_of_no_change_alone_is_extended_to_the_whole_range():
    model, images, labels = linear_case(40)
    sweep = pgd_sweep(model, images, labels, ["0"], **OPTIMAL)
    check(eps50(model, images, labels, sweep, **OPTIMAL), truth(model, images, labels))


def test_the_bracket_is_the_narrowest_of_the_sweep(monkeypatch):
    """Sizes beyond the first that loses half of the images add no attack."""
    model, images, labels = linear_case(41)
    sizes = []
    run = PgdPlan.run

    def recorded(plan, search, seed):
        sizes.append(search.threat.eps)
        run(plan, search, seed)

    median = Fraction(truth(model, images, labels))
    eps = [median * share for share in (Fraction(1, 2), Fraction(9, 10), Fraction(11, 10), 2, 4)]
    sweep = pgd_sweep(model, images, labels, eps, **OPTIMAL)
    monkeypatch.setattr(PgdPlan, "run", recorded)
    eps50(model, images, labels, sweep, **OPTIMAL)
    assert sizes[0] == median
    assert all(eps[1] < size < eps[2] for size in sizes)


def test_the_rounding_at_which_it_stops_is_of_the_pixel_scale():
    """As test_it_stops_at_the_rounding_of_pixels, in pixels of 0 to 255."""
    model, images, labels = linear_case(5)
    with torch.no_grad():
        model[1].weight[0] = model[1].weight[1] + 1.0
        model[1].bias.zero_()
        model[1].bias[0] = -8.0 + 1e-12
    images, labels = torch.full((5, 1, 4, 4), 127.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    wide = nn.Sequential(_Scale(), *model).eval()
    sweep = pgd_sweep(wide, images, labels, ["255/8"], bounds=(0, 255), **OPTIMAL)
    found = eps50(wide, images, labels, sweep, **OPTIMAL)
    assert found.low == 0
    assert float(FINEST) / 2 < found.high <= float(FINEST)


class _Scale(nn.Module):
    def forward(self, images):
        return images / 255
