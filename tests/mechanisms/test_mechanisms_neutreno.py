"""NeuTRENO as a module: the formula, masks, grouped queries, dropout, half precision; what a context holds."""

import copy
import io
import pickle

import pytest
import torch

from twicing.mechanisms import Context, Mechanism, Neutreno, Standard, find_mechanism
from twicing.testing import make_inputs, relative_rms

BUDGET = 1.4e-14
MASK = torch.ones(5, 5, dtype=torch.bool).tril(1)
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": MASK},
    "float": {"attn_mask": torch.linspace(-3, 3, 25, dtype=torch.float64).view(5, 5)},
    "scale": {"scale": 0.7},
    "grouped": {"enable_gqa": True},
}


def inputs(call="plain", dtype=torch.float64, value_width=None):
    """query, key, value, and the values of layer 1."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if call == "grouped" else None
    made = make_inputs((2, 4, 5, 8), generator=generator, key_heads=heads, value_width=value_width, dtype=dtype)
    return *made, torch.randn(made[2].shape, generator=generator).to(dtype)


def by_hand(query, key, value, first, lam=0.6, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """With explicit tensors, in the order of the paper's equation."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        attn_mask = attn_mask.double().log() if attn_mask.dtype == torch.bool else attn_mask
        scores = scores + attn_mask
    A = scores.softmax(-1)
    value, first = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (value, first))
    return A @ value + lam * (first - value)


@pytest.mark.parametrize("call", CALLS)
def test_it_is_the_formula(call):
    tensors = [tensor.requires_grad_() for tensor in inputs(call)]
    output = Neutreno(2, 4, 8)(*tensors[:3], **CALLS[call], context=Context({1: tensors[3]}))
    expected = by_hand(*tensors, **CALLS[call])
    assert relative_rms(output, expected) < BUDGET
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = zip(*(torch.autograd.grad(u, tensors, upstream) for u in (output, expected)), strict=True)
    assert all(relative_rms(seen, wanted) < 1e-13 for seen, wanted in gradients)
    standard = Standard(2, 4, 8)(*tensors[:3], **CALLS[call])
    for wrong in (by_hand(*tensors, lam=0.5, **CALLS[call]), by_hand(*tensors, lam=-0.6, **CALLS[call]), standard):
        assert relative_rms(output, wrong) > 1e-3


@pytest.mark.parametrize("call", CALLS)
def test_layer_one_is_standard_attention(call):
    query, key, value, _ = inputs(call)
    assert torch.equal(
        Neutreno(1, 4, 8)(query, key, value, **CALLS[call]), Standard(1, 4, 8)(query, key, value, **CALLS[call])
    )


def test_the_published_default_and_the_option():
    assert find_mechanism("neutreno") is Neutreno
    tensors = inputs()
    context = Context({1: tensors[3]})
    assert torch.equal(
        Neutreno(2, 4, 8)(*tensors[:3], context=context), Neutreno(2, 4, 8, lam=0.6)(*tensors[:3], context=context)
    )
    assert relative_rms(Neutreno(5, 4, 8, lam=0.4)(*tensors[:3], context=context), by_hand(*tensors, lam=0.4)) < BUDGET
    assert torch.equal(Neutreno(2, 4, 8, lam=0)(*tensors[:3], context=context), Standard(2, 4, 8)(*tensors[:3]))
    assert (repr(Neutreno(2, 4, 8)), repr(Neutreno(1, 4, 8))) == (
        "Neutreno(lambda 0.6)",
        "Neutreno(lambda 0.6, standard in layer 1)",
    )
    assert (Neutreno(1, 4, 8).reads_values_of, Neutreno(7, 4, 8).reads_values_of) == ((), (1,))
    assert not list(Neutreno(2, 4, 8).parameters())


def test_dropout_drops_weights_and_never_the_correction():
    query, key, value, first = inputs()
    output = Neutreno(2, 4, 8)(query, key, value, dropout_p=1.0, context=Context({1: first}))
    assert relative_rms(output, 0.6 * (first - value)) < BUDGET


def test_a_row_of_nothing_gets_the_correction_alone_and_disturbs_nobody():
    query, key, value, first = inputs()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    output = Neutreno(2, 4, 8)(query, key, value, attn_mask=mask, context=Context({1: first}))
    assert relative_rms(output[:, :, 2], 0.6 * (first - value)[:, :, 2]) < BUDGET
    others = [0, 1, 3, 4]
    assert relative_rms(output[:, :, others], by_hand(query, key, value, first)[:, :, others]) < BUDGET


