"""The public call: Twicing Attention with the arguments of scaled_dot_product_attention, and the choice of a backend.

arXiv 2503.00687, Definition 2 and equations 18-19.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.names import listed
from twicing.ops import blocked, reference, sdpa, triton
from twicing.ops.call import Call, check_gain_is_used, checked_call
from twicing.ops.flop_counts import register_where_counted


class Backend(Protocol):
    """One way to compute a call. A backend that cannot serve a call says why, and what to use."""

    ABOUT: str

    def refuses(self, call: Call, /) -> str | None:
        """Why it cannot serve the call, or None."""

    def run(self, call: Call, /) -> Tensor:
        """The result, [..., H, N, Dv], in the query's dtype."""


# A new backend is one file and one line here. "auto" takes the first that does not refuse, and `blocked` before that
# where a record says that it is faster, forward and with the backward; a test holds these constants against the record.
# `triton` stands behind `reference`, which refuses nothing, and so is taken by name only, until a record says more.
BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "reference": reference, "blocked": blocked, "triton": triton}
BLOCKED_RECORD = "benchmarks/results/ops-cpu-2-threads-float32.csv"
# Of one thread there is a record beside it, which says the same.
BLOCKED_MOST_THREADS = 2
BLOCKED_LEAST_HEADS = 8
BLOCKED_LEAST_WIDTH = 16
BLOCKED_TOKENS = {"full": (197, 4096), "causal": (512, 4096)}


def twicing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Twicing attention, U = A V + g A (V - A V), A = softmax(scale Q K^T + mask).

    A drop-in for torch.nn.functional.scaled_dot_product_attention ("SDPA"): the same names, shapes and meaning.

    query, key: [..., H, N, D]; value: [..., H, N, Dv]. N is the same for all three unless order is 1.
    attn_mask: broadcasts to [..., H, N, N]; bool (True = attend) or float (added to the scores). Gradients reach a
        float mask. A query that may attend to nothing gets zero, and disturbs no other.
    dropout_p: the share of the weights in A that is dropped, always (as in SDPA); all passes share one dropped A.
    enable_gqa: key and value have fewer heads, a divisor of H.
    order: how many times to smooth: the degree of the polynomial in A, I - (I - A)(I - g A)^(order - 1). 2 is twicing;
        1 is the SDPA call itself, bit for bit.
    gain: g, a finite number, or a tensor of one element or [H], H the query heads, with a gradient. 1 is the paper's,
        0 is standard attention; in [0, 1] every eigenvalue of A that lies in [0, 1] stays there.
    backend: how, never what: "sdpa", "reference", "blocked" (CPU, order 2), "triton" (GPU, orders 1 and 2), or "auto":
        "blocked" where a record says that it is faster (fp32 on one or two threads of the CPU, several heads, hundreds
        to thousands of tokens), else "sdpa" where it serves the call, else "reference" (see explain_backend()). One
        that is asked for by name and cannot serve the call raises.
    Returns U, [..., H, N, Dv], in the query's dtype (autocast's under autocast); half precision accumulates in fp32.
    Raises ValueError or TypeError, saying what was expected and what came.
    Source: arXiv 2503.00687, Definition 2 and Algorithm 1.
    """
    check_gain_is_used(order, gain)
    if _is_plain_sdpa(order, backend):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    call = checked_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, order, gain)
    if not torch.compiler.is_compiling():
        register_where_counted()
    return BACKENDS[_chosen(backend, call)].run(call)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
    backend: str = "auto",
) -> str:
    """What twicing_attention() would do with the same arguments, in words: the backend it takes, and why no other.

    Computes nothing. Raises as twicing_attention() does where the arguments do not fit.
    """
    check_gain_is_used(order, gain)
    if _is_plain_sdpa(order, backend):
        return f"backend={backend!r} with order=1 is torch.nn.functional.scaled_dot_product_attention itself."
    call = checked_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, order, gain)
    chosen = _chosen(backend, call)
    why = "as asked for"
    if backend == "auto":
        on_record = f"faster than 'sdpa' for such a call on record ({BLOCKED_RECORD})"
        why = on_record if chosen == "blocked" else "the first that serves this call"
    lines = [f"backend={backend!r} takes {chosen!r}, {why}: {BACKENDS[chosen].ABOUT}."]
    for name, other in BACKENDS.items():
        reason = other.refuses(call)
        if name != chosen:
            lines.append(f"not {name!r}: {reason or f'it would serve too: {other.ABOUT}.'}")
    return "\n".join(lines)


def _is_plain_sdpa(order: int, backend: str) -> bool:
    """Whether the call goes to SDPA untouched and unchecked, so that order 1 takes whatever SDPA takes."""
    return order == 1 and backend in ("auto", "sdpa")


def _is_blocked_faster(call: Call) -> bool:
    """Whether the record of the CPU says so, or speaks of shorter and longer sequences for which it is so."""
    *others, tokens, width = call.query.shape
    fewest, most = BLOCKED_TOKENS["causal" if call.is_causal else "full"]
    return (
        # An exported program should need nothing but PyTorch's own operators, and serve sizes that none of these do.
        not torch.compiler.is_exporting()
        and call.query.device.type == "cpu"
        and call.query.dtype == torch.float32
        and call.attn_mask is None
        and call.dropout_p == 0.0
        and width >= BLOCKED_LEAST_WIDTH
        and math.prod(others) >= BLOCKED_LEAST_HEADS
        and fewest <= tokens <= most
        and _settings_allow_blocked()
    )


def _settings_allow_blocked() -> bool:
    """Whether torch uses no more threads than the record is of, and nobody chose how SDPA computes.

    sdpa_kernel(SDPBackend.MATH), as a second derivative needs it, turns the fused kernel off: then SDPA is wanted.
    """
    return torch.get_num_threads() <= BLOCKED_MOST_THREADS and torch.backends.cuda.flash_sdp_enabled()


# A compiler cannot trace these questions: it asks once, while it compiles. This is all that the public
# torch.compiler.assume_constant_result() does, but that loads the compiler wherever twicing is imported.
_settings_allow_blocked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _chosen(backend: str, call: Call) -> str:
    """The name of the backend that serves the call."""
    if backend == "auto":
        if _is_blocked_faster(call) and blocked.refuses(call) is None:
            return "blocked"
        return next(name for name, candidate in BACKENDS.items() if candidate.refuses(call) is None)
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: {listed(backend, ['auto', *BACKENDS])}")
    reason = BACKENDS[backend].refuses(call)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}")
    return backend
