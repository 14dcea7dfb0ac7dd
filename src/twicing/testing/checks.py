"""The checks of soundness, one function each: what any attention mechanism must do before its results mean anything.

They look for the mistakes that give plausible results: masks that are ignored, a look into the future, tensors kept
from one forward to the next, a formula that is nearly the one claimed.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twicing.mechanisms.context import Context, declared_reads
from twicing.ops.boost import Smoother
from twicing.ops.reference import attention_matrix
from twicing.testing.budget import FP64_BUDGET, WRONG_FORMULAS, Formula, make_inputs, relative_rms

Factory = Callable[[int, int, int], nn.Module]
# The output of a layer from the smoother v -> A v, the values, and the values of earlier layers by their number.
FormulaAcross = Callable[[Smoother, Tensor, Mapping[int, Tensor]], Tensor]

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 7, 4
# The later layer that is checked: neither the first nor the one after it.
LATER = 3
# Two ways to compute the same in fp64 differ by far less, two different things by far more.
SAME = 1e-10


class UnsoundError(Exception):
    """What a check saw, as a sentence."""


class Layers(nn.Module):
    """Layers 1 to L of a mechanism that needs a context, run as a host runs them: each leaves its values to the others.

    forward() takes the queries, keys and values of every layer, one layer after another; returns layer L's output.
    """

    def __init__(self, mechanisms: Sequence[nn.Module], reads: Sequence[tuple[int, ...] | None]) -> None:
        super().__init__()
        self.mechanisms = nn.ModuleList(mechanisms)
        self.reads = list(reads)

    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        so_far = Context()
        for layer, (mechanism, reads) in enumerate(zip(self.mechanisms, self.reads, strict=True), start=1):
            # Only what was declared: hosts hand over nothing else.
            context = None if reads is None else so_far.only(reads)
            output: Tensor = mechanism(*tensors[3 * layer - 3 : 3 * layer], **{**options, "context": context})
            so_far = Context(so_far.values_by_layer, (so_far if context is None else context).memory)
            so_far.record(layer, tensors[3 * layer - 1])
        return output


@dataclass(frozen=True)
class Subject:
    """The mechanism under test, in layer 1 or in a later layer.

    formula: what it claims from smoother and values. formula_across: what it claims instead in a later layer, if it
    needs a context, from smoother, values, and the values of earlier layers by number.
    """

    factory: Factory
    formula: Formula | None
    causal: bool
    layer: int = 1
    formula_across: FormulaAcross | None = None

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new instance for the layer, with the same initial weights every time; with the layers before it, if it
        needs a context."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            last = self.factory(self.layer, HEADS, WIDTH)
            if self.reads(last, self.layer) is None:
                mechanism = last
            else:
                every = [*(self.factory(layer, HEADS, WIDTH) for layer in range(1, self.layer)), last]
                mechanism = Layers(every, [self.reads(each, layer) for layer, each in enumerate(every, start=1)])
        mechanism = mechanism.to(dtype)
        if dtype == torch.float64:
            # A mechanism may keep what it learns in fp32; exactness cannot be asked of it there.
            for parameter in mechanism.parameters():
                parameter.data = parameter.data.double()
        return mechanism

    def inputs(self, seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key and value, those of the layers before the checked one first, where it needs a context."""
        generator = torch.Generator().manual_seed(seed)
        shape = (BATCH, HEADS, tokens, WIDTH)
        layers = self.layer if self.needs_context() else 1
        drawn = [make_inputs(shape, generator=generator, peaked=True, dtype=dtype) for _ in range(layers)]
        return [tensor for layer in drawn for tensor in layer]

    def needs_context(self) -> bool:
        """Whether the layer reads what earlier layers left, or leaves something itself."""
        return isinstance(self.build(), Layers)

    def reads(self, mechanism: nn.Module, layer: int) -> tuple[int, ...] | None:
        """The layers whose values it reads: see declared_reads()."""
        return declared_reads(mechanism, layer, getattr(self.factory, "__name__", "mechanism"))


def run(
    mechanism: nn.Module,
    inputs: Sequence[Tensor],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """One forward as the adapters call it, without dropout or grouped heads."""
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
        # Queries and keys of earlier layers have none.
        gradients = torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)
        if not all(gradient.isfinite().all() for gradient in gradients if gradient is not None):
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
            return run(mechanism, tensors[: len(inputs)], attn_mask=attn_mask)

        try:
            # The parameters are named too: gradcheck moves them in place. Random directions do for a later layer.
            torch.autograd.gradcheck(output, (*inputs, *learnt), fast_mode=subject.layer > 1)
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
    values = [tensor.requires_grad_() for tensor in first[2::3]]
    expected_gradients = torch.autograd.grad(run(subject.build(), first).square().sum(), values, allow_unused=True)
    run(mechanism, subject.inputs(seed=3, tokens=TOKENS - 2))
    outputs = [run(mechanism, inputs) for inputs in (first, second)]
    for seen, wanted in zip(outputs, expected, strict=True):
        _expect_same(seen, wanted, "a forward depends on the forwards before it")
    gradients = torch.autograd.grad(outputs[0].square().sum(), values, allow_unused=True)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        if gradient is not None and wanted is not None:
            _expect_same(gradient, wanted, "a gradient depends on a forward that came in between")
        elif gradient is not wanted:
            raise UnsoundError("whether values have a gradient depends on a forward that came in between")


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
    # Only a cycle needs the collector, which is slow where much is loaded.
    if any(reference() is not None for reference in watched):
        gc.collect()
    if any(reference() is not None for reference in watched):
        raise UnsoundError("tensors of a finished forward, and the memory of its graph, are kept alive")


def _formula(subject: Subject) -> None:
    """The claimed formula, with the exact A in fp64, with every kind of mask; the wrong formulas must not pass."""
    inputs, mechanism = subject.inputs(), subject.build()
    *before, query, key, value = inputs
    earlier = dict(enumerate(before[2::3], start=1))
    formula: FormulaAcross | None
    if earlier:
        formula = subject.formula_across
    else:
        plain = subject.formula
        formula = None if plain is None else lambda smooth, value, _earlier: plain(smooth, value)
    if formula is None:
        return
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
        claimed = formula(smooth, value, earlier)
        wrong = {name: wrong_one(smooth, value) for name, wrong_one in WRONG_FORMULAS.items()}
        if earlier:
            own, turned = dict.fromkeys(earlier, value), dict(zip(earlier, reversed(earlier.values()), strict=True))
            wrong["its own values in place of earlier ones"] = formula(smooth, value, own)
            wrong["the values of other layers"] = formula(smooth, value, turned)
        seen = run(mechanism, inputs, attn_mask=mask, is_causal=is_causal, scale=scale)
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
