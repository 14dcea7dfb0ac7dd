"""Accuracy against eps: starts as PGD, carries broken images along, never rises, and eps50 is the median."""

from fractions import Fraction

import pytest
import torch

from twicing.robustness.attacks import pgd
from twicing.robustness.sweep import Sweep, pgd_sweep
from twicing.robustness.threat import Threat

EPS = ["1/64", "1/32", "1/16", "1/8"]


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_smallest_eps_is_plain_pgd(network, digits):
    sweep = pgd_sweep(network, *digits, EPS, generator=seeded())
    plain = pgd(network, *digits, Threat(EPS[0]), generator=seeded())
    assert torch.equal(sweep.correct[0], plain.correct)
    assert torch.equal(sweep.correct_before, plain.correct_before)
    assert [threat.eps_label for threat in sweep.threats] == EPS


def test_each_row_is_pgd_or_worse_and_what_is_broken_stays_broken(network, digits):
    sweep = pgd_sweep(network, *digits, EPS, generator=seeded())
    broken_before = ~sweep.correct_before
    for eps, row in zip(EPS, sweep.correct, strict=True):
        alone = pgd(network, *digits, Threat(eps), generator=seeded())
        assert torch.equal(row, alone.correct & ~broken_before)
        broken_before = ~row
    assert sweep.accuracies == sorted(sweep.accuracies, reverse=True)
    assert sweep.accuracies[0] > 0.8
    assert sweep.accuracies[-1] < 0.1


def test_options_reach_the_attack(network, digits):
    weak = pgd_sweep(network, *digits, ["1/16"], steps=1, relative_step_size=0.1, losses=["margin"], random_start=False)
    strong = pgd_sweep(network, *digits, ["1/16"], restarts=2, batch_size=50, generator=seeded())
    assert strong.accuracies[0] < weak.accuracies[0] - 0.05
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] \(pixels\)"):
        pgd_sweep(network, digits[0] * 255, digits[1], ["1/16"])
    scaled = pgd_sweep(
        lambda x: network(x / 255), digits[0] * 255, digits[1], ["16"], bounds=(0, 255), generator=seeded()
    )
    same = pgd_sweep(network, *digits, ["16/255"], generator=seeded())
    assert torch.equal(scaled.correct, same.correct)


@pytest.mark.parametrize(
    ("before", "rows", "eps50"),
    [
        ([1, 1, 1, 1], [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], Fraction(1, 32)),
        ([1, 1, 1, 1], [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], Fraction(1, 16)),
        ([1, 1, 1, 0], [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], None),
        ([1, 1, 0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], Fraction(0)),
        ([1, 1, 1], [[1, 0, 0], [0, 0, 0], [0, 0, 0]], Fraction(1, 64)),
    ],
)
def test_eps50_is_the_median_of_the_smallest_eps_that_succeeds(before, rows, eps50):
    threats = tuple(Threat(eps) for eps in EPS[:3])
    assert Sweep(threats, torch.tensor(rows).bool(), torch.tensor(before).bool()).eps50 == eps50


@pytest.mark.parametrize("eps", [[], ["1/16", "1/32"], ["1/16", "2/32"]], ids=str)
def test_eps_must_ascend(eps, network, digits):
    with pytest.raises(ValueError, match="eps must be one or more sizes, each larger than the one before: got "):
        pgd_sweep(network, *digits, eps)
