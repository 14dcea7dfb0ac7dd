"""Non-local means against loops over pixels, and against kernel regression on patches."""

import math

import numpy as np
import pytest
import torch

from twicing.classical.nadaraya_watson import nadaraya_watson_weights
from twicing.classical.nonlocal_means import NonlocalMeans, nonlocal_means, psnr


def noisy(channels=3, height=7, width=6):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def patches_by_hand(image, patch):
    """[H W, C patch patch], mirrored at the border by numpy."""
    border = patch // 2
    padded = np.pad(image.numpy(), ((0, 0), (border, border), (border, border)), mode="reflect")
    height, width = image.shape[1:]
    return np.stack([padded[:, i : i + patch, j : j + patch].ravel() for i in range(height) for j in range(width)])


def matrix_by_hand(image, h, patch, search):
    width = image.shape[2]
    P = patches_by_hand(image, patch)
    A = np.zeros((len(P), len(P)))
    for i in range(len(P)):
        for j in range(len(P)):
            down, right = abs(i // width - j // width), abs(i % width - j % width)
            if max(down, right) <= search:
                A[i, j] = math.exp(-((P[i] - P[j]) ** 2).mean() / (2 * h**2))
    return A / A.sum(1, keepdims=True)


@pytest.mark.parametrize(("patch", "search"), [(1, 1), (3, 2), (5, 4), (3, 5)])
def test_weights_are_those_of_loops_over_pixels(patch, search):
    image = noisy()
    by_hand = matrix_by_hand(image, 0.3, patch, search)
    filters = NonlocalMeans(image, patch=patch, search=search)
    np.testing.assert_allclose(filters.matrix(0.3).numpy(), by_hand, atol=1e-13)
    values = noisy(2) ** 2
    smoothed = filters.smoother(0.3)(values).flatten(1).numpy()
    np.testing.assert_allclose(smoothed, (by_hand @ values.flatten(1).numpy().T).T, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("passes", [1, 3])
def test_passes_apply_the_matrix_of_the_noisy_image_again(order, passes):
    image = noisy(1)
    A = matrix_by_hand(image, 0.2, 3, 2)
    layer = A if order == 1 else 2 * A - A @ A
    expected = np.linalg.matrix_power(layer, passes) @ image.flatten().numpy()
    found = nonlocal_means(image, bandwidth=0.2, patch=3, search=2, order=order, passes=passes)
    assert found.shape == image.shape
    np.testing.assert_allclose(found.flatten().numpy(), expected, atol=1e-12)


def test_it_is_kernel_regression_on_patches():
    image = noisy(2, 6, 6)
    P = torch.from_numpy(patches_by_hand(image, 3))
    regression = nadaraya_watson_weights(P, P, bandwidth=0.25 * math.sqrt(P.shape[1]))
    torch.testing.assert_close(NonlocalMeans(image, patch=3, search=5).matrix(0.25), regression, rtol=0, atol=1e-13)


def test_it_denoises_what_repeats_itself():
    clean = torch.tensor([0.2, 0.8], dtype=torch.float64).repeat(24, 12)[None]
    image = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert psnr(nonlocal_means(image, bandwidth=0.1), clean) > psnr(image, clean) + 6


def test_psnr_is_in_decibels():
    clean = torch.zeros(1, 4, 4)
    assert psnr(clean + 0.1, clean) == pytest.approx(20)
    assert psnr(clean + 25.5, clean, peak=255) == pytest.approx(20)
    assert psnr(clean, clean) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 4}, "patch must be odd"),
        ({"patch": 15}, "patch must be odd"),
        ({"search": 0}, "search must be from 1"),
        ({"search": 6}, "search must be from 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NonlocalMeans(noisy(), **({"patch": 3, "search": 2} | arguments))


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match="one float image"):
        NonlocalMeans(noisy()[0])
    with pytest.raises(ValueError, match="one float image"):
        NonlocalMeans((255 * noisy()).to(torch.uint8))
    with pytest.raises(ValueError, match="bandwidth must be a positive"):
        NonlocalMeans(noisy(), search=3).smoother(0.0)
    with pytest.raises(ValueError, match="passes must be at least 1"):
        nonlocal_means(noisy(), bandwidth=1.0, search=3, passes=0)