def test_values_of_another_width():
    tensors = inputs(value_width=3)
    output = Neutreno(2, 4, 8)(*tensors[:3], context=Context({1: tensors[3]}))
    assert relative_rms(output, by_hand(*tensors)) < BUDGET


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_other_dtypes_it_is_no_worse_than_twice_an_honest_reference(dtype):
    tensors = inputs(dtype=dtype)
    expected = by_hand(*(tensor.double() for tensor in tensors))
    output = Neutreno(2, 4, 8)(*tensors[:3], context=Context({1: tensors[3]}))
    assert output.dtype == dtype
    assert relative_rms(output, expected) < 2 * relative_rms(by_hand(*tensors), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": float("nan")}, ValueError, "lam must be finite .*: got nan"),
        ({"lam": "0.6"}, TypeError, r"lam must be a number, lambda in .*: got '0.6'"),
        ({"lam": True}, TypeError, "lam must be a number"),
        ({"lam": torch.ones(())}, TypeError, "lam must be a number"),
    ],
    ids=str,
)
def test_a_lambda_that_is_no_number_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Neutreno(2, 4, 8, **options)


def test_what_does_not_fit_is_refused():
    query, key, value, first = inputs()
    mechanism = Neutreno(3, 4, 8)
    with pytest.raises(RuntimeError, match=r"NeuTRENO in layer 3 needs the values of layer 1: pass context=Context\("):
        mechanism(query, key, value)
    with pytest.raises(
        RuntimeError, match=r"The values of layer 1 are not in the context; there are .*: 2, 4\. A mech"
    ):
        mechanism(query, key, value, context=Context({2: first, 4: first}))
    with pytest.raises(RuntimeError, match="the layers: none"):
        mechanism(query, key, value, context=Context())
    with pytest.raises(ValueError, match=r"the same tokens in layer 1 and in layer 3, .* got values \[2, 4, 4, 8\] in"):
        mechanism(query, key, value, context=Context({1: first[:, :, :4]}))
    with pytest.raises(ValueError, match=r"as many queries as values: .* and 1 queries\."):
        mechanism(query[:, :, :1], key, value, context=Context({1: first}))


# --- the context ------------------------------------------------------------------------------------------------------


def test_a_context_goes_its_own_way():
    """A layer that is computed again must not see what was added since."""
    first, second = torch.ones(1), torch.zeros(1)
    context = Context({1: first})
    for other in (context.copy(), context.only([1])):
        other.record(2, second)
        other.remember("integral", second)
        assert other.values(2) is second
        assert other.recall("integral") is second
    assert context.recall("integral") is None
    assert context.recall("integral", 3) == 3
    with pytest.raises(RuntimeError, match="values of layer 2 are not in the context"):
        context.values(2)
    kept = other.only([2])
    assert (kept.values(2), kept.recall("integral")) == (second, second)
    with pytest.raises(
        RuntimeError, match=r"values of layer 1 are not in the context; there are those of the layers: 2"
    ):
        kept.values(1)


def test_a_broken_context_says_why_whatever_is_asked_of_it():
    asks = (lambda c: c.values(1), lambda c: c.recall("x"), lambda c: c.remember("x", 1))
    for context in (Context(broken="because."), Context(broken="because.").copy().only([])):
        for ask in asks:
            with pytest.raises(RuntimeError, match=r"^because\.$"):
                ask(context)


def test_a_context_knows_what_was_made_without_gradients():
    with_gradients, without = Context(), Context()
    with_gradients.record(1, torch.ones(1))
    with_gradients.remember("x", 1)
    assert not with_gradients.without_grad
    with torch.no_grad():
        without.record(1, torch.ones(1))
        with_gradients.remember("y", 1)
    without.record(2, torch.ones(1))
    assert without.copy().without_grad
    assert with_gradients.only([1]).without_grad


def test_copies_and_pickles_of_a_context_are_empty():
    values = (torch.ones(3, requires_grad=True) * 2).exp()
    context = Context({1: values}, {"x": values})
    tensor = torch.ones(3)
    tensor.carried = context
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    copies = [copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.load(file, weights_only=True)]
    assert [entry.carried for entry in copies] == [{}] * 3


def test_mechanisms_read_nothing_unless_they_say_so():
    assert (Mechanism.reads_values_of, Mechanism.remembers) == ((), False)
