"""What is not converted, and what is said about it. The model is untouched each time."""

import copy
import warnings

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from twicing.adapters.surgery import convert, describe, find_sites
from twicing.mechanisms import Standard


def refused(model, match, mechanism="twicing", error=ValueError, **arguments):
    before = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(error, match=match):
        convert(model, mechanism, **arguments)
    assert before == [(path, type(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("swin_tiny_patch4_window7_224", r"layers\.0\.blocks\.0\.attn is a .*swin_transformer\.WindowAttention"),
        ("xcit_nano_12_p8_224", r"blocks\.0\.attn is a timm\.models\.xcit\.XCA"),
        ("eva02_tiny_patch14_224", r"blocks\.0\.attn is a timm\.models\.eva\.EvaAttention"),
    ],
    ids=["swin", "xcit", "eva"],
)
def test_other_attention_of_timm(name, attention):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    refused(model, rf"is not known to the library: {attention}\. Known is timm's Attention")
    assert "is not known to the library" in describe(model)


def test_nothing_found():
    refused(nn.Sequential(nn.Linear(2, 2)), "No attention was found in Sequential: known is timm's Attention in the")
    assert find_sites(nn.Linear(2, 2)) == []


def test_partly_known(small_vit):
    class MyAttention(nn.Module):
        pass

    class Both(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit = vit
            self.text = MyAttention()

    model = Both(small_vit())
    refused(model, r"The attention of Both is only partly known: text is a .*MyAttention, .* by itself")
    convert(model.vit, "twicing")
    # What is converted already is known as well.
    refused(model, "only partly known: text is a")


def test_an_unknown_block_between_known_ones(small_vit):
    class MyBlock(Block):
        pass

    model = small_vit()
    model.blocks[1] = MyBlock(48, 3)
    refused(model, r"only partly known: blocks\.1\.attn is a timm\.layers\.attention\.Attention")


def test_a_subclass_of_timms_attention(small_vit):
    class Mine(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    refused(small_vit(attn_layer=Mine), r"blocks\.0\.attn is a .*Mine: in timm's blocks the library knows timm's")


def test_differential_attention(small_vit):
    refused(small_vit(attn_layer="diff"), r"blocks\.0\.attn is a .*DiffAttention: in timm's blocks")


@pytest.mark.parametrize("block", [ParallelThingsBlock, ParallelScalingBlock])
def test_parallel_blocks(block, small_vit):
    refused(small_vit(block_fn=block), "is not known to the library: blocks.0")


def test_an_unknown_child(small_vit):
    model = small_vit()
    model.blocks[1].attn.lora = nn.Linear(2, 2)
    refused(model, r"blocks\.1\.attn is timm's Attention, but has the unknown children \['lora'\].*cannot be mirrored")


def test_a_missing_child(small_vit):
    model = small_vit()
    del model.blocks[1].attn.q_norm
    refused(model, r"lacks the children \['q_norm'\]")


def test_an_unknown_tensor(small_vit):
    model = small_vit()
    model.blocks[0].attn.bias_table = nn.Parameter(torch.zeros(3))
    refused(model, r"has the unknown tensors \['bias_table'\]")


def test_a_replaced_forward(small_vit):
    model = small_vit()
    model.blocks[0].attn.forward = lambda x, attn_mask=None: x
    refused(model, r"its forward\(x, attn_mask=None\) is not the one that the library mirrors")


def test_a_forward_with_other_arguments(small_vit, monkeypatch):
    model = small_vit()
    monkeypatch.setattr(Attention, "forward", lambda self, x, rope=None: x)
    refused(model, r"its forward\(x, rope=None\) is not the one that the library mirrors")


def test_shared_attention(small_vit):
    model = small_vit()
    model.blocks[2].attn = model.blocks[0].attn
    refused(model, r"blocks\.2\.attn and blocks\.0\.attn are one and the same module")


def test_two_stacks(small_vit):
    model = nn.ModuleDict({"student": small_vit(), "teacher": small_vit()})
    refused(model, r"2 separate stacks of attention layers \(student\.blocks, teacher\.blocks\).* pass the part")
    convert(model["student"], "twicing")
    assert "converted" not in describe(model["teacher"]).replace("none converted", "")


def test_converted_already(small_vit):
    model = small_vit()
    convert(model, "twicing", layers=2)
    refused(model, r"Layer 2 \(blocks\.1\.attn\) is already converted to twicing: undo that first", "standard")


def test_out_of_range(small_vit):
    refused(small_vit(), r"the model has 3 attention layers, counted from 1 to 3; got 4\.", layers="3-4")


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "a compiled part"])
def test_compiled(how, small_vit):
    model = small_vit()
    if how == "torch.compile(model)":
        model = torch.compile(model, backend="eager")
    elif how == "model.compile()":
        model.compile(backend="eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    refused(model, r"A compiled model cannot be changed: .* Convert first, then compile\.")


def test_wrapped_for_several_devices(small_vit):
    class FSDPModule:
        """What fully_shard() adds to a module's bases."""

    model = small_vit()
    refused(nn.DataParallel(model), "wrapped for several devices cannot be changed: the model is a DataParallel")
    model.blocks[0].__class__ = type("FSDPBlock", (FSDPModule, Block), {})
    refused(model, r"wrapped for several devices cannot be changed: blocks\.0 is a FSDPBlock")


def test_wrapped_for_distributed_training(small_vit, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small_vit())
        refused(model, "the model is a DistributedDataParallel. Convert first, then wrap")
    finally:
        torch.distributed.destroy_process_group()


def test_scripted_or_traced(small_vit, images):
    with warnings.catch_warnings():
        # TorchScript is deprecated, and still about.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(small_vit(), images)
    refused(traced, "A scripted or traced model cannot be changed: the model is a TopLevelTracedModule")


def test_quantised(small_vit):
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, which wraps weights: the second case.
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(small_vit()), {nn.Linear})
    refused(dynamic, r"A quantised model cannot be changed: .*qkv is a Linear, quantised\. Convert first")
    model = small_vit()
    model.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(144, 48, dtype=torch.int8), requires_grad=False)
    refused(model, r"A quantised model cannot be changed: blocks\.0\.attn\.qkv is a Linear")


def test_weights_that_are_quantised_tensors(small_vit):
    class Int4Tensor(torch.Tensor):
        """As torchao's: a class of its own that calls itself floating-point."""

    Int4Tensor.__module__ = "torchao.quantization.quantize_.workflows"
    model = small_vit()
    weight = model.blocks[0].attn.qkv.weight.detach().as_subclass(Int4Tensor)
    model.blocks[0].attn.qkv.weight = nn.Parameter(weight, requires_grad=False)
    refused(model, r"A quantised model cannot be changed: blocks\.0\.attn\.qkv is a Linear")


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"The model must be a torch\.nn\.Module: got a str"):
        convert("vit", "twicing")


def test_what_is_no_mechanism(small_vit):
    model = small_vit()
    refused(model, "mechanism must be a name or a factory .*: got 3", 3, error=TypeError)
    refused(model, "mechanism must be a name or a factory", Standard(1, 3, 16), error=TypeError)
    refused(model, "Unknown mechanism 'twcing': did you mean 'twicing'", "twcing")
    refused(model, "must build a torch.nn.Module: for layer 1 it built a int", lambda *_: 3, error=TypeError)
    refused(model, r"The forward\(\) of the mechanism .* must take \(query", lambda *_: nn.ReLU(), error=TypeError)
    one = Standard(1, 3, 16)
    refused(model, "gave the same module for two layers", lambda *_: one)
