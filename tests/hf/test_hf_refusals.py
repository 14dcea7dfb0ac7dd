"""What is not converted in transformers' models, and what a converted one does not take, each with its sentence."""

import importlib
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomModel,
    DiffLlamaConfig,
    DiffLlamaModel,
    GPT2Config,
    GPT2Model,
    LlamaForCausalLM,
    SplinterConfig,
    SplinterModel,
    T5Config,
    T5Model,
)

from twicing.adapters.surgery import convert, describe, find_sites
from twicing.testing import relative_rms


def bart():
    sizes = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(**sizes, decoder_attention_heads=4)).eval()


def t5():
    return T5Model(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


@pytest.mark.parametrize(
    ("build", "stacks"), [(bart, "model.encoder.layers, model.decoder.layers"), (t5, "encoder.block")]
)
def test_encoder_and_decoder_are_two_stacks(build, stacks):
    with pytest.raises(ValueError, match=rf"2 separate stacks of attention layers \({stacks}"):
        convert(build(), "twicing")


@pytest.mark.parametrize("build", [bart, t5])
def test_cross_attention_is_no_layer_whatever_its_shape(build):
    model = build()
    decoder = model.model.decoder if build is bart else model.decoder
    sites = find_sites(decoder)
    assert [site.layer for site in sites] == [1, 2]
    assert not [site.path for site in sites if "enc" in site.path.lower()]
    convert(decoder, "twicing")
    crossing = [
        module for path, module in decoder.named_modules() if path.lower().endswith(("encoder_attn", "encdecattention"))
    ]
    assert len(crossing) == 2
    assert all(type(module).__name__ in ("BartAttention", "T5Attention") for module in crossing)


def test_cross_attention_by_itself():
    with pytest.raises(ValueError, match="T5LayerCrossAttention holds cross-attention only, which has no residual"):
        convert(t5().decoder.block[0].layer[1], "twicing")
    with pytest.raises(ValueError, match="may attend to other tokens than its own, and nothing here tells"):
        convert(bart().model.decoder.layers[0].encoder_attn, "twicing")


def test_self_attention_that_is_used_as_cross_attention():
    layer = bart().model.decoder.layers[0]
    convert(layer, "twicing")
    tokens = torch.randn(1, 4, 32)
    # Of equal length: the shapes would tell nothing.
    with pytest.raises(ValueError, match="serves self-attention only, and got key_value_states"):
        layer.self_attn(tokens, key_value_states=torch.randn(1, 4, 32))
    with pytest.raises(ValueError, match="serves self-attention only, and got key_value_states"):
        layer.self_attn(tokens, torch.randn(1, 4, 32))


def test_gpt2_with_cross_attention():
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)).eval()
    assert [site.path for site in find_sites(model)] == ["h.0.attn", "h.1.attn"]
    convert(model, "twicing")
    model(torch.tensor([[1, 2, 3]]), encoder_hidden_states=torch.randn(1, 3, 32))


def test_a_module_that_says_it_is_cross_attention_is_believed():
    # By its name, and its place, it would be self-attention.
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True))
    model.h[0].attn = model.h[0].crossattention
    del model.h[0].crossattention
    assert [site.path for site in find_sites(model)] == ["h.1.attn"]


def test_attention_that_does_not_go_through_the_interface():
    model = BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    match = r"h\.0\.self_attention is a .*BloomAttention\. Known is timm's .*transformers' attention interface"
    with pytest.raises(ValueError, match=match):
        convert(model, "twicing")
    assert "not known to the library" in describe(model)


def test_a_replaced_forward(host):
    model = host("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(ValueError, match=r"forward\(\) of model\.layers\.1\.self_attn was replaced"):
        convert(model, "twicing")


def test_a_forward_that_is_replaced_afterwards(host, inputs_of):
    model = host("llama")
    convert(model, "twicing")
    attention = model.model.layers[1].self_attn
    kind = type(attention).__mro__[1]
    attention.forward = lambda *args, **kwargs: kind.forward(attention, *args, **kwargs)
    with pytest.raises(ValueError, match=r"forward\(\) of a converted LlamaAttention was replaced"):
        model(**inputs_of("llama"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "deit"])
def test_attention_weights_are_not_made_up(name, host, inputs_of):
    """Nor left out without a word, as by hosts that collect whatever modules put out."""
    model = host(name, attn_implementation="eager").eval()
    convert(model, "twicing", layers="last-2")
    with pytest.raises(ValueError, match=r"puts out no attention weights \(output_attentions=True\)"):
        model(**inputs_of(name), output_attentions=True)
    model(**inputs_of(name))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "block_indices", "head_mask"])
def test_other_formulas(name, host):
    layer = host("llama").model.layers[0]
    convert(layer, "twicing")
    rotation = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(
        ValueError, match=f"LlamaAttention computes its attention with {name}, which is another formula"
    ):
        layer.self_attn(torch.randn(1, 3, 32), position_embeddings=rotation, **{name: torch.ones(4)})


