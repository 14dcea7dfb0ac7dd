"""Correctness before time: a contender's output and gradients against fp64, inside the budget of an honest reference.

It runs on the whole shape that is timed; heads do not see one another, so that a few of them can be checked alone.
"""

import torch
from torch import Tensor

from twicing.experiments.bench.cases import Case
from twicing.experiments.bench.contenders import Attend, Contender
from twicing.ops.attention import twicing_attention
from twicing.testing import relative_rms, truth
from twicing.testing.budget import FP64_BUDGET

# The forward without a graph is timed too, and may be another program.
NAMES = ("output without a graph", "output", "gradient of query", "gradient of key", "gradient of value")
# The dense fp64 matrices of the checked heads; about six of them live at once in a backward.
MATRIX_BYTES = 256 << 20
# One head's fp64 matrix of more tokens is 8 GiB and more.
MOST_TOKENS = 32768


def refuse_uncheckable(case: Case) -> None:
    """Raise where there can be no truth to hold the contenders against."""
    if case.tokens < 2:
        raise ValueError(
            f"{case} cannot be checked: one token attends to itself alone, so that the query's gradient is zero and "
            "has no relative error. Choose two tokens or more."
        )
    if case.tokens > MOST_TOKENS:
        raise ValueError(
            f"{case} cannot be checked: fp64 attention of more than {MOST_TOKENS} tokens does not fit into memory, "
            "and nothing is timed that was not checked. Choose fewer tokens."
        )


class Gate:
    """What the contenders of one case are held against; the fp64 truth is made once for each order."""

    def __init__(self, case: Case):
        refuse_uncheckable(case)
        self._case = case
        self._heads = _checked_heads(case)
        self._inputs, self._upstream = case.inputs(needs_grad=True), case.upstream()
        self._expected: dict[int, list[Tensor]] = {}
        self._budgets: dict[int, list[float]] = {}

    def complaint(self, contender: Contender) -> str | None:
        """Why the contender gets no time, or None where it is right. Whatever it raises is a complaint too."""
        case = self._case
        refused = contender.refuses(*self._inputs, case.is_causal)
        if refused is not None:
            return f"skipped: {refused}"
        if contender.order not in self._expected:
            self._prepare(contender.order)
        try:
            found = _outputs_and_gradients(contender.attend, self._inputs, self._upstream, case.is_causal)
        except Exception as error:  # a compiler or a driver that fails, or memory that does not suffice
            return f"failed: {first_line(error)}"
        for name, tensor, expected, budget in zip(
            NAMES, found, self._expected[contender.order], self._budgets[contender.order], strict=True
        ):
            off = relative_rms(self._checked(tensor), expected)
            # Not `off > budget`, which NaN would pass.
            if not off <= budget:
                return f"wrong: {name} off by {off:.1e} (relative RMS), the budget is {budget:.1e}"
        return None

    def _prepare(self, order: int) -> None:
        inputs = tuple(self._checked(tensor).requires_grad_() for tensor in self._inputs)
        in_fp64 = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        upstream = self._checked(self._upstream)

        def exactly(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
            return truth(query, key, value, is_causal=is_causal, order=order)

        def honestly(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
            return twicing_attention(query, key, value, is_causal=is_causal, order=order, backend="reference")

        expected = _outputs_and_gradients(exactly, in_fp64, upstream.double(), self._case.is_causal)
        honest = _outputs_and_gradients(honestly, inputs, upstream, self._case.is_causal)
        self._expected[order] = expected
        exact = self._case.dtype == torch.float64
        self._budgets[order] = [
            FP64_BUDGET if exact else 2.0 * relative_rms(one, other)
            for one, other in zip(honest, expected, strict=True)
        ]

    def _checked(self, tensor: Tensor) -> Tensor:
        """The heads that are checked, [heads, N, D]."""
        return tensor.detach().flatten(0, 1)[self._heads]


def first_line(error: Exception) -> str:
    """What happened, in one line: compilers and drivers write pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _checked_heads(case: Case) -> Tensor:
    """As many heads as fit, evenly spread from the first of the first batch entry to the last of the last."""
    total = case.batch * case.heads
    fitting = max(1, MATRIX_BYTES // (8 * case.tokens**2))
    if fitting == 1:
        return torch.tensor([total - 1])
    return torch.linspace(0, total - 1, min(total, fitting)).round().long()


def _outputs_and_gradients(
    attend: Attend, inputs: tuple[Tensor, ...], upstream: Tensor, is_causal: bool
) -> list[Tensor]:
    query, key, value = inputs
    with torch.no_grad():
        inference = attend(query.detach(), key.detach(), value.detach(), is_causal)
    output = attend(query, key, value, is_causal)
    gradients = torch.autograd.grad(output, inputs, upstream.reshape(output.shape))
    return [inference, output, *gradients]
