"""Converting in place, reporting it, undoing it, and rebuilding it from a spec."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from twicing.adapters.surgery import convert, describe, find_sites, spec, undo
from twicing.mechanisms import Mechanism, Standard, Twicing


class Doubled(Mechanism):
    """A mechanism of the test's own, with weights: values times a learned number."""

    def __init__(self, layer, num_heads, head_dim, *, start=2.0):
        super().__init__(layer, num_heads, head_dim)
        if layer == 3 and start == 13.0:
            raise RuntimeError("thirteen")
        self.factor = nn.Linear(1, 1)
        nn.init.constant_(self.factor.weight, start)

    def forward(self, query, key, value, *, attn_mask, is_causal, scale, dropout_p, enable_gqa=False, context=None):
        return value * self.factor.weight.squeeze()


def state_of(model):
    """Everything by which a model could differ: classes, attributes, tensors, modes."""
    return [
        (path, type(module), sorted(vars(module)), list(module._modules), module.training)
        for path, module in model.named_modules()
    ], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(map(torch.equal, one[1].values(), other[1].values()))
    )


# --- converting -------------------------------------------------------------------------------------------------------


def test_no_object_but_the_attention_changes_and_no_class_does(small_vit, images):
    model, other = small_vit(), small_vit()
    forward = Attention.forward
    parameters, modules = list(model.parameters()), list(model.modules())
    convert(model, "twicing")
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert {id(m) for m in modules} <= {id(m) for m in model.modules()}
    assert list(model.state_dict()) == list(other.state_dict())
    assert Attention.forward is forward
    assert all(type(block.attn) is Attention for block in other.blocks)
    assert all(isinstance(block.attn, Attention) for block in model.blocks)
    assert not torch.equal(model(images), other(images))


def test_only_the_chosen_layers_change(small_vit):
    model = small_vit()
    convert(model, "twicing", layers="last-2")
    assert [site.converted for site in find_sites(model)] == [None, "twicing", "twicing"]


def test_each_layer_gets_its_own_instance_built_for_it(small_vit):
    model = small_vit()
    convert(model, Doubled, layers=[1, 3])
    built = [model.blocks[i].attn.twicing_mechanism for i in (0, 2)]
    assert [(m.layer, m.num_heads, m.head_dim) for m in built] == [(1, 3, 16), (3, 3, 16)]
    assert built[0] is not built[1]
    assert not any(mechanism.training for mechanism in built)


def test_a_failure_in_the_last_layer_leaves_the_model_untouched(small_vit):
    model = small_vit()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="thirteen"):
        convert(model, Doubled, options={"start": 13.0})
    assert same_state(before, state_of(model))


def test_a_failure_in_the_second_entry_of_a_spec_leaves_the_model_untouched(small_vit):
    model = small_vit()
    before = state_of(model)
    entries = [
        {"mechanism": "twicing", "layers": [1], "options": {}},
        {"mechanism": "twicing", "layers": [9], "options": {}},
    ]
    with pytest.raises(ValueError, match="out of range"):
        convert(model, spec=entries)
    assert same_state(before, state_of(model))


def test_new_parameters_follow_the_layer(small_vit):
    model = small_vit().to(torch.bfloat16)
    model.blocks[1].attn.to("meta")
    model.train()
    convert(model, Doubled)
    weights = [block.attn.twicing_mechanism.factor.weight for block in model.blocks]
    assert [w.dtype for w in weights] == [torch.bfloat16] * 3
    assert [w.device.type for w in weights] == ["cpu", "meta", "cpu"]
    assert all(block.attn.twicing_mechanism.training for block in model.blocks)


def test_a_learned_gain_adds_one_fp32_key_a_layer_and_survives_a_cast(small_vit):
    model = small_vit()
    keys = set(model.state_dict())
    job = convert(model.bfloat16(), "twicing", layers="2-3", options={"gain": 0.3, "learn_gain": True})
    new = set(model.state_dict()) - keys
    assert new == {"blocks.1.attn.twicing_mechanism.gain", "blocks.2.attn.twicing_mechanism.gain"}
    assert job.new_parameters == 6
    model.half().float().bfloat16()
    for key in new:
        gain = model.state_dict()[key]
        assert gain.dtype == torch.float32
        # 0.3 has no more than three digits in bf16.
        assert torch.equal(gain, torch.full((3,), 0.3))
    undo(model)
    assert set(model.state_dict()) == keys


def test_freezing_and_moving_the_model_reaches_the_mechanism(small_vit):
    model = small_vit()
    convert(model, "twicing", options={"learn_gain": True})
    model.requires_grad_(False)
    assert not model.blocks[0].attn.twicing_mechanism.gain.requires_grad
    model.to("meta")
    assert model.blocks[0].attn.twicing_mechanism.gain.device.type == "meta"


