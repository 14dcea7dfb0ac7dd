"""twicing diagnose on a model of timm: files, verdicts on planted weights, every number recomputed from the inputs."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from twicing.adapters.surgery import spec
from twicing.analysis.capture import BLOCK_OUTPUT
from twicing.analysis.collapse import ATTENTION, CURVES, ENTROPY, RANK, SHARE, measure_collapse
from twicing.experiments.diagnose.cases import cases_of
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.run import run
from twicing.torchvision_import import mend_torchvision_import

SIZE = ("img_size=32", "patch_size=8", "depth=3", "embed_dim=24", "num_heads=3", "num_classes=10")
DEPTH, INPUTS, DRAWS = 3, 6, 2
QUICK = Diagnose("vit_tiny_patch16_224", model_args=SIZE, inputs=INPUTS, draws=DRAWS, batch_size=4, device="cpu")


def diagnosed(options, folder, *, drawn=False):
    """Run the command and return what it prints. drawn: whether the page is made, which takes longer than all else."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr("twicing.experiments.diagnose.run.diagnosis_page", lambda *_: "")
        page = run(replace(options, out=folder), "twicing diagnose it", Console(file=said, width=300))
    assert page == folder / "diagnosis.html"
    return said.getvalue()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, diagnosed(QUICK, folder, drawn=True)


def read(folder):
    return json.loads((folder / "diagnosis.json").read_text())


def rows(folder, name):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def fresh(seed):
    """A model of timm as the command is to draw it."""
    mend_torchvision_import()
    import timm

    arguments = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments).eval()


def test_it_says_what_it_used_and_what_it_found(plain):
    folder, said = plain
    assert {path.name for path in folder.iterdir()} == {
        "diagnosis.html",
        "diagnosis.json",
        "diagnosis.csv",
        "inputs.csv",
    }
    assert "scikit-learn's two sample photographs and 4 views cut from them, as no --images were given" in said
    assert "Note: The weights are random: give --checkpoint FILE or --pretrained" in said
    assert "the bands are too narrow" in said
    found = read(folder)["models"][0]
    assert f"vit_tiny_patch16_224: {found['verdict']['headline']}." in said
    for reason in found["verdict"]["reasons"]:
        assert reason in said
    assert (found["mechanism"], found["layers"]) == ("standard", "all")
    assert (found["tokens"], found["width"]) == (17, 24)


def test_the_page_stands_alone_and_says_the_same(plain):
    folder, _ = plain
    text = (folder / "diagnosis.html").read_text()
    found = read(folder)["models"][0]
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#|https://arxiv\.org)', text)
    assert f"{found['verdict']['headline']}." in text
    assert "two sample photographs" in text
    assert text.count("<svg ") == 10
    assert "twicing diagnose it" in text
    share = found["verdict"]["facts"]["share"]
    assert f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_numbers_are_those_of_the_model_and_of_fresh_ones(plain):
    folder, _ = plain
    (case,), _, _ = cases_of(QUICK)
    images = case.inputs().load(range(INPUTS))
    mean = std = torch.full((1, 3, 1, 1), 0.5)
    # Random weights of the seed, and of the two seeds after it; timm's configuration normalises by 1/2 and 1/2.
    expected = [measure_collapse(fresh(seed), [(images - mean) / std]) for seed in (0, 1, 2)]
    table = {(r["weights"], r["where"], r["metric"], int(r["layer"])): r for r in rows(folder, "diagnosis.csv")}
    assert len(table) == 2 * len(CURVES) * DEPTH
    for key in CURVES:
        means = [one.values[key].mean(0) for one in expected]
        for layer in range(DEPTH):
            own, initial = table["model", *key, layer + 1], table["random initialisation", *key, layer + 1]
            assert float(own["mean"]) == pytest.approx(float(means[0][layer]), rel=1e-4)
            assert float(initial["draw 1"]) == pytest.approx(float(means[1][layer]), rel=1e-4)
            assert float(initial["draw 2"]) == pytest.approx(float(means[2][layer]), rel=1e-4)
            assert float(initial["mean"]) == pytest.approx(float(means[1][layer] + means[2][layer]) / 2, rel=1e-4)
            assert own["draw 1"] == ""


