"""The experiments, in the order of the page: the first paper, the second, and where the theory ends."""

from collections.abc import Sequence

from twicing.experiments.theory import (
    assumptions,
    attention_as_regression,
    bias,
    cross_terms,
    denoising,
    eigencapacity,
    energy,
    least_squares,
    residual_snr,
    softmax_sensitivity,
    twicing_kernel,
)
from twicing.experiments.theory.experiment import Experiment
from twicing.names import listed

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        eigencapacity.EXPERIMENT,
        bias.EXPERIMENT,
        attention_as_regression.EXPERIMENT,
        twicing_kernel.EXPERIMENT,
        denoising.EXPERIMENT,
        energy.EXPERIMENT,
        least_squares.EXPERIMENT,
        residual_snr.EXPERIMENT,
        softmax_sensitivity.EXPERIMENT,
        cross_terms.EXPERIMENT,
        assumptions.EXPERIMENT,
    )
}


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, in the order of the page; all for no names.

    Raises ValueError for an unknown name, with the nearest one and the list.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"there is no experiment {name!r}: {listed(name, EXPERIMENTS)}")
    return [one for one in EXPERIMENTS.values() if not names or one.name in names]
