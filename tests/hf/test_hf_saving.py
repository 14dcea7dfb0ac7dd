"""save_pretrained() and from_pretrained(): what is loaded is what was saved, or loading raises."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from twicing import torchvision_import
from twicing.adapters.surgery import convert, describe, spec, undo
from twicing.mechanisms import Standard
from twicing.testing import relative_rms

TOKENS = torch.tensor([[5, 9, 17, 33, 8, 21, 40, 12]])
GAINS = torch.tensor([0.1, -0.2, 0.3, 1.4])

# Progress bars and reports of transformers go to standard error and are not looked at.
WITHOUT = """
import runpy, sys
sys.modules["twicing"] = None
# Beside a torch without CUDA, torchvision has to be mended; the file that does it imports nothing of the library.
mend = runpy.run_path(sys.argv[2])
mend["mend_torchvision_import"]()
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for kind in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
    except ValueError as error:
        print("refused", "twicing" in str(error))
"""
WITH = """
import sys, torch
import twicing.adapters.transformers
from transformers import AutoModelForCausalLM
first, second, answers = sys.argv[1:]
tokens = torch.tensor([[5, 9, 17, 33, 8, 21, 40, 12]])
model = AutoModelForCausalLM.from_pretrained(first)
model.save_pretrained(second)
again = AutoModelForCausalLM.from_pretrained(second)
with torch.no_grad():
    torch.save([model(tokens).logits, again(tokens).logits], answers)
print(twicing.spec(model) == twicing.spec(again), model.training)
"""


@pytest.fixture
def converted(host):
    """A Llama whose layer 2 has learned gains, whose layer 3 has the paper's, and whose layer 1 is its own."""
    model = host("llama")
    convert(model, "twicing", layers=2, options={"learn_gain": True})
    convert(model, "twicing", layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.twicing_mechanism.gain.copy_(GAINS)
    return model


def run(program, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_a_process_without_twicing_refuses_to_load(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    assert run(WITHOUT, tmp_path, torchvision_import.__file__)[:2] == ["refused True", "refused True"]


def test_a_process_with_twicing_loads_saves_and_loads_again(converted, tmp_path):
    converted.save_pretrained(tmp_path / "first")
    said = run(WITH, tmp_path / "first", tmp_path / "second", tmp_path / "answers.pt")
    assert said[0] == "True False"
    with torch.no_grad():
        expected = converted(TOKENS).logits
    for logits in torch.load(tmp_path / "answers.pt", weights_only=True):
        assert torch.equal(logits, expected)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config == json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["attn_implementation"] == "twicing"
    assert config["twicing"] == {"spec": spec(converted), "layers": 3}


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
def test_loading_here(kind, converted, tmp_path):
    converted.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert describe(loaded) == describe(converted)
    assert torch.equal(loaded(TOKENS).logits, converted(TOKENS).logits)
    assert torch.equal(loaded.model.layers[1].self_attn.twicing_mechanism.gain, GAINS)
    # Nothing says that it is quantised, and it trains.
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not getattr(loaded, "is_quantized", False)
    loaded.train()(TOKENS).logits.sum().backward()
    assert loaded.model.layers[1].self_attn.twicing_mechanism.gain.grad is not None
    undo(loaded)
    undo(converted)
    assert torch.equal(loaded.eval()(TOKENS).logits, converted(TOKENS).logits)


def test_the_part_without_the_head(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS)[0], converted.model(TOKENS)[0])


def test_a_part_that_shares_the_config_of_the_whole(host, tmp_path):
    model = host("llama")
    convert(model.model, "twicing")
    model.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "deit"])
def test_other_hosts(name, host, inputs_of, tmp_path):
    model, inputs = host(name), inputs_of(name)
    convert(model, "twicing", layers="1,3", options={"gain": 0.5})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert spec(loaded) == spec(model)
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


class Remembering(Standard):
    """A mechanism with a buffer that is not saved, and one that is."""

    def __init__(self, layer, num_heads, head_dim, *, start=2.0):
        super().__init__(layer, num_heads, head_dim)
        self.register_buffer("constant", torch.full((num_heads,), start), persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, query, key, value, **options):
        self.count += 1
        return self.constant.view(-1, 1, 1) * super().forward(query, key, value, **options)


def test_what_a_mechanism_is_made_of_besides_weights(host, inputs_of, tmp_path):
    model, inputs = host("bert"), inputs_of("bert")
    convert(model, "test_hf_saving:Remembering", layers=2, options={"start": 3.0})
    expected = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    mechanism = loaded.encoder.layer[1].attention.self.twicing_mechanism
    assert torch.equal(mechanism.constant, torch.full((4,), 3.0))
    assert mechanism.count == 1
    assert torch.equal(loaded(**inputs)[0], expected)


def test_a_mechanism_that_reads_earlier_layers(host, inputs_of, tmp_path):
    model, inputs = host("bert"), inputs_of("bert")
    convert(model, "neutreno")
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs)[0], model(**inputs)[0])