def test_a_wrapper_around_the_host_carries_its_prefix(small_vit, images):
    class Normalised(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.num_heads = 3
            self.attention_network = network

        def forward(self, x):
            return self.attention_network(2 * x)

    model = Normalised(small_vit())
    untouched = model(images)
    job = convert(model, "twicing", layers=2)
    assert "layer 2 = attention_network.blocks.1.attn" in str(job)
    assert find_sites(model)[1].path == "attention_network.blocks.1.attn"
    assert not torch.equal(model(images), untouched)


def test_sites_lead_to_the_modules(small_vit):
    model = small_vit()
    for converted in (False, True):
        if converted:
            convert(model, "twicing")
        for number, site in enumerate(find_sites(model), start=1):
            block = model.blocks[number - 1]
            assert (site.layer, site.path) == (number, f"blocks.{number - 1}.attn")
            assert (site.block, site.attention, site.merge) == (block, block.attn, block.attn.proj)
            assert (site.num_heads, site.head_dim) == (3, 16)


def test_hooks_keep_working(small_vit, images):
    model, seen = small_vit(), []
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.blocks[0].attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    convert(model, "twicing")
    model(images)
    assert seen == [(2, 17, 48), (2, 17, 48)]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_replaced_and_how_to_undo_it(small_vit):
    job = convert(small_vit(), "twicing", layers="2-3", options={"gain": 0.5})
    assert str(job) == (
        "VisionTransformer: 2 attention layers converted.\n"
        "  layer 2 = blocks.1.attn: Attention -> twicing (order 2, gain 0.5)\n"
        "  layer 3 = blocks.2.attn: Attention -> twicing (order 2, gain 0.5)\n"
        "  New parameters: none, so state-dict keys and optimisers stay valid. "
        "To take it back: .undo(), or twicing.undo(model)."
    )
    assert repr(job) == str(job)
    assert job.layers == (2, 3)


def test_the_report_counts_new_parameters(small_vit):
    job = convert(small_vit(), "twicing", layers=1, options={"learn_gain": True, "backend": "sdpa"})
    assert "1 attention layer converted." in str(job)
    assert "twicing (order 2, gain learned per head, backend sdpa)" in str(job)
    assert "New parameters: 3, so make the optimiser now." in str(job)


def test_the_report_tells_of_new_buffers(small_vit):
    class WithBuffer(Standard):
        def __init__(self, *at):
            super().__init__(*at)
            self.register_buffer("seen", torch.zeros(1))

    job = convert(small_vit(), WithBuffer)
    assert "New parameters: none, so optimisers stay valid, but new buffers add state-dict keys." in str(job)


def test_using_the_report_as_the_model_says_so(small_vit, images):
    job = convert(small_vit(), "twicing")
    with pytest.raises(TypeError, match=r"the model was changed in place; use the model: model\(x\), not job\(x\)\."):
        job(images)
    for name in ("parameters", "forward", "train", "eval", "to", "state_dict"):
        with pytest.raises(AttributeError, match=rf"changed in place; use the model: model\.{name}, not job\.{name}\."):
            getattr(job, name)
    with pytest.raises(TypeError, match=r"The model must be a torch.nn.Module: got a Conversion\."):
        convert(job, "twicing")
    assert not hasattr(job, "_repr_html_")


def test_describe(small_vit):
    model = small_vit()
    assert describe(model) == (
        "VisionTransformer: 3 attention layers, none converted.\n"
        "  layer 1 = blocks.0.attn: Attention, 3 heads of 16\n"
        "  layer 2 = blocks.1.attn: Attention, 3 heads of 16\n"
        "  layer 3 = blocks.2.attn: Attention, 3 heads of 16"
    )
    convert(model, "standard", layers=2)
    assert "3 attention layers, 1 converted." in describe(model)
    assert "  layer 2 = blocks.1.attn: Attention, 3 heads of 16 -> standard\n" in describe(model)
    assert describe(nn.Linear(2, 2)) == "Linear: 0 attention layers, none converted."


# --- undoing ----------------------------------------------------------------------------------------------------------


def test_undo_leaves_no_trace(small_vit, images):
    model = small_vit()
    before, text, output = state_of(model), repr(model), model(images)
    job = convert(model, "twicing", options={"learn_gain": True})
    assert not same_state(before, state_of(model))
    job.undo()
    assert same_state(before, state_of(model))
    assert repr(model) == text
    assert torch.equal(model(images), output)


def test_undoing_one_of_two_conversions_leaves_the_other(small_vit):
    model = small_vit()
    first = convert(model, "twicing", layers=1)
    second = convert(model, "standard", layers="2-3")
    first.undo()
    assert [site.converted for site in find_sites(model)] == [None, "standard", "standard"]
    with pytest.raises(ValueError, match="nothing to undo: this conversion was already undone"):
        first.undo()
    again = convert(model, "twicing", layers=1)
    with pytest.raises(ValueError, match="already undone"):
        first.undo()
    assert again.layers == (1,)
    second.undo()
    assert [site.converted for site in find_sites(model)] == ["twicing", None, None]


def test_undo_without_a_conversion_says_so(small_vit):
    with pytest.raises(ValueError, match="nothing to undo: no layer of VisionTransformer is converted"):
        undo(small_vit())


def average(model):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model).module


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "average": average}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_converted_and_can_be_undone_by_themselves(copied, small_vit, images):
    model = small_vit()
    untouched = model(images)
    convert(model, "twicing", options={"learn_gain": True})
    converted = model(images)
    twin = copied(model)
    assert torch.equal(twin(images), converted)
    assert spec(twin) == spec(model)
    undo(twin)
    assert torch.equal(twin(images), untouched)
    assert torch.equal(model(images), converted)


