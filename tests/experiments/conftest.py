"""A saved model of transformers, for the tests of every command that looks into such folders."""

import importlib

import pytest
from saved_transformers import save_llama


@pytest.fixture(scope="module")
def hf():
    """transformers, with torchvision's import mended."""
    try:
        importlib.import_module("twicing.adapters.transformers")
    except ImportError:
        pytest.skip("needs transformers: pip install 'twicing[hf]'")
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def llama(hf, tmp_path_factory):
    return save_llama(hf, tmp_path_factory.mktemp("hf") / "tiny-llama")
