"""How values of one layer reach later layers of the same forward pass: they travel with the tokens.

A block leaves what later layers will read on the tensor that it puts out, and the next block finds it on the tensor
that comes in. So nothing of a forward pass lies on the model: several may be under way, in several threads, and a
checkpoint's recomputation is handed the very tensor, and with it the context, of its own forward. Where a tensor comes
in without one (re-entrant checkpointing hands in a detached one), reading is refused.
"""

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twicing.adapters.site import AttentionSite
from twicing.mechanisms.context import Context

# The attribute of a tensor that carries the context, the one by which modules know their part, and the one in which
# blocks of transformers keep how they are checkpointed.
_CARRIED = "_twicing_context"
_TAP = "twicing_tap"
_CHECKPOINT = "_gradient_checkpointing_func"

# Why a layer cannot read what earlier ones left, after which layer it is.
_OUTSIDE = (
    "was run outside its block, where the values of earlier layers cannot be found: run the model, or its blocks one "
    "after another, and checkpoint whole blocks."
)
_LOST = (
    "are not the tensor that the layer before put out, so that the values of earlier layers cannot be found. "
    "Re-entrant activation checkpointing does that (use use_reentrant=False), as do checkpoints within checkpoints, "
    "hooks that replace saved tensors or outputs, wrappers that return another tensor, and running a layer by itself."
)
_WITHOUT_GRADIENTS = (
    "was computed with gradients switched off, though the tokens have gradients: under re-entrant activation "
    "checkpointing they would be wrong. Use use_reentrant=False."
)
_REPLACED = (
    "was replaced after the conversion, and later layers read its values: undo the conversion, and convert again."
)


