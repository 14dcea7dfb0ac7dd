"""twicing analyze on folders of transformers: text with and without a next word, pictures, and what is refused."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from saved_transformers import TOKENS, save_bert, save_tokenizer, save_vit

from twicing.adapters.surgery import convert, spec
from twicing.experiments.analyze import run as run_module
from twicing.experiments.analyze.keep import read_analysis
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.run import run
from twicing.experiments.analyze.subjects import looked_at
from twicing.experiments.cases.hugging_face import NextToken

COUNT = 4


@pytest.fixture(scope="module")
def vit(hf, tmp_path_factory):
    return save_vit(hf, tmp_path_factory.mktemp("hf") / "tiny-vit", classes=5, pixels=48)


@pytest.fixture
def no_page(monkeypatch):
    """Numbers only: drawing takes longer than measuring."""
    monkeypatch.setattr(run_module, "read_section", lambda folder: None)
    monkeypatch.setattr(run_module, "write_page", lambda folder, section: folder / "analysis.html")
    monkeypatch.setattr(run_module, "print_results", lambda section, console: None)


def quick(folder, **changes):
    options = Analyze((str(folder),), spectrum_images=1, map_images=1, bandwidth_images=COUNT, device="cpu")
    return replace(options, **changes)


def analyzed(options, out):
    run(replace(options, out=out), "twicing analyze", Console(file=io.StringIO()))
    return read_analysis(out)


def test_a_language_model_says_the_last_token_of_each_window(hf, llama, tmp_path, no_page):
    found = analyzed(quick(llama), tmp_path)
    assert list(found.models) == ["tiny-llama"]
    about = found.models["tiny-llama"]
    assert (about["seed"], about["causal"], about["layers"], about["tokens"]) == (None, True, 3, TOKENS)
    assert found.about["shown"].startswith(f"4 windows of {TOKENS} tokens from Python's documentation")
    (looked,), folder, left_out = looked_at(quick(llama))
    assert (str(folder), left_out) == ("runs/analyze-tiny-llama", [])
    ids, _ = looked.case.inputs().sampled()
    network = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="sdpa").eval()
    plain, twiced = (
        [row for row in found.bandwidth if row["label"] == label]
        for label in ("tiny-llama", "tiny-llama, twiced in every layer with the same weights")
    )
    for rows in (plain, twiced):
        for factor in (0.5, 1.0, 2.0):
            scaled = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="sdpa")
            for layer in scaled.model.layers:
                layer.self_attn.q_proj.weight.data *= factor
            if rows is twiced:
                convert(scaled, "twicing")
            with torch.no_grad():
                logits = scaled.eval()(input_ids=ids[:, :-1], use_cache=False).logits.double()
            expected = logits[:, -1].log_softmax(-1).gather(1, ids[:, -1:]).mean()
            (row,) = (row for row in rows if row["factor"] == factor)
            assert (row["measure"], row["n"]) == ("log-probability", COUNT)
            assert row["value"] == pytest.approx(float(expected), rel=1e-5)
    assert plain[0]["value"] != twiced[0]["value"]
    # Grouped queries: A is of every query head.
    eager = hf.AutoModel.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = eager(input_ids=ids[:1], output_attentions=True).attentions
    for layer, attention in enumerate(maps, start=1):
        largest = torch.linalg.svdvals(attention[0].double()).amax(-1)
        rows = [row for row in found.spectrum if row["layer"] == layer]
        assert [row["largest_singular"] for row in rows] == pytest.approx(largest.tolist(), rel=1e-4)
    assert not network.training


def test_the_page_of_a_model_without_a_next_word_says_so(hf, tmp_path):
    bert = save_bert(hf, tmp_path / "tiny-bert")
    found = analyzed(quick(bert, tokens=20), tmp_path / "out")
    assert found.bandwidth == []
    assert not found.models["tiny-bert"]["causal"]
    text = (tmp_path / "out" / "analysis.html").read_text()
    assert (
        "No bandwidth test: it was saved without a head that gives the next word (BertForMaskedLM), so that there is "
        "no answer to compare." in text
    )
    assert "<h1>Inside tiny-bert</h1>" in text
    assert "Between the dotted ends" in text
    assert "causal" not in text
    assert "None" not in text
    assert "keeps no additive absolute positions where they are looked for" in text


def test_a_conversion_stands_beside_the_model(llama, tmp_path, no_page):
    found = analyzed(quick(llama, convert="twicing", layers="last-1", bandwidth_images=0), tmp_path)
    assert [one["label"] for one in found.models.values()] == ["tiny-llama", "tiny-llama, twicing [last-1]"]
    assert [one["formulas"]["3"] for one in found.models.values()] == ["A", "2A - A^2"]
    assert [one["layers_converted"] for one in found.models.values()] == ["none", "3"]


def test_pictures_have_heat_maps_and_classes(hf, vit, tmp_path, no_page):
    found = analyzed(quick(vit), tmp_path)
    (looked,), _, _ = looked_at(quick(vit))
    pixels, _ = looked.case.inputs().sampled()
    assert (found.unit, found.causal) == ("images", False)
    eager = hf.ViTForImageClassification.from_pretrained(vit, attn_implementation="eager").eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        whole = eager((pixels - mean) / std, output_attentions=True)
    heads = torch.stack([attention[0, :, 0, 1:].reshape(3, 6, 6) for attention in whole.attentions])
    assert found.arrays["tiny-vit"]["heads/A"][0] == pytest.approx(heads.numpy(), abs=1e-5)
    rows = [row for row in found.bandwidth if row["label"] == "tiny-vit"]
    assert {row["measure"] for row in rows} == {"agreement"}
    model = looked.build()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), whole.logits, rtol=1e-4, atol=1e-5)
        for layer in eager.vit.layers if hasattr(eager.vit, "layers") else eager.vit.encoder.layer:
            for name, weights in layer.named_parameters():
                if "query" in name or "q_proj" in name:
                    weights *= 2
        answers = eager((pixels - mean) / std).logits.argmax(1)
    assert rows[-1]["value"] == pytest.approx(float((answers == whole.logits.argmax(1)).double().mean()))


def test_scores_are_of_the_last_position_whether_or_not_a_model_can_leave_out_the_others():
    scores = torch.arange(24.0).view(2, 3, 4)

    class Whole(torch.nn.Module):
        config = SimpleNamespace()

        def forward(self, input_ids):
            return SimpleNamespace(logits=scores[: len(input_ids)])

    class Sparing(Whole):
        def forward(self, input_ids, logits_to_keep=0):
            assert logits_to_keep == 1
            return SimpleNamespace(logits=scores[: len(input_ids), -1:])

    for network in (Whole(), Sparing()):
        assert torch.equal(NextToken(network)(torch.zeros(2, 3, dtype=torch.long)), scores[:, 2])


def test_a_base_model_names_no_classes(hf, tmp_path):
    (looked,), _, _ = looked_at(quick(save_vit(hf, tmp_path / "base")))
    assert looked.case.silent.startswith("it was saved without a head that names classes (ViTModel)")


def test_a_token_at_every_end_is_no_word(hf, llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_tokenizer(tmp_path, special=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"sep_token": "[SEP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (looked,), _, _ = looked_at(quick(tmp_path))
    assert looked.case.silent.startswith("its tokenizer ends every window with a special token")


def test_a_model_that_was_saved_converted_is_not_twiced_again(hf, llama, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    convert(model, "twicing", layers="3")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False)
    (looked,), _, _ = looked_at(quick(tmp_path))
    assert not looked.twice
    assert [entry["layers"] for entry in spec(looked.build())] == [[3]]


def test_what_does_not_fit_is_told(llama, vit, tmp_path):
    for options, sentence in (
        (quick(llama, images=tmp_path), "is a model of text: leave --images out"),
        (quick(vit, tokens=64), "is a model of pictures: leave --tokens out"),
        (quick(llama, pretrained=True, model_args=("a=1",)), "of transformers: leave --pretrained, --model-args out"),
        (quick(llama, layers="2"), "name it with --convert"),
        (quick(llama, models=(str(llama), "vit_tiny_patch16_224")), "is a folder of transformers: look at it alone"),
        (quick(tmp_path), r"is a folder without config\.json: name the run folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            looked_at(options)
    with pytest.raises(ValueError, match="--tokens is 8 or more: got 7"):
        run(quick(llama, tokens=7), "", Console(quiet=True))
