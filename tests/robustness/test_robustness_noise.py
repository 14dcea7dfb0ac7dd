"""Noise has the stated spread, stays in pixel range, and is the same for an image in whatever company it comes."""

import pytest
import torch

from twicing.data.digits import load_digits
from twicing.robustness.noise import gaussian_noise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_moments_before_clipping_matters():
    images = torch.full((400, 1, 16, 16), 0.5, dtype=torch.float64)
    noise = gaussian_noise(images, "1/16", generator=seeded()) - images
    # 102,400 draws: the standard error of the mean is sd / 320, that of the spread sd / 452; four of each.
    assert abs(noise.mean()) < 4 * (1 / 16) / 320
    assert abs(noise.std() - 1 / 16) < 4 * (1 / 16) / 452
    # Neighbouring pixels and neighbouring images (whose streams have neighbouring seeds) are uncorrelated.
    for shifted, kept in [(noise[1:], noise[:-1]), (noise[..., 1:], noise[..., :-1])]:
        assert abs((shifted * kept).mean()) < 4 * (1 / 16) ** 2 / kept.numel() ** 0.5


def test_real_digits_stay_pixels():
    images, _ = load_digits()
    noisy = gaussian_noise(images[:100], 0.5, generator=seeded())
    assert (noisy.min().item(), noisy.max().item()) == (0.0, 1.0)
    assert noisy.dtype == images.dtype
    assert noisy.shape == images[:100].shape


def test_other_bounds():
    noisy = gaussian_noise(torch.full((4, 100), 128.0), 300.0, bounds=(0, 255), generator=seeded())
    assert (noisy.min().item(), noisy.max().item()) == (0.0, 255.0)


def test_an_image_gets_the_same_noise_in_any_company():
    images = torch.full((9, 1, 8, 8), 0.5)
    together = gaussian_noise(images, 0.1, generator=seeded())
    for n in (1, 4):
        assert torch.equal(gaussian_noise(images[:n], 0.1, generator=seeded()), together[:n])


def test_images_and_seeds_differ():
    images = torch.full((9, 1, 8, 8), 0.5)
    noisy = gaussian_noise(images, 0.1, generator=seeded())
    assert len(noisy.flatten(1).unique(dim=0)) == 9
    assert not torch.equal(noisy, gaussian_noise(images, 0.1, generator=seeded(1)))
    generator = seeded()
    assert torch.equal(noisy, gaussian_noise(images, 0.1, generator=generator))
    assert not torch.equal(noisy, gaussian_noise(images, 0.1, generator=generator))


def test_no_noise_is_the_image():
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(gaussian_noise(images, 0.0), images)


@pytest.mark.parametrize("spelt", ["1/8", 0.125])
def test_sd_may_be_a_fraction_or_a_float(spelt):
    images = torch.full((2, 8), 0.5)
    assert torch.equal(
        gaussian_noise(images, spelt, generator=seeded()), gaussian_noise(images, "2/16", generator=seeded())
    )


@pytest.mark.parametrize("sd", [-0.1, float("nan"), float("inf"), "-1/8"])
def test_a_senseless_sd_is_refused(sd):
    with pytest.raises(ValueError, match=f"sd must be a finite number, 0 or larger: got {sd}"):
        gaussian_noise(torch.zeros(1, 4), sd)


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match=r"got values from -1 to 0; put the normalisation inside the model"):
        gaussian_noise(torch.tensor([[-1.0, 0.0]]), 0.1)
