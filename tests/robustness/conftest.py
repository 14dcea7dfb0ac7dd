"""Two models of the real digits: a linear one, whose worst case is known exactly, and a small network; and foolbox."""

import copy
import warnings

import pytest
import torch
from torch import nn

from twicing.data.digits import load_digits
from twicing.robustness.attacks import fgsm, pgd


def seeded():
    return torch.Generator().manual_seed(0)


ATTACKS = {
    "fgsm": fgsm,
    "pgd": lambda *arguments: pgd(*arguments, generator=seeded()),
    "pgd without random start": lambda *arguments: pgd(*arguments, random_start=False),
    "pgd, cross-entropy": lambda *arguments: pgd(*arguments, losses=("cross-entropy",), generator=seeded()),
    "pgd, margin": lambda *arguments: pgd(*arguments, losses=["margin"], generator=seeded()),
    "pgd, one step": lambda *arguments: pgd(*arguments, steps=1, random_start=False),
}


@pytest.fixture(params=ATTACKS)
def attack(request):
    """Every attack in turn: attack(model, images, labels, threat)."""
    return ATTACKS[request.param]


@pytest.fixture(scope="session")
def digits():
    """120 digits that the models below were not fitted to."""
    images, labels = load_digits()
    return images[:120].double(), labels[:120]


@pytest.fixture(scope="session")
def linear_model():
    """Nearest class mean, which is linear in the pixels: logits_c = <x, m_c> - ||m_c||^2 / 2."""
    images, labels = load_digits()
    means = torch.stack([images[200:][labels[200:] == digit].mean(0).flatten() for digit in range(10)]).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double()).eval()
    with torch.no_grad():
        model[1].weight.copy_(means)
        model[1].bias.copy_(-means.square().sum(1) / 2)
    return model


@pytest.fixture
def network(trained_network):
    """A smooth network in float64, so that rounding does not decide a sign; a test's own, as some write gradients."""
    return copy.deepcopy(trained_network)


@pytest.fixture(scope="session")
def trained_network():
    """The network that every test gets a copy of."""
    images, labels = load_digits()
    x, y = images[200:].double(), labels[200:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 10)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def foolbox():
    """The independent implementation to compare with."""
    with warnings.catch_warnings():
        # It imports from a namespace that SciPy has deprecated; nothing of ours.
        warnings.filterwarnings("ignore", "Please import", DeprecationWarning)
        import foolbox

        yield foolbox
