"""Multiply-adds of one forward, which the papers call FLOPs: every weight matrix, and attention by its algebra.

Attention is counted from its sites: PyTorch's counter gives fused attention nothing on the CPU.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twicing.adapters.site import AttentionSite, is_converted, mechanism_of
from twicing.adapters.surgery import find_sites


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of model(images), by linear layers, convolutions, and the products in attention.

    Attention of N tokens and H heads of width D takes (1 + m) N^2 H D: the scores, and m products of A with values; m
    is 1 for the host's own attention, and the order for twicing, where A is kept. Norms, softmax and sums are left out.
    Raises ValueError for a mechanism that has no order to count by.
    """
    counts: list[int] = []
    hooks = [
        module.register_forward_hook(partial(_count_weights, counts))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    for site in find_sites(model):
        hooks.append(site.merge.register_forward_pre_hook(partial(_count_attention, counts, site)))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


def _count_weights(counts: list[int], layer: nn.Module, _inputs: Any, output: Tensor) -> None:
    # One number of the output is a sum over all weights that belong to its channel.
    counts.append(output.numel() * layer.get_parameter("weight")[0].numel())


def _count_attention(counts: list[int], site: AttentionSite, _merge: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    batch, tokens, _ = inputs[0].shape
    counts.append((1 + _order(site)) * batch * tokens**2 * site.num_heads * site.head_dim)


def _order(site: AttentionSite) -> int:
    if not is_converted(site.attention):
        return 1
    order = getattr(mechanism_of(site.attention), "order", None)
    if not isinstance(order, int):
        raise ValueError(f"{site.converted!r} has no order, by which its products could be counted ({site}).")
    return order
