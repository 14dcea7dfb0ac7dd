"""twicing diagnose on folders of transformers: text and pictures, converted or not, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from saved_transformers import TOKENS, save_bert, save_tokenizer, save_vit

from twicing.adapters.surgery import convert, spec
from twicing.analysis.capture import BLOCK_OUTPUT
from twicing.analysis.collapse import ATTENTION, ENTROPY, RANK
from twicing.experiments.diagnose.cases import cases_of
from twicing.experiments.diagnose.diagnosis import diagnose_case
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.run import run

WINDOWS = 5


@pytest.fixture(scope="module")
def bert(hf, tmp_path_factory):
    return save_bert(hf, tmp_path_factory.mktemp("hf") / "tiny-bert")


@pytest.fixture(scope="module")
def vit(hf, tmp_path_factory):
    return save_vit(hf, tmp_path_factory.mktemp("hf") / "tiny-vit")


def quick(folder, **changes):
    return replace(Diagnose(str(folder), inputs=WINDOWS, draws=1, batch_size=2, device="cpu"), **changes)


def diagnosis_of(options):
    (case,), _, _ = cases_of(options)
    keep = lambda _share: None  # noqa: E731
    return diagnose_case(case, draws=1, seed=0, batch_size=2, device=torch.device("cpu"), progress=keep)


def test_windows_of_a_text_and_the_states_of_the_model(hf, llama):
    found = diagnosis_of(quick(llama, tokens=64))
    # The model takes no more than 16 tokens.
    source = "Python's documentation of its own language, as no --text was given"
    assert found.inputs.words == f"5 windows of {TOKENS} tokens from {source}"
    ids = found.inputs.load(range(WINDOWS))
    assert ids.shape == (WINDOWS, TOKENS)
    network = hf.AutoModel.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        states = network(input_ids=ids, output_hidden_states=True, output_attentions=True)
    # hidden_states[1] is what the first block puts out; after the last one comes the norm.
    tokens = states.hidden_states[1].double()
    for place, one in enumerate(tokens):
        singular = torch.linalg.svdvals(one - one.mean(0))
        share = singular[singular > 1e-9] / singular.sum()
        rank = float(torch.special.entr(share).sum().exp())
        assert float(found.model.values[BLOCK_OUTPUT, RANK][place, 0]) == pytest.approx(rank, rel=1e-3)
    for layer, weights in enumerate(states.attentions):
        entropy = torch.special.entr(weights.double()).sum(-1).mean((1, 2))
        torch.testing.assert_close(found.model.values[ATTENTION, ENTROPY][:, layer], entropy, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.model.values[BLOCK_OUTPUT, RANK], found.draws[0].values[BLOCK_OUTPUT, RANK])


def test_draws_are_fresh_and_follow_the_seed_alone(llama):
    (case,), _, _ = cases_of(quick(llama, convert="twicing", layers="2-3"))
    first, again, other = (case.draw(seed).network for seed in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.layers[0].mlp.up_proj.weight, other.layers[0].mlp.up_proj.weight)
    built = case.build().network
    assert not torch.equal(first.layers[0].mlp.up_proj.weight, built.layers[0].mlp.up_proj.weight)
    assert [entry["layers"] for entry in spec(first)] == [entry["layers"] for entry in spec(built)] == [[2, 3]]
    assert first.embed_tokens.weight.dtype == built.embed_tokens.weight.dtype == torch.float32


def test_a_converted_model_is_seen_at_its_mechanisms(llama):
    plain, twiced = (diagnosis_of(quick(llama, **c)).model for c in ({}, {"convert": "twicing", "layers": "2-3"}))
    for layer, same in ((0, True), (1, False), (2, False)):
        pair = [one.values["attention output", RANK][:, layer] for one in (plain, twiced)]
        assert torch.equal(*pair) == same
    # A of layer 2 is that of the plain model: the first layer that is converted sees the same tokens.
    entropies = [one.values[ATTENTION, ENTROPY][:, 1] for one in (plain, twiced)]
    torch.testing.assert_close(*entropies)


def test_a_folder_that_was_saved_converted_is_diagnosed_as_such(hf, llama, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    convert(model, "twicing", layers="3", options={"gain": 0.5})
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "saved", special=False)
    (case,), _, _ = cases_of(quick(tmp_path / "saved"))
    expected = [{"mechanism": "twicing", "layers": [3], "options": spec(model)[0]["options"]}]
    assert spec(case.build()) == spec(case.draw(1)) == expected
    # Its config says the same once, not beside what the folder's says.
    assert case.draw(1).network.config.twicing["spec"] == expected
    assert (case.mechanism, case.layers) == ("twicing", "3")
    assert diagnosis_of(quick(tmp_path / "saved")).model.layers == 3


def test_special_tokens_are_in_every_window_of_an_encoder(bert, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the name of a class is the value of that object and it is in a function " * 12)
    found = diagnosis_of(quick(bert, text=text, tokens=20))
    ids = found.inputs.load(range(WINDOWS))
    assert ids.shape == (WINDOWS, 20)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    assert (ids[:, 1:-1] > 2).all()
    assert found.inputs.words == f"5 windows of 20 tokens from the text {text}"
    assert found.model.tokens == 20


def test_pictures_are_normalised_as_the_folder_says(vit):
    (case,), folder, notes = cases_of(quick(vit))
    model = case.build()
    assert model.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])
    found = diagnosis_of(quick(vit))
    assert (found.model.tokens, found.model.width, found.model.layers) == (17, 24, 2)
    assert "two sample photographs" in found.inputs.words
    assert (str(folder), notes) == ("runs/diagnose-tiny-vit", [])


def test_the_command_writes_its_files(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("twicing.experiments.diagnose.run.diagnosis_page", lambda *_: "")
    run(quick(llama, out=tmp_path), "twicing diagnose tiny-llama", Console(quiet=True))
    found = json.loads((tmp_path / "diagnosis.json").read_text())["models"][0]
    assert found["label"] == "tiny-llama"
    assert "model.safetensors" in found["weights"]
    # The first token of a causal layer attends to itself alone.
    assert 0 < found["curves"][-1]["mean"] <= 1


def test_what_is_missing_is_told_in_a_sentence(llama, vit, tmp_path):
    def without(folder, *names):
        copied = tmp_path / "-".join(["without", *names])
        copied.mkdir()
        for path in folder.iterdir():
            if not path.name.startswith(names):
                (copied / path.name).write_bytes(path.read_bytes())
        return copied

    for folder, names, sentence in (
        (llama, ("tokenizer",), "holds no tokenizer"),
        (llama, ("model.safetensors",), "holds no weights"),
        (vit, ("preprocessor",), "does not say how pictures are normalised"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cases_of(quick(without(folder, *names)))
    broken = without(llama, "nothing")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"transformers cannot load .*without-nothing: "):
        cases_of(quick(broken))
    for options, sentence in (
        (quick(llama, images=tmp_path), "is a model of text: leave --images out"),
        (quick(vit, text=tmp_path), "is a model of pictures: leave --text out"),
        (quick(llama, pretrained=True, seeds=(1,)), "is a folder of transformers: leave --pretrained, --seeds out"),
        (quick(llama, text=tmp_path / "no.txt"), "is no file: give a text in UTF-8"),
        (quick(llama, layers="2"), "name it with --convert"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cases_of(options)


def test_weights_that_would_be_random_are_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of LlamaModel \(layers\.1\.mlp\.up_proj\.weight, 1 in all\)"):
        cases_of(quick(tmp_path))


def test_a_text_that_is_too_short_or_no_text_is_told(llama, tmp_path):
    (tmp_path / "short.txt").write_text("the name of it " * 6)
    with pytest.raises(ValueError, match=r"short\.txt gives too few windows of 16 tokens \(1\): .*a longer text"):
        cases_of(quick(llama, text=tmp_path / "short.txt"))
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        cases_of(quick(llama, text=tmp_path / "latin.txt"))
