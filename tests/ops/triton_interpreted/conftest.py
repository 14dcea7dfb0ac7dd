"""Kernels in Triton's interpreter, in a process of their own: see tests/ops/test_triton_interpreted.py."""

import os
from functools import partial

import pytest

from twicing import twicing_attention
from twicing.ops.triton import tuning
from twicing.ops.triton.tuning import Blocks

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1 in the environment"

# Small and unequal, so that a few dozen tokens make several tiles, whole ones and edges.
SMALL = {
    "smooth": Blocks(32, 16, 4, 1),
    "causal_head": Blocks(16, 16, 4, 1),
    "small_head": Blocks(16, 256, 4, 1),
    "boosted_gradient": Blocks(16, 32, 4, 1),
    "key_gradients": Blocks(16, 32, 4, 1),
    "query_gradients": Blocks(32, 16, 4, 1),
    "head_backward": Blocks(16, 16, 4, 1),
}


def pytest_collection_modifyitems(items):
    for item in items:
        # The interpreter turns arrays of one element into numbers, which numpy 2.4 will not allow any more.
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"))
        # Padded columns, which nobody reads, and diverged runs.
        item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"))


@pytest.fixture
def call():
    return partial(twicing_attention, backend="triton")


@pytest.fixture(params=["blocks", "heads"])
def schedule(request):
    """One program per block of rows or columns, or one per head."""
    with tuning.tried(request.param, **SMALL):
        yield request.param


@pytest.fixture
def by_blocks():
    with tuning.tried("blocks", **SMALL):
        yield