def test_means_bands_and_facts_follow_from_the_inputs(plain):
    folder, _ = plain
    values = {}
    for row in rows(folder, "inputs.csv"):
        key = row["weights"], row["where"], row["metric"], int(row["layer"])
        values.setdefault(key, {})[int(row["input"])] = float(row["value"])
    assert all(sorted(by_input) == list(range(INPUTS)) for by_input in values.values())
    values = {key: np.array([by_input[place] for place in range(INPUTS)]) for key, by_input in values.items()}
    assert len(values) == (1 + DRAWS) * len(CURVES) * DEPTH
    draw = np.random.default_rng(0)
    picks = draw.multinomial(INPUTS, [1 / INPUTS] * INPUTS, size=2000)
    for row in rows(folder, "diagnosis.csv"):
        which = ["model"] if row["weights"] == "model" else ["draw 1", "draw 2"]
        own = np.mean([values[name, row["where"], row["metric"], int(row["layer"])] for name in which], axis=0)
        assert float(row["mean"]) == pytest.approx(own.mean(), rel=1e-9)
        resampled = np.sort(picks @ own / INPUTS)
        assert float(row["low"]) == pytest.approx(resampled[49], rel=1e-9)
        assert float(row["high"]) == pytest.approx(resampled[1949], rel=1e-9)
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    verdict = read(folder)["models"][0]["verdict"]
    rank = np.stack([values["model", BLOCK_OUTPUT, RANK, layer] for layer in (1, 2, 3)], axis=1)
    initial = (values["draw 1", BLOCK_OUTPUT, RANK, 3] + values["draw 2", BLOCK_OUTPUT, RANK, 3]) / 2
    facts = verdict["facts"]
    assert facts["rank"]["value"] == pytest.approx(rank[:, -1].mean())
    assert facts["kept"]["value"] == pytest.approx(rank[:, -1].mean() / rank.mean(0).max())
    assert facts["against"]["value"] == pytest.approx(rank[:, -1].mean() / initial.mean())
    assert facts["share"]["value"] == pytest.approx(values["model", BLOCK_OUTPUT, SHARE, 3].mean())
    resampled = np.sort((picks @ rank[:, -1]) / (picks @ initial))
    assert facts["against"]["low"] == pytest.approx(resampled[49])
    assert facts["against"]["high"] == pytest.approx(resampled[1949])
    assert verdict["largest_rank_in_block"] == int(rank.mean(0).argmax()) + 1


def test_csv_and_json_agree_and_the_same_command_gives_the_same_files(plain, tmp_path):
    folder, _ = plain
    for row, entry in zip(rows(folder, "diagnosis.csv"), read(folder)["models"][0]["curves"], strict=True):
        alone = [row["draw 1"], row["draw 2"]] if entry["draws"] else []
        assert [float(one) for one in alone] == entry["draws"]
        assert [row[name] for name in ("model", "weights", "where", "metric")] == [
            entry[name] for name in ("model", "weights", "where", "metric")
        ]
        assert [float(row[name]) for name in ("mean", "low", "high")] == [entry[n] for n in ("mean", "low", "high")]
    diagnosed(QUICK, tmp_path, drawn=True)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_batch_size_changes_no_number_and_the_seed_changes_the_draws(plain, tmp_path):
    folder, _ = plain
    diagnosed(replace(QUICK, batch_size=1), tmp_path / "one")
    for ours, theirs in zip(rows(tmp_path / "one", "diagnosis.csv"), rows(folder, "diagnosis.csv"), strict=True):
        assert float(ours["mean"]) == pytest.approx(float(theirs["mean"]), rel=1e-4)
    weights = [
        cases_of(replace(QUICK, seed=seed))[0][0].draw(seed).network.blocks[0].attn.qkv.weight for seed in (0, 1)
    ]
    assert not torch.equal(*weights)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures" / "below"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for place in range(7):
        pixels = draw.integers(0, 256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("planted", "headline"),
    [
        ("uniform", "Yes, it collapses"),
        ("one direction", "Yes, it collapses"),
        ("common token", "No: the tokens share a mean, but keep their rank"),
    ],
)
def test_planted_weights_get_the_verdict_they_deserve(planted, headline, pictures, tmp_path):
    model = fresh(5)
    torch.manual_seed(0)
    for block in model.blocks:
        if planted == "uniform":
            block.attn.qkv.weight.data[:24] = 0
            block.attn.proj.weight.data *= 1e5
        elif planted == "one direction":
            block.mlp.fc2.weight.data = 1000 * torch.outer(torch.ones(24), torch.randn(96))
    if planted == "common token":
        model.pos_embed.data += 3 * torch.randn(24)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    options = replace(QUICK, checkpoint=tmp_path / "weights.pt", images=pictures)
    said = diagnosed(options, tmp_path / "out")
    found = read(tmp_path / "out")["models"][0]
    assert found["verdict"]["headline"] == headline
    assert found["verdict"]["random_initialisation"] == "no sign of collapse"
    assert found["inputs"]["what"] == f"6 of the 7 pictures in {pictures}"
    assert found["inputs"]["caution"] == ""
    assert "random: give --checkpoint" not in said
    assert "weights.pt" in found["weights"]
    if planted == "uniform":
        assert found["verdict"]["uniform_attention_in_layers"] == [1, 2, 3]
        assert "Attention in layers 1-3 averages all tokens alike" in said
        assert "Attention in layers 1-3 puts out one and the same token." in said
        nats = [e["mean"] for e in found["curves"] if (e["where"], e["metric"]) == (ATTENTION, ENTROPY)]
        assert nats[:3] == pytest.approx([np.log(17)] * 3, rel=1e-5)


