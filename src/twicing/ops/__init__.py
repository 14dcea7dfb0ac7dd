"""Pure functions on tensors: the formula, and the ways to compute it."""
