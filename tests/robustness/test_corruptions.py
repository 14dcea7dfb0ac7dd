"""The eight corruptions against formulas worked out here, their seeds, their severities, and their errors."""

import io
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from twicing.robustness.corruptions import CORRUPTIONS, GENERATED, SEVERITIES, corrupt

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter(kind, severity):
    return CORRUPTIONS[kind][1][severity - 1]


@pytest.fixture(scope="module")
def photographs():
    """Real photographs, cut into squares: images(side, channels, n) in [0, 1]."""
    both = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255

    def images(side, channels=3, n=4):
        corners = [(picture, 60 + 25 * place, 50 + 90 * place) for place in range(n) for picture in both][:n]
        cuts = torch.stack([picture[:, top : top + 224, left : left + 224] for picture, top, left in corners])
        smaller = torch.nn.functional.interpolate(cuts, size=side, mode="area")
        return smaller if channels == 3 else smaller.mean(1, keepdim=True)

    return images


def constant(value, channels=1, side=32, n=1):
    return torch.full((n, channels, side, side), value, dtype=torch.float64)


def test_there_are_eight_in_forty_ways_and_they_are_named_as_generated():
    assert len(CORRUPTIONS) == 8
    assert len(SEVERITIES) == 5
    assert all(len(parameters) == 5 for _, parameters in CORRUPTIONS.values())
    assert GENERATED == "generated, not ImageNet-C"


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (224, 3)])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_change_grows_with_the_severity(kind, side, channels, photographs):
    images = photographs(side, channels, 2 if side == 224 else 4)
    corrupted = [corrupt(images, kind, severity, generator=seeded()) for severity in SEVERITIES]
    change = [float((one - images).square().mean()) for one in corrupted]
    assert all(harder > 1.05 * easier for easier, harder in pairwise(change)), change
    assert change[0] > 2e-5  # the weakest one is no identity
    for one in corrupted:
        assert one.shape == images.shape
        assert one.dtype == images.dtype
        assert 0 <= one.min() <= one.max() <= 1


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_depends_on_seed_and_position_only(kind, photographs):
    images = photographs(32)
    whole = corrupt(images, kind, 3, generator=seeded(5))
    assert torch.equal(whole, corrupt(images, kind, 3, generator=seeded(5)))
    batches = [corrupt(images[i : i + 2], kind, 3, indices=[i, i + 1], generator=seeded(5)) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(batches))
    backwards = corrupt(images.flip(0), kind, 3, indices=torch.tensor([3, 2, 1, 0]), generator=seeded(5))
    assert torch.equal(whole, backwards.flip(0))
    other = corrupt(images, kind, 3, generator=seeded(6))
    assert torch.equal(whole, other) == (kind not in RANDOM)
    twins = corrupt(images[:1].repeat(2, 1, 1, 1), kind, 3, generator=seeded(5))
    assert torch.equal(twins[0], twins[1]) == (kind not in RANDOM)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_double_precision_gets_the_same_numbers_and_the_images_stay(kind, photographs):
    images = photographs(28, 1)
    before = images.clone()
    single = corrupt(images, kind, 2, generator=seeded())
    assert torch.equal(images, before)
    double = corrupt(images.double(), kind, 2, generator=seeded())
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


def test_images_that_carry_gradients_or_come_from_inference_are_taken(photographs):
    images = photographs(28, 1)
    expected = corrupt(images, "gaussian_blur", 1)
    assert torch.equal(corrupt(images.requires_grad_(), "gaussian_blur", 1), expected)
    with torch.inference_mode():
        assert torch.equal(corrupt(images.detach().clone(), "gaussian_blur", 1), expected)


