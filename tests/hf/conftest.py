"""Small models of transformers with random weights; nothing is looked for in the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
# Attention is nearly uniform at the usual initialisation, where many formulas look alike.
SHARP = {"initializer_range": 0.3}


def gpt2(**changes):
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **SPECIAL, **SHARP, **changes}))


def llama(**changes):
    sizes = {"vocab_size": 50, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**ENCODER, **sizes, **SPECIAL, **SHARP, **changes}))


def bert(**changes):
    return BertModel(BertConfig(**{**ENCODER, **SHARP, "vocab_size": 50, "max_position_embeddings": 64, **changes}))


def vit(**changes):
    return ViTModel(ViTConfig(**{**ENCODER, **SHARP, "image_size": 16, "patch_size": 4, **changes}))


def deit(**changes):
    return DeiTModel(DeiTConfig(**{**ENCODER, **SHARP, "image_size": 16, "patch_size": 4, **changes}))


HOSTS = {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit, "deit": deit}


@pytest.fixture
def host():
    """A small model by its name; keyword arguments go to its config."""

    def build(name, **changes):
        torch.manual_seed(0)
        return HOSTS[name](**changes).eval()

    return build


@pytest.fixture
def inputs_of():
    """What a model of that name takes: 2 sequences of 10 tokens, or 2 images."""

    def build(name):
        generator = torch.Generator().manual_seed(1)
        if name in ("vit", "deit"):
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        return {"input_ids": torch.randint(3, 50, (2, 10), generator=generator)}

    return build
