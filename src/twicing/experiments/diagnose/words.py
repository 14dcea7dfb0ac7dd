"""A verdict in sentences, always with its numbers."""

from collections.abc import Sequence

from twicing.adapters.crossing import layers_in_words
from twicing.analysis.capture import BLOCK_OUTPUT
from twicing.analysis.collapse import COSINE, RANK, SHARE
from twicing.analysis.collapse_bands import ENOUGH_INPUTS, Band
from twicing.analysis.collapse_verdict import (
    COLLAPSES,
    LEAST_RANK,
    MEAN_DOMINATES,
    NARROW,
    NO_SIGN,
    ON_A_LINE,
    ONE_KEY,
    OPEN,
    RANK_KEPT,
    SAME_TOKEN,
    SHARES_A_MEAN,
    UNIFORM,
)
from twicing.experiments.diagnose.diagnosis import INITIAL, MODEL, Diagnosis
from twicing.experiments.statistics import number

HEADLINES = {
    COLLAPSES: "Yes, it collapses",
    NARROW: "It does not collapse with depth, but is narrower than its random initialisation",
    SHARES_A_MEAN: "No: the tokens share a mean, but keep their rank",
    NO_SIGN: "No sign of collapse",
    OPEN: "Undecided on these inputs",
}
IN_TABLES = {
    COLLAPSES: "collapses",
    NARROW: "narrow",
    SHARES_A_MEAN: "shared mean",
    NO_SIGN: "no sign",
    OPEN: "undecided",
}
RULES = (
    (
        "Yes, it collapses",
        f"where ||X - mean|| / ||X|| is below {number(SAME_TOKEN)} (the spacing of bfloat16: the tokens are one), or "
        f"the effective rank falls below {RANK_KEPT:g} of the largest on the way (more directions are lost than kept), "
        f"or below {ON_A_LINE:g} (the tokens lie on a line; asked where {LEAST_RANK} or more directions are possible).",
    ),
    (
        "Narrower than its random initialisation",
        f"where the effective rank is below {RANK_KEPT:g} of that at random initialisation, without falling so "
        "far with depth.",
    ),
    (
        "Tokens share a mean but keep their rank",
        f"where ||X - mean|| / ||X|| is below {number(MEAN_DOMINATES)}: the mean token has over half of the energy.",
    ),
    ("No sign of collapse", "where none of these holds."),
    ("Undecided", "where the band over inputs holds the threshold of a rule that would come first."),
)


def headline(diagnosis: Diagnosis) -> str:
    """The verdict in one line."""
    return HEADLINES[diagnosis.verdict.kind]


def reasons(diagnosis: Diagnosis) -> list[str]:
    """The sentences behind it, each with numbers; bands are 95 % over inputs."""
    verdict, facts, layers = diagnosis.verdict, diagnosis.verdict.facts, diagnosis.model.layers
    return [
        *_rules(verdict.met, "Decided by: "),
        *_rules(verdict.open, "Open, as the band holds the threshold: "),
        f"After the last of {layers} blocks the tokens fill {with_band(facts.rank)} of at most "
        f"{diagnosis.model.largest_rank} directions beside their mean (effective rank): {_kept(diagnosis)}.",
        f"||X - mean|| / ||X|| is {with_band(facts.share)} there, and the mean pairwise cosine "
        f"{with_band(_last(diagnosis, MODEL, COSINE))}, which by itself decides nothing.",
        _against(diagnosis),
        *_of_layers(diagnosis),
        *_of_bands(len(diagnosis.weights[0])),
    ]


def with_band(one: Band) -> str:
    """ "0.462 [0.431, 0.492]"."""
    return f"{number(float(one.value))} [{number(float(one.low))}, {number(float(one.high))}]"


def _kept(diagnosis: Diagnosis) -> str:
    facts = diagnosis.verdict.facts
    if facts.peak == diagnosis.model.layers:
        return "no block has more"
    return f"{with_band(facts.kept)} of what block {facts.peak} has, the most of all"


def _rules(rules: Sequence[str], opening: str) -> list[str]:
    return [f"{opening}{'; '.join(rules)}."] if rules else []


def _against(diagnosis: Diagnosis) -> str:
    verdict, draws = diagnosis.verdict, diagnosis.draws
    rank, share, cosine = (with_band(_last(diagnosis, INITIAL, metric)) for metric in (RANK, SHARE, COSINE))
    opening = f"Its random initialisation ends at an effective rank of {rank}"
    ratio = with_band(verdict.facts.against)
    if len(draws) == 1:
        compared = f"(one draw); the model has {ratio} of that"
    else:
        # The bands are over inputs: how far draws differ has to be seen from the draws.
        alone = [float(draw.values[BLOCK_OUTPUT, RANK][:, -1].mean()) for draw in draws]
        own = float(verdict.facts.rank.value)
        than = "more than each" if own > max(alone) else "fewer than each" if own < min(alone) else "within the range"
        compared = (
            f"(the mean of {len(draws)} draws, {number(min(alone))} to {number(max(alone))}); the model has {ratio} of "
            f"that, {than} of the draws"
        )
    return (
        f"{opening} {compared}. There {SHARE} is {share} and the cosine {cosine}; by the same rules: {verdict.initial}."
    )


def _of_layers(diagnosis: Diagnosis) -> list[str]:
    verdict = diagnosis.verdict
    said = (
        (verdict.uniform, f"averages all tokens alike (entropy above {UNIFORM:g} of the largest)"),
        (verdict.one_key, f"copies hardly more than one token each (entropy below {ONE_KEY:g} of the largest)"),
        (verdict.same_output, "puts out one and the same token"),
    )
    return [f"Attention in {layers_in_words(layers)} {what}." for layers, what in said if layers]


def _last(diagnosis: Diagnosis, which: str, metric: str) -> Band:
    curve = diagnosis.curve(which, (BLOCK_OUTPUT, metric))
    return Band(curve.value[-1], curve.low[-1], curve.high[-1])


def _of_bands(inputs: int) -> list[str]:
    if inputs >= ENOUGH_INPUTS:
        return []
    return [
        f"Bands of only {inputs} inputs are too narrow for 95 %, and of two hold the mean half of the time: give "
        f"{ENOUGH_INPUTS} or more."
    ]
