"""The checks of soundness, one function each: what any attention mechanism must do before its results mean anything.

They look for the mistakes that give plausible results: masks that are ignored, a look into the future, tensors kept
from one forward to the next, a formula that is nearly the one claimed.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from twicing.ops.reference import attention_matrix
from twicing.testing.budget import FP64_BUDGET, WRONG_FORMULAS, Formula, make_inputs, relative_rms

Factory = Callable[[int, int, int], nn.Module]

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 7, 4
# Two ways to compute the same in fp64 differ by far less, two different things by far more.
SAME = 1e-10


class UnsoundError(Exception):
    """What a check saw, as a sentence."""


@dataclass(frozen=True)
class Subject:
    """The mechanism under test."""

    factory: Factory
    formula: Formula | None
    causal: bool

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new instance for layer 1, with the same initial weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mechanism = self.factory(1, HEADS, WIDTH).to(dtype)
        if dtype == torch.float64:
            # A mechanism may keep what it learns in fp32; exactness cannot be asked of it there.
            for parameter in mechanism.parameters():
                parameter.data = parameter.data.double()
        return mechanism

    def inputs(self, seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key and value."""
        generator = torch.Generator().manual_seed(seed)
        return list(make_inputs((BATCH, HEADS, tokens, WIDTH), generator=generator, peaked=True, dtype=dtype))


def run(
    mechanism: nn.Module,
    inputs: Sequence[Tensor],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """One forward as the adapters call it, without dropout, grouped heads or other layers."""
    output: Tensor = mechanism(
        *inputs, attn_mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=0.0, enable_gqa=False, context=None
    )
    return output


def _expect_same(seen: Tensor, expected: Tensor, complaint: str) -> None:
    if not seen.isfinite().all():
        raise UnsoundError(f"{complaint} (the output is not finite)")
    off = relative_rms(seen, expected)
    if off > SAME:
        raise UnsoundError(f"{complaint} (relative RMS {off:.1e})")


def _shape_and_dtype(subject: Subject) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = subject.inputs(dtype=dtype)
        output = run(subject.build(dtype), inputs)
        if output.shape != inputs[2].shape or output.dtype != dtype:
            raise UnsoundError(
                f"expected {dtype} of shape {list(inputs[2].shape)}, got {output.dtype} of shape {list(output.shape)}"
            )
        if not output.isfinite().all():
            raise UnsoundError(f"the output in {dtype} is not finite")


def _masks(subject: Subject) -> None:
    """Masked keys must have no influence: the other tokens see what they see when the masked ones are absent."""
    inputs, mechanism = subject.inputs(), subject.build()
    kept = torch.tensor([True, True, False, True, True, False, True])
    expected = run(mechanism, [tensor[:, :, kept] for tensor in inputs])
    additive = torch.zeros(TOKENS, dtype=torch.float64).masked_fill(~kept, float("-inf"))
    for kind, mask in (("bool", kept), ("float", additive)):
        for shape in ((1, 1, 1, TOKENS), (1, 1, TOKENS, TOKENS)):
            seen = run(mechanism, inputs, attn_mask=mask.expand(shape))[:, :, kept]
            _expect_same(
                seen, expected, f"a {kind} mask {list(shape)} does not act as if the masked tokens were absent"
            )


def _empty_rows(subject: Subject) -> None:
    """A token that attends to nothing, and is attended to by none, must not disturb the others, nor any gradient."""
    inputs, mechanism = [tensor.requires_grad_() for tensor in subject.inputs()], subject.build()
    alone = 2
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[alone, :] = mask[:, alone] = False
    others = torch.arange(TOKENS) != alone
    expected = run(mechanism, [tensor[:, :, others] for tensor in inputs])
    additive = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    for kind, given in (("bool", mask), ("float", additive)):
        output = run(mechanism, inputs, attn_mask=given)
        _expect_same(output[:, :, others], expected, f"an empty row of a {kind} mask disturbs the other tokens")
        if not output.isfinite().all():
            raise UnsoundError(f"the output for an empty row of a {kind} mask is not finite")
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise UnsoundError(f"an empty row of a {kind} mask makes gradients that are not finite")


def _causality(subject: Subject) -> None:
    inputs, mechanism = subject.inputs(), subject.build()
    past = 4
    causal_mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    expected = run(mechanism, [tensor[:, :, :past] for tensor in inputs], is_causal=True)
    seen = run(mechanism, inputs, is_causal=True)
    _expect_same(seen[:, :, :past], expected, "with is_causal, tokens depend on later ones")
    _expect_same(run(mechanism, inputs, attn_mask=causal_mask), seen, "a causal attn_mask and is_causal do not agree")


def _permutation(subject: Subject) -> None:
    inputs, mechanism = subject.inputs(), subject.build()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    seen = run(mechanism, [tensor[:, :, order] for tensor in inputs])
    _expect_same(seen, run(mechanism, inputs)[:, :, order], "permuting the tokens does not permute the outputs")


def _gradients(subject: Subject) -> None:
    mechanism = subject.build()
    inputs = [tensor[:1, :, :4].contiguous().requires_grad_() for tensor in subject.inputs()]
    learnt = [parameter for parameter in mechanism.parameters() if parameter.requires_grad]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    for kind, attn_mask in (("without a mask", None), ("with a mask", mask)):

        def output(*tensors: Tensor, attn_mask: Tensor | None = attn_mask) -> Tensor:
            return run(mechanism, tensors[:3], attn_mask=attn_mask)

        try:
            # The parameters are named too: gradcheck moves them in place.
            torch.autograd.gradcheck(output, (*inputs, *learnt))
        except RuntimeError as error:
            raise UnsoundError(
                f"{kind}, derivatives differ from numerical ones: {str(error).splitlines()[0]}"
            ) from error


def _determinism(subject: Subject) -> None:
    inputs, mechanism = subject.inputs(dtype=torch.float32), subject.build(torch.float32)
    if not torch.equal(run(mechanism, inputs), run(mechanism, inputs)):
        raise UnsoundError("the same forward twice gives different bits")


def _memory(subject: Subject) -> None:
    """What one forward saw must not show in the next, nor in a backward that comes later."""
    mechanism = subject.build()
    first, second = subject.inputs(seed=1), subject.inputs(seed=2)
    expected = [run(subject.build(), inputs) for inputs in (first, second)]
    value = first[2].requires_grad_()
    (expected_gradient,) = torch.autograd.grad(run(subject.build(), first).square().sum(), value)
    run(mechanism, subject.inputs(seed=3, tokens=TOKENS - 2))
    outputs = [run(mechanism, inputs) for inputs in (first, second)]
    for seen, wanted in zip(outputs, expected, strict=True):
        _expect_same(seen, wanted, "a forward depends on the forwards before it")
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), value)
    _expect_same(gradient, expected_gradient, "a gradient depends on a forward that came in between")


