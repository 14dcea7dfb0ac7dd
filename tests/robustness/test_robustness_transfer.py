"""Transfer: what fools one model is shown to another, which judges for itself."""

import pytest
import torch

from twicing.robustness.attacks import pgd
from twicing.robustness.threat import Threat
from twicing.robustness.transfer import transfer

THREAT = Threat("1/8")


@pytest.fixture(scope="module")
def made(trained_network, digits):
    """Images made against the network."""
    return pgd(trained_network, *digits, THREAT, generator=torch.Generator().manual_seed(0))


def test_the_model_they_were_made_against_is_fooled_as_before(made, network, digits):
    assert torch.equal(transfer(network, made.adversarial, *digits, THREAT), made.correct)


def test_another_model_judges_for_itself(made, linear_model, digits):
    images, labels = digits
    right = transfer(linear_model, made.adversarial, images, labels, THREAT)
    clean = linear_model(images).argmax(1) == labels
    assert torch.equal(right, clean & (linear_model(made.adversarial).argmax(1) == labels))
    # Some are lost to images of another model, and fewer than to the network that they were made against.
    assert made.accuracy < right.double().mean() < clean.double().mean()


def test_an_image_that_was_wrong_stays_wrong(linear_model, digits):
    """The other model may have pushed it over to the right side."""
    images, labels = digits
    wrong_labels = (labels + 1) % 10
    rescued = pgd(
        linear_model,
        images,
        linear_model(images).argmax(1),
        THREAT,
        generator=torch.Generator().manual_seed(0),
    ).adversarial
    now_right = linear_model(rescued).argmax(1) == wrong_labels
    assert (now_right & (linear_model(images).argmax(1) != wrong_labels)).any()
    right = transfer(linear_model, rescued, images, wrong_labels, THREAT)
    assert not (right & (linear_model(images).argmax(1) != wrong_labels)).any()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_matter(batch_size, made, linear_model, digits):
    expected = transfer(linear_model, made.adversarial, *digits, THREAT)
    with torch.inference_mode():
        assert torch.equal(transfer(linear_model, made.adversarial, *digits, THREAT, batch_size=batch_size), expected)


def test_what_was_made_for_another_threat_or_other_images_is_refused(made, linear_model, digits):
    images, labels = digits
    with pytest.raises(
        ValueError, match=r"within eps = 1/16 of images: got a change of 0.125, so these were made for a"
    ):
        transfer(linear_model, made.adversarial, images, labels, Threat("1/16"))
    with pytest.raises(ValueError, match=r"within eps = 1/8 of images: got a change of .* or for other images"):
        transfer(linear_model, made.adversarial.flip(0), images, labels, THREAT)
    with pytest.raises(ValueError, match=r"one image for each of images, torch.float64 of shape \[120, 1, 8, 8\]: got"):
        transfer(linear_model, made.adversarial[1:], images, labels, THREAT)
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \[120, 1, 8, 8\]"):
        transfer(linear_model, made.adversarial.float(), images, labels, THREAT)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] \(pixels\): got values from"):
        transfer(linear_model, made.adversarial - 0.5, images, labels, THREAT)
    with pytest.raises(ValueError, match="got values from nan to nan"):
        transfer(linear_model, made.adversarial * torch.nan, images, labels, THREAT)


def test_one_rounding_is_no_offence(linear_model, digits):
    images, labels = digits
    outside = (images + 0.125 + 1e-8).clamp(0, 1)
    assert torch.equal(
        transfer(linear_model, outside, images, labels, THREAT),
        transfer(linear_model, (images + 0.125).clamp(0, 1), images, labels, THREAT),
    )


@pytest.mark.parametrize("excess", [1e-5, 0.075])
@pytest.mark.parametrize("sign", [1, -1])
def test_more_than_one_rounding_is_refused_in_either_direction(sign, excess, linear_model, digits):
    images, labels = digits
    outside = (images + sign * (0.125 + excess)).clamp(0, 1)
    with pytest.raises(ValueError, match="must lie within eps = 1/8 of images"):
        transfer(linear_model, outside, images, labels, THREAT)


def test_one_rounding_is_of_the_pixel_scale(linear_model, digits):
    images, labels = digits
    wide = Threat("255/8", bounds=(0, 255))
    for excess, fits in ((1e-4, True), (1e-3, False)):
        outside = (images * 255 + 31.875 + excess).clamp(0, 255)
        if fits:
            right = transfer(lambda x: linear_model(x / 255), outside, images * 255, labels, wide)
            inside = (images + 0.125).clamp(0, 1)
            assert torch.equal(right, transfer(linear_model, inside, images, labels, THREAT))
        else:
            with pytest.raises(ValueError, match="must lie within eps = 255/8"):
                transfer(lambda x: linear_model(x / 255), outside, images * 255, labels, wide)