# --- specs ------------------------------------------------------------------------------------------------------------


def test_a_spec_rebuilds_the_model_from_its_weights(small_vit, images):
    model = small_vit()
    convert(model, "twicing", layers=[1, 3], options={"gain": 0.25, "learn_gain": True})
    convert(model, "standard", layers=2)
    entries = json.loads(json.dumps(spec(model)))
    options = {"order": 2, "gain": 0.25, "learn_gain": True, "backend": "auto"}
    assert entries == [
        {"mechanism": "twicing", "layers": [1, 3], "options": options},
        {"mechanism": "standard", "layers": [2], "options": {}},
    ]
    with torch.no_grad():
        model.blocks[0].attn.twicing_mechanism.gain.fill_(0.75)
    other = small_vit()
    convert(other, spec=entries)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    assert spec(other) == entries


def test_the_spec_of_an_unconverted_model_is_empty_and_changes_nothing(small_vit):
    model = small_vit()
    before = state_of(model)
    assert spec(model) == []
    job = convert(model, spec=[])
    job.undo()
    assert same_state(before, state_of(model))
    assert str(job) == "VisionTransformer: nothing was converted."


def test_a_model_whose_attention_is_not_known_has_the_empty_spec_and_takes_it():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    assert spec(model) == []
    job = convert(model, spec=[])
    job.undo()
    assert str(job) == "SwinTransformer: nothing was converted."


def test_one_entry_is_a_spec_too(small_vit):
    model = small_vit()
    convert(model, spec={"mechanism": "twicing", "layers": "last-1", "options": {}})
    assert spec(model)[0]["layers"] == [3]


def test_a_spec_is_a_copy(small_vit):
    model = small_vit()
    convert(model, "twicing")
    spec(model)[0]["options"]["gain"] = 9
    assert spec(model)[0]["options"]["gain"] == 1.0


def test_ones_own_mechanism_goes_by_import_path(small_vit, images):
    model = small_vit()
    convert(model, Doubled)
    assert spec(model)[0]["mechanism"] == f"{Doubled.__module__}:Doubled"
    other = small_vit()
    convert(other, spec=spec(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_a_nameless_mechanism_converts_but_has_no_spec(small_vit):
    model = small_vit()
    job = convert(model, lambda layer, num_heads, head_dim: Twicing(layer, num_heads, head_dim), layers=2)
    assert "<lambda> (order 2, gain 1)" in str(job)
    with pytest.raises(ValueError, match=r"Layer 2 was converted with .*<lambda>, which cannot be found by its name"):
        spec(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "convert\\(\\) needs a mechanism, such as 'twicing', or a spec"),
        ({"mechanism": "twicing", "spec": []}, "A spec says everything"),
        ({"spec": [], "layers": "last-1"}, "A spec says everything"),
        (
            {"spec": [{"mechanism": "twicing"}]},
            r"A spec is a list of entries .* got the entry \{'mechanism': 'twicing'\}",
        ),
        ({"spec": ["twicing"]}, "got the entry 'twicing'"),
        (
            {"spec": [{"mechanism": "twicing", "layers": [1], "options": {}}] * 2},
            "The spec names layer 1 more than once",
        ),
    ],
)
def test_wrong_requests_are_refused(arguments, message, small_vit):
    with pytest.raises(ValueError, match=message):
        convert(small_vit(), **arguments)
