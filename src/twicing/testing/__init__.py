"""What one needs to trust an implementation: inputs, the fp64 truth, budgets of error, wrong formulas, soundness."""

from twicing.testing.budget import (
    WRONG_FORMULAS,
    Formula,
    error_budget,
    make_inputs,
    measured_errors,
    relative_rms,
    truth,
)
from twicing.testing.checks import CHECKS, FormulaAcross
from twicing.testing.soundness import MechanismError, check_mechanism, checked

__all__ = [
    "CHECKS",
    "WRONG_FORMULAS",
    "Formula",
    "FormulaAcross",
    "MechanismError",
    "check_mechanism",
    "checked",
    "error_budget",
    "make_inputs",
    "measured_errors",
    "relative_rms",
    "truth",
]
