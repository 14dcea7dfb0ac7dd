"""A threat keeps its eps exactly, refuses what is not pixels with the range it saw, and projects into its own set."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twicing.robustness.threat import Threat, as_fraction


@pytest.mark.parametrize(
    ("spelt", "exact"),
    [
        ("4/255", Fraction(4, 255)),
        (" 1/16 ", Fraction(1, 16)),
        ("0.1", Fraction(1, 10)),
        ("0.26/255", Fraction(26, 25500)),
        ("1/16/255", Fraction(1, 16 * 255)),
        (Fraction(3, 255), Fraction(1, 85)),
        (0, Fraction(0)),
        (1, Fraction(1)),
    ],
)
def test_eps_is_read_exactly(spelt, exact):
    assert as_fraction(spelt) == exact
    assert Threat(spelt).eps == exact


@pytest.mark.parametrize("spelt", ["four", "", "/255", "4/", "4/0", "nan", "inf", "1//2"])
def test_what_is_no_fraction_is_refused(spelt):
    with pytest.raises(ValueError, match=r'eps must read like "4/255", "1/16" or "0.1": got '):
        Threat(spelt)


@pytest.mark.parametrize("number", [0.1, True, None, torch.tensor(0.1)])
def test_a_float_eps_is_refused(number):
    with pytest.raises(TypeError, match=r'eps must be a fraction.*got the .*Write it as a string, "4/255"'):
        Threat(number)


def test_it_prints_as_it_was_spelt():
    assert Threat("3/255").eps_label == "3/255"
    assert Threat(Fraction(1, 16)).eps_label == "1/16"
    assert str(Threat("8/255")) == "linf, eps 8/255, pixels in [0, 1]"
    assert repr(Threat("3/255")).count("3/255") == 1


def test_equal_threats_are_equal_however_spelt():
    assert Threat("3/255") == Threat(Fraction(1, 85), bounds=(0, 1))
    assert hash(Threat("3/255")) == hash(Threat("1/85"))
    assert Threat("3/255") != Threat("4/255")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"eps": "-1/16"}, "eps must be 0 or larger: got -1/16", id="negative"),
        pytest.param({"eps": 4}, r'exceed the whole pixel range \[0, 1\]: got 4.*write "4/255"', id="forgotten /255"),
        pytest.param({"eps": "1/16", "norm": "l2"}, "norm must be \"linf\".*got 'l2'", id="norm"),
        pytest.param({"eps": "1/16", "bounds": (1, 0)}, r"lowest and the highest.*got \(1, 0\)", id="bounds reversed"),
        pytest.param({"eps": "1/16", "bounds": (0, float("nan"))}, r"got \(0, nan\)", id="bounds nan"),
        pytest.param({"eps": "1/16", "bounds": (0, float("inf"))}, r"got \(0, inf\)", id="bounds infinite"),
    ],
)
def test_settings_without_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Threat(**arguments)


def test_eps_may_be_as_wide_as_the_bounds():
    assert Threat(255, bounds=(0, 255)).eps == 255


def test_normalised_images_are_refused_with_the_range_seen():
    images = torch.full((2, 1, 2, 2), 0.5)
    images[0, 0, 0, 0], images[1, 0, 1, 1] = -2.1179, 2.64
    with pytest.raises(
        ValueError, match=r"must lie in \[0, 1\] \(pixels\): got values from -2.12 to 2.64; put the norm"
    ):
        Threat("1/16").check_images(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        pytest.param(torch.full((1, 3), torch.nan), ValueError, "got values from nan to nan", id="nan"),
        pytest.param(torch.tensor([[0.0, torch.inf]]), ValueError, "got values from 0 to inf", id="infinite"),
        pytest.param(torch.zeros(1, 3, dtype=torch.uint8), TypeError, r"got torch.uint8. Convert integers", id="uint8"),
        pytest.param(torch.zeros(1, 3, dtype=torch.float16), TypeError, "got torch.float16", id="half"),
        pytest.param([[0.5]], TypeError, "got list", id="list"),
        pytest.param(torch.zeros(3), ValueError, r"first axis: got the shape \[3\]", id="no batch"),
        pytest.param(torch.zeros(0, 3), ValueError, r"at least one pixel: got the shape \[0, 3\]", id="empty"),
    ],
)
def test_what_is_not_pixels_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        Threat("1/16").check_images(images)


def test_other_bounds_are_respected():
    Threat("8", bounds=(0, 255)).check_images(torch.tensor([[0.0, 255.0]]))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        Threat("8/255", bounds=(-1, 1)).check_images(torch.tensor([[0.0, 1.5]]))


def test_project_in_closed_form():
    images = torch.tensor([[0.0, 0.5, 0.5, 0.5, 1.0]])
    candidate = torch.tensor([[-1.0, 0.2, 0.55, 0.9, 7.0]])
    projected = Threat("1/8").project(candidate, images)
    assert torch.equal(projected, torch.tensor([[0.0, 0.375, 0.55, 0.625, 1.0]]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), numerator=st.integers(0, 255), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_project_lands_in_the_set_and_is_idempotent(seed, numerator, scale):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 7, generator=generator)
    candidate = images + scale * torch.randn(3, 7, generator=generator)
    threat = Threat(Fraction(numerator, 255))
    projected = threat.project(candidate, images)
    assert (projected - images).abs().max() <= numerator / 255 + 1e-7
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert torch.equal(threat.project(projected, images), projected)
