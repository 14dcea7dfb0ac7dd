"""Names of what is measured, each with its unit: records carry them, and reports look numbers up by them."""

ACCURACY = "accuracy [share of images]"
TOP5 = "top-5 accuracy [share of images]"
# The median over images of the smallest eps tried that fools the model; a model that withstands more has no value.
EPS50 = "eps50 [share of pixel range]"
ZERO_GRADIENTS = "share of zero gradients"
CORRUPTED = "mean corruption accuracy [share of images]"

TRAINING_LOSS = "training loss [nats]"
HELD_OUT_ACCURACY = "held-out accuracy [share of images]"
TRAINING_TIME = "training time [s]"
STEP_TIME = "training time [s per step]"


def is_perplexity(metric: str) -> bool:
    """Whether it is one of "valid perplexity per word, segments" and its like, which name their unit and their way."""
    return " perplexity per " in metric
