"""Where the self-attention of a model of transformers is: every module that calls its attention interface.

Told by the code of a module's forward(), not by names of models; what is cross-attention is told by the module.
"""

import inspect
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from twicing.adapters.site import AttentionSite, is_converted
from twicing.adapters.transformers_attention import CACHES, OTHER_TOKENS, converted_class

# What the hosts call things, in the order of trust.
_MERGES = (
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "proj",
    "wo",
    "o",
    "out_lin",
    "projection_layer",
    "linear_out",
    "Wo",
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "qk_head_dim")
_VALUES = ("v_proj", "value", "v_lin", "v")
_SELF = re.compile(r"^(self_?attn|self_?attention|self|attn|attention|mixer)$", re.IGNORECASE)
# Self-attention whose forward() takes other things than its own tokens.
_QUERIES_OF_OTHERS = {"queries", "query", "q", "query_tensor", "latents", "query_sine_embed"}
_OTHERS = {*OTHER_TOKENS, *_QUERIES_OF_OTHERS}


def find_sites(model: nn.Module) -> Iterator[AttentionSite]:
    """The self-attention layers in module order, numbered from 1, converted ones included; cross-attention is none.

    Raises ValueError where a module is such a layer but not one that can be converted, or may be cross-attention.
    """
    modules = dict(model.named_modules())
    seen: dict[int, str] = {}
    for path, attention in modules.items():
        if not calls_the_interface(attention) or is_cross_attention(attention, path):
            continue
        _refuse_unmirrored(attention, path)
        kind = type(attention).__mro__[1] if is_converted(attention) else type(attention)
        block, block_path = _block(path, modules)
        heads, width = _heads(attention), _width(attention)
        merge = _merge(attention, path, modules, heads)
        seen[id(attention)] = path
        yield AttentionSite(
            layer=len(seen),
            path=path,
            stack=block_path.rpartition(".")[0],
            block=block,
            attention=attention,
            merge=merge,
            num_heads=heads,
            head_dim=width,
            converted_class=converted_class(kind),
            value_source=(source := _value_source(attention, heads, width)),
            read_values=partial(_values, width=width, parts=3 if source == "c_attn" else 1),
        )


def no_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of attention that are no layers: cross-attention, and heads that pool tokens by attention."""
    return [
        module
        for path, module in model.named_modules()
        if (calls_the_interface(module) and is_cross_attention(module, path))
        or (type(module).__module__.startswith("transformers.") and type(module).__name__.endswith("PoolingHead"))
    ]


def calls_the_interface(module: nn.Module) -> bool:
    """Whether the module's forward(), as its class has it, gets its attention function from transformers' interface."""
    kind: Any = type(module).__mro__[1] if is_converted(module) else type(module)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names and "config" in vars(module)


def is_cross_attention(attention: nn.Module, path: str) -> bool:
    """Whether the module attends to other tokens than its own, by its own word, its arguments, or its place.

    Raises ValueError where none of them tells.
    """
    declared = getattr(attention, "is_cross_attention", None)
    if isinstance(declared, bool):
        return declared
    arguments = _arguments(attention)
    if not _OTHERS.intersection(arguments):
        return False
    name = path.rpartition(".")[2]
    kind = type(attention).__name__
    if "cross" in kind.lower() or arguments[0] in _QUERIES_OF_OTHERS:
        return True
    if _SELF.match(name) or "selfattention" in kind.lower():
        return False
    if re.search(r"cross|enc|multi|image|text|other", name, re.IGNORECASE):
        return True
    raise ValueError(
        f"{path or 'the model'} is a {type(attention).__module__}.{kind}, which may attend to other tokens than "
        "its own, and nothing here tells whether it does: pass the layer or the model that holds it."
    )


def is_self_attention(module: nn.Module) -> bool:
    """Whether a module that calls the interface cannot be cross-attention, or says that it is none."""
    declared = getattr(module, "is_cross_attention", None)
    if isinstance(declared, bool):
        return not declared
    return not _OTHERS.intersection(_arguments(module))


def _arguments(attention: nn.Module) -> list[str]:
    """The names of what the host's forward() takes, in order."""
    kind: Any = type(attention).__mro__[1] if is_converted(attention) else type(attention)
    return list(inspect.signature(kind.forward).parameters)[1:]


