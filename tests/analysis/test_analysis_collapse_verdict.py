"""The verdict: planted collapses get "yes", healthy models "no", a high cosine alone decides nothing."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from twicing.analysis.capture import ATTENTION_OUTPUT, BLOCK_OUTPUT
from twicing.analysis.collapse import (
    ATTENTION,
    COSINE,
    CURVES,
    ENTROPY_SHARE,
    RANK,
    SHARE,
    Collapse,
    measure_collapse,
)
from twicing.analysis.collapse_bands import resamples
from twicing.analysis.collapse_verdict import COLLAPSES, NARROW, NO_SIGN, OPEN, SHARES_A_MEAN, judge, mean_over_draws

INPUTS, LAYERS = 20, 4
WEIGHTS = resamples(INPUTS, 0)
HEALTHY = {RANK: (10.0, 10.0, 10.0, 10.0), SHARE: (0.9, 0.9, 0.9, 0.9)}


def made_up(*, spread=0.01, tokens=17, width=64, seed=0, **changes):
    """A Collapse whose block outputs have these means by layer; the inputs vary by the spread, relative."""
    draw = np.random.default_rng(seed)
    factors = draw.normal(size=INPUTS)
    factors = torch.tensor(1 + spread * (factors - factors.mean()) / factors.std())
    metrics = HEALTHY | {{"rank": RANK, "share": SHARE}[name]: value for name, value in changes.items()}
    values = {key: torch.full((INPUTS, LAYERS), 0.5, dtype=torch.float64) for key in CURVES}
    for metric, means in metrics.items():
        values[BLOCK_OUTPUT, metric] = factors[:, None] * torch.tensor(means, dtype=torch.float64)
    return Collapse(values, tokens, width)


def verdict(model, *initial):
    return judge(model, initial or (made_up(seed=1),), WEIGHTS)


CASES = {
    "healthy": ({}, NO_SIGN, None),
    "one token": ({"share": (0.9, 0.5, 0.1, 0.005)}, COLLAPSES, "the tokens become one token"),
    "falls with depth": ({"rank": (9.0, 10.0, 6.0, 4.5)}, COLLAPSES, "falls with depth to less than half"),
    "a line from the start": ({"rank": (1.5, 1.5, 1.5, 1.5)}, COLLAPSES, "lie on a line"),
    "recovers": ({"rank": (10.0, 3.0, 3.0, 9.0)}, NO_SIGN, None),
    "narrow throughout": ({"rank": (4.5, 4.5, 4.5, 4.5)}, NARROW, "less than half of that at random initialisation"),
    "shared mean": ({"share": (0.9, 0.8, 0.6, 0.4)}, SHARES_A_MEAN, "more than half of the energy"),
    "shared and fallen": ({"share": (0.9, 0.8, 0.6, 0.4), "rank": (10.0, 8.0, 6.0, 4.0)}, COLLAPSES, "falls with"),
    "grows": ({"rank": (2.5, 5.0, 8.0, 12.0)}, NO_SIGN, None),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rule_and_their_order(case):
    changes, kind, rule = CASES[case]
    found = verdict(made_up(**changes))
    assert found.kind == kind
    assert found.initial == NO_SIGN
    assert found.open == ()
    assert (rule is None and found.met == ()) or (rule is not None and rule in "; ".join(found.met))


EDGES = {
    "one token": ("share", 2.0**-7, COLLAPSES, SHARES_A_MEAN),
    "a line": ("rank", 2.0, COLLAPSES, NARROW),
    "narrow": ("rank", 5.0, NARROW, NO_SIGN),
    "shared": ("share", math.sqrt(0.5), SHARES_A_MEAN, NO_SIGN),
}


@pytest.mark.parametrize("edge", EDGES)
def test_each_threshold_lies_where_it_is_said_and_inputs_may_leave_it_open(edge):
    name, threshold, below, above = EDGES[edge]
    for factor, kind in ((0.98, below), (1.02, above)):
        found = verdict(made_up(**{name: (factor * threshold,) * LAYERS}))
        assert found.kind == kind
    found = verdict(made_up(**{name: (threshold,) * LAYERS}, spread=0.05))
    assert found.kind == OPEN
    assert len(found.open) == 1
    assert found.met == ()
    # More inputs of the same spread cannot be had here, but less spread is the same to a band.
    assert verdict(made_up(**{name: (0.98 * threshold,) * LAYERS}, spread=0.2)).kind == OPEN


@pytest.mark.parametrize("edge", EDGES)
def test_what_lies_at_a_threshold_is_not_below_it(edge):
    name, threshold, _, above = EDGES[edge]
    # Resamples of a single input: their means are the threshold to the last bit.
    found = judge(made_up(**{name: (threshold,) * LAYERS}, spread=0.0), [made_up(spread=0.0)], np.eye(INPUTS))
    assert (found.kind, found.open) == (above, ())


def test_a_band_that_ends_at_a_threshold_is_open():
    model = made_up(spread=0.0)
    values = torch.full((INPUTS,), 0.7, dtype=torch.float64)
    values[0] = 0.5**0.5
    model.values[BLOCK_OUTPUT, SHARE][:, -1] = values
    # All resamples are of the one input at the threshold, or of one below.
    ends = np.zeros((2, INPUTS))
    ends[0, 0] = ends[1, 1] = 1.0
    assert judge(model, [made_up(spread=0.0)], ends).kind == OPEN


def test_depth_is_held_against_the_largest_rank_on_the_way():
    kept = verdict(made_up(rank=(6.0, 12.0, 9.0, 6.6)))
    assert kept.facts.peak == 2
    assert float(kept.facts.kept.value) == pytest.approx(0.55)
    assert kept.kind == NO_SIGN
    assert verdict(made_up(rank=(6.0, 12.0, 9.0, 5.4))).kind == COLLAPSES


def test_a_rule_that_comes_later_does_not_hide_an_open_one():
    model = made_up(share=(0.3,) * LAYERS, rank=(10.0, 9.0, 7.0, 5.0), spread=0.0)
    # The inputs differ in how far the rank falls.
    model.values[BLOCK_OUTPUT, RANK][:, -1] += torch.linspace(-1, 1, INPUTS)
    found = verdict(model)
    assert found.kind == OPEN
    assert found.open[0] == "the rank falls with depth to less than half"


def test_few_tokens_lie_on_a_line_anyhow():
    model = made_up(rank=(1.8,) * LAYERS, tokens=4)
    assert judge(model, [model], WEIGHTS).kind == NO_SIGN
    model = made_up(rank=(1.8,) * LAYERS, tokens=5)
    assert judge(model, [model], WEIGHTS).kind == COLLAPSES


def test_the_cosine_decides_nothing():
    model = made_up()
    model.values[BLOCK_OUTPUT, COSINE].fill_(0.999)
    assert verdict(model).kind == NO_SIGN


def test_the_initialisation_is_the_mean_of_its_draws_and_judged_by_the_same_rules():
    draws = [made_up(rank=(8.0,) * LAYERS, seed=1), made_up(rank=(12.0,) * LAYERS, seed=2)]
    assert float(mean_over_draws(draws).values[BLOCK_OUTPUT, RANK].mean()) == pytest.approx(10)
    found = verdict(made_up(), *draws)
    assert float(found.facts.against.value) == pytest.approx(1.0)
    collapsed = made_up(rank=(10.0, 5.0, 2.5, 1.2), seed=3)
    assert verdict(made_up(), collapsed).initial == COLLAPSES
    assert float(verdict(made_up(), collapsed).facts.against.value) == pytest.approx(10 / 1.2)
    # It is held against itself: that the model is wider makes it no narrower.
    assert verdict(made_up(rank=(16.0,) * LAYERS), made_up(rank=(4.0,) * LAYERS)).initial == NO_SIGN
    # What falls with depth is a collapse although the initialisation does the same, and then that is said beside it.
    assert (verdict(collapsed, collapsed).kind, verdict(collapsed, collapsed).initial) == (COLLAPSES, COLLAPSES)


def test_ranks_of_nothing():
    nothing = made_up(rank=(0.0,) * LAYERS, share=(0.0,) * LAYERS)
    found = verdict(nothing)
    assert found.kind == COLLAPSES
    assert float(found.facts.kept.value) == 1.0
    assert float(verdict(made_up(), nothing).facts.against.value) == math.inf
    assert float(verdict(nothing, nothing).facts.against.value) == 1.0


def test_layers_that_stand_out_are_named():
    model = made_up()
    model.values[ATTENTION, ENTROPY_SHARE][:] = torch.tensor([0.995, 0.5, 0.985, 0.04])
    model.values[ATTENTION_OUTPUT, SHARE][:] = torch.tensor([0.5, 0.007, 0.5, 0.0079])
    found = verdict(model)
    assert (found.uniform, found.one_key, found.same_output) == ((1,), (4,), (2,))


def test_a_diverged_model_or_other_sizes_are_refused():
    model = made_up()
    model.values[BLOCK_OUTPUT, RANK][3, 2] = torch.nan
    with pytest.raises(ValueError, match="the tokens of layer 3 are not finite: the model diverged"):
        verdict(model)
    with pytest.raises(ValueError, match="the tokens of layer 3 are not finite"):
        verdict(made_up(), model)
    with pytest.raises(ValueError, match="must be of the same inputs and layers: got 20 inputs and 4 layers"):
        judge(made_up(), [made_up()], resamples(INPUTS + 1, 0))
    without_choice = made_up()
    without_choice.values[ATTENTION, ENTROPY_SHARE].fill_(torch.nan)
    assert verdict(without_choice).kind == NO_SIGN


class Planted:
    """What is done to a healthy model's weights, so that a known thing happens to its tokens."""

    @staticmethod
    def nothing(model):
        return model

    @staticmethod
    def uniform_attention(model):
        """Queries are zero, so that attention averages, and its output dwarfs the tokens."""
        for block in model.blocks:
            block.attn.qkv.weight.data[:24] = 0
            block.attn.proj.weight.data *= 3000
        return model

    @staticmethod
    def one_direction(model):
        """Every block adds to a token a multiple of one direction, and far more than was there."""
        direction = torch.randn(24)
        for block in model.blocks:
            block.mlp.fc2.weight.data = 100 * torch.outer(direction, torch.randn(96))
        return model

    @staticmethod
    def common_token(model):
        """All tokens get the same vector added before the blocks: alike by the cosine, and as many directions."""
        model.pos_embed.data += 20 * torch.randn(24)
        return model