@dataclass(frozen=True, eq=False)
class Tap:
    """What one layer has to do for the layers that read. Its block, its attention if it reads, and the module that
    its values come from, if they are read, know it.

    model: marks the layers that were numbered together; copies of a model share it.
    layer, path, value_source, read_values: as in the AttentionSite; attention: its path within the block.
    readers: for each layer that reads and is not before this one, the layers whose values it reads.
    """

    model: str
    layer: int
    path: str
    readers: Mapping[int, tuple[int, ...]]
    attention: str
    value_source: str
    read_values: Callable[[Tensor], Tensor]

    @property
    def leads_on(self) -> bool:
        """Whether a later layer reads anything."""
        return any(reader > self.layer for reader in self.readers)

    @property
    def keeps(self) -> list[int]:
        """The layers whose values are still to be read after this one."""
        return [layer for reader, layers in self.readers.items() if reader > self.layer for layer in layers]


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A block's checkpointing function, host, around a forward() that is recomputed with the context of its tokens.

    transformers 5.23 checkpoints the forward() of a block and not its call: a recomputation passes the hooks by.
    """

    host: Callable[..., Any]
    tap: Tap

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.host(partial(_recomputed, self.tap, forward), *args, **kwargs)


def tap_of(module: nn.Module) -> Tap | None:
    """What a module has to do for layers that read, or None."""
    return vars(module).get(_TAP)


def refuse_other_numbering(sites: Sequence[AttentionSite], readers: Collection[int]) -> None:
    """Raise where a layer that is needed was numbered otherwise before, as part of a larger or smaller model."""
    for site in sites[: max(readers, default=0)]:
        tap = tap_of(site.block)
        if tap is not None and tap.layer != site.layer:
            raise ValueError(
                f"{site.path} is layer {site.layer} here, but was layer {tap.layer} when a mechanism that reads other "
                "layers was put in: convert the same model as then, or undo that conversion first."
            )


def refuse_unreadable(sites: Sequence[AttentionSite], readers: Mapping[int, tuple[int, ...]]) -> None:
    """Raise where a layer is to be read whose host has no module that puts out its values."""
    for reader, layers in readers.items():
        for site in (sites[layer - 1] for layer in layers):
            if not site.value_source:
                raise ValueError(
                    f"Layer {reader} would read the values of layer {site.layer} ({site.path}: "
                    f"{type(site.attention).__name__}), which has no child of its own that puts them out: this host "
                    "serves only mechanisms that read no other layer."
                )


def connect(sites: Sequence[AttentionSite], readers: Mapping[int, tuple[int, ...]]) -> None:
    """Arrange that each reader, by its layer number, finds the values of the layers that it reads."""
    needed = sites[: max(readers, default=0)]
    # Layers that are connected already stay so, under the same mark.
    marks = [tap.model for site in needed if (tap := tap_of(site.block)) is not None]
    mark = marks[0] if marks else uuid.uuid4().hex
    for site in needed:
        before = tap_of(site.block)
        later = {layer: reads for layer, reads in readers.items() if layer >= site.layer}
        tap = Tap(
            model=mark,
            layer=site.layer,
            path=site.path,
            readers={**(before.readers if before else {}), **later},
            attention=next(name for name, module in site.block.named_modules() if module is site.attention),
            value_source=site.value_source,
            read_values=site.read_values,
        )
        vars(site.block)[_TAP] = tap
        if before is None:
            # Before a hook that changes what comes in; what goes out is marked after hooks that are there by now.
            site.block.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
            site.block.register_forward_hook(_leave, always_call=True)
        if site.layer in tap.readers:
            vars(site.attention)[_TAP] = tap
        if site.layer in tap.keeps:
            source = site.attention.get_submodule(site.value_source)
            vars(source)[_TAP] = tap
            if not _has(source._forward_hooks, _record):
                source.register_forward_hook(_record)


def refuse_part(converted: Iterable[nn.Module], modules: Iterable[nn.Module], name: str) -> None:
    """Raise where these attention modules read layers that are not among the modules: they could not be let go."""
    taps = [_tap(module) for module in modules if _is_block(module)]
    blocks = Counter((tap.model, reader) for tap in taps for reader in tap.readers)
    for attention in converted:
        tap = tap_of(attention)
        if tap is not None and blocks[tap.model, tap.layer] < tap.layer:
            raise ValueError(
                f"{name} is only a part of a model whose layer {tap.layer} reads values of earlier layers: undo the "
                "whole model, or use the undo() of the conversion."
            )


def disconnect(converted: Iterable[nn.Module], modules: Iterable[nn.Module]) -> None:
    """Let go of what only these attention modules read; modules: all those of their model."""
    gone = {(tap.model, tap.layer) for attention in converted if (tap := tap_of(attention)) is not None}
    for module in list(modules):
        tap = tap_of(module)
        if tap is None:
            continue
        left = replace(tap, readers={r: reads for r, reads in tap.readers.items() if (tap.model, r) not in gone})
        if _is_block(module):
            _set(module, left if left.readers else None)
        elif _has(module._forward_hooks, _record):
            _set(module, left if left.layer in left.keeps else None)
        else:
            _set(module, left if left.layer in left.readers else None)


def context_of(attention: nn.Module) -> Context | None:
    """The context for the mechanism of a converted attention that is being run, or None where it needs none."""
    tap = getattr(attention, _TAP, None)
    if tap is None:
        return None
    layer, context = _open().get(tap.model, (None, None))
    if context is None or layer != tap.layer:
        return Context(broken=f"The attention of layer {tap.layer} ({tap.path}) {_OUTSIDE}")
    return context


def read_by(block: nn.Module) -> str:
    """Which later layers read the values of this block's layer, for a line that describes it; "" where none does."""
    tap = tap_of(block)
    readers = [] if tap is None else sorted(r for r, reads in tap.readers.items() if tap.layer in reads)
    return f", values read by {layers_in_words(readers)}" if readers else ""


