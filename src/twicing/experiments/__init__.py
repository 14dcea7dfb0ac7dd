"""Fair comparisons: seeds, intervals, controls, and the report."""
