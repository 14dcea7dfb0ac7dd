"""check_mechanism() passes what is sound and names what is not: one deliberately broken mechanism for every check."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twicing import boost, twicing_attention
from twicing.mechanisms.neutreno import Neutreno
from twicing.mechanisms.standard import Standard
from twicing.mechanisms.twicing import Twicing
from twicing.testing import CHECKS, WRONG_FORMULAS, MechanismError, check_mechanism, checked


def attend(query, key, value, attn_mask=None, is_causal=False, scale=None, order=2):
    return twicing_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, order=order)


class Sound(nn.Module):
    """Twicing, as the checks want it. The broken ones below change one thing."""

    def __init__(self, layer, num_heads, head_dim):
        super().__init__()

    def forward(self, query, key, value, *, attn_mask, is_causal, scale, dropout_p, enable_gqa, context):
        return self.output(query, key, value, attn_mask, is_causal, scale)

    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask, is_causal, scale)


class IgnoresTheMask(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, None, is_causal, scale)


class MasksTheFirstPassOnly(Sound):
    """What happens when a second call of SDPA forgets its mask."""

    def output(self, query, key, value, attn_mask, is_causal, scale):
        once = attend(query, key, value, attn_mask, is_causal, scale, order=1)
        return once + attend(query, key, value - once, None, is_causal, scale, order=1)


class PoisonedByEmptyRows(Sound):
    """The softmax as it is usually written: a row of nothing is 0 / 0."""

    def matrix(self, query, key, attn_mask, is_causal, scale):
        scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=scores.dtype).masked_fill(~attn_mask, float("-inf"))
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1)

    def output(self, query, key, value, attn_mask, is_causal, scale):
        A = self.matrix(query, key, attn_mask, is_causal, scale)
        return A @ value + A @ (value - A @ value)


class PoisonedGradientsOfEmptyRows(PoisonedByEmptyRows):
    """Cleaning the NaN away afterwards leaves it in the gradients."""

    def matrix(self, query, key, attn_mask, is_causal, scale):
        return torch.nan_to_num(super().matrix(query, key, attn_mask, is_causal, scale))


class LeaksTheFuture(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        once = attend(query, key, value, attn_mask, is_causal, scale, order=1)
        return once + attend(query, key, value - once, attn_mask, False, scale, order=1)


class IgnoresIsCausal(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask, False, scale)


class KnowsPositions(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(
            query, key, value * torch.linspace(1, 2, value.shape[-2])[:, None].to(value), attn_mask, is_causal
        )


class WrongBackward(Sound):
    """Right outputs; the correction has no gradient."""

    def output(self, query, key, value, attn_mask, is_causal, scale):
        once = attend(query, key, value, attn_mask, is_causal, scale, order=1)
        return once + (attend(query, key, value, attn_mask, is_causal, scale) - once).detach()


class WrongSign(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        smooth = partial(attend, query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, order=1)
        return smooth(value=value) - smooth(value=value - smooth(value=value))


class IgnoresTheScale(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask, is_causal)


class KeepsValues(Sound):
    """The values of the first forward ever, as a mechanism across layers might keep them in an attribute."""

    first = None

    def output(self, query, key, value, attn_mask, is_causal, scale):
        if self.first is None or self.first.shape != value.shape:
            self.first = value.detach()
        output = attend(query, key, value, attn_mask, is_causal, scale)
        return output + 0.1 * (self.first - value)


class KeepsAGraph(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        self.last = attend(query, key, value, attn_mask, is_causal, scale)
        return self.last


class Random(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask, is_causal, scale) * (1 + 1e-6 * torch.rand(()))


class HidesWhatItLearns(Sound):
    """A parameter that no state dict holds."""

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.gain = nn.Parameter(torch.ones(num_heads, 1, 1))

    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def output(self, query, key, value, attn_mask, is_causal, scale):
        return self.gain * attend(query, key, value, attn_mask, is_causal, scale)


class AlwaysInFp32(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query.float(), key.float(), value.float(), attn_mask, is_causal, scale)


class MergesHeads(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask, is_causal, scale).transpose(1, 2).flatten(2)


class CannotBePickled(Sound):
    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.function = lambda x: x


class Raises(Sound):
    def output(self, query, key, value, attn_mask, is_causal, scale):
        if attn_mask is not None:
            raise NotImplementedError("no masks yet")
        return attend(query, key, value, None, is_causal, scale)


# Class, the checks that must fail (others may fail with them), and words of what is said.
BROKEN = [
    (IgnoresTheMask, {"masks", "empty rows", "formula"}, "does not act as if the masked tokens were absent"),
    (MasksTheFirstPassOnly, {"masks", "formula"}, "a bool mask [1, 1, 1, 7] does not act as if"),
    (
        PoisonedByEmptyRows,
        {"empty rows", "formula"},
        "an empty row of a bool mask disturbs the other tokens (the output",
    ),
    (PoisonedGradientsOfEmptyRows, {"empty rows"}, "an empty row of a bool mask makes gradients that are not finite"),
    (LeaksTheFuture, {"causality", "formula"}, "with is_causal, tokens depend on later ones"),
    (IgnoresIsCausal, {"causality", "formula"}, "with is_causal, tokens depend on later ones"),
    (KnowsPositions, {"permutation", "formula"}, "permuting the tokens does not permute the outputs"),
    (WrongBackward, {"gradients"}, "without a mask, derivatives differ from numerical ones: Jacobian mismatch"),
    (WrongSign, {"formula"}, "it computes wrong_sign"),
    (IgnoresTheScale, {"formula"}, "with scale=0.3, the output is not what the formula gives"),
    (KeepsValues, {"memory"}, "a forward depends on the forwards before it"),
    (
        KeepsAGraph,
        {"copies", "kept graph"},
        "tensors of a finished forward, and the memory of its graph, are kept alive",
    ),
    (Random, {"determinism"}, "the same forward twice gives different bits"),
    (HidesWhatItLearns, {"state dict"}, "a state dict, loaded into a new instance, gives other outputs"),
    (AlwaysInFp32, {"shape and dtype"}, "expected torch.float64 of shape [2, 3, 7, 4], got torch.float32 of shape"),
    (MergesHeads, {"shape and dtype"}, "got torch.float64 of shape [2, 7, 12]"),
    (CannotBePickled, {"copies"}, "raised "),
    (Raises, {"masks", "empty rows", "gradients", "formula"}, "raised NotImplementedError: no masks yet"),
]


@pytest.mark.parametrize(("broken", "checks", "text"), BROKEN, ids=lambda entry: getattr(entry, "__name__", ""))
def test_a_broken_mechanism_is_named_with_what_is_wrong(broken, checks, text):
    with pytest.raises(MechanismError) as caught:
        check_mechanism(broken, formula=boost)
    assert checks <= caught.value.failed.keys()
    assert text in "\n".join(caught.value.failed[check] for check in checks)
    assert str(caught.value).startswith(f"{broken.__name__} fails {len(caught.value.failed)} of the checks")
    assert all(f"  {check}: {seen}" in str(caught.value) for check, seen in caught.value.failed.items())


def test_every_check_has_a_mechanism_that_fails_it():
    assert set().union(*(checks for _, checks, _ in BROKEN)) == CHECKS.keys()


@pytest.mark.parametrize(
    ("factory", "formula"),
    [
        (Sound, boost),
        (Twicing, boost),
        (partial(Twicing, learn_gain=True), boost),
        (partial(Twicing, backend="reference"), boost),
        (partial(Twicing, order=3, gain=0.5), partial(boost, order=3, gain=0.5)),
        (Standard, partial(boost, order=1)),
        (Standard, lambda smooth, v: smooth(v)),
        (Standard, None),
    ],
    ids=["sound", "twicing", "learnt-gain", "reference", "order-3", "standard-boost", "standard", "no-claim"],
)
def test_sound_mechanisms_pass(factory, formula):
    check_mechanism(factory, formula=formula)


def test_a_claim_that_is_another_mechanism_is_named():
    with pytest.raises(MechanismError, match="it computes no_correction"):
        check_mechanism(Standard, formula=boost)
    with pytest.raises(MechanismError) as caught:
        check_mechanism(Twicing, formula=partial(boost, order=3))
    assert caught.value.failed.keys() == {"formula"}


def test_a_check_that_could_not_tell_the_formula_from_wrong_ones_says_so(monkeypatch):
    monkeypatch.setitem(WRONG_FORMULAS, "nearly", lambda smooth, v: boost(smooth, v) * (1 + 1e-5))
    check_mechanism(Twicing, formula=boost)
    monkeypatch.setitem(WRONG_FORMULAS, "nearer", lambda smooth, v: boost(smooth, v) * (1 + 1e-6))
    with pytest.raises(MechanismError, match="without a mask, the check cannot tell the formula from nearly or nearer"):
        check_mechanism(Twicing, formula=boost)


def test_checks_that_do_not_apply_can_be_left_out():
    check_mechanism(KnowsPositions, skip=["permutation", "masks", "empty rows", "causality"])
    check_mechanism(LeaksTheFuture, causal=False)
    check_mechanism(LeaksTheFuture, formula=boost, causal=False)
    with pytest.raises(ValueError, match=r"Unknown check 'premutation': did you mean 'permutation'\? Known are "):
        check_mechanism(KnowsPositions, skip=["premutation"])


def test_it_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    check_mechanism(partial(Twicing, learn_gain=True), formula=boost)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_oracle_is_not_the_code_under_test():
    """A mechanism that computes twicing by hand, with no code of this library, passes as twicing."""

    class ByHand(Sound):
        def output(self, query, key, value, attn_mask, is_causal, scale):
            empty = None
            if attn_mask is not None:
                empty = ~(attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")).any(-1, True)
            identity = torch.eye(query.shape[-2], dtype=query.dtype).expand(*query.shape[:-1], -1)
            A = F.scaled_dot_product_attention(query, key, identity, attn_mask, 0.0, is_causal, scale=scale)
            A = A if empty is None else A.masked_fill(empty, 0.0)
            return (2 * A - A @ A) @ value

    check_mechanism(ByHand, formula=boost, skip=["copies"])


# --- mechanisms that read earlier layers ------------------------------------------------------------------------------


def neutreno(smooth, value, earlier):
    return smooth(value) + 0.6 * (earlier[1] - value)


class ReadsBack(Sound):
    """A V + 0.6 (V_1 - V) by hand. The broken ones below change one thing."""

    remembers = False

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.layer = layer
        self.reads_values_of = (1,) if layer > 1 else ()

    def forward(self, query, key, value, *, attn_mask, is_causal, scale, dropout_p, enable_gqa, context):
        attended = attend(query, key, value, attn_mask, is_causal, scale, order=1)
        return attended if self.layer == 1 else attended + 0.6 * (self.read(context) - value)

    def read(self, context):
        return context.values(1)


class DetachesWhatItReads(ReadsBack):
    def read(self, context):
        return super().read(context).detach()


class ReadsTheLayerBefore(ReadsBack):
    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = (layer - 1,) if layer > 1 else ()

    def read(self, context):
        return context.values(self.layer - 1)


class ReadsWhatItDidNotDeclare(ReadsBack):
    def read(self, context):
        return context.values(1) + 0.0 * context.values(2) if self.layer == 3 else context.values(1)


class DeclaresNothing(ReadsBack):
    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = ()


class DeclaresItself(ReadsBack):
    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = (layer,)


class KeepsTheFirstItRead(ReadsBack):
    """As an attribute that outlives the forward pass."""

    kept = None

    def read(self, context):
        read = super().read(context)
        if self.kept is None or self.kept.shape != read.shape:
            self.kept = read
        return self.kept


class MixesTokensUnmasked(ReadsBack):
    """A mean over tokens sees the masked ones, and the later ones."""

    def read(self, context):
        return super().read(context).mean(-2, keepdim=True)


class KnowsPositionsLater(ReadsBack):
    def read(self, context):
        read = super().read(context)
        return read * torch.linspace(1, 2, read.shape[-2])[:, None].to(read)


class Remembers(ReadsBack):
    """Reads no values: layer 1 leaves its own, and each later one adds them up."""

    remembers = True

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = ()

    def forward(self, query, key, value, *, context, **options):
        if self.layer == 1:
            context.remember("first", value)
            context.remember("sum", torch.zeros_like(value))
        return super().forward(query, key, value, context=context, **options)

    def read(self, context):
        context.remember("sum", context.recall("sum") + context.recall("first"))
        return context.recall("sum")


class RemembersUndeclared(Remembers):
    remembers = False


class RemembersDetached(Remembers):
    def read(self, context):
        total = super().read(context)
        context.remember("sum", total.detach())
        return total


def remembered(smooth, value, earlier):
    """In layer 3: layer 2 has added the values of layer 1 once, layer 3 once more."""
    return smooth(value) + 0.6 * (2 * earlier[1] - value)


class WrongInLaterLayers(Sound):
    """No context, but not the same everywhere."""

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.layer = layer

    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask if self.layer == 1 else None, is_causal and self.layer == 1, scale)


class WrongWhereMaskedInLaterLayers(WrongInLaterLayers):
    """The same without a mask."""

    def output(self, query, key, value, attn_mask, is_causal, scale):
        return attend(query, key, value, attn_mask if self.layer == 1 else None, is_causal, scale)


ACROSS = [
    (DetachesWhatItReads, {"gradients"}, "in layer 3: without a mask, derivatives differ from numerical ones"),
    (ReadsTheLayerBefore, {"formula"}, "in layer 3: without a mask, the output is not what the formula gives"),
    (ReadsWhatItDidNotDeclare, {"masks", "gradients"}, "values of layer 2 are not in the context"),
    (DeclaresNothing, {"shape and dtype"}, "in layer 3: raised AttributeError"),
    (DeclaresItself, {"shape and dtype"}, "each must come before its own layer"),
    (KeepsTheFirstItRead, {"memory", "kept graph", "copies"}, "a forward depends on the forwards before it"),
    (MixesTokensUnmasked, {"masks", "causality"}, "in layer 3: with is_causal, tokens depend on later ones"),
    (KnowsPositionsLater, {"permutation", "formula"}, "in layer 3: permuting the tokens does not permute the outputs"),
    (WrongInLaterLayers, {"masks", "causality"}, "in layer 3: a bool mask [1, 1, 1, 7] does not act as if"),
    (WrongWhereMaskedInLaterLayers, {"masks"}, "in layer 3: a bool mask"),
]


@pytest.mark.parametrize(("broken", "checks", "text"), ACROSS, ids=lambda entry: getattr(entry, "__name__", ""))
def test_a_mechanism_that_is_broken_in_later_layers_is_named(broken, checks, text):
    with pytest.raises(MechanismError) as caught:
        check_mechanism(broken, formula_across=neutreno)
    assert checks <= caught.value.failed.keys()
    assert text in "\n".join(caught.value.failed[check] for check in checks)


def test_sound_mechanisms_that_read_earlier_layers_pass():
    check_mechanism(Neutreno, formula=lambda smooth, v: smooth(v), formula_across=neutreno)
    check_mechanism(ReadsBack, formula=lambda smooth, v: smooth(v), formula_across=neutreno)
    check_mechanism(ReadsTheLayerBefore, formula_across=lambda smooth, v, e: smooth(v) + 0.6 * (e[2] - v))
    check_mechanism(Remembers, formula_across=remembered)
    check_mechanism(partial(Neutreno, lam=0.4), formula_across=lambda smooth, v, e: smooth(v) + 0.4 * (e[1] - v))


def test_what_is_remembered_is_checked_too():
    with pytest.raises(
        MechanismError, match=r"shape and dtype: raised AttributeError: 'NoneType' object .* 'remember'"
    ):
        check_mechanism(RemembersUndeclared, formula_across=remembered)
    with pytest.raises(MechanismError) as caught:
        check_mechanism(RemembersDetached, formula_across=remembered)
    assert caught.value.failed.keys() == {"gradients"}
    with pytest.raises(MechanismError) as caught:
        check_mechanism(Remembers, formula_across=neutreno)
    assert caught.value.failed.keys() == {"formula"}


def test_a_claim_about_later_layers_must_be_right():
    with pytest.raises(MechanismError, match=r"in layer 3: without a mask, .*; it computes the values of other layers"):
        check_mechanism(Neutreno, formula_across=lambda smooth, v, e: smooth(v) + 0.6 * (e[2] - v))
    with pytest.raises(MechanismError, match=r"in layer 3: .* is not what the formula gives"):
        check_mechanism(Neutreno, formula_across=lambda smooth, v, e: smooth(v) + 0.5 * (e[1] - v))
    with pytest.raises(MechanismError, match=r"formula: without a mask, .* \(relative RMS"):
        check_mechanism(Neutreno, formula=boost)
    with pytest.raises(MechanismError, match="cannot tell the formula from no_correction or its own values in place"):
        check_mechanism(partial(Neutreno, lam=0.0), formula_across=lambda smooth, v, e: smooth(v) + 0.0 * e[1])


def test_what_is_unsound_is_refused_before_it_trains():
    with pytest.raises(
        ValueError, match=r"^The mechanism 'a:b' is not sound, .* It fails masks: a bool mask .*; empty"
    ):
        checked(IgnoresTheMask, "a:b")
    # Vision models are encoders.
    assert checked(LeaksTheFuture, "a:b") is LeaksTheFuture
