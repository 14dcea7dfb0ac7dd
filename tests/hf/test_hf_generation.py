"""Every step of a generation against the full forward: logits, never tokens, in fp32."""

import copy
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

from twicing.adapters.surgery import convert, undo
from twicing.adapters.transformers import twicing_cache
from twicing.adapters.transformers_decoding import attend, layer_with_residuals
from twicing.mechanisms import Standard, Twicing
from twicing.testing import relative_rms

# Relative RMS in fp32, as the issue asks.
BUDGET = 2e-6
PROMPT = torch.tensor([[5, 9, 17, 33, 8, 21, 40, 12], [7, 7, 30, 11, 49, 3, 26, 19]])
COMPILER = shutil.which("g++") is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])

HOW = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 3},
    "rejected guesses": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "static, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "several returned": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}


class Recorder(LogitsProcessor):
    """Keeps the tokens so far and the scores of the next one, in whatever order beams come."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        # Guesses are tried on made-up scores, all equal.
        if scores.std() > 0:
            self.steps.append((input_ids.clone(), scores.clone()))
        # The special tokens would end a sequence early.
        return scores.index_fill(-1, torch.tensor([0, 1, 2]), -1e9)


def generated(model, prompt=PROMPT, mask=None, new=6, **how):
    torch.manual_seed(3)
    recorder = Recorder()
    mask = torch.ones_like(prompt) if mask is None else mask
    model.generate(prompt, attention_mask=mask, max_new_tokens=new, logits_processor=[recorder], **how)
    return recorder.steps


def worst(model, steps, mask=None):
    """The largest relative RMS between what a step gave and the full forward of the same tokens."""
    errors = []
    for tokens, scores in steps:
        seen = torch.ones_like(tokens)
        if mask is not None:
            seen[:, : mask.shape[1]] = mask.repeat_interleave(len(tokens) // len(mask), 0)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            full = model(tokens, attention_mask=seen, position_ids=positions, use_cache=False).logits[:, -1]
        errors.append(relative_rms(scores.log_softmax(-1), full.log_softmax(-1)))
    return max(errors)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("how", HOW)
def test_every_step_is_the_full_forward(how, name, host):
    model = host(name)
    convert(model, "twicing")
    # Guesses are for one sequence.
    steps = generated(model, PROMPT[:1] if how == "rejected guesses" else PROMPT, **HOW[how])
    assert len(steps) >= 6
    assert worst(model, steps) < BUDGET
    undo(model)
    assert worst(model, steps) > 1e3 * BUDGET


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["greedy", "beam search", "chunked prefill", "static"])
def test_left_padded_batches(how, name, host):
    model = host(name)
    convert(model, "twicing", layers="2-3")
    steps = generated(model, mask=LEFT, **HOW[how])
    assert worst(model, steps, LEFT) < BUDGET
    # The padding matters: without its mask the same tokens give something else.
    assert worst(model, steps) > 1e3 * BUDGET


class NothingForNobody(TorchFunctionMode):
    """SDPA as some devices have it: NaN for a query that may attend to nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention or len(args) < 4 or args[3] is None:
            return output
        return output.masked_fill(~args[3].any(-1, keepdim=True), torch.nan)


def test_padding_tokens_poison_nobody(host):
    model = host("llama")
    convert(model, "twicing")
    expected = generated(model, mask=LEFT)
    with NothingForNobody():
        steps = generated(model, mask=LEFT)
    for (_, scores), (_, others) in zip(steps, expected, strict=True):
        assert torch.equal(scores, others)


@pytest.mark.parametrize("how", ["greedy", "static"])
def test_a_host_with_eager_attention(how, host):
    model = host("llama", attn_implementation="eager")
    convert(model, "twicing")
    assert worst(model, generated(model, mask=LEFT, **HOW[how]), LEFT) < BUDGET


def test_bert_as_a_decoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=48, is_decoder=True, initializer_range=0.3, pad_token_id=0)
    model = BertLMHeadModel(config).eval()
    convert(model, "twicing")
    for how in ("greedy", "beam search"):
        assert worst(model, generated(model, eos_token_id=2, **HOW[how])) < BUDGET


def test_left_padding_changes_nothing_for_the_tokens_after_it(host):
    model = host("llama")
    convert(model, "twicing")
    padded = generated(model, mask=LEFT)
    alone = generated(model, PROMPT[:1, 3:])
    for (_, one), (_, other) in zip(padded, alone, strict=True):
        assert relative_rms(one[:1], other) < 3 * BUDGET


@pytest.mark.parametrize("options", [{"gain": 0.4}, {"gain": -0.5, "learn_gain": True}, {"order": 1}])
def test_other_gains_and_orders(options, host):
    model = host("llama")
    convert(model, "twicing", options=options)
    if "learn_gain" in options:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.twicing_mechanism.gain.copy_(torch.tensor([0.1, 0.9, -0.3, 1.4]))
    for how in ("greedy", "static", "beam search"):
        assert worst(model, generated(model, **HOW[how])) < BUDGET


