"""What tests of operations share. The kernels' own tests run in a process that test_triton_interpreted.py starts."""

import os

import pytest
import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreted"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
