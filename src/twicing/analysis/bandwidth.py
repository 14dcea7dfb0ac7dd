"""The bandwidth test: what a model still answers when all its attention logits are scaled at inference.

softmax(f Q K^T / sqrt(D)): a small f is a wide kernel, a large one a narrow kernel. Remark 2 of arXiv 2503.00687 says
that twicing is less sensitive to the bandwidth; how to test that is our reading.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from twicing.adapters.site import is_converted, mechanism_of
from twicing.adapters.surgery import convert
from twicing.analysis.capture import sites_to_look_into

# From half to double in equal ratios, 1 in the middle.
FACTORS = tuple(2 ** (step / 4) for step in range(-4, 5))


@contextmanager
def scaled_logits(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the attention logits of every layer by a factor while the block runs; the mask is not scaled.

    Every mechanism is handed its queries times the factor, so that none can overlook it. Layers that are not converted
    become "standard" for as long: the same numbers. Afterwards the model is what it was, bit for bit, whatever
    happened; with factor 1 nothing is touched at all.
    Raises ValueError for a factor that is not a positive number, or a model without attention layers that the library
    knows.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"logits are scaled by a positive number: got {factor}.")
    sites = sites_to_look_into(model)
    if factor == 1:
        yield
        return

    def scale_query(
        _mechanism: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "query" in kwargs:
            return args, {**kwargs, "query": factor * kwargs["query"]}
        return (factor * args[0], *args[1:]), kwargs

    own = [site.layer for site in sites if not is_converted(site.attention)]
    conversion = convert(model, "standard", layers=own) if own else None
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            mechanism = mechanism_of(site.attention)
            handles.append(mechanism.register_forward_pre_hook(scale_query, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        if conversion is not None:
            conversion.undo()


def answers_by_factor(
    model: nn.Module,
    inputs: Tensor,
    factors: Sequence[float] = FACTORS,
    *,
    batch_size: int = 64,
    passed: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """What the model answers for each input with its logits scaled by each factor, [factors, inputs], on the CPU.

    The class, or the next word, of the largest score. inputs: [n, ...], what the model takes, which gives scores [b, V]
    of them; in eval mode. passed: told after each batch how many inputs.
    Raises ValueError for a model in training mode or no inputs, and what scaled_logits() raises.
    """
    return _by_factor(model, inputs, factors, batch_size, passed, lambda scores, _places: scores.argmax(-1))


def log_probabilities_by_factor(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    factors: Sequence[float] = FACTORS,
    *,
    batch_size: int = 64,
    passed: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """log p(target) in nats with the logits scaled by each factor, [factors, inputs], float64, on the CPU.

    targets: [n], whole numbers: the class of each input, or the word that comes next. Else as answers_by_factor().
    """
    if len(targets) != len(inputs):
        raise ValueError(f"it takes a target for each of the {len(inputs)} inputs: got {len(targets)}.")

    def read(scores: Tensor, places: slice) -> Tensor:
        wanted = targets[places].to(scores.device)
        return -F.cross_entropy(scores.float(), wanted, reduction="none").double()

    return _by_factor(model, inputs, factors, batch_size, passed, read)


@torch.no_grad()
def _by_factor(
    model: nn.Module,
    inputs: Tensor,
    factors: Sequence[float],
    batch_size: int,
    passed: Callable[[int], None],
    read: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """What `read` makes of the scores of the inputs at these places, [factors, inputs]."""
    if model.training:
        raise ValueError("the model must be in eval mode, as dropout would change the answers: call model.eval().")
    if len(inputs) == 0 or batch_size < 1:
        raise ValueError(f"it takes an input and a batch_size of 1 or more: got {len(inputs)} inputs and {batch_size}.")
    found = []
    for factor in factors:
        with scaled_logits(model, factor):
            read_off = []
            for start in range(0, len(inputs), batch_size):
                places = slice(start, min(start + batch_size, len(inputs)))
                read_off.append(read(model(inputs[places]), places).cpu())
                passed(places.stop - start)
            found.append(torch.cat(read_off))
    return torch.stack(found)
