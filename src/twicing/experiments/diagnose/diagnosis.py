"""One model diagnosed: what was measured in it and in its random initialisations, the bands, and the verdict."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from twicing.analysis.collapse import CURVES, Collapse, Key, measure_collapse
from twicing.analysis.collapse_bands import Band, Numbers, band, resamples
from twicing.analysis.collapse_verdict import Verdict, judge, mean_over_draws
from twicing.experiments.cases.case import Case
from twicing.experiments.cases.inputs import Inputs

MODEL, INITIAL = "model", "random initialisation"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """model: what was measured in it. draws: the same in each random initialisation. weights: of resamples()."""

    case: Case
    inputs: Inputs
    model: Collapse
    draws: tuple[Collapse, ...]
    weights: Numbers
    verdict: Verdict

    @cached_property
    def initial(self) -> Collapse:
        """The mean of the draws, input by input."""
        return mean_over_draws(self.draws)

    def curve(self, which: str, key: Key) -> Band:
        """The mean over inputs by layer, [layers], of "model" or of "random initialisation", with its band."""
        one = self.model if which == MODEL else self.initial
        return band(one.values[key].numpy(), self.weights)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for every model, place, metric and layer: mean, band, and the means of the single draws."""
        for key in CURVES:
            for which in (MODEL, INITIAL):
                curve = self.curve(which, key)
                alone = [draw.values[key].mean(0).tolist() for draw in self.draws] if which == INITIAL else []
                for layer in range(self.model.layers):
                    yield {
                        "model": self.case.name,
                        "weights": which,
                        "where": key[0],
                        "metric": key[1],
                        "layer": layer + 1,
                        "inputs": self.model.inputs,
                        "mean": finite(curve.value[layer]),
                        "low": finite(curve.low[layer]),
                        "high": finite(curve.high[layer]),
                        "draws": [finite(draw[layer]) for draw in alone],
                    }

    def input_rows(self) -> Iterator[dict[str, Any]]:
        """A row for every model, draw, input, place, metric and layer: what the means and bands are made of."""
        for name, one in ((MODEL, self.model), *((f"draw {k}", draw) for k, draw in enumerate(self.draws, start=1))):
            for where, metric in CURVES:
                for place, layers in enumerate(one.values[where, metric].tolist()):
                    for layer, value in enumerate(layers, start=1):
                        yield {
                            "model": self.case.name,
                            "weights": name,
                            "input": place,
                            "where": where,
                            "metric": metric,
                            "layer": layer,
                            "value": finite(value),
                        }

    def facts(self) -> Mapping[str, dict[str, float | None]]:
        """The numbers that the verdict is made of, each with its band, as JSON values."""
        facts = self.verdict.facts
        named = {"share": facts.share, "rank": facts.rank, "kept": facts.kept, "against": facts.against}
        return {
            name: {end: finite(float(getattr(one, end))) for end in ("value", "low", "high")}
            for name, one in named.items()
        }


def diagnose_case(
    case: Case,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[float], object],
) -> Diagnosis:
    """Measure the model and so many random initialisations, one after the other, and judge.

    progress: told the share of the case that is done. The seed decides the draws and the bands.
    Raises ValueError, naming the model, for what cannot be diagnosed.
    """
    inputs = case.inputs()
    weights = resamples(inputs.count, seed)
    shown = 0

    def passed(count: int) -> None:
        nonlocal shown
        shown += count
        progress(shown / (inputs.count * (1 + draws)))

    measured: list[Collapse] = []
    builders = [case.build, *(_drawing(case, seed + 1 + place) for place in range(draws))]
    try:
        for build in builders:
            model = build().to(device)
            measured.append(measure_collapse(model, inputs.batches(batch_size, device), progress=passed))
        verdict = judge(measured[0], measured[1:], weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{case.name} cannot be diagnosed: {error}") from error
    return Diagnosis(case, inputs, measured[0], tuple(measured[1:]), weights, verdict)


def finite(value: float) -> float | None:
    """A number for JSON; None where there is none, such as the share of an entropy where no query has a choice."""
    return float(value) if math.isfinite(value) else None


def _drawing(case: Case, seed: int) -> Callable[[], torch.nn.Module]:
    return lambda: case.draw(seed)
