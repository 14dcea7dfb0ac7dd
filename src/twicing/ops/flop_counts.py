"""What PyTorch's FLOP counter (torch.utils.flop_counter) is told of our operators, which it cannot look into.

Two operations per multiply-add. Counted is what the algebra needs with A made once in each pass, as PyTorch counts its
own fused attention: units of N^2 D, 3 forward and 7 backward (2 and 5 for order 1), all of A where half is masked too.
What a kernel makes again to save memory is not counted.
"""

import sys
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = tuple[int, ...]


def register_where_counted() -> None:
    """Tell the counter our formulas, once it was imported. It imports triton, and so it is not imported here."""
    counter = sys.modules.get(_COUNTER)
    operators = torch.ops.twicing
    if counter is None or operators.blocked_forward in counter.flop_registry:
        return
    counter.register_flop_formula(operators.blocked_forward)(_blocked_forward)
    counter.register_flop_formula(operators.blocked_backward)(_blocked_backward)
    counter.register_flop_formula(operators.triton_forward)(_triton_forward)
    counter.register_flop_formula(operators.triton_backward)(_triton_backward)


def _blocked_forward(query: Shape, _key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return _forward(query, value, 2)


def _blocked_backward(*inputs: Any, **_: Any) -> int:
    # The upstream gradient and four that the forward kept come first.
    query, _, value = inputs[5:8]
    return _backward(query, value, 2)


def _triton_forward(query: Shape, _key: Shape, value: Shape, *options: Any, **_: Any) -> int:
    # The last one is is_training.
    return _forward(query, value, options[-2])


def _triton_backward(*inputs: Any, **_: Any) -> int:
    query, _, value = inputs[4:7]
    return _backward(query, value, inputs[-1])


def _forward(query: Shape, value: Shape, order: int) -> int:
    """Q K^T, and A times values as often as the order says."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens**2 * (width + order * value[-1])


def _backward(query: Shape, value: Shape, order: int) -> int:
    """Q K^T, dS K and dS^T Q; A^T G and G V^T or G R^T; for order 2 also A^T dR and dR V^T."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens**2 * (3 * width + 2 * order * value[-1])