def test_the_standard_mechanism_generates_as_the_host(host):
    model = host("llama")
    before = generated(model)
    convert(model, "standard")
    for (tokens, scores), (same, others) in zip(before, generated(model), strict=True):
        assert torch.equal(tokens, same)
        assert torch.equal(scores, others)


def sliding(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    return MistralForCausalLM(MistralConfig(**sizes, **more, sliding_window=5, **changes)).eval()


@pytest.mark.parametrize("how", ["greedy", "beam search", "chunked prefill", "rejected guesses"])
def test_a_sliding_window(how):
    model = sliding()
    convert(model, "twicing")
    prompt = PROMPT[:1] if how == "rejected guesses" else PROMPT
    assert worst(model, generated(model, prompt, new=12, **HOW[how])) < BUDGET


def test_a_sliding_window_of_fixed_size_needs_another_cache():
    model = sliding()
    convert(model, "twicing")
    with pytest.raises(ValueError, match=r"a StaticSlidingWindowLayer, which keeps no residuals\. .*twicing_cache\("):
        generated(model, **HOW["static"])
    steps = generated(model, new=12, past_key_values=twicing_cache(model, 24))
    assert worst(model, steps) < BUDGET


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_chunks_of_any_size_by_hand(name, host):
    model = host(name)
    convert(model, "twicing")
    tokens = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        for sizes in ([40], [1] * 40, [17, 20, 1, 2], [3, 30, 7]):
            for cache in (DynamicCache(), twicing_cache(model), twicing_cache(model, 64)):
                outputs = []
                for chunk in tokens.split(sizes, dim=1):
                    outputs.append(model(chunk, past_key_values=cache).logits)
                assert relative_rms(torch.cat(outputs, 1), full) < BUDGET


def test_a_static_cache_can_be_used_again(host):
    model = host("llama")
    convert(model, "twicing")
    cache = twicing_cache(model, 24)
    first = generated(model, past_key_values=cache)
    stores = [layer.residuals.data_ptr() for layer in cache.layers]
    cache.reset()
    # What a compiled step was made for stays where it is.
    assert [layer.residuals.data_ptr() for layer in cache.layers] == stores
    assert not any(layer.residuals.any() for layer in cache.layers)
    again = generated(model, PROMPT.flip(0), past_key_values=cache)
    assert worst(model, again) < BUDGET
    assert not torch.equal(first[0][1], again[0][1])


def counting(graphs):
    """A backend of torch.compile that keeps the graphs it gets, and runs them as they are."""

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    return backend


def test_static_cache_with_torch_compile(host):
    model = host("llama", num_hidden_layers=2)
    convert(model, "twicing", options={"gain": 0.7})
    tokens = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(4))
    cache, graphs = twicing_cache(model, 16), []
    step = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=False)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        # As transformers does it: the prompt in eager mode, the steps compiled.
        outputs = [model(tokens[:, :6], past_key_values=cache).logits]
        outputs += [step(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(6, 12)]
    assert relative_rms(torch.cat(outputs, 1), full) < BUDGET
    # One graph serves all steps: the length is a tensor.
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="inductor needs g++ and Python's headers on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_static_cache_compiled_by_inductor(host, monkeypatch, tmp_path):
    """As a user compiles it; what inductor reorders in fp32 is within the same budget."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = host("llama", num_hidden_layers=2)
    convert(model, "twicing", options={"gain": 0.7})
    tokens = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(4))
    cache = twicing_cache(model, 16)
    step = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        outputs = [model(tokens[:, :6], past_key_values=cache).logits]
        outputs += [step(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(6, 10)]
    assert relative_rms(torch.cat(outputs, 1), full) < BUDGET


@pytest.mark.slow
def test_a_compiled_prompt(host):
    model = host("llama", num_hidden_layers=2)
    convert(model, "twicing")
    tokens = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(4))
    cache, graphs = twicing_cache(model, 16), []
    step = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=False)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        # A first prompt outside the graph makes room for residuals.
        model(tokens[:, :6], past_key_values=cache)
        cache.reset()
        outputs = [step(chunk, past_key_values=cache).logits for chunk in tokens.split([6, 1, 1], 1)]
    assert relative_rms(torch.cat(outputs, 1), full) < BUDGET
    assert len(graphs) == 2


def seq2seq():
    torch.manual_seed(0)
    bart = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}
    t5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return {
        "bart": BartForConditionalGeneration(BartConfig(**bart, **heads, decoder_start_token_id=2)).eval(),
        "t5": T5ForConditionalGeneration(T5Config(**t5, decoder_start_token_id=0)).eval(),
    }


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoders_with_cross_attention(name, beams):
    model = seq2seq()[name]
    decoder = model.model.decoder if name == "bart" else model.decoder
    before = generated(model, num_beams=beams)[0][1]
    convert(decoder, "twicing")
    steps = generated(model, num_beams=beams)
    for tokens, scores in steps:
        with torch.no_grad():
            source = PROMPT.repeat_interleave(beams, 0)
            full = model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        assert relative_rms(scores.log_softmax(-1), full.log_softmax(-1)) < BUDGET
    # A single token attends to itself only, and twicing changes nothing.
    assert relative_rms(steps[0][1], before) < BUDGET


def prefilled(model, cache):
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    return cache


def refused(model, cache, match, tokens=PROMPT[:, :1]):
    with pytest.raises(ValueError, match=match), torch.no_grad():
        model(tokens, past_key_values=cache)


def test_a_cache_that_was_filled_before_the_conversion_is_refused(host):
    model = host("llama")
    cache = prefilled(model, DynamicCache(config=model.config))
    static = prefilled(model, StaticCache(config=model.config, max_cache_len=16))
    convert(model, "twicing", layers="2-3")
    refused(model, cache, "layer 2 got a cache that holds 8 tokens without their residuals.*start a new one")
    refused(model, static, "layer 2 got a cache that holds 8 tokens without their residuals")


def test_a_cache_of_another_conversion_is_refused(host):
    model = host("llama")
    convert(model, "twicing")
    cache = prefilled(model, DynamicCache())
    undo(model)
    convert(model, "twicing", options={"gain": 0.5})
    refused(model, cache, r"order and gain \(2, 1\.0\), and is to go on with \(2, 0\.5\)")


def test_a_cache_that_an_unconverted_model_went_on_with_is_refused(host):
    model = host("llama")
    convert(model, "twicing")
    cache = prefilled(model, DynamicCache())
    undo(model)
    with torch.no_grad():
        model(PROMPT[:, :1], past_key_values=cache)
    convert(model, "twicing")
    refused(model, cache, "got keys and values without their residuals")


def test_a_cache_given_on_without_residuals_is_refused(host):
    model = host("llama")
    convert(model, "twicing")
    cache = prefilled(model, DynamicCache())
    refused(model, DynamicCache([(k, v) for k, v, _ in cache]), "holds 8 tokens without their residuals")


def test_a_quantised_cache_is_refused(host):
    class MyLayer(DynamicLayer):
        pass

    model = host("llama")
    convert(model, "twicing")
    cache = DynamicCache()
    cache.layer_class_to_replicate = MyLayer
    refused(model, cache, r"layer 1 got a cache whose layer is a MyLayer, which keeps no residuals")
    assert QuantizedCache is not DynamicCache


def test_a_host_that_does_not_use_the_cache_it_hands_on_is_refused(host):
    # Layers that share keys and values read those of another layer, and put none into the cache.
    model = host("llama")
    convert(model, "twicing")
    attention, q = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 8)
    layer = layer_with_residuals(DynamicCache(), attention, attention.twicing_mechanism)
    with pytest.raises(ValueError, match="did not put keys and values of these tokens into its cache"):
        attend(layer, q, q[:, :2], q[:, :2], None, True, None, 1.0)
    layer.update(q[:, :2], q[:, :2])
    attend(layer, q, q[:, :2], q[:, :2], None, True, None, 1.0)


@pytest.mark.parametrize(
    ("size", "match"), [(None, "3 new tokens after 4 cached ones"), (16, "what is not filled yet")]
)
def test_several_tokens_after_cached_ones_need_a_mask(size, match, host):
    # As where somebody runs a layer by itself: nothing would keep the new tokens from those after them.
    model = host("llama")
    convert(model, "twicing")
    attention, cache = model.model.layers[0].self_attn, twicing_cache(model, size)

    def step(tokens):
        rotation = (torch.ones(1, tokens, 8), torch.zeros(1, tokens, 8))
        attention(torch.randn(1, tokens, 32), position_embeddings=rotation, past_key_values=cache)

    step(4)
    with pytest.raises(ValueError, match=match):
        step(3)


def test_something_else_as_a_cache_is_refused(host):
    model = host("llama")
    convert(model, "twicing")
    attention = model.model.layers[1].self_attn
    with pytest.raises(ValueError, match="layer 2 got a list as its cache"):
        attention(torch.randn(1, 3, 32), past_key_values=[1])


@pytest.mark.parametrize(("mechanism", "options"), [("neutreno", {}), ("twicing", {"order": 3})])
def test_mechanisms_without_a_rule_for_cached_decoding_are_refused(mechanism, options, host):
    model = host("llama")
    convert(model, mechanism, layers="2-3", options=options)
    with pytest.raises(ValueError, match="has no rule for cached decoding: use_cache=False runs the whole sequence"):
        generated(model)
    assert worst(model, generated(model, use_cache=False)) < BUDGET


class MyTwicing(Twicing):
    """Twicing's options, and another formula."""

    def forward(self, query, key, value, **options):
        return Standard(1, 1, 1)(query, key, -value, **options)


def test_a_subclass_has_no_rule_of_its_parents(host):
    model = host("llama")
    convert(model, MyTwicing)
    with pytest.raises(ValueError, match=r"MyTwicing .* has no rule for cached decoding"):
        generated(model)


def test_training_with_dropout_fills_a_cache_that_cannot_go_on(host):
    model = host("llama", attention_dropout=0.5)
    convert(model, "twicing")
    cache = DynamicCache()
    model.train()(PROMPT, past_key_values=cache).logits.sum().backward()
    model.eval()
    refused(model, cache, "This cache was filled with dropout")
    model.train()
    good = DynamicCache()
    prefilled(model.eval(), good)
    refused(model.train(), good, "This cache was filled with dropout")


def test_cropping_reordering_and_selecting_keep_residuals_with_their_tokens(host):
    model = host("llama")
    convert(model, "twicing")
    with torch.no_grad():
        cache = prefilled(model, DynamicCache())
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        kept = copy.deepcopy(cache)
        tokens = torch.cat([PROMPT.flip(0)[:, :5], torch.tensor([[4, 6], [9, 9]])], 1)
        full = model(tokens, use_cache=False).logits[:, -2:]
        assert relative_rms(model(tokens[:, 5:], past_key_values=cache).logits, full) < BUDGET
        assert relative_rms(model(tokens[:, 5:], past_key_values=kept).logits, full) < BUDGET
        cache.reset()
        full = model(PROMPT, use_cache=False).logits
        assert relative_rms(model(PROMPT, past_key_values=cache).logits, full) < BUDGET


def test_a_cache_of_fixed_size_reorders_residuals_with_their_tokens(host):
    model = host("llama")
    convert(model, "twicing")
    cache = prefilled(model, twicing_cache(model, 12))
    cache.reorder_cache(torch.tensor([1, 0]))
    tokens = torch.cat([PROMPT.flip(0), torch.tensor([[4, 6], [9, 9]])], 1)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits[:, -2:]
        assert relative_rms(model(tokens[:, 8:], past_key_values=cache).logits, full) < BUDGET


def test_a_cache_that_is_reset_forgets_why_it_could_not_go_on(host):
    model = host("llama", attention_dropout=0.5)
    convert(model, "twicing")
    cache = DynamicCache()
    model.train()(PROMPT, past_key_values=cache)
    cache.reset()
    model.eval()
    with torch.no_grad():
        full = model(PROMPT, use_cache=False).logits
        steps = [model(chunk, past_key_values=cache).logits for chunk in PROMPT.split([5, 3], 1)]
    assert relative_rms(torch.cat(steps, 1), full) < BUDGET


@pytest.mark.parametrize("size", [None, 16])
def test_a_mask_for_each_head_where_heads_share_keys(size, host):
    model = host("llama")
    convert(model, "twicing")
    allowed = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)) > 0.4
    allowed = (allowed | torch.eye(8, dtype=torch.bool)).tril()
    room = torch.nn.functional.pad(allowed, (0, (size or 8) - 8))
    cache, done, steps = twicing_cache(model, size), 0, []
    with torch.no_grad():
        full = model(PROMPT, attention_mask=allowed, use_cache=False).logits
        for chunk in PROMPT.split([3, 1, 4], 1):
            new = slice(done, done + chunk.shape[1])
            done = new.stop
            seen = room[:, :, new, : size or done]
            positions = torch.arange(new.start, new.stop)[None]
            steps.append(model(chunk, attention_mask=seen, position_ids=positions, past_key_values=cache).logits)
    assert relative_rms(torch.cat(steps, 1), full) < BUDGET


def test_gradients_flow_through_a_growing_cache(host):
    model = host("llama").double()
    convert(model, "twicing")
    weight = model.model.layers[0].self_attn.v_proj.weight
    full = model(PROMPT, use_cache=False).logits.square().mean()
    (expected,) = torch.autograd.grad(full, weight)
    cache = DynamicCache()
    steps = [model(chunk, past_key_values=cache).logits for chunk in PROMPT.split([5, 1, 2], 1)]
    (got,) = torch.autograd.grad(torch.cat(steps, 1).square().mean(), weight)
    assert relative_rms(got, expected) < 1e-10


def test_autocast_and_bf16_decode_near_the_full_forward(host):
    model = host("llama")
    convert(model, "twicing")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps = generated(model)
        assert worst(model, steps) < 0.02
    half = host("llama").to(torch.bfloat16)
    convert(half, "twicing")
    assert worst(half, generated(half)) < 0.05