def test_without_a_generator_the_default_one_decides(photographs):
    torch.manual_seed(3)
    one = corrupt(photographs(28), "gaussian_noise", 1)
    torch.manual_seed(3)
    assert torch.equal(one, corrupt(photographs(28), "gaussian_noise", 1))
    assert not torch.equal(one, corrupt(photographs(28), "gaussian_noise", 1))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_and_speckle_noise_have_their_spread(severity):
    # Where the bounds are three standard deviations away or more, clipping hardly matters.
    for value in (0.4, 0.5):
        images = constant(value, channels=3, side=64, n=4)
        noise = corrupt(images, "gaussian_noise", severity, generator=seeded()) - images
        speckle = corrupt(images, "speckle_noise", severity, generator=seeded()) - images
        inside = value / 3
        if parameter("gaussian_noise", severity) < inside:
            assert noise.std().item() == pytest.approx(parameter("gaussian_noise", severity), rel=0.02)
            assert noise.mean().abs() < 0.005
        if value * parameter("speckle_noise", severity) < inside:
            assert speckle.std().item() == pytest.approx(value * parameter("speckle_noise", severity), rel=0.02)
    black = constant(0.0)
    assert torch.equal(corrupt(black, "speckle_noise", severity), black)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_whole_photons_with_a_poisson_spread(severity):
    photons = parameter("shot_noise", severity)
    images = constant(0.3, channels=3, side=64, n=4)
    seen = corrupt(images, "shot_noise", severity, generator=seeded())
    counts = seen * photons
    torch.testing.assert_close(counts, counts.round())
    assert seen.mean().item() == pytest.approx(0.3, rel=0.01)
    assert seen.var().item() == pytest.approx(0.3 / photons, rel=0.05)
    assert torch.equal(corrupt(constant(0.0), "shot_noise", severity), constant(0.0))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_half_black_half_white_and_leaves_the_rest(severity):
    share = parameter("impulse_noise", severity)
    images = constant(0.5, channels=3, side=128, n=4)
    seen = corrupt(images, "impulse_noise", severity, generator=seeded())
    assert set(seen.unique().tolist()) == {0.0, 0.5, 1.0}
    assert (seen == 0).double().mean().item() == pytest.approx(share / 2, rel=0.05)
    assert (seen == 1).double().mean().item() == pytest.approx(share / 2, rel=0.05)
    # Value by value, not pixel by pixel: a hit in one colour says nothing about the next.
    red, green = (seen[:, colour] != 0.5 for colour in (0, 1))
    assert (red & green).double().mean().item() == pytest.approx(share**2, abs=3e-3)
    if severity < 5:
        harder = corrupt(images, "impulse_noise", severity + 1, generator=seeded())
        assert torch.equal(seen[seen != 0.5], harder[seen != 0.5])