def test_learned_gains_stay_in_fp32_whatever_the_model_is_loaded_in(converted, tmp_path):
    gain = torch.tensor([0.1001, 0.2002, 0.3003, 0.4004])
    with torch.no_grad():
        converted.model.layers[1].self_attn.twicing_mechanism.gain.copy_(gain)
    converted.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.lm_head.weight.dtype == dtype
        assert torch.equal(loaded.model.layers[1].self_attn.twicing_mechanism.gain, gain)
        loaded.save_pretrained(tmp_path / "half")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "half")
        assert torch.equal(again.model.layers[1].self_attn.twicing_mechanism.gain, gain)


def test_with_another_attention_implementation_for_the_rest(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    eager = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert relative_rms(eager(TOKENS).logits, converted(TOKENS).logits) < 2e-6
    assert spec(eager) == spec(converted)


def test_undo_leaves_a_folder_like_any_other(converted, host, tmp_path):
    undo(converted)
    converted.save_pretrained(tmp_path / "ours")
    host("llama").save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_undoing_one_of_two_conversions(host, tmp_path):
    model = host("llama")
    first = convert(model, "twicing", layers="1-2")
    convert(model, "standard", layers=3)
    first.undo()
    model.save_pretrained(tmp_path)
    assert [entry["mechanism"] for entry in model.config.twicing["spec"]] == ["standard"]
    assert spec(LlamaForCausalLM.from_pretrained(tmp_path)) == spec(model)


def test_weights_without_the_gains_are_refused(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.twicing_mechanism.gain"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    match = r"The saved weights lack model\.layers\.1\.self_attn\.twicing_mechanism\.gain, which"
    with pytest.raises(ValueError, match=match):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_config_without_the_spec_is_refused(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["twicing"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was converted by twicing, but not how: the entry 'twicing' is missing"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_model_made_from_the_config_alone_does_not_run_as_standard_attention(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="says that it was converted, but the model was made from it without that"):
        model(TOKENS)


def refused_at_saving(model, folder, match):
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))


def test_a_slice_of_the_layers_is_refused_at_saving(host, tmp_path):
    model = host("llama")
    convert(model.model.layers[1:], "twicing")
    refused_at_saving(model, tmp_path, "A part with 2 attention layers was converted, and LlamaForCausalLM has 3")


def test_one_of_two_stacks_is_refused_at_saving(tmp_path):
    sizes = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = BartForConditionalGeneration(BartConfig(**sizes))
    convert(model.model.encoder, "twicing")
    refused_at_saving(model, tmp_path, "cannot be saved so that from_pretrained.. finds it: .* 2 separate stacks")
    undo(model.model.encoder)
    model.save_pretrained(tmp_path)


def two_configs():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {**text, "image_size": 16, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=vision))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    return {"clip": (clip, clip.vision_model), "t5": (t5, t5.encoder)}


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_part_with_a_config_of_its_own_is_refused_at_saving(name, tmp_path):
    model, part = two_configs()[name]
    convert(part, "twicing")
    refused_at_saving(model, tmp_path, "was converted in a part that has a config of its own")
    # The state dict is still there for whoever keeps the spec beside it.
    assert len(model.state_dict()) > 0
    undo(part)
    model.save_pretrained(tmp_path)


def test_a_mechanism_without_a_name_is_refused_at_saving(host, tmp_path):
    model = host("llama")
    convert(model, lambda layer, num_heads, head_dim: Standard(layer, num_heads, head_dim))
    refused_at_saving(model, tmp_path, "cannot be found by its name")


def of_one_config(host):
    first = host("llama").eval()
    return first, LlamaForCausalLM(first.config).eval()


@pytest.mark.parametrize("layers", [None, 1])
def test_a_model_with_the_config_of_one_that_was_converted_otherwise_is_refused_at_saving(layers, host, tmp_path):
    # It would be loaded as the other was converted.
    model, other = of_one_config(host)
    if layers is not None:
        convert(model, "twicing", layers=layers)
    job = convert(other, "twicing", layers=2)
    refused_at_saving(model, tmp_path, "another model was made from the same config object: undo the conversion of")
    job.undo()
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert spec(loaded) == spec(model)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_models_of_one_config_that_were_converted_alike_are_saved(host, tmp_path):
    for model in (models := of_one_config(host)):
        convert(model, "twicing", layers="2-3")
    for model in models:
        model.save_pretrained(tmp_path)
        assert spec(LlamaForCausalLM.from_pretrained(tmp_path)) == spec(model)


def test_a_model_made_from_the_config_and_converted_by_it_is_saved_and_loaded(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")
    convert(model, spec=model.config.twicing["spec"])
    model.save_pretrained(tmp_path)
    assert spec(LlamaForCausalLM.from_pretrained(tmp_path)) == spec(converted)
