"""What a conversion arranges for layers that read others: said in the report, kept in the spec, gone after undo()."""

import copy
import json

import pytest
import torch
from by_hand import Mixing, logits, neutreno

from twicing.adapters.surgery import convert, describe, spec, undo
from twicing.mechanisms import Standard
from twicing.testing import relative_rms


@pytest.fixture
def vit(small_vit):
    return small_vit().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hooks_of(model):
    return [
        (path, list(hooks))
        for path, module in model.named_modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_always_called,
            module._forward_pre_hooks_with_kwargs,
        )
    ] + [(path, sorted(vars(module)), type(module)) for path, module in model.named_modules()]


def tapped(model):
    return [path for path, module in model.named_modules() if "twicing_tap" in vars(module)]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_report_says_whose_values_are_read(vit):
    job = convert(vit, "neutreno", layers="2-3")
    assert str(job) == (
        "VisionTransformer: 2 attention layers converted.\n"
        "  layer 2 = blocks.1.attn: Attention -> neutreno (lambda 0.6)\n"
        "  layer 3 = blocks.2.attn: Attention -> neutreno (lambda 0.6)\n"
        "  The values of layer 1 are read by layers 2, 3; what layer 1 computes is not changed by that.\n"
        "  New parameters: none, so state-dict keys and optimisers stay valid. "
        "To take it back: .undo(), or twicing.undo(model)."
    )
    assert describe(vit) == (
        "VisionTransformer: 3 attention layers, 2 converted.\n"
        "  layer 1 = blocks.0.attn: Attention, 3 heads of 16, values read by layers 2, 3\n"
        "  layer 2 = blocks.1.attn: Attention, 3 heads of 16 -> neutreno (lambda 0.6)\n"
        "  layer 3 = blocks.2.attn: Attention, 3 heads of 16 -> neutreno (lambda 0.6)"
    )


def test_long_runs_of_layers_are_said_shortly(small_vit):
    job = convert(small_vit(depth=5), "neutreno")
    assert "layer 1 = blocks.0.attn: Attention -> neutreno (lambda 0.6, standard in layer 1)" in str(job)
    assert "The values of layer 1 are read by layers 2-5;" in str(job)
    assert "read by" not in str(convert(small_vit(), "twicing"))
    assert "The values of layer 2 are read by layer 3;" in str(convert(small_vit(), Mixing))


def test_only_what_is_needed_is_touched(small_vit):
    vit = small_vit(depth=5)
    convert(vit, "neutreno", layers=3)
    assert tapped(vit) == ["blocks.0", "blocks.0.attn.qkv", "blocks.1", "blocks.2", "blocks.2.attn"]
    undo(vit)
    convert(vit, "neutreno", layers=1)
    assert tapped(vit) == []


def test_state_dict_and_parameters_stay(vit):
    keys, parameters = list(vit.state_dict()), [id(parameter) for parameter in vit.parameters()]
    convert(vit, "neutreno")
    assert list(vit.state_dict()) == keys
    assert [id(parameter) for parameter in vit.parameters()] == parameters


# --- specs ------------------------------------------------------------------------------------------------------------


def test_a_spec_rebuilds_it(small_vit, vit, images):
    convert(vit, "neutreno", layers="2-3", options={"lam": 0.4})
    entries = json.loads(json.dumps(spec(vit)))
    assert entries == [{"mechanism": "neutreno", "layers": [2, 3], "options": {"lam": 0.4}}]
    other = small_vit().double()
    convert(other, spec=entries)
    assert torch.equal(other(images), vit(images))
    assert relative_rms(vit(images), logits(vit, images, neutreno(lam=0.4))) < 1e-12


def test_what_is_converted_in_two_goes_is_what_its_spec_gives_in_one(small_vit, vit, images):
    """Also for what layers remember: both goes share one context."""
    convert(vit, Mixing, layers="2-3")
    convert(vit, Mixing, layers=1)
    other = small_vit().double()
    convert(other, spec=spec(vit))
    assert len(spec(vit)) == 1
    assert torch.equal(other(images), vit(images))
    assert describe(other) == describe(vit)


# --- undo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["neutreno", Mixing])
@pytest.mark.parametrize("how", ["job", "model", "copy"])
def test_undo_leaves_no_trace(how, mechanism, vit, images):
    before, untouched = hooks_of(vit), vit(images)
    seen = []
    handle = vit.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    job = convert(vit, mechanism, layers="2-3")
    vit(images).sum().backward()
    model = copy.deepcopy(vit) if how == "copy" else vit
    job.undo() if how == "job" else undo(model)
    assert torch.equal(model(images), untouched)
    # Other people's hooks stay.
    assert len(seen) == 2
    if how != "copy":
        handle.remove()
        assert hooks_of(vit) == before
    assert tapped(model) == []


