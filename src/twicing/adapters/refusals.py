"""Models that are not to be changed in place, each with its reason: compiled, wrapped, scripted, quantised, unknown.

A conversion that half works is worse than none: it would train, and report numbers, under a wrong name.
"""

import re

import torch
from torch import nn

KNOWN_ATTENTION = (
    "timm's Attention in the blocks of its VisionTransformer family (ViT, DeiT), self-attention that goes through "
    "transformers' attention interface (GPT-2, Llama, BERT, ViT, ...), and torch.nn.MultiheadAttention"
)
# By name, since looking them up would import the distributed package. fully_shard() adds FSDPModule as a base.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
_QUANTISED = re.compile(
    r"torch\.ao\.(nn|quantization)\b|(torchao|bitsandbytes|auto_gptq|gptqmodel|brevitas|optimum\.quanto)\b"
)
_ATTENTION_NAME = re.compile(r"att(ention|n)|^XCA$", re.IGNORECASE)


def refuse_unchangeable(model: object) -> None:
    """Raise where the object is no plain module, whatever attention it holds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a torch.nn.Module: got a {type(model).__name__}.")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"A scripted or traced model cannot be changed: {where}. Convert the Python model first.")
        # torch.compile() wraps and leaves _orig_mod; module.compile() compiles in place.
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"A compiled model cannot be changed: {where}, compiled. Convert first, then compile.")
        if any(base.__name__ in _WRAPPERS for base in type(module).__mro__):
            raise ValueError(
                f"A model that is wrapped for several devices cannot be changed: {where}. Convert first, then wrap."
            )
        if _QUANTISED.match(type(module).__module__) or any(map(_is_quantised, module.parameters(recurse=False))):
            raise ValueError(f"A quantised model cannot be changed: {where}, quantised. Convert first, then quantise.")


def refuse_unknown_attention(model: nn.Module, known: list[nn.Module], passed_over: list[nn.Module]) -> None:
    """Raise where the model has attention besides the known modules and those passed over, so far as one can see.

    Anything counts whose class is called attention, or that has a number of heads, and that holds none of these.
    """
    inside = {id(part) for module in [*known, *passed_over] for part in module.modules()}
    unknown = [
        (path, module)
        for path, module in model.named_modules()
        if id(module) not in inside and _looks_like_attention(module) and not _holds(module, inside)
    ]
    if not unknown:
        return
    # The innermost one is the attention; what is around it merely knows the number of heads.
    path, module = next(
        ((path, module) for path, module in unknown if _ATTENTION_NAME.search(type(module).__name__)), unknown[0]
    )
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if known:
        raise ValueError(
            f"The attention of {type(model).__name__} is only partly known: {path or 'the model'} is a {kind}, which "
            "the library does not know. Convert the part that is known by itself, such as convert(model.encoder, ...)."
        )
    raise ValueError(
        f"The attention of {type(model).__name__} is not known to the library: {path or 'the model'} is a {kind}. "
        f"Known is {KNOWN_ATTENTION}."
    )


def _looks_like_attention(module: nn.Module) -> bool:
    heads = getattr(module, "num_heads", None)
    has_heads = isinstance(heads, int) and not isinstance(heads, bool)
    return has_heads or _ATTENTION_NAME.search(type(module).__name__) is not None


def _holds(module: nn.Module, inside: set[int]) -> bool:
    return any(id(part) in inside for part in module.modules())


def _is_quantised(parameter: nn.Parameter) -> bool:
    # torchao's weights are tensors of its own class, which call themselves floating-point.
    own_class = type(parameter.data).__module__
    return not (parameter.is_floating_point() or parameter.is_complex()) or _QUANTISED.match(own_class) is not None