def _state_dict(subject: Subject) -> None:
    """Weights must be all that a mechanism learns: moved, saved and loaded, they give the same outputs."""
    inputs, mechanism = subject.inputs(), subject.build()
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(0.25)
    expected = run(mechanism, inputs)
    loaded = subject.build()
    loaded.load_state_dict(mechanism.state_dict())
    _expect_same(run(loaded, inputs), expected, "a state dict, loaded into a new instance, gives other outputs")


def _copies(subject: Subject) -> None:
    mechanism = subject.build()
    # Results of an operation, as in a model: tensors that are no leaves cannot be copied if a mechanism keeps them.
    inputs = [tensor.requires_grad_() * 1.0 for tensor in subject.inputs()]
    expected = run(mechanism, inputs)
    for kind, copied in (
        ("copy.deepcopy", copy.deepcopy(mechanism)),
        ("pickle", pickle.loads(pickle.dumps(mechanism))),
    ):
        _expect_same(run(copied, inputs), expected, f"a copy by {kind} gives other outputs")


def _kept_graph(subject: Subject) -> None:
    mechanism = subject.build()
    inputs = [tensor.requires_grad_() * 1.0 for tensor in subject.inputs()]
    output = run(mechanism, inputs)
    watched = [weakref.ref(tensor) for tensor in (*inputs, output)]
    del inputs, output
    gc.collect()
    if any(reference() is not None for reference in watched):
        raise UnsoundError("tensors of a finished forward, and the memory of its graph, are kept alive")


def _formula(subject: Subject) -> None:
    """The claimed formula, with the exact A in fp64, with every kind of mask; the wrong formulas must not pass."""
    if subject.formula is None:
        return
    query, key, value = subject.inputs()
    mechanism = subject.build()
    padding = torch.tensor([True, True, False, True, True, True, False]).expand(1, 1, 1, TOKENS)
    hole = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    hole[3] = False
    cases: dict[str, tuple[Tensor | None, bool, float | None]] = {
        "without a mask": (None, False, None),
        "with scale=0.3": (None, False, 0.3),
        "with masked keys": (padding, False, None),
        "with an empty row": (hole, False, None),
    }
    if subject.causal:
        cases["with is_causal"] = (None, True, None)
    for kind, (mask, is_causal, scale) in cases.items():
        smooth = partial(torch.matmul, attention_matrix(query, key, mask, is_causal, scale))
        claimed = subject.formula(smooth, value)
        wrong = {name: formula(smooth, value) for name, formula in WRONG_FORMULAS.items()}
        seen = run(mechanism, (query, key, value), attn_mask=mask, is_causal=is_causal, scale=scale)
        off = relative_rms(seen, claimed)
        # Written so that NaN fails.
        if not off <= FP64_BUDGET:
            nearest = [name for name, output in wrong.items() if relative_rms(seen, output) <= FP64_BUDGET]
            hint = f"; it computes {nearest[0]}" if nearest else ""
            raise UnsoundError(f"{kind}, the output is not what the formula gives (relative RMS {off:.1e}){hint}")
        # The claim itself may be one of them ("no_correction" is standard attention); two would pass unseen.
        passing = [name for name, output in wrong.items() if relative_rms(output, claimed) <= 1e-3]
        if len(passing) > 1:
            raise UnsoundError(f"{kind}, the check cannot tell the formula from {' or '.join(passing)}")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "shape and dtype": _shape_and_dtype,
    "masks": _masks,
    "empty rows": _empty_rows,
    "causality": _causality,
    "permutation": _permutation,
    "gradients": _gradients,
    "determinism": _determinism,
    "memory": _memory,
    "state dict": _state_dict,
    "copies": _copies,
    "kept graph": _kept_graph,
    "formula": _formula,
}
