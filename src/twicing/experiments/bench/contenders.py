"""Who is timed: SDPA once and twice, the papers' dense form, plain and compiled, and each backend of ours.

The dense form is arXiv 2503.00687, Algorithm 1, as its released code has it: A is made, and stays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from twicing.names import listed
from twicing.ops.attention import BACKENDS, twicing_attention
from twicing.ops.call import checked_call

# (query, key, value, is_causal) -> output.
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

SDPA = "SDPA"
# Their order 1 is SDPA itself, and the dense form without its correction.
_ORDER_1_IS_NOT_OURS = ("sdpa", "reference")
# What works on one kind of device only is no contender on another.
_DEVICE_OF = {"blocked": "cpu", "triton": "cuda"}
_GPU_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _serves(_query: Tensor, _key: Tensor, _value: Tensor, _is_causal: bool) -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute attention, plain (order 1) or twiced (order 2).

    attend and refuses are functions of modules, or partial ones: other processes are handed them.
    is_baseline: ratios are to the fastest of these. compiles: its first call of a shape calls a compiler.
    refuses: why it cannot serve the arguments of attend(), or None.
    """

    name: str
    order: int
    attend: Attend
    refuses: Callable[[Tensor, Tensor, Tensor, bool], str | None] = _serves
    is_baseline: bool = False
    compiles: bool = False


def all_contenders(device: torch.device) -> dict[str, Contender]:
    """Every contender there is for the device, by name; backends are those that twicing_attention() knows."""
    listing = [Contender(SDPA, 1, _sdpa, is_baseline=True)]
    if device.type == "cuda":
        for name, kernel in _GPU_KERNELS.items():
            listing.append(Contender(f"{SDPA}, {name}", 1, partial(_sdpa_by, kernel), is_baseline=True))
    listing += [
        Contender("two SDPA calls", 2, _two_sdpa_calls),
        Contender("dense", 2, _dense),
        Contender("dense, compiled", 2, _compiled_dense, compiles=True),
    ]
    for backend in BACKENDS:
        if _DEVICE_OF.get(backend, device.type) != device.type:
            continue
        if backend not in _ORDER_1_IS_NOT_OURS and _has_order_1(backend, device):
            listing.append(_ours(backend, order=1))
        listing.append(_ours(backend, order=2))
    return {contender.name: contender for contender in listing}


def chosen_contenders(names: tuple[str, ...], device: torch.device) -> dict[str, Contender]:
    """Those of the given names and the baselines; all where no name is given."""
    known = all_contenders(device)
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown contender {name!r}: {listed(name, known)}")
    return {name: one for name, one in known.items() if not names or one.is_baseline or name in names}


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _sdpa_by(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(query, key, value, is_causal)


def _two_sdpa_calls(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """A (2 V - A V)."""
    return _sdpa(query, key, 2.0 * value - _sdpa(query, key, value, is_causal), is_causal)


def _dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """A V + A (V - A V), all in the inputs' dtype but the softmax, as people write it."""
    scores = (query @ key.mT) / math.sqrt(query.shape[-1])
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    attn = scores.softmax(-1)
    smoothed = attn @ value
    return smoothed + attn @ (value - smoothed)


def _compiled_dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return _compiler_made()(query, key, value, is_causal)


@cache
def _compiler_made() -> Attend:
    # Not at import: torch.compile() alone takes seconds. For each shape: with symbolic sizes it would be slower.
    return torch.compile(_dense, dynamic=False)


def _has_order_1(backend: str, device: torch.device) -> bool:
    sample = torch.zeros(1, 1, 16, 16, device=device)
    return _ours(backend, order=1).refuses(sample, sample, sample, False) is None


def _ours(backend: str, *, order: int) -> Contender:
    name = f"twicing: {backend}" + ("" if order == 2 else f", order {order}")
    return Contender(name, order, partial(_attend_by, backend, order), partial(_refusal_of, backend, order))


def _attend_by(backend: str, order: int, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return twicing_attention(query, key, value, is_causal=is_causal, order=order, backend=backend)


def _refusal_of(backend: str, order: int, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str | None:
    call = checked_call(query, key, value, None, 0.0, is_causal, None, False, order, 1.0)
    return BACKENDS[backend].refuses(call)
