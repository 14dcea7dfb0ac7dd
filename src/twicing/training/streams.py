"""Streams of random numbers: what is drawn for one purpose is never what is drawn for another.

Every draw of a training is a function of (seed, stream, counts), so that it does not matter who draws it, in which
order, in which process, or whether it was drawn before an interruption.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Evaluations have their own, from 3 on and from 20 on (experiments/).
ORDER_STREAM, STEP_STREAM, MECHANISM_STREAM, AUGMENT_STREAM, MIX_STREAM = 1, 2, 5, 6, 7


def stream_seed(seed: int, stream: int, *counts: int) -> int:
    """A 32-bit seed (all that torch's CPU generator reads) for the draw of that number in one of a run's streams.

    counts may be several, such as (epoch, image). A last count of 0 is as none: process 0 draws what one alone draws.
    """
    return int(np.random.SeedSequence([seed, stream, *counts]).generate_state(1)[0])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Within it, the global generators of Python, numpy and torch (CPU) start from the seed; then all is as before.

    For augmentation of timm and torchvision, which take no generator.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