def layers_in_words(numbers: Sequence[int]) -> str:
    """ "layer 3", "layers 2, 3", or "layers 2-12" for a run of more than two."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]}-{numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"


_here = threading.local()


def _open() -> dict[str, tuple[int, Context]]:
    """By model, the layer that is being run in this thread, and its context."""
    contexts: dict[str, tuple[int, Context]] | None = getattr(_here, "contexts", None)
    if contexts is None:
        contexts = _here.contexts = {}
    return contexts


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tap = _tap(block)
    context = _came_in(tap, _tokens(args, kwargs))
    source = f"{tap.attention}.{tap.value_source}"
    if tap.layer in tap.keeps and not _has(block.get_submodule(source)._forward_hooks, _record):
        context.broken = f"{tap.value_source} of layer {tap.layer} ({tap.path}) {_REPLACED}"
    _open()[tap.model] = tap.layer, context
    # Checkpointing may have been switched on, or changed, since the conversion.
    host = vars(block).get(_CHECKPOINT)
    if host is not None and not (isinstance(host, _Checkpoint) and host.tap is tap):
        setattr(block, _CHECKPOINT, _Checkpoint(_without_context(host), tap))


def _leave(block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    tap = _tap(block)
    # Also after an exception, or where a pre-hook raised before _enter() ran.
    opened = _open().pop(tap.model, None)
    tokens = _tokens(output if isinstance(output, (tuple, list)) else (output,), {})
    if opened is not None and tokens is not None and tap.leads_on:
        setattr(tokens, _CARRIED, opened[1].only(tap.keeps))


def _recomputed(tap: Tap, forward: Callable[..., Any], *args: Any) -> Any:
    """What forward() returns; where the block's hooks did not run before it, with the context of its tokens."""
    contexts = _open()
    if tap.model in contexts:
        return forward(*args)
    # The host binds what it passes by keyword.
    contexts[tap.model] = tap.layer, _came_in(tap, _tokens(args, getattr(forward, "keywords", {})))
    try:
        return forward(*args)
    finally:
        contexts.pop(tap.model, None)


def _without_context(checkpoint: Any) -> Any:
    return checkpoint.host if isinstance(checkpoint, _Checkpoint) else checkpoint


def _record(source: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    tap = _tap(source)
    layer, context = _open().get(tap.model, (None, None))
    if context is not None and layer == tap.layer:
        context.record(tap.layer, tap.read_values(output))


def _came_in(tap: Tap, tokens: Tensor | None) -> Context:
    """The context of a layer whose tokens these are."""
    return Context() if tap.layer == 1 else _arrived(tap, tokens)


def _arrived(tap: Tap, tokens: Tensor | None) -> Context:
    """The context that came in with the tokens, as this layer may use it."""
    carried = None if tokens is None else getattr(tokens, _CARRIED, None)
    if carried is None and tokens is not None and not torch.compiler.is_compiling() and tokens._is_view():
        # Backward hooks, and sharded training, hand on a view of the whole.
        base = tokens._base
        carried = getattr(base, _CARRIED, None) if base is not None and base.shape == tokens.shape else None
    if not isinstance(carried, Context):
        return Context(broken=f"The tokens that came into layer {tap.layer} ({tap.path}) {_LOST}")
    context = carried.copy()
    if context.without_grad and tokens is not None and tokens.requires_grad and not tokens.is_leaf:
        context.broken = f"What layer {tap.layer} ({tap.path}) reads of earlier layers {_WITHOUT_GRADIENTS}"
    elif torch.is_grad_enabled():
        # Gradients begin here, for the tokens as for what they carry: it was meant so.
        context.without_grad = False
    return context


def _tap(module: nn.Module) -> Tap:
    tap: Tap = getattr(module, _TAP)
    return tap


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor, which is where hosts have the tokens."""
    return next((entry for entry in (*args, *kwargs.values()) if isinstance(entry, Tensor)), None)


def _is_block(module: nn.Module) -> bool:
    return _has(module._forward_pre_hooks, _enter)


def _has(hooks: Mapping[int, Callable[..., Any]], hook: Callable[..., Any]) -> bool:
    # By the function, since a copy of a module has other numbers, or none of the handles, of its hooks.
    return any(entry is hook for entry in hooks.values())


def _set(module: nn.Module, tap: Tap | None) -> None:
    """Give the module its new part, or take the part and its hooks away."""
    if tap is not None:
        vars(module)[_TAP] = tap
        return
    del vars(module)[_TAP]
    if _CHECKPOINT in vars(module):
        setattr(module, _CHECKPOINT, _without_context(vars(module)[_CHECKPOINT]))
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    ):
        for number in [number for number, hook in hooks.items() if hook in (_enter, _leave, _record)]:
            del hooks[number]
            flags.pop(number, None)
