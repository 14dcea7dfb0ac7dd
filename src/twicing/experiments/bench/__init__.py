"""`twicing bench`: what attention costs, correctness first, every ratio taken in one run."""