@pytest.mark.parametrize(("side", "severity"), [(28, 1), (32, 5), (40, 3)])
def test_the_blur_is_the_weighted_mean_of_the_mirrored_image(side, severity, photographs):
    image = photographs(side, 3, 1).double()
    sigma = parameter("gaussian_blur", severity) * (side / 32) ** 0.5
    reach = int(4 * sigma + 0.5)
    weights = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    # The mirror stands at the edge of the outermost pixel: c b a | a b c.
    mirrored = [*range(reach - 1, -1, -1), *range(side), *range(side - 1, side - 1 - reach, -1)]
    padded = image[:, :, mirrored][:, :, :, mirrored]
    kernel = (weights[:, None] * weights).expand(3, 1, -1, -1)
    expected = torch.nn.functional.conv2d(padded, kernel, groups=3)
    torch.testing.assert_close(corrupt(image, "gaussian_blur", severity), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_each_channels_mean_and_scales_its_spread(severity, photographs):
    images = photographs(32).double()
    seen = corrupt(images, "contrast", severity)
    torch.testing.assert_close(seen.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(seen.std((2, 3)), parameter("contrast", severity) * images.std((2, 3)))


@pytest.mark.parametrize(("side", "severity"), [(28, 2), (32, 4), (48, 5)])
def test_pixelate_takes_the_mean_of_square_cells(side, severity, photographs):
    image = photographs(side, 3, 1).double()
    seen = corrupt(image, "pixelate", severity)
    block = parameter("pixelate", severity) * (side / 32) ** 0.5
    cells = round(side / block)
    edges = [next(i for i in range(side + 1) if i * cells >= cell * side) for cell in range(cells + 1)]
    expected = torch.empty_like(image)
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            mean = image[..., top:bottom, left:right].mean((2, 3), keepdim=True)
            expected[..., top:bottom, left:right] = mean
    torch.testing.assert_close(seen, expected)
    assert len(seen[0, 0].unique()) <= cells**2
    torch.testing.assert_close(seen, corrupt(seen.clamp(0, 1), "pixelate", severity))  # once pixelated, always


def test_images_that_are_not_square_keep_their_shape_and_their_squares(photographs):
    image = photographs(64, 3, 1)[..., :32, :].double()
    for kind in CORRUPTIONS:
        assert corrupt(image, kind, 1).shape == image.shape
    # The shorter side is 32, so cells are 2 pixels wide both ways at severity 4.
    expected = torch.nn.functional.avg_pool2d(image, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(corrupt(image, "pixelate", 4), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillows_at_that_quality(severity, channels, photographs):
    image = photographs(32, channels, 1)
    pixels = (image[0] * 255).round().byte().numpy()
    picture = Image.fromarray(pixels[0], "L") if channels == 1 else Image.fromarray(pixels.transpose(1, 2, 0), "RGB")
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=(60, 45, 30, 18, 10)[severity - 1])
    decoded = np.array(Image.open(file), dtype=np.float32) / 255
    expected = decoded[None] if channels == 1 else decoded.transpose(2, 0, 1)
    torch.testing.assert_close(corrupt(image, "jpeg_compression", severity)[0], torch.tensor(expected))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_table_of_the_documentation_is_the_one_in_use(kind):
    (row,) = [line for line in corrupt.__doc__.splitlines() if line.strip().startswith(f"| {kind} ")]
    numbers = row.split("|")[3].replace("=", " ").split()[1:]
    assert [float(number) for number in numbers] == list(CORRUPTIONS[kind][1])


def test_a_hundredth_of_a_thousand_images_takes_a_hundredth_of_two_minutes(photographs):
    images = photographs(32, 3, 10)
    started = time.process_time()
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            corrupt(images, kind, severity, generator=seeded())
    assert time.process_time() - started < 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fog"}, "the kind of corruption must be one of gaussian_noise, .*: got 'fog'"),
        ({"severity": 0}, "the severity must be 1, 2, 3, 4 or 5: got 0"),
        ({"severity": 6}, "the severity must be 1, 2, 3, 4 or 5: got 6"),
        ({"severity": 1.0}, "the severity must be 1, 2, 3, 4 or 5: got 1.0"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "made for images of 28 to 224 pixels: got 8 x 8"),
        ({"images": torch.zeros(1, 1, 32, 27)}, "made for images of 28 to 224 pixels: got 32 x 27"),
        ({"images": torch.zeros(1, 4, 32, 32)}, r"grey or RGB: got the shape \[1, 4, 32, 32\]"),
        ({"images": torch.zeros(3, 32, 32)}, r"grey or RGB: got the shape \[3, 32, 32\]"),
        ({"images": torch.full((1, 3, 32, 32), 2.0)}, r"images must lie in \[0, 1\] \(pixels\)"),
        ({"images": torch.full((1, 3, 32, 32), torch.nan)}, r"images must lie in \[0, 1\] \(pixels\)"),
        ({"indices": [0]}, r"indices must be 2 positions, 0 or larger, one per image: got \[0\]"),
        ({"indices": [0, -1]}, r"indices must be 2 positions, 0 or larger, one per image: got \[0, -1\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"images": torch.zeros(2, 1, 32, 32), "kind": "contrast", "severity": 1} | changes
    with pytest.raises(ValueError, match=message):
        corrupt(**arguments)


def test_bytes_are_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        corrupt(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "contrast", 1)
