"""`linear` and `twicing-linear`: sound as far as they claim, the formula exact, and what they cannot do refused."""

import json

import pytest
import torch

from twicing import convert, spec
from twicing.mechanisms import Linear, TwicingLinear, find_mechanism, known_mechanisms
from twicing.mechanisms.options import complete_options
from twicing.ops.linear import linear_attention_matrix, twicing_linear_attention
from twicing.testing import WRONG_FORMULAS, check_mechanism, make_inputs, relative_rms
from twicing.testing.budget import FP64_BUDGET
from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

import timm  # noqa: E402

# They give additive masks and masks that differ from query to query, which linear attention refuses; what these checks
# ask is asked below with masks of keys. "formula" makes no claim: its A is softmax's.
NOT_WITH_THESE_MASKS = ("masks", "empty rows", "causality", "gradients")
BOTH = {"linear": Linear, "twicing-linear": TwicingLinear}


@pytest.fixture(params=BOTH, ids=BOTH)
def mechanism(request):
    return BOTH[request.param](1, 4, 8)


@pytest.fixture
def inputs():
    return make_inputs((2, 4, 30, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_they_are_registered_by_name():
    assert set(BOTH) <= set(known_mechanisms())
    assert all(find_mechanism(name) is kind for name, kind in BOTH.items())


@pytest.mark.parametrize("factory", BOTH.values())
def test_they_are_sound(factory):
    check_mechanism(factory, skip=NOT_WITH_THESE_MASKS)


CALLS = {
    "plain": {},
    "masked": {"attn_mask": (torch.arange(30) % 4 != 2)[None]},
    "causal": {"is_causal": True},
    "causal-masked": {"is_causal": True, "attn_mask": (torch.arange(30) >= 5)[None]},
    "scaled": {"scale": 0.3},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_formula_is_what_is_claimed_and_no_wrong_one(call, inputs):
    query, key, value = inputs
    options = {name: option for name, option in CALLS[call].items() if name != "scale"}
    A = linear_attention_matrix(query, key, **options)
    plain, twiced = (kind(1, 4, 8)(query, key, value, **CALLS[call]) for kind in BOTH.values())
    assert relative_rms(plain, A @ value) <= FP64_BUDGET
    assert relative_rms(twiced, (2.0 * A - A @ A) @ value) <= FP64_BUDGET
    for wrong in WRONG_FORMULAS.values():
        assert relative_rms(twiced, wrong(lambda v: A @ v, value)) > 1e-2


def test_masked_tokens_act_as_if_they_were_absent(mechanism, inputs):
    kept = torch.arange(30) % 4 != 2
    for is_causal in (False, True):
        expected = mechanism(*(tensor[:, :, kept] for tensor in inputs), is_causal=is_causal)
        for shape in ((1, 1, 1, 30), (1, 1, 30, 30)):
            output = mechanism(*inputs, attn_mask=kept.expand(shape), is_causal=is_causal)
            assert relative_rms(output[:, :, kept], expected) <= FP64_BUDGET


def test_no_token_depends_on_later_ones(mechanism, inputs):
    whole = mechanism(*inputs, is_causal=True)
    alone = mechanism(*(tensor[:, :, :17] for tensor in inputs), is_causal=True)
    assert relative_rms(whole[:, :, :17], alone) <= FP64_BUDGET


def test_an_empty_sequence_gives_zero_and_disturbs_nobody(mechanism, inputs):
    leaves = [tensor.requires_grad_() for tensor in inputs]
    mask = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 30)
    output = mechanism(*leaves, attn_mask=mask)
    assert (output[0] == 0).all()
    assert relative_rms(output[1], mechanism(*(tensor[1:] for tensor in inputs))[0]) <= FP64_BUDGET
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.square().sum(), leaves))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_gradients_are_the_numerical_ones(mechanism, is_causal, inputs):
    leaves = [tensor[:1, :, :5].contiguous().requires_grad_() for tensor in inputs]
    mask = torch.tensor([[True, True, False, True, True]])
    for attn_mask in (None, mask):
        assert torch.autograd.gradcheck(
            lambda *tensors, m=attn_mask: mechanism(*tensors, attn_mask=m, is_causal=is_causal), leaves, fast_mode=True
        )


def test_grouped_heads(mechanism, inputs):
    query, key, value = inputs
    few = key[:, :2], value[:, :2]
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in few]
    output = mechanism(query, *few, enable_gqa=True)
    assert relative_rms(output, mechanism(query, *repeated)) <= FP64_BUDGET


def test_options_reach_the_operator(inputs):
    twiced = TwicingLinear(1, 4, 8, order=3, gain=0.4, feature_map="dpfp")
    assert torch.equal(twiced(*inputs), twicing_linear_attention(*inputs, order=3, gain=0.4, feature_map="dpfp"))
    plain = Linear(1, 4, 8, feature_map="relu")
    assert torch.equal(plain(*inputs), twicing_linear_attention(*inputs, order=1, feature_map="relu"))
    assert torch.equal(TwicingLinear(1, 4, 8, order=1)(*inputs), Linear(1, 4, 8)(*inputs))


def test_autocast_gives_what_sdpa_gives(mechanism):
    inputs = make_inputs((2, 4, 30, 8), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert mechanism(*inputs).dtype == torch.bfloat16


def test_what_needs_the_matrix_is_refused_in_a_sentence(mechanism, inputs):
    with pytest.raises(ValueError, match=r"cannot drop attention weights.*dropout_p=0\.1\. Set the model's attention"):
        mechanism(*inputs, dropout_p=0.1)
    with pytest.raises(ValueError, match="no mask that is added to the scores"):
        mechanism(*inputs, attn_mask=torch.zeros(30, 30, dtype=torch.float64))
    with pytest.raises(ValueError, match="may differ from query to query"):
        mechanism(*inputs, attn_mask=torch.ones(30, 30, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"order": 1, "gain": 0.5}, ValueError, "gain has no effect with order=1"),
        ({"gain": float("inf")}, ValueError, "gain must be finite"),
        ({"gain": torch.ones(4)}, TypeError, "gain must be a number here"),
        ({"feature_map": "elu"}, ValueError, r"Unknown feature map 'elu': did you mean 'relu'\? Known are 'elu\+1'"),
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TwicingLinear(1, 4, 8, **options)


def test_they_print_their_formula_and_their_options_fit_into_json():
    assert repr(Linear(1, 4, 8)) == "Linear(feature map elu+1)"
    assert repr(TwicingLinear(1, 4, 8, gain=0.25)) == "TwicingLinear(order 2, gain 0.25, feature map elu+1)"
    assert complete_options(TwicingLinear, "twicing-linear", None) == {"order": 2, "gain": 1.0, "feature_map": "elu+1"}
    assert not list(TwicingLinear(1, 4, 8).parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not-fused"])
@pytest.mark.parametrize("name", BOTH)
def test_a_vision_transformer_takes_them_and_gives_them_back(name, fused):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=4)
    for block in model.blocks:
        block.attn.fused_attn = fused
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    before = model(images)
    job = convert(model, name, layers="2-3", options={"feature_map": "relu"})
    after = model(images)
    assert relative_rms(after, before) > 1e-3
    again = convert(timm.create_model("vit_tiny_patch16_224", depth=3), spec=json.loads(json.dumps(spec(model))))
    assert "feature map relu" in str(again)
    job.undo()
    assert torch.equal(model(images), before)