def test_undoing_one_of_two_conversions_leaves_the_other_its_values(vit, images):
    first, second = convert(vit, "neutreno", layers=3), convert(vit, "neutreno", layers=2)
    assert relative_rms(vit(images), logits(vit, images, neutreno((2, 3)))) < 1e-12
    first.undo()
    assert relative_rms(vit(images), logits(vit, images, neutreno((2,)))) < 1e-12
    assert tapped(vit) == ["blocks.0", "blocks.0.attn.qkv", "blocks.1", "blocks.1.attn"]
    convert(vit, "neutreno", layers=3)
    second.undo()
    assert relative_rms(vit(images), logits(vit, images, neutreno((3,)))) < 1e-12
    assert tapped(vit) == ["blocks.0", "blocks.0.attn.qkv", "blocks.1", "blocks.2", "blocks.2.attn"]
    undo(vit)
    assert tapped(vit) == []


def test_twicing_in_a_layer_that_passes_values_on_comes_and_goes(vit, images):
    convert(vit, "neutreno", layers=3)
    expected = vit(images)
    job = convert(vit, "twicing", layers="1-2")
    assert not torch.equal(vit(images), expected)
    job.undo()
    assert torch.equal(vit(images), expected)
    convert(vit.blocks[1], "twicing")
    undo(vit.blocks[1])
    assert torch.equal(vit(images), expected)


def test_a_part_whose_layers_read_beyond_it_is_not_undone(vit, images):
    convert(vit, "neutreno")
    expected = vit(images)
    for part in (vit.blocks[2], vit.blocks[1:]):
        with pytest.raises(ValueError, match=r"is only a part of a model whose layer [23] reads values of earlier lay"):
            undo(part)
    assert torch.equal(vit(images), expected)
    undo(vit.blocks)
    assert tapped(vit) == []


def test_undo_of_a_model_beside_its_copy(vit, images):
    untouched = vit(images)
    convert(vit, "neutreno")
    both = torch.nn.ModuleList([vit, copy.deepcopy(vit)])
    undo(both)
    assert tapped(both) == []
    assert torch.equal(both[1](images), untouched)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_part_that_was_numbered_otherwise_is_refused(vit, images):
    convert(vit, "neutreno", layers=3)
    before = hooks_of(vit)
    with pytest.raises(
        ValueError, match=r"attn is layer 1 here, but was layer 2 when a mechanism that reads other lay"
    ):
        convert(vit.blocks[1:2], Mixing)
    assert hooks_of(vit) == before
    undo(vit)
    convert(vit.blocks[1:], "neutreno", layers=2)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is layer 2 here, but was layer 1 when"):
        convert(vit, "neutreno", layers=2)


class Declares(Standard):
    def __init__(self, layer, num_heads, head_dim, *, reads=None):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = tuple(reads) if isinstance(reads, list) else reads


@pytest.mark.parametrize(
    ("reads", "error", "message"),
    [
        ([3], ValueError, r"in layer 3 reads the values of the layers \[3\]: each must come before its own layer"),
        ([1, 4], ValueError, r"in layer 3 reads the values of the layers \[1, 4\]"),
        ([0], ValueError, r"reads the values of the layers \[0\]"),
        (
            ["1"],
            TypeError,
            r"reads_values_of of the mechanism .*Declares' must be a tuple of layer numbers: got \('1',",
        ),
        (1, TypeError, "must be a tuple of layer numbers: got 1"),
        ([True], TypeError, r"must be a tuple of layer numbers: got \(True,\)"),
    ],
    ids=str,
)
def test_a_declaration_that_makes_no_sense_is_refused(reads, error, message, vit):
    before = hooks_of(vit)
    with pytest.raises(error, match=message):
        convert(vit, Declares, layers=3, options={"reads": reads})
    assert hooks_of(vit) == before


def test_what_was_not_declared_cannot_be_read(vit, images):
    class Greedy(Mixing):
        def __init__(self, *at):
            super().__init__(*at)
            self.reads_values_of = (1,) if self.layer > 1 else ()

    convert(vit, Greedy)
    with pytest.raises(
        RuntimeError, match=r"values of layer 2 are not in the context; there are those of .*: 1\. A mec"
    ):
        vit(images)


def test_a_layer_by_itself_is_refused(vit):
    convert(vit, "neutreno")
    tokens = torch.randn(2, 17, 48, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"The attention of layer 3 \(blocks\.2\.attn\) was run outside its block"):
        vit.blocks[2].attn(tokens)
    with pytest.raises(RuntimeError, match=r"The tokens that came into layer 3 .* running a layer by itself"):
        vit.blocks[2](tokens)
    assert vit.blocks[0](tokens).shape == tokens.shape


def test_tokens_that_are_dropped_between_layers_are_refused(vit, images):
    convert(vit, "neutreno")
    x = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
    fewer = x[:, :5].clone()
    fewer._twicing_context = x._twicing_context
    with pytest.raises(ValueError, match=r"the same tokens in layer 1 and in layer 2, .* got values \[2, 3, 17, 16\]"):
        vit.blocks[1](fewer)
