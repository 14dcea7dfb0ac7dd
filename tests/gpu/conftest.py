"""Tests that need a CUDA device; elsewhere they are skipped."""

import os

import pytest
import torch

# Products by cuBLAS are deterministic with it only; it must be there before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device: run scripts/gpu_check.sh on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
