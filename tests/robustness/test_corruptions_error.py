"""Corruption error and mCE worked out by hand, and what they refuse."""

import pytest

from twicing.data.shifted import IMAGENET_C, IMAGENET_C_EXTRA
from twicing.robustness.corruption_error import (
    ALEXNET_ERRORS,
    ALEXNET_EXTRA_ERRORS,
    corruption_error,
    extra_corruption_error,
    mean_corruption_error,
)

ALL = (*IMAGENET_C, *IMAGENET_C_EXTRA)


def test_the_fifteen_and_the_extra_four_are_those_of_the_files():
    assert tuple(ALEXNET_ERRORS) == IMAGENET_C
    assert tuple(ALEXNET_EXTRA_ERRORS) == IMAGENET_C_EXTRA


def test_one_corruption_by_hand():
    # (0.5 + 0.6 + 0.7 + 0.8 + 0.9) / 5 = 0.7, and AlexNet is wrong on 0.819324 of the foggy images.
    assert corruption_error("fog", [0.5, 0.6, 0.7, 0.8, 0.9]) == pytest.approx(0.7 / 0.819324)
    assert corruption_error("spatter", [0.359] * 5) == pytest.approx(0.5)
    assert corruption_error("snow", [0] * 5) == 0


def test_alexnet_itself_has_one():
    errors = {kind: [error] * 5 for kind, error in (ALEXNET_ERRORS | ALEXNET_EXTRA_ERRORS).items()}
    assert mean_corruption_error(errors) == pytest.approx(1)
    assert extra_corruption_error(errors) == pytest.approx(1)


def test_the_mean_is_over_the_fifteen_and_the_extra_four_stand_apart():
    half = {kind: [0.1, 0.3, 0.5, 0.7, 0.9] for kind in IMAGENET_C}
    by_hand = (
        sum(
            0.5 / error
            for error in (
                0.886428,
                0.894468,
                0.922640,
                0.819880,
                0.826268,
                0.785948,
                0.798360,
                0.866816,
                0.826572,
                0.819324,
                0.564592,
                0.853204,
                0.646056,
                0.717840,
                0.606500,
            )
        )
        / 15
    )
    assert mean_corruption_error(half) == pytest.approx(by_hand, rel=1e-12)
    with_extra = half | {kind: [1.0] * 5 for kind in IMAGENET_C_EXTRA}
    assert mean_corruption_error(with_extra) == pytest.approx(by_hand, rel=1e-12)
    assert extra_corruption_error(with_extra) == pytest.approx((1 / 0.845 + 1 / 0.787 + 1 / 0.718 + 1 / 0.658) / 4)


@pytest.mark.parametrize("kind", IMAGENET_C)
def test_no_mce_without_each_of_the_fifteen(kind):
    errors = {other: [0.5] * 5 for other in ALL if other != kind}
    with pytest.raises(ValueError, match=f"mCE needs all fifteen corruptions: {kind} missing"):
        mean_corruption_error(errors)
    assert extra_corruption_error(errors) > 0


@pytest.mark.parametrize("kind", IMAGENET_C_EXTRA)
def test_the_extra_mean_needs_all_four(kind):
    errors = {other: [0.5] * 5 for other in ALL if other != kind}
    with pytest.raises(ValueError, match=f"needs all four: {kind} missing"):
        extra_corruption_error(errors)
    assert mean_corruption_error(errors) > 0


@pytest.mark.parametrize(
    ("kind", "errors", "message"),
    [
        ("rain", [0.5] * 5, "known for ImageNet-C's corruptions only .*: got 'rain'"),
        ("fog", [0.5] * 4, "the corruption error of fog needs five errors, one per severity: got 4"),
        ("fog", [0.5] * 6, "needs five errors, one per severity: got 6"),
        ("fog", [50.0] * 5, "errors must be shares of the images, 0 to 1: got .* for fog"),
        ("fog", [-0.1, 0, 0, 0, 0], "errors must be shares"),
        ("fog", [float("nan"), 0, 0, 0, 0], "errors must be shares"),
    ],
)
def test_what_is_no_error_of_imagenet_c_is_refused(kind, errors, message):
    with pytest.raises(ValueError, match=message):
        corruption_error(kind, errors)
    with pytest.raises(ValueError, match=message):
        mean_corruption_error({kind: errors})
