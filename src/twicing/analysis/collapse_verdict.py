"""Does the model collapse? A verdict by fixed rules, on the output of the last block, which may be "no".

The mean pairwise cosine decides nothing: a mean token that all have in common raises it, however many directions the
rest keeps. What decides is whether the tokens can still be told apart, and in how many directions (effective rank).
A rule counts as met where the whole band over inputs lies beyond its threshold, and as open where the band holds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twicing.analysis.capture import ATTENTION_OUTPUT, BLOCK_OUTPUT
from twicing.analysis.collapse import ATTENTION, ENTROPY_SHARE, RANK, SHARE, Collapse
from twicing.analysis.collapse_bands import Band, Numbers, band

COLLAPSES = "collapses"
NARROW = "narrower than its random initialisation"
SHARES_A_MEAN = "tokens share a mean but keep their rank"
NO_SIGN = "no sign of collapse"
OPEN = "undecided"

# The spacing of bfloat16 numbers, 2^-7 of their size: tokens closer to their mean than that are one token in half
# precision.
SAME_TOKEN = 2.0**-7
# Fewer than two directions are left: tokens lie on a line.
ON_A_LINE = 2.0
# With fewer directions to have, being on a line says nothing.
LEAST_RANK = 4
# More is lost than is kept: between healthy layers the effective rank changes by a tenth or two.
RANK_KEPT = 0.5
# The mean token has half of the energy: ||X - mean||^2 / ||X||^2 = 1/2.
MEAN_DOMINATES = 0.5**0.5
# Attention this close to the largest entropy averages all tokens alike; this close to zero it copies one.
UNIFORM, ONE_KEY = 0.99, 0.05

BELOW, ABOVE, BETWEEN = "below", "above", "between"


@dataclass(frozen=True, eq=False)
class Facts:
    """What the verdict is made of, each with its band over inputs. All are of the output of the last block.

    share: ||X - mean|| / ||X||. rank: effective rank of centred tokens. kept: rank over the largest rank of any block.
    against: rank over that of the random initialisation. peak: the block with the largest rank, counted from 1.
    """

    share: Band
    rank: Band
    kept: Band
    against: Band
    peak: int


@dataclass(frozen=True, eq=False)
class Verdict:
    """kind: one of the five in words. met: the rules that were met, open: those the inputs do not decide; in words.

    initial: the kind that the random initialisation has by the same rules. uniform, one_key: layers whose attention
    averages everything, or copies one token. same_output: layers whose attention puts out one and the same token.
    """

    kind: str
    met: tuple[str, ...]
    open: tuple[str, ...]
    facts: Facts
    initial: str
    uniform: tuple[int, ...]
    one_key: tuple[int, ...]
    same_output: tuple[int, ...]


def judge(model: Collapse, initial: Sequence[Collapse], weights: Numbers) -> Verdict:
    """The verdict on a model, beside draws of its random initialisation that were measured on the same inputs.

    weights: of resamples(). Raises ValueError where a model's tokens are not finite, or sizes differ.
    """
    for one in (model, *initial):
        if (one.inputs, one.layers) != (model.inputs, model.layers) or one.inputs != weights.shape[1]:
            raise ValueError(
                "the model, its random initialisation and the resamples must be of the same inputs and layers: got "
                f"{one.inputs} inputs and {one.layers} layers beside {model.inputs} and {model.layers}."
            )
        _refuse_infinite(one)
    drawn = mean_over_draws(initial)
    facts = _facts(model, drawn, weights)
    kind, met, still_open = _by_the_rules(facts, model.largest_rank)
    # Against itself it is 1.
    at_start, _, _ = _by_the_rules(_facts(drawn, drawn, weights), drawn.largest_rank)
    entropy = model.values[ATTENTION, ENTROPY_SHARE].mean(0)
    output = model.values[ATTENTION_OUTPUT, SHARE].mean(0)
    return Verdict(
        kind,
        met,
        still_open,
        facts,
        at_start,
        uniform=_layers(entropy.numpy() > UNIFORM),
        one_key=_layers(entropy.numpy() < ONE_KEY),
        same_output=_layers(output.numpy() < SAME_TOKEN),
    )


def mean_over_draws(draws: Sequence[Collapse]) -> Collapse:
    """The mean of several models on the same inputs, input by input."""
    first = draws[0]
    values = {key: sum(draw.values[key] for draw in draws) / len(draws) for key in first.values}
    return Collapse(values, first.tokens, first.width)  # type: ignore[arg-type]


def _facts(model: Collapse, initial: Collapse, weights: Numbers) -> Facts:
    share = model.values[BLOCK_OUTPUT, SHARE].numpy()
    rank = model.values[BLOCK_OUTPUT, RANK].numpy()
    both = np.stack([rank[:, -1], initial.values[BLOCK_OUTPUT, RANK].numpy()[:, -1]], axis=1)
    return Facts(
        share=band(share[:, -1], weights),
        rank=band(rank[:, -1], weights),
        kept=band(rank, weights, lambda means: _ratio(means[..., -1], means.max(-1))),
        against=band(both, weights, lambda means: _ratio(means[..., 0], means[..., 1])),
        peak=int(rank.mean(0).argmax()) + 1,
    )


def _by_the_rules(facts: Facts, largest_rank: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The kind, the rules that are met, and those that are open."""
    rules = [
        (COLLAPSES, "the tokens become one token", facts.share, SAME_TOKEN),
        (COLLAPSES, "the rank falls with depth to less than half", facts.kept, RANK_KEPT),
    ]
    if largest_rank >= LEAST_RANK:
        rules.append((COLLAPSES, "the tokens lie on a line", facts.rank, ON_A_LINE))
    rules += [
        (NARROW, "the rank is less than half of that at random initialisation", facts.against, RANK_KEPT),
        (SHARES_A_MEAN, "the mean token has more than half of the energy", facts.share, MEAN_DOMINATES),
    ]
    sides = [(kind, words, _side(fact, threshold)) for kind, words, fact, threshold in rules]
    still_open = tuple(words for _, words, side in sides if side == BETWEEN)
    for wanted in (COLLAPSES, NARROW, SHARES_A_MEAN):
        met = tuple(words for kind, words, side in sides if kind == wanted and side == BELOW)
        if met:
            return wanted, met, still_open
        if any(kind == wanted and side == BETWEEN for kind, _, side in sides):
            return OPEN, (), still_open
    return NO_SIGN, (), ()


def _side(fact: Band, threshold: float) -> str:
    if fact.high < threshold:
        return BELOW
    return ABOVE if fact.low >= threshold else BETWEEN


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """part / whole; 0 / 0 is 1: where there was no rank, none is lost."""
    of_nothing = np.where(part == 0, 1.0, np.inf)
    return np.where(whole == 0, of_nothing, part / np.where(whole == 0, 1.0, whole))


def _layers(which: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(place) + 1 for place in np.flatnonzero(which))


def _refuse_infinite(one: Collapse) -> None:
    # The entropy is missing, and rightly so, where no query has a choice.
    tokens = np.stack([values.numpy() for (where, _), values in one.values.items() if where != ATTENTION])
    finite: NDArray[np.bool_] = np.isfinite(tokens).all(axis=(0, 1))
    if not finite.all():
        raise ValueError(
            f"the tokens of layer {_layers(~finite)[0]} are not finite: the model diverged, or needs more precision."
        )
