"""Record what the attention layers of a model put out, without changing a bit of what the model computes.

Which tensors, because papers differ: the attention output (heads concatenated, before the projection) and the block
output (after the residual connections and the feed-forward part). A number without its place means nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from twicing.adapters.surgery import AttentionSite, find_sites

ATTENTION_OUTPUT = "attention output"
BLOCK_OUTPUT = "block output"
PLACES = (ATTENTION_OUTPUT, BLOCK_OUTPUT)


class Captured:
    """What capture() recorded: for every place and layer one tensor per forward, in the order of the forwards.

    layers: the layer numbers, counted from 1.
    """

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers
        self._chunks: dict[tuple[str, int], list[Tensor]] = {(where, i): [] for where in PLACES for i in layers}

    def forwards(self, where: str, layer: int) -> list[Tensor]:
        """One tensor per forward, [B, N, C] or what `reduce` made of it. where: "attention output", "block output"."""
        if (where, layer) not in self._chunks:
            raise KeyError(
                f'nothing is captured at "{where}" of layer {layer}: '
                f'there are "{ATTENTION_OUTPUT}" and "{BLOCK_OUTPUT}" of the layers {list(self.layers)}.'
            )
        return self._chunks[where, layer]

    def tensor(self, where: str, layer: int) -> Tensor:
        """All forwards together, concatenated along the batch."""
        return torch.cat(self.forwards(where, layer))

    def _check(self) -> None:
        counts = {key: len(chunks) for key, chunks in self._chunks.items()}
        if not any(counts.values()):
            raise RuntimeError(
                "nothing was captured: run the model itself inside `with capture(model)`. "
                "If it ran, its hooks did not fire, as in a compiled or scripted copy: run the plain one."
            )
        uneven = [f"{where} of layer {layer}: {n}" for (where, layer), n in counts.items() if n != max(counts.values())]
        if uneven:
            raise RuntimeError(
                f"only a part was captured: {max(counts.values())} forwards were seen, but {'; '.join(uneven)}. "
                "They did not run as modules (skipped, compiled, or replaced by a fused path): run the plain model."
            )


def _keep(tokens: Tensor) -> Tensor:
    return tokens


@contextmanager
def capture(model: nn.Module, *, reduce: Callable[[Tensor], Tensor] = _keep) -> Iterator[Captured]:
    """Record every attention layer's outputs while the block runs: `with capture(model) as captured: model(images)`.

    Recorded per layer, [B, N, C] in the model's dtype, detached, on its device: the attention output with the heads
    concatenated, before the projection, and the block output (the first tensor, where a block returns several).
    reduce: called on each tensor as it comes, with autocast off; only a copy of what it returns is kept. Without it
    whole tensors are, and memory grows with every forward.
    Every forward inside appends. A recomputation by activation checkpointing is not a forward and is not recorded.
    Uses forward hooks, removed at the end in any case, and changes no output bit. Not through torch.compile: the plain
    model is what can be looked into.
    Raises ValueError for a model without attention layers that the library knows, or a compiled one; RuntimeError at
    the end where nothing, or not every layer, was captured.
    """
    sites = sites_to_look_into(model)
    captured = Captured(tuple(site.layer for site in sites))
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles += _attach(site, captured, reduce)
        yield captured
    finally:
        for handle in handles:
            handle.remove()
    captured._check()


def _attach(site: AttentionSite, captured: Captured, reduce: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    def record(where: str, tokens: object) -> None:
        if in_backward():
            return
        tokens = tokens[0] if isinstance(tokens, (tuple, list)) else tokens
        if not isinstance(tokens, Tensor):
            raise TypeError(f"the {where} of layer {site.layer} must be a tensor: got {type(tokens).__name__}.")
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            # A copy: the model may write over its own tensor later, and a view would keep the whole of it alive.
            captured.forwards(where, site.layer).append(reduce(tokens.detach()).clone())

    # Hooks that return nothing leave inputs and outputs as they are.
    def before_merge(_module: nn.Module, inputs: tuple[object, ...]) -> None:
        record(ATTENTION_OUTPUT, inputs[0] if inputs else None)

    def after_block(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
        record(BLOCK_OUTPUT, output)

    return [
        site.merge.register_forward_pre_hook(before_merge),
        site.block.register_forward_hook(after_block),
    ]


def in_backward() -> bool:
    """Whether a backward is under way, in which a forward is a recomputation by activation checkpointing.

    It was recorded the first time. torch.utils.checkpoint asks in the same way; there is no public one.
    """
    return torch._C._current_graph_task_id() != -1


def sites_to_look_into(model: nn.Module) -> list[AttentionSite]:
    """The attention layers of a model whose hooks will fire.

    Raises ValueError where there are none that the library knows, or where a part is compiled or scripted.
    """
    _refuse_compiled(model)
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            f"no attention layers were found in {type(model).__name__}, so there is nothing to capture: "
            "twicing.describe(model) says what the library sees of a model."
        )
    return sites


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"a scripted model cannot be looked into: {name or 'the model'} is one. Pass the plain one."
            )
        # A compiled graph may have been traced without the hooks, or keep recording after they are removed.
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"a compiled model cannot be looked into: {name or 'the model'} is one. "
                "Capture the plain model (model._orig_mod of torch.compile's), which computes the same."
            )
