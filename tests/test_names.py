"""An unknown name is answered with the one that was probably meant; of many names the first are listed."""

import pytest

from twicing.names import few, listed, nearest

KEYS = ("epochs", "width", "evaluation.eps", "evaluation.probes")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("epoch", "epochs"),
        ("evaluation.esp", "evaluation.eps"),
        # The last part alone, though "epochs" looks more like it than "evaluation.eps" does.
        ("eps", "evaluation.eps"),
        ("pobes", "evaluation.probes"),
        ("wid", "width"),
        ("evalu", None),
        ("wi", None),
        ("colour", None),
        (3, None),
    ],
)
def test_the_nearest_name(name, meant):
    assert nearest(name, KEYS) == meant


def test_a_whole_name_comes_before_a_last_part():
    assert nearest("epsi", ["evaluation.eps", "eps"]) == "eps"


def test_what_was_meant_stands_before_what_there_is():
    assert listed("epoch", iter(["width", "epochs"])) == "did you mean 'epochs'? Known are 'width', 'epochs'."
    assert listed("colour", ["width", "epochs"]) == "known are 'width', 'epochs'."
    assert listed("colour", []) == "known are none."


def test_of_many_names_the_first_are_listed():
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c, d, e"
    assert few(["a", "b", "c", "d", "e", "f", "g"]) == "a, b, c, d, e and 2 more"
    assert few(["a", "b", "c"], 2) == "a, b and 1 more"