def test_a_paged_cache(host):
    layer = host("llama").model.layers[0]
    convert(layer, "twicing")
    rotation = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="LlamaAttention got a paged cache, as continuous batching has it"):
        layer.self_attn(torch.randn(1, 3, 32), position_embeddings=rotation, cache=object())


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "twicing.adapters.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or later .*pip install 'twicing\[hf\]'"):
        importlib.import_module("twicing.adapters.transformers")


def test_a_mask_of_another_kind(host):
    layer = host("llama").model.layers[0]
    convert(layer, "twicing")
    rotation = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"needs a mask of the kind of 'sdpa' or 'eager', .*: got a Tensor \[1, 3\]"):
        layer.self_attn(torch.randn(1, 3, 32), rotation, torch.ones(1, 3))


def test_an_attention_implementation_that_was_changed_afterwards(host, inputs_of):
    model = host("llama")
    convert(model, "twicing")
    expected = model(**inputs_of("llama")).logits
    model.set_attn_implementation("eager")
    assert relative_rms(model(**inputs_of("llama")).logits, expected) < 2e-6
    AttentionInterface.register("someone_elses", lambda *a, **k: None)
    model.set_attn_implementation("someone_elses")
    with pytest.raises(ValueError, match="implementation is 'someone_elses' now, whose masks a converted layer cannot"):
        model(**inputs_of("llama"))


def test_attention_implementations_that_leave_no_room(host):
    named = host("llama", attn_implementation="twicing")
    with pytest.raises(ValueError, match="implementation is 'twicing', which twices every layer already"):
        convert(named, "twicing", layers=2)
    named.set_attn_implementation("sdpa")
    convert(named, "twicing", layers=2)
    AttentionInterface.register("someone_elses", lambda *a, **k: None)
    other = host("llama", attn_implementation="someone_elses")
    with pytest.raises(
        ValueError, match="implementation is 'someone_elses', whose masks a converted layer cannot read"
    ):
        convert(other, "twicing")


class TestByName:
    """attn_implementation="twicing" without a conversion: every layer at once, without a cache."""

    def test_all_layers_with_their_masks(self, host, inputs_of):
        tokens = inputs_of("llama")["input_ids"]
        mask = torch.tensor([[0, 0, 0] + [1] * 7, [1] * 10])
        model = host("llama")
        named = host("llama", attn_implementation="twicing")
        convert(model, "twicing")
        with torch.no_grad():
            ours = model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
            assert relative_rms(named(tokens, attention_mask=mask).logits[mask.bool()], ours) < 2e-6

    def test_a_cached_call_is_refused(self, host, inputs_of):
        named = host("llama", attn_implementation="twicing")
        with pytest.raises(ValueError, match=r"got 1 queries for 11 keys without residuals.*use_cache=False"):
            named.generate(inputs_of("llama")["input_ids"], max_new_tokens=3, do_sample=False)
        named.generate(inputs_of("llama")["input_ids"], max_new_tokens=3, do_sample=False, use_cache=False)

    def test_cross_attention_is_refused_by_its_module(self):
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, attn_implementation="twicing")
        )
        with pytest.raises(ValueError, match="serves self-attention only, and BartAttention is, or may be, cross"):
            model(torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[5, 6]]))

    def test_a_config_that_says_more_than_the_model_is(self, host, inputs_of):
        model = host("llama")
        convert(model, "twicing", layers=2)
        config = type(model.config).from_dict(model.config.to_dict())
        with pytest.raises(
            ValueError, match=r"says that it was converted, but .* spec=model\.config\.twicing\['spec'\]"
        ):
            LlamaForCausalLM(config)(**inputs_of("llama"))


def test_masks_come_for_our_name():
    from transformers import AttentionMaskInterface

    # Without its mask function a registered name gets no mask at all, and no error.
    assert "twicing" in AttentionMaskInterface._global_mapping


def test_a_bare_module_list(host):
    # The layers of a model without the model: counted within what is passed.
    layers = host("llama").model.layers[1:]
    assert isinstance(layers, nn.ModuleList)
    assert [site.path for site in find_sites(layers)] == ["0.self_attn", "1.self_attn"]


def test_a_difference_of_two_attentions_is_refused():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = DiffLlamaModel(DiffLlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=48))
    with pytest.raises(ValueError, match=r"DiffLlamaAttention, which subtracts one softmax attention from another"):
        convert(model, "twicing")


def test_attention_that_does_not_say_whether_it_is_causal_is_refused_without_a_mask(inputs_of):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = SplinterConfig(**sizes, intermediate_size=48, attn_implementation="twicing")
    with pytest.raises(ValueError, match=r"SplinterSelfAttention does not say whether it is causal.* with 'eager'"):
        SplinterModel(config)(**inputs_of("bert"))
