"""A verdict in sentences and curves: numbers stand where they belong, and a colour means one thing on a page."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from twicing.analysis.capture import BLOCK_OUTPUT
from twicing.analysis.collapse import COSINE, CURVES, RANK, SHARE, Collapse
from twicing.analysis.collapse_bands import resamples
from twicing.analysis.collapse_verdict import judge
from twicing.experiments.diagnose.diagnosis import Diagnosis
from twicing.experiments.diagnose.figures import INITIAL_STYLE, model_styles, pictures, side_by_side
from twicing.experiments.diagnose.words import HEADLINES, IN_TABLES, headline, reasons

INPUTS = 10


def made_up(rank, share=0.9, cosine=0.2, inputs=INPUTS):
    """A model of as many blocks as ranks are given; the inputs do not differ, so that bands have no width."""
    values = {key: torch.full((inputs, len(rank)), 0.5, dtype=torch.float64) for key in CURVES}
    values[BLOCK_OUTPUT, RANK] = torch.tensor(rank, dtype=torch.float64).expand(inputs, -1)
    values[BLOCK_OUTPUT, SHARE].fill_(share)
    values[BLOCK_OUTPUT, COSINE].fill_(cosine)
    return Collapse(values, tokens=17, width=64)


def diagnosis(model, *draws):
    weights = resamples(len(model.values[BLOCK_OUTPUT, RANK]), 0)
    return Diagnosis(None, None, model, draws, weights, judge(model, draws, weights))


def test_every_number_is_said_where_it_belongs():
    found = diagnosis(made_up((8.0, 10.0, 7.0), 0.6, 0.64), made_up((9.0, 9.0, 9.0), 0.8, 0.36))
    assert headline(found) == "No: the tokens share a mean, but keep their rank"
    assert reasons(found) == [
        "Decided by: the mean token has more than half of the energy.",
        "After the last of 3 blocks the tokens fill 7.000 [7.000, 7.000] of at most 16 directions beside their mean "
        "(effective rank): 0.700 [0.700, 0.700] of what block 2 has, the most of all.",
        "||X - mean|| / ||X|| is 0.600 [0.600, 0.600] there, and the mean pairwise cosine 0.640 [0.640, 0.640], which "
        "by itself decides nothing.",
        "Its random initialisation ends at an effective rank of 9.000 [9.000, 9.000] (one draw); the model has 0.778 "
        "[0.778, 0.778] of that. There ||X - mean|| / ||X|| is 0.800 [0.800, 0.800] and the cosine 0.360 [0.360, "
        "0.360]; by the same rules: no sign of collapse.",
    ]


@pytest.mark.parametrize(
    ("own", "said"), [(7.0, "fewer than each"), (9.0, "within the range"), (11.0, "more than each")]
)
def test_the_model_is_placed_among_the_draws(own, said):
    # By their last blocks: before those the draws lie elsewhere.
    found = diagnosis(made_up((own, own)), made_up((9.5, 8.0)), made_up((5.5, 10.0)))
    sentence = f"(the mean of 2 draws, 8.000 to 10.0); the model has {own / 9:.3f} "
    assert sentence in reasons(found)[2]
    assert f"of that, {said} of the draws." in reasons(found)[2]


def test_a_rank_that_grows_to_the_end_and_an_open_rule():
    model = made_up((8.0, 9.0), 2**-0.5)
    # The threshold is the mean of inputs that differ.
    model.values[BLOCK_OUTPUT, SHARE][:, -1] += torch.linspace(-0.1, 0.1, INPUTS)
    found = diagnosis(model, made_up((9.0, 9.0)))
    assert headline(found) == "Undecided on these inputs"
    assert reasons(found)[0] == (
        "Open, as the band holds the threshold: the mean token has more than half of the energy."
    )
    assert reasons(found)[1].endswith("(effective rank): no block has more.")


def test_bands_of_few_inputs_are_called_too_narrow():
    few, enough = (diagnosis(*[made_up((9.0, 9.0), inputs=inputs)] * 2) for inputs in (9, 10))
    assert reasons(few) == [
        *reasons(enough),
        "Bands of only 9 inputs are too narrow for 95 %, and of two hold the mean half of the time: give 10 or more.",
    ]


def test_every_kind_has_its_words():
    assert set(HEADLINES) == set(IN_TABLES)
    kinds = {
        judge(model, [made_up((10.0, 10.0))], resamples(INPUTS, 0)).kind
        for model in (
            made_up((10.0, 10.0)),
            made_up((10.0, 4.0)),
            made_up((4.0, 4.0)),
            made_up((10.0, 10.0), 0.5),
        )
    }
    assert kinds < set(HEADLINES)
    assert len(kinds) == 4


def test_a_colour_means_one_model_or_random_weights_on_all_of_a_page():
    found = [diagnosis(made_up((10.0, 9.0)), made_up((9.0, 9.0))) for _ in range(7)]
    named = [replace(one, case=SimpleNamespace(name=f"model {place}")) for place, one in enumerate(found)]
    styles = model_styles(named)
    assert INITIAL_STYLE.name not in {style.name for style in styles.values()}
    assert len({(style.name, style.marker) for style in styles.values()}) == 7
    together = "".join(panel.svg() for panel in side_by_side(named, styles).panels)
    assert colours(together) == {style.name for style in styles.values()}
    style = styles["model 4"]
    *_, attention = pictures(named[4], 5, style)
    assert all(colours(panel.svg()) == {style.name, INITIAL_STYLE.name} for panel in attention.panels)


def colours(svg):
    """The CSS variables of arms that a drawing uses."""
    return set(re.findall(r"var\(--(arm-\d+)", svg))
