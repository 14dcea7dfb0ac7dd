"""Converted models of transformers against the dense formula in fp64, and what stays as it was."""

import copy
import pickle

import pytest
import torch
from dense_oracle import by_oracle, standard
from transformers import (
    BartConfig,
    BartModel,
    Gemma2Config,
    Gemma2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    SplinterConfig,
    SplinterModel,
    T5Config,
    T5Model,
)

from twicing.adapters.surgery import convert, describe, spec, undo
from twicing.analysis.capture import capture
from twicing.mechanisms import Mechanism
from twicing.testing import WRONG_FORMULAS, relative_rms

# Three layers in fp64; the host's own sums are in another order.
BUDGET = 1e-12
NAMES = ["gpt2", "llama", "bert", "vit", "deit"]


def double(model, inputs):
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_converted_model_equals_the_oracle_and_undo_restores_it(name, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    with torch.no_grad():
        untouched = model(**inputs)[0]
        expected = by_oracle(lambda: model(**inputs)[0])
        assert relative_rms(by_oracle(lambda: model(**inputs)[0], standard), untouched) < BUDGET
        job = convert(model, "twicing")
        assert relative_rms(model(**inputs)[0], expected) < BUDGET
        assert relative_rms(untouched, expected) > 1e3 * BUDGET
        job.undo()
        assert torch.equal(model(**inputs)[0], untouched)
    assert not {"twicing", "attn_implementation", "quantization_config"} & set(vars(model.config))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_the_oracle_rejects_wrong_formulas(wrong, name, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    wrong_output = by_oracle(lambda: model(**inputs)[0], lambda A, v: WRONG_FORMULAS[wrong](lambda x: A @ x, v))
    convert(model, "twicing")
    with torch.no_grad():
        assert relative_rms(model(**inputs)[0], wrong_output) > 1e3 * BUDGET


@pytest.mark.parametrize("name", NAMES)
def test_per_layer(name, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    calls = []

    def second_only(A, v):
        calls.append(1)
        return A @ v + A @ (v - A @ v) if len(calls) == 2 else A @ v

    expected = by_oracle(lambda: model(**inputs)[0], second_only)
    convert(model, "twicing", layers=2)
    assert spec(model)[0]["layers"] == [2]
    assert describe(model).count("->") == 1
    with torch.no_grad():
        assert relative_rms(model(**inputs)[0], expected) < BUDGET


def other_hosts():
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    seq2seq = {"vocab_size": 50, "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "pad_token_id": 0}
    vision = {k: sizes[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    heads = {"num_key_value_heads": 2}
    return {
        "gpt_neox": lambda: GPTNeoXModel(GPTNeoXConfig(**sizes)),
        "mistral, sliding window": lambda: MistralModel(MistralConfig(**sizes, **heads, sliding_window=4)),
        "opt": lambda: OPTModel(OPTConfig(**{**sizes, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3})),
        "qwen2": lambda: Qwen2Model(Qwen2Config(**sizes, **heads)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**vision, image_size=16, patch_size=4)),
        "t5 encoder": lambda: T5Model(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=3)).encoder,
        "bart encoder": lambda: BartModel(BartConfig(**seq2seq, decoder_layers=1)).encoder,
    }


@pytest.mark.parametrize("name", other_hosts())
def test_whatever_goes_through_the_attention_interface(name, inputs_of):
    torch.manual_seed(0)
    model, inputs = double(other_hosts()[name]().eval(), inputs_of("vit" if name == "siglip" else "gpt2"))
    expected = by_oracle(lambda: model(**inputs).last_hidden_state)
    convert(model, "twicing")
    with torch.no_grad():
        assert relative_rms(model(**inputs).last_hidden_state, expected) < BUDGET


def test_gqa_by_the_formula_of_the_paper(host, inputs_of):
    # The oracle above repeats heads as transformers does; here one layer is done by hand.
    model = host("llama").double()
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = model.model.rotary_emb(x, torch.arange(6)[None])
    convert(model, "twicing")
    with torch.no_grad():
        output = attention(x, position_embeddings=rotation)[0]
        cos, sin = (part.double() for part in rotation)

        def rotated(t):
            half = torch.cat([-t[..., 4:], t[..., :4]], dim=-1)
            return t * cos + half * sin

        q = rotated(attention.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2))
        k = rotated(attention.k_proj(x).unflatten(-1, (2, 8)).transpose(1, 2))
        v = attention.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        rows = []
        for head in range(4):
            A = (q[0, head] @ k[0, head // 2].T / 8**0.5).masked_fill(~torch.ones(6, 6).bool().tril(), -torch.inf)
            A = A.softmax(-1)
            rows.append((2 * A - A @ A) @ v[0, head // 2])
        by_hand = attention.o_proj(torch.cat(rows, dim=-1))
    assert relative_rms(output[0], by_hand) < BUDGET


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_retrofit_starts_at_the_pretrained_function_bit_for_bit(name, use_cache, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    if name in ("gpt2", "llama"):
        inputs["use_cache"] = use_cache
    with torch.no_grad():
        untouched = model(**inputs)[0]
        convert(model, "twicing", options={"gain": 0.0, "learn_gain": True})
        assert torch.equal(model(**inputs)[0], untouched)
    model(**inputs)[0].square().sum().backward()
    gains = [parameter for path, parameter in model.named_parameters() if path.endswith("twicing_mechanism.gain")]
    assert len(gains) == 3
    assert all(gain.grad.abs().min() > 0 for gain in gains)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_gradients_of_all_parameters(name, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    oracle = copy.deepcopy(model)
    from dense_oracle import DenseAttention

    with DenseAttention():
        oracle(**inputs)[0].square().sum().backward()
    convert(model, "twicing")
    model(**inputs)[0].square().sum().backward()
    for (path, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        elif theirs.grad.norm() > 1e-9:
            assert relative_rms(ours.grad, theirs.grad) < 1e-10, path


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_activation_checkpointing_changes_no_gradient(name, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    convert(model, "twicing")
    model.train()
    # Dropout is off in all of them but these.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    # The second is its name before transformers 5.23.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable()
    assert all(relative_rms(*pair) < 1e-10 for pair in zip(gradients(), expected, strict=True) if pair[1].norm() > 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_stay_converted(name, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    untouched = model(**inputs)[0]
    convert(model, "twicing", layers="2-3")
    output = model(**inputs)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs)[0], output)
        undo(other)
        assert torch.equal(other(**inputs)[0], untouched)
        assert not hasattr(other.config, "twicing")
    assert torch.equal(model(**inputs)[0], output)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_analysis_looks_inside(name, converted, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    if converted:
        convert(model, "twicing", layers=1)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        with capture(model) as captured:
            assert torch.equal(model(**inputs)[0], output[0])
    tokens = output.hidden_states[0].shape[1]
    for layer in (1, 2, 3):
        assert captured.tensor("attention output", layer).shape == (2, tokens, 32)
    # hidden_states[i] is what came out of block i; that of the last one is normalised.
    for layer in (1, 2):
        assert torch.equal(captured.tensor("block output", layer), output.hidden_states[layer])


class ReadsFirst(Mechanism):
    """A V of its own values, plus the values of layer 1: whoever gets other values is found out."""

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = () if layer == 1 else (1,)

    def forward(self, query, key, value, *, attn_mask, is_causal, scale, dropout_p, enable_gqa=False, context=None):
        # The argument holds more than this mechanism can tell apart: it says what it got.
        groups = query.shape[1] // value.shape[1]
        self.value = value
        self.first = None if self.layer == 1 else context.values(1)
        return (value if self.layer == 1 else value + context.values(1)).repeat_interleave(groups, 1)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_first_layer_arrive(name, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    convert(model, ReadsFirst)
    with torch.no_grad():
        model(**inputs)
    first, second, third = (m for m in model.modules() if isinstance(m, ReadsFirst))
    assert torch.equal(second.first, first.value)
    assert torch.equal(third.first, first.value)


def test_neutreno_in_a_host_of_transformers(host, inputs_of):
    model, inputs = double(host("bert"), inputs_of("bert"))
    values = []

    def neutreno(A, v):
        values.append(v)
        return A @ v + 0.6 * (values[0] - v)

    expected = by_oracle(lambda: model(**inputs)[0], neutreno)
    convert(model, "neutreno")
    with torch.no_grad():
        assert relative_rms(model(**inputs)[0], expected) < BUDGET


def gradients_under_checkpointing(model, inputs, how, enable):
    """The gradients of all parameters without checkpointing, and with it as enabled: transformers' own names for it."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    both = []
    for checkpointed in (False, True):
        if checkpointed:
            # The second is its name before transformers 5.23.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            next(getattr(model, name) for name in names if hasattr(model, name))(how)
            enable()
        model.zero_grad()
        model(**inputs)[0].square().sum().backward()
        both.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return both


@pytest.mark.parametrize("layers", ["all", "2-3"])
@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_first_layer_arrive_in_a_recomputation_too(name, layers, host, inputs_of):
    model, inputs = double(host(name), inputs_of(name))
    convert(model, "neutreno", layers=layers)
    expected, found = gradients_under_checkpointing(model, inputs, {"use_reentrant": False}, lambda: None)
    assert all(relative_rms(*pair) < 1e-10 for pair in zip(found, expected, strict=True) if pair[1].norm() > 1e-9)
    copied = copy.deepcopy(model)
    for converted in (model, copied):
        undo(converted)
        kept = [vars(module).get("_gradient_checkpointing_func") for module in converted.modules()]
        assert {type(function).__module__ for function in kept if function is not None} <= {"functools"}
        converted(**inputs)[0].sum().backward()


def test_a_reentrant_recomputation_is_refused_in_a_host_of_transformers(host, inputs_of):
    model, inputs = double(host("llama"), inputs_of("llama"))
    convert(model, "neutreno", layers="3")

    def only_the_reading_layer():
        for layer in model.model.layers[:2]:
            layer.gradient_checkpointing = False

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients_under_checkpointing(model, inputs, {"use_reentrant": True}, only_the_reading_layer)


class Wrapped(torch.nn.Module):
    """A projection with an adapter of low rank beside it, as LoRA has it; how wide it is, it does not say."""

    def __init__(self, projection, width):
        super().__init__()
        self.projection = projection
        self.down, self.up = torch.nn.Linear(width, 2), torch.nn.Linear(2, width)

    def forward(self, x):
        return self.projection(x) + self.up(self.down(x))


@pytest.mark.parametrize(("name", "wrapped"), [("llama", "o_proj"), ("gpt2", "c_proj"), ("bert", "dense")])
def test_projections_that_are_wrapped_after_the_conversion(name, wrapped, host, inputs_of):
    model, inputs = host(name), inputs_of(name)
    convert(model, "twicing", layers="2-3")
    before = spec(model)
    for path, projection in list(model.named_modules()):
        if path.rpartition(".")[2] == wrapped and "mlp" not in path and "att" in path:
            model.set_submodule(path, Wrapped(projection, 32))
    model(**inputs)
    assert spec(model) == before
    assert "3 attention layers, 2 converted" in describe(model)
    undo(model)
    model(**inputs)


def test_a_model_with_eager_attention(host, inputs_of):
    model, inputs = double(host("llama", attn_implementation="eager"), inputs_of("llama"))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    kept = mask.bool()
    reference = double(host("llama"), {})[0]
    expected = by_oracle(lambda: reference(**inputs, attention_mask=mask)[0])
    convert(model, "twicing")
    with torch.no_grad():
        assert relative_rms(model(**inputs, attention_mask=mask)[0][kept], expected[kept]) < BUDGET


def test_gemma2_caps_its_scores_and_is_refused():
    config = Gemma2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=48)
    config.vocab_size = 50
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is a .*Gemma2Attention, whose scores are capped"):
        convert(Gemma2Model(config), "twicing")


def test_without_a_mask_a_host_of_eager_attention_holds_nothing_back(inputs_of):
    # Splinter says nowhere that it is bidirectional: it serves "eager" only, which does not ask.
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = SplinterModel(SplinterConfig(**sizes, intermediate_size=48, initializer_range=0.3)).eval().double()
    inputs = inputs_of("bert")
    with torch.no_grad():
        untouched = model(**inputs)[0]
        convert(model, "standard")
        # The host's own softmax is in fp32.
        assert relative_rms(model(**inputs)[0], untouched) < 1e-6