def _block(path: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """The innermost layer of the model around an attention module, and its path."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
    for name in around:
        if isinstance(modules[name], GradientCheckpointingLayer):
            return modules[name], name
    for name in around:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList):
            return modules[name], name
    raise ValueError(
        f"{path or 'the model'} is a {type(modules[path]).__name__} outside of any layer of its model: pass the model, "
        "or one of its layers."
    )


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        number = getattr(module, name, None)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def _heads(attention: nn.Module) -> int:
    found = _first(attention, _HEADS) or _first(vars(attention)["config"], _HEADS[1:] + _HEADS[:1])
    if found is None:
        raise ValueError(f"{type(attention).__name__} does not say how many heads it has: it is not known.")
    return found


def _width(attention: nn.Module) -> int:
    found = _first(attention, _WIDTHS)
    if found is None:
        raise ValueError(f"{type(attention).__name__} does not say how wide its heads are: it is not known.")
    return found


def _merge(attention: nn.Module, path: str, modules: dict[str, nn.Module], heads: int) -> nn.Module:
    """The module that takes the heads' outputs, concatenated: in the attention, or beside it (BERT)."""
    width = _first(attention, ("v_head_dim",)) or _width(attention)
    # What was wrapped after a conversion, as LoRA does it, need not say how wide it is: it fitted before.
    wrapped = {None} if any(map(is_converted, modules.values())) else set()
    fitting = {heads * width} | wrapped
    for name in _MERGES:
        found = getattr(attention, name, None)
        if isinstance(found, nn.Module) and _takes(found) in fitting:
            return found
    beside = modules.get(f"{path.rpartition('.')[0]}.output.dense".lstrip("."))
    if beside is not None and _takes(beside) in fitting:
        return beside
    raise ValueError(
        f"{path or 'the model'} is a {type(attention).__module__}.{type(attention).__name__} without a projection of "
        f"its {heads} heads of {width} that the library knows ({', '.join(_MERGES)})."
    )


def _takes(module: nn.Module) -> int | None:
    """How wide the inputs of a linear layer are."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return _first(module, ("in_features",))


def _value_source(attention: nn.Module, heads: int, width: int) -> str:
    """The child that puts out the values and nothing that is changed before they are used, or ""."""
    if any(hasattr(attention, name) for name in ("v_norm", "v_sconv", "kv_b_proj")):
        return ""
    for name in _VALUES:
        if isinstance(getattr(attention, name, None), nn.Linear):
            return name
    fused = getattr(attention, "c_attn", None)
    if isinstance(fused, Conv1D) and fused.weight.shape[1] == 3 * heads * width:
        return "c_attn"
    return ""


def _values(projected: Tensor, *, width: int, parts: int) -> Tensor:
    """Values [B, H, N, D] from the output of their projection, [B, N, parts * H * D], where they come last."""
    return projected.chunk(parts, dim=-1)[-1].unflatten(-1, (-1, width)).transpose(1, 2)


def _refuse_unmirrored(attention: nn.Module, path: str) -> None:
    kind: Any = type(attention)
    # After a conversion, what is put around a forward() is put around ours.
    if "forward" in vars(attention) and not is_converted(attention):
        raise ValueError(f"The forward() of {path} was replaced: undo the change, or convert before making it.")
    parameters = inspect.signature(kind.forward).parameters.values()
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not hands_on and set(CACHES).intersection(_arguments(attention)):
        raise ValueError(
            f"{path} is a {kind.__module__}.{kind.__name__}, which takes a cache and hands nothing on to the attention "
            "function: its cached decoding would be wrong."
        )
    if getattr(attention, "attn_logit_softcapping", None) or getattr(attention, "sinks", None) is not None:
        raise ValueError(
            f"{path} is a {kind.__module__}.{kind.__name__}, whose scores are capped, or go partly to a sink: its rows "
            "are not those of softmax(scale Q K^T + mask)."
        )
    if hasattr(attention, "lambda_init"):
        raise ValueError(
            f"{path} is a {kind.__module__}.{kind.__name__}, which subtracts one softmax attention from another: to "
            "twice each of them is not to twice the difference."
        )