PLANTED = {
    "nothing": NO_SIGN,
    "uniform_attention": COLLAPSES,
    "one_direction": COLLAPSES,
    "common_token": SHARES_A_MEAN,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_collapses_are_found_and_healthy_models_are_not_accused(planted, make_vit):
    images = torch.randn(12, 1, 8, 8)

    def fresh(seed):
        torch.manual_seed(seed)
        model = make_vit()
        for part in model.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.1)
        for block in model.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=0.3)
        nn.init.normal_(model.pos_embed, std=1.0)
        nn.init.normal_(model.patch_embed.proj.weight, std=1.0)
        return model

    model = getattr(Planted, planted)(fresh(1))
    measured = measure_collapse(model, images.split(6))
    initial = [measure_collapse(fresh(seed), images.split(6)) for seed in (2, 3)]
    found = judge(measured, initial, resamples(12, 0))
    assert found.kind == PLANTED[planted]
    assert found.initial == NO_SIGN
    if planted == "nothing":
        assert (found.uniform, found.same_output) == ((), ())
    if planted == "uniform_attention":
        assert (found.uniform, found.same_output) == ((1, 2, 3), (1, 2, 3))
        assert float(measured.values[BLOCK_OUTPUT, SHARE][:, -1].max()) < 2.0**-7
    if planted == "one_direction":
        assert float(found.facts.rank.high) < 2
    if planted == "common_token":
        assert float(measured.values[BLOCK_OUTPUT, COSINE].min()) > 0.9