def test_a_conversion_is_put_into_the_model_and_into_what_it_is_held_against(tmp_path):
    options = replace(QUICK, convert="twicing", layers="2-3", options=("gain=0.5",), draws=1)
    (case,), folder, _ = cases_of(options)
    expected = [{"mechanism": "twicing", "layers": [2, 3]}]
    for model in (case.build(), case.draw(7)):
        found = spec(model)
        assert [{key: entry[key] for key in ("mechanism", "layers")} for entry in found] == expected
        assert found[0]["options"]["gain"] == 0.5
        assert not model.training
    assert not torch.equal(case.build().network.head.weight, case.draw(7).network.head.weight)
    assert str(folder) == "runs/diagnose-vit-tiny-patch16-224-twicing-2-3"
    diagnosed(options, tmp_path)
    found = read(tmp_path)["models"][0]
    assert (found["mechanism"], found["layers"]) == ("twicing", "2-3")
    assert "(one draw)" in " ".join(found["verdict"]["reasons"])


def test_a_checkpoint_of_ours_brings_its_conversion_to_the_draws(tmp_path):
    (case,), _, _ = cases_of(replace(QUICK, convert="twicing", layers="1"))
    model = case.build()
    torch.save({"twicing": {"spec": spec(model)}, "state_dict": model.network.state_dict()}, tmp_path / "ours.pt")
    (case,), _, _ = cases_of(replace(QUICK, checkpoint=tmp_path / "ours.pt"))
    assert spec(case.build()) == spec(case.draw(3)) == spec(model)
    assert case.mechanism == "twicing"


REFUSED = {
    "unknown name": ({"model": "vit_tiny_patch16_225"}, r"neither a folder nor one of timm's .* models"),
    "no folder": ({"images": "nowhere"}, "--images nowhere is not a folder"),
    "text for pictures": ({"text": "book.txt"}, "is a model of timm: leave --text out"),
    "arms of a model": ({"arms": ("standard",), "seeds": (1,)}, "leave --arms, --seeds out"),
    "one input": ({"inputs": 1}, "--inputs must be 2 or more: got 1"),
    "no draws": ({"draws": 0}, "--draws must be 1 or more: got 0"),
    "layers alone": ({"layers": "2"}, "--layers and --options are of a mechanism: name it with --convert"),
    "unknown mechanism": ({"convert": "twiceing"}, "twiceing"),
    "device": ({"device": "tpu"}, "--device is cpu, cuda or auto: got 'tpu'"),
    "grey": ({"model_args": ("in_chans=1",)}, "leave in_chans out"),
    "both": ({"pretrained": True, "checkpoint": "x.pt"}, "two sources of the same weights"),
    "no attention": (
        {"model": "resnet10t"},
        "^resnet10t has no attention layers that the library knows: there is nothing to diagnose",
    ),
    "unknown attention": (
        {"model": "xcit_nano_12_p8_224"},
        "^The attention of xcit_nano_12_p8_224 is not known to the library: ",
    ),
    "folder of nothing": ({"model": "."}, "is a folder without config.json: name the run folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_in_a_sentence(case, tmp_path, monkeypatch):
    changes, sentence = REFUSED[case]
    changes = {k: Path(v) if k in ("images", "text", "checkpoint") else v for k, v in changes.items()}
    monkeypatch.chdir(tmp_path)
    options = replace(QUICK, **({"model_args": ()} if "model" in changes else {}), **changes)
    with pytest.raises(ValueError, match=sentence):
        run(options, "twicing diagnose", Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_pictures_and_a_diverged_model_are_told_with_the_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no picture \(\.bmp"):
        diagnosed(replace(QUICK, images=tmp_path / "empty"), tmp_path / "out")
    model = fresh(0)
    model.blocks[1].mlp.fc2.weight.data[:] = torch.nan
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be diagnosed: the tokens of layer 2 are not finite"):
        diagnosed(replace(QUICK, checkpoint=tmp_path / "weights.pt"), tmp_path / "out")
