"""torch.nn.MultiheadAttention, nn.TransformerEncoder and nn.TransformerDecoder against their own formulas in fp64."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from twicing.adapters.surgery import convert, describe, find_sites, spec, undo
from twicing.testing import WRONG_FORMULAS, relative_rms

BUDGET = 1e-13


def attention(**changes):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, **{"batch_first": True, "dtype": torch.float64, **changes}).eval()
    with torch.no_grad():
        module.in_proj_weight.normal_(std=0.4)
    return module


def encoder(layers=3, **changes):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, **changes}
    layer = nn.TransformerEncoderLayer(32, 4, 48, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=options["batch_first"]).eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(module, x, blocked=None, bias=0.0, formula=None):
    """The module with x [B, N, C] in explicit tensors. blocked: [.., N, N], True where nothing is to be seen."""
    formula = formula or (lambda A, v: A @ v + A @ (v - A @ v))
    weight, shift = module.in_proj_weight, module.in_proj_bias
    projected = x @ weight.T + (0 if shift is None else shift)
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in projected.chunk(3, -1))
    scores = q @ k.mT / 8**0.5 + bias
    if blocked is not None:
        scores = scores.masked_fill(blocked, -torch.inf)
    A = scores.softmax(-1).nan_to_num(0.0)
    return module.out_proj(formula(A, v).transpose(1, 2).flatten(2)), A


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "no batch"])
def test_it_is_the_formula(layout, bias):
    module = attention(batch_first=layout == "batch first", bias=bias)
    x = tokens(2, 7)
    expected = by_hand(module, x)[0]
    untouched = by_hand(module, x, formula=lambda A, v: A @ v)[0]
    wrong = [by_hand(module, x, formula=lambda A, v, f=f: f(lambda y: A @ y, v))[0] for f in WRONG_FORMULAS.values()]
    convert(module, "twicing")

    def run():
        if layout == "no batch":
            return torch.stack([module(one, one, one)[0] for one in x])
        y = x if layout == "batch first" else x.transpose(0, 1)
        output = module(y, y, y)[0]
        return output if layout == "batch first" else output.transpose(0, 1)

    assert relative_rms(run(), expected) < BUDGET
    assert all(relative_rms(run(), other) > 1e3 * BUDGET for other in [untouched, *wrong])
    undo(module)
    assert relative_rms(run(), untouched) < BUDGET


CAUSAL = torch.ones(7, 7).bool().tril().logical_not()
PADDED = torch.tensor([[False] * 7, [True] * 2 + [False] * 5])


@pytest.mark.parametrize("kind", ["bool", "float", "bool beside float"])
@pytest.mark.parametrize("masks", ["causal", "padding", "both", "one for each head"])
def test_masks_mean_the_opposite(masks, kind):
    module, x = attention(), tokens(2, 7)
    each = torch.rand(8, 7, 7, generator=torch.Generator().manual_seed(2)) > 0.6
    each.diagonal(dim1=-2, dim2=-1).fill_(False)
    given = {
        "causal": {"attn_mask": CAUSAL},
        "padding": {"key_padding_mask": PADDED},
        "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDED},
        "one for each head": {"attn_mask": each},
    }[masks]
    blocked = torch.zeros(2, 4, 7, 7).bool()
    if "attn_mask" in given:
        blocked |= given["attn_mask"] if given["attn_mask"].dim() == 2 else each.unflatten(0, (2, 4))
    if "key_padding_mask" in given:
        blocked |= PADDED[:, None, None]
    expected = by_hand(module, x, blocked)[0]
    as_float = {"bool": [], "float": list(given), "bool beside float": ["attn_mask"]}[kind]
    for name in as_float:
        if name in given:
            given[name] = torch.zeros_like(given[name], dtype=x.dtype).masked_fill(given[name], -torch.inf)
    convert(module, "twicing")
    assert relative_rms(module(x, x, x, **given)[0], expected) < BUDGET


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_mask_of_integers_is_refused_as_by_the_host(name, kind):
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, dtype=kind) if name == "key_padding_mask" else torch.zeros(5, 5, dtype=kind)
    with pytest.raises(AssertionError, match="only bool and floating types"):
        attention(x, x, x, **{name: mask})
    convert(attention, "twicing")
    with pytest.raises(ValueError, match=rf"{name} must be bool \(True = ignore\) or float .* got torch\."):
        attention(x, x, x, **{name: mask})


def test_masks_of_another_shape_are_refused_instead_of_broadcast():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    convert(attention, "twicing")
    for mask in (torch.zeros(1, 5), torch.zeros(2, 5, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"attn_mask must have the shape \[5, 5\] or \[4, 5, 5\]: got \["):
            attention(x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match=r"key_padding_mask must have the shape \[2, 5\]: got \[1, 5\]"):
        attention(x, x, x, key_padding_mask=torch.zeros(1, 5))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padding_beside_a_nested_tensor_is_refused_instead_of_ignored():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    convert(attention, "twicing")
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with pytest.raises(ValueError, match="A nested tensor has no padding: got a key_padding_mask beside it"):
        attention(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


def test_padding_of_a_sequence_without_a_batch():
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 8)
    padding = torch.tensor([False, False, True, False, True])
    convert(attention, "twicing")
    output = attention(x, x, x, key_padding_mask=padding)[0]
    kept = x[~padding]
    assert torch.allclose(output[~padding], attention(kept, kept, kept)[0], atol=1e-6)


def test_a_float_mask_is_added():
    module, x, bias = attention(), tokens(2, 7), tokens(7)[:, :7]
    expected = by_hand(module, x, bias=bias)[0]
    convert(module, "twicing")
    assert relative_rms(module(x, x, x, attn_mask=bias)[0], expected) < BUDGET


def test_is_causal_is_a_hint_and_the_mask_counts():
    module, x = attention(), tokens(2, 7)
    window = (CAUSAL | CAUSAL.T.roll(3, 1)) & ~torch.eye(7).bool()
    expected = by_hand(module, x, window)[0]
    convert(module, "twicing")
    assert relative_rms(module(x, x, x, attn_mask=window, is_causal=True)[0], expected) < BUDGET
    assert relative_rms(module(x, x, x, attn_mask=window, is_causal=True, need_weights=False)[0], expected) < BUDGET
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        module(x, x, x, is_causal=True)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_weights_are_the_hosts(batched, average):
    module, x = attention(), tokens(2, 7)
    x = x if batched else x[0]
    options = {"attn_mask": CAUSAL, "average_attn_weights": average}
    expected = module(x, x, x, **options)[1]
    convert(module, "twicing")
    got = module(x, x, x, **options)[1]
    assert got.shape == expected.shape
    assert relative_rms(got, expected) < BUDGET
    assert module(x, x, x, need_weights=False)[1] is None


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without, where torch has a fast path"])
@pytest.mark.parametrize("padding", [None, PADDED.flip(1)], ids=["no padding", "padding"])
@pytest.mark.parametrize("layers", ["all", "2-3", "1"])
def test_an_encoder_in_eval_mode(layers, padding, grad):
    model, x = encoder(), tokens(2, 7)
    chosen = {"all": [1, 2, 3], "2-3": [2, 3], "1": [1]}[layers]
    blocked = None if padding is None else padding[:, None, None]
    expected = x
    for number, layer in enumerate(model.layers, start=1):
        formula = None if number in chosen else lambda A, v: A @ v
        expected = layer.norm1(expected + by_hand(layer.self_attn, expected, blocked, formula=formula)[0])
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
    convert(model, "twicing", layers=layers)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        # Without gradients torch packs padded sequences into nested tensors, and says, once, that these are young.
        warnings.simplefilter("ignore")
        output = model(x, src_key_padding_mask=padding)
    kept = torch.ones(2, 7).bool() if padding is None else ~padding
    assert relative_rms(output[kept], expected[kept]) < BUDGET


def test_undo_gives_the_fast_path_back_bit_for_bit():
    model, x = encoder(dtype=torch.float32), tokens(2, 7).float()
    with torch.no_grad():
        untouched = model(x)
        job = convert(model, "twicing")
        assert relative_rms(model(x), untouched) > 1e-3
        job.undo()
        assert torch.equal(model(x), untouched)


def test_gain_zero_is_standard_attention():
    model, x = encoder(), tokens(2, 7)
    untouched = model(x)
    convert(model, "twicing", options={"gain": 0.0})
    assert relative_rms(model(x), untouched) < BUDGET


def test_gradients_reach_every_parameter():
    module, x = attention(), tokens(2, 7)
    by_hand(module, x, CAUSAL)[0].square().sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    convert(module, "twicing")
    module(x, x, x, attn_mask=CAUSAL)[0].square().sum().backward()
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        assert relative_rms(parameter.grad, grad) < 1e-11


def test_dropout_is_that_of_training():
    module, x = attention(dropout=0.5), tokens(2, 7)
    convert(module, "twicing")
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.train()
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_a_row_that_sees_nothing_gives_zero_and_disturbs_no_other():
    module, x = attention(), tokens(2, 7)
    blocked = CAUSAL.clone()
    blocked[3] = True
    expected = by_hand(module, x, blocked)[0]
    convert(module, "twicing")
    output = module(x, x, x, attn_mask=blocked)[0]
    assert relative_rms(output, expected) < BUDGET
    assert torch.equal(output[:, 3], module.out_proj.bias.expand(2, -1))


def test_cross_attention_is_refused_by_identity_not_by_shape():
    module, x = attention(), tokens(2, 7)
    convert(module, "twicing")
    with pytest.raises(ValueError, match="serves self-attention, query, key and value the same tensor: got different"):
        module(x, x + 1, x + 1)
    with pytest.raises(ValueError, match="the same tensor: got different ones"):
        module(x, x.clone(), x.clone())


def test_a_decoder_is_converted_without_its_cross_attention():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, dropout=0.0, dtype=torch.float64)
    model, x, memory = nn.TransformerDecoder(layer, 2).eval(), tokens(2, 7), tokens(2, 7, seed=2)
    assert [site.path for site in find_sites(model)] == ["layers.0.self_attn", "layers.1.self_attn"]
    before = model(x, memory)
    convert(model, "twicing")
    assert type(model.layers[0].multihead_attn) is nn.MultiheadAttention
    assert relative_rms(model(x, memory), before) > 1e3 * BUDGET


def test_a_transformer_holds_two_stacks():
    model = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
    with pytest.raises(ValueError, match=r"2 separate stacks of attention layers \(encoder\.layers, decoder\.layers\)"):
        convert(model, "twicing")


def test_a_module_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"mix": attention()}) for _ in range(2))

    assert [(site.layer, site.path, site.stack) for site in find_sites(Mine())] == [
        (1, "blocks.0.mix", "blocks"),
        (2, "blocks.1.mix", "blocks"),
    ]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_besides_the_tokens_are_refused(option):
    with pytest.raises(
        ValueError, match=r"with a key of its own \(add_bias_kv or add_zero_attn\): then A is not square"
    ):
        convert(attention(**{option: True}), "twicing")


def test_keys_of_another_width_are_cross_attention():
    with pytest.raises(ValueError, match="MultiheadAttention holds cross-attention only"):
        convert(nn.MultiheadAttention(32, 4, kdim=16, vdim=16), "twicing")


def test_a_replaced_forward():
    module = attention()
    module.forward = lambda *args: args
    with pytest.raises(ValueError, match=r"the model is an nn\.MultiheadAttention whose forward\(\) was replaced"):
        convert(module, "twicing")


def test_values_cannot_be_read_across_layers():
    with pytest.raises(ValueError, match=r"Layer 2 would read the values of layer 1 .* has no child of its own"):
        convert(encoder(), "neutreno")


def test_copies_pickles_and_specs():
    model, x = encoder(), tokens(2, 7)
    convert(model, "twicing", layers=2, options={"learn_gain": True})
    assert "layers.1.self_attn: MultiheadAttention, 4 heads of 8 -> twicing" in describe(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    fresh = encoder()
    convert(fresh, spec=spec(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
