"""twicing analyze on models of timm: heat maps computed by hand, pictures, conversions side by side, and refusals."""

import csv
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import Markup
from PIL import Image
from rich.console import Console

from twicing.adapters.surgery import convert, spec
from twicing.analysis.bandwidth import FACTORS, scaled_logits
from twicing.data.decode import to_tensor
from twicing.experiments.analyze import run as run_module
from twicing.experiments.analyze import spectrum_figures
from twicing.experiments.analyze.formulas import unbroken
from twicing.experiments.analyze.keep import read_analysis
from twicing.experiments.analyze.maps import map_grids, part_grids
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.page import print_results
from twicing.experiments.analyze.run import run
from twicing.experiments.analyze.section import AnalysisSection, Chapter, Line, Table
from twicing.experiments.analyze.subjects import looked_at
from twicing.experiments.attack_tables import Cell
from twicing.experiments.cases.inputs import VIEWS, folder_inputs, photograph_inputs, spread
from twicing.torchvision_import import mend_torchvision_import

sys.path.append(str(Path(__file__).parents[1] / "data"))
from made_folders import picture

NAME = "vit_tiny_patch16_224"
SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 3, "img_size": 48, "patch_size": 8, "num_classes": 5}
ARGUMENTS = tuple(f"{name}={value}" for name, value in SIZES.items())
OPTIONS = Analyze((NAME,), model_args=ARGUMENTS, spectrum_images=2, map_images=2, bandwidth_images=6, device="cpu")


def told():
    return Console(file=io.StringIO(), width=100)


def network(seed=1):
    """Attends unevenly, as fresh weights do not."""
    mend_torchvision_import()
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(NAME, **SIZES).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.6)
        model.pos_embed.normal_()
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for place in range(7):
        # Two deep, of other sizes than the model's, and not in the order of their making.
        path = folder / f"class{place % 2}" / f"{(3 * place) % 7}.png"
        path.parent.mkdir(exist_ok=True)
        picture((60, 54), seed=place).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "trained.pth"
    torch.save(network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def options(pictures, checkpoint):
    return dataclasses.replace(
        OPTIONS, images=pictures, checkpoint=(checkpoint,), convert="twicing", layers="3", options=("gain=1",)
    )


@pytest.fixture(scope="module")
def analyzed(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    return run(dataclasses.replace(options, out=out), "twicing analyze", told()).parent


@pytest.fixture
def no_page(monkeypatch):
    """Numbers only: drawing takes longer than measuring."""
    monkeypatch.setattr(run_module, "read_section", lambda folder: None)
    monkeypatch.setattr(run_module, "write_page", lambda folder, section: folder / "analysis.html")
    monkeypatch.setattr(run_module, "print_results", lambda section, console: None)


def shown_pictures(pictures, count):
    return folder_inputs(pictures, count, 48).sampled()[0]


def explicit_softmax(images, twiced=()):
    """A of every layer, [B, H, N, N], of a forward that forms it; twiced: layers that apply 2A - A^2."""
    model = network()
    found = []

    def see(layer, attn, values):
        found.append(attn)
        return attn @ values if layer not in twiced else (2 * attn - attn @ attn) @ values

    def forward(attention, layer, x):
        batch, tokens, _ = x.shape
        q, k, v = attention.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = see(layer, (q @ k.mT / 8**0.5).softmax(-1), v)
        return attention.proj(out.transpose(1, 2).reshape(batch, tokens, 16))

    for layer, block in enumerate(model.blocks, start=1):
        block.attn.forward = lambda x, attention=block.attn, layer=layer, **_: forward(attention, layer, x)
    with torch.no_grad():
        model((images - 0.5) / 0.5)
    return found


PLAIN, TWICED = f"{NAME}, seed 0", f"{NAME}, twicing [3], seed 0"


def test_both_are_there_with_the_same_pictures(analyzed, options):
    found = read_analysis(analyzed)
    assert list(found.models) == [PLAIN, TWICED]
    assert found.left_out == []
    expected = (255 * shown_pictures(options.images, 6)[:2]).round().to(torch.uint8).numpy()
    for name in found.models:
        assert (found.arrays[name]["pictures"] == expected).all()
    assert found.about["shown"].startswith("6 of the 7 pictures in ")


def test_heat_maps_are_the_softmax_of_an_unfused_model(analyzed, options):
    found, images = read_analysis(analyzed), shown_pictures(options.images, 6)[:2]
    for name, twiced in ((PLAIN, ()), (TWICED, (3,))):
        matrices = explicit_softmax(images, twiced)
        expected = torch.stack([attn[:, :, 0, 1:].reshape(2, 2, 6, 6) for attn in matrices], dim=1)
        assert found.arrays[name]["heads/A"] == pytest.approx(expected.numpy(), abs=1e-5)
    assert "heads/own" not in found.arrays[PLAIN]
    # The third layer's own matrix is twiced, the others' are A.
    last = matrices[2]
    own = torch.stack([*matrices[:2], 2 * last - last @ last], dim=1)[..., 0, 1:].reshape(2, 3, 2, 6, 6)
    assert found.arrays[TWICED]["heads/own"] == pytest.approx(own.numpy(), abs=1e-5)
    assert own[:, 2].min() < 0


def test_rollout_is_the_product_of_half_steps(analyzed, options):
    found, images = read_analysis(analyzed), shown_pictures(options.images, 6)[:2]
    matrices = explicit_softmax(images, (3,))
    own = [*matrices[:2], 2 * matrices[2] - matrices[2] @ matrices[2]]
    for kind, chosen in (("A", matrices), ("own", own)):
        rolled = torch.eye(37).expand(2, 37, 37)
        for layer, matrix in enumerate(chosen):
            rolled = (matrix.mean(1) + torch.eye(37)) / 2 @ rolled
            expected = rolled[:, 0, 1:].reshape(2, 6, 6).numpy()
            assert found.arrays[TWICED][f"rollout/{kind}"][:, layer] == pytest.approx(expected, abs=1e-5)


def test_agreement_is_with_the_models_own_answer(analyzed):
    found = read_analysis(analyzed)
    for name in (PLAIN, TWICED):
        rows = [row for row in found.bandwidth if row["model"] == name]
        assert {row["measure"] for row in rows} == {"agreement"}
        assert {row["n"] for row in rows} == {6}
        assert next(row["value"] for row in rows if row["factor"] == 1) == 1
        assert all(0 <= row["value"] <= 1 for row in rows)


def test_scaled_answers_are_held_against_the_unscaled_ones(monkeypatch):
    scaled = torch.tensor([[factor > 1, factor >= 1] for factor in FACTORS]).long()
    monkeypatch.setattr(run_module, "answers_by_factor", lambda *_, **__: scaled)
    test = run_module._Bandwidth(torch.zeros(2, 3, 8, 8), None, True, 2)
    rows = test.rows(None, torch.device("cpu"), lambda _: None)
    assert [row["value"] for row in rows] == [0.5 if factor != 1 else 1.0 for factor in FACTORS]


class Page(HTMLParser):
    """Tags that are left open, ids that are there twice, and what a page would load."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.tags, self.alts = [], [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.add(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.alts += [named["alt"]] if tag == "img" else []
        self.loads += [named[key] for key in ("src", "href", "xlink:href") if key in named and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(analyzed):
    text = (analyzed / "analysis.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert all(one.startswith(("#", "data:image/")) for one in page.loads)
    assert "<h2>Heat maps" in text
    assert "What is not shown" not in text
    assert "rollout of A in layer 2, vit_tiny_patch16_224" in page.alts
    # By head: a layer that is not twiced applies A.
    assert f"head 1 of A in layer 1, {NAME}, twicing [3]" in page.alts
    assert f"head 1 of 2A - A^2 in layer 3, {NAME}, twicing [3]" in page.alts
    assert not re.search(r"\bNone\b", text)


def test_only_the_eigenvalues_farthest_from_0_are_drawn_and_the_caption_says_so(analyzed, monkeypatch):
    found = read_analysis(analyzed)
    whole = spectrum_figures.eigenvalues(found)
    assert whole.caption.startswith("All eigenvalues of a layer's matrices")
    monkeypatch.setattr(spectrum_figures, "MOST_POINTS", 10)
    some = spectrum_figures.eigenvalues(found)
    assert "only the 10 farthest from 0 are drawn, of A and of p(A) alike; the others" in some.caption
    drawn = next(line for line in some.panels[0].axes.lines if line.get_label() == "A")
    moduli = np.sort(np.abs(found.arrays[PLAIN]["eigenvalues/1"]).flatten())[::-1]
    assert np.hypot(*drawn.get_data()) == pytest.approx(moduli[:10], abs=1e-4)
    assert len(whole.panels[0].axes.lines[2].get_xdata()) == 74


@pytest.mark.parametrize("formula", ["2A - A^2", "2 x - x^2", "2s - s^2", "2 A - A A", "I - (I - A)(I - gA)^2"])
def test_a_formula_stays_on_one_line(formula):
    found = unbroken(Markup(f"as {formula} has it - mostly, in layer 2 A stays"))
    minus = formula.replace(" - ", " − ")  # noqa: RUF001
    assert found == f'as <span class="formula">{minus}</span> has it - mostly, in layer 2 A stays'


def test_brackets_of_a_label_are_no_markup_of_the_terminal():
    table = Table("Spectra", ("twicing [last]",), (Line("in [nats]", (Cell(1.0, None),)),), "")
    console = told()
    print_results(AnalysisSection(None, {}, (Chapter("", "", (table,), (), ()),), ()), console)
    assert "twicing [last]" in console.file.getvalue()
    assert "in [nats]" in console.file.getvalue()


def test_grids_put_models_below_each_other_from_early_to_late(analyzed):
    found = read_analysis(analyzed)
    first, second, heads = map_grids(found)
    assert [(row[0], row[1]) for row in first.rows] == [
        (NAME, "mean over heads of A"),
        (NAME, "rollout of A"),
        (f"{NAME}, twicing [3]", "mean over heads of A"),
        (f"{NAME}, twicing [3]", "rollout of A"),
        (f"{NAME}, twicing [3]", "mean over heads of what each layer applies"),
        (f"{NAME}, twicing [3]", "rollout of what each layer applies"),
    ]
    assert first.columns == ("image", "early", "", "late")
    assert second.title == "Heat maps, image 2"
    assert [row[1] for row in heads.rows[:3]] == ["A, layer 1", "A, layer 2", "A, layer 3"]
    (parts,) = part_grids(found)
    assert parts.columns == ("token-token", "token-position", "position-token", "position-position")
    # What a cell says is its map's range.
    maps = found.arrays[TWICED]["heads/own"][1].mean(1)
    cell = second.rows[4][2][3]
    low, high = re.fullmatch(r"layer 3: (\S+) to (\S+)", cell.note).groups()
    assert float(low) == pytest.approx(maps[2].min(), rel=0.05)
    assert float(high) == pytest.approx(maps[2].max(), rel=0.05)
    assert float(low) < 0


def test_a_cells_picture_shows_its_map(analyzed):
    import base64

    found = read_analysis(analyzed)
    source = map_grids(found)[0].rows[0][2][2].source
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))
    assert drawn.shape == (160, 160, 3)
    heat = found.arrays[PLAIN]["heads/A"][0, 1].mean(0)
    grey = found.arrays[PLAIN]["pictures"][0].mean(0).reshape(6, 8, 6, 8).mean((1, 3))
    light = np.asarray(Image.fromarray(drawn).resize((6, 6), Image.Resampling.BOX)).sum(-1).astype(float)
    # Beneath the map lies the picture: what is left without it follows the map.
    rest = light - 3 * 0.38 * grey
    assert np.corrcoef(rest.flatten(), heat.flatten())[0, 1] > 0.9


def test_parts_of_the_logits_are_those_of_both_models_alike(analyzed):
    with (analyzed / "logit_parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    of = {name: [row["sd"] for row in rows if row["model"] == name] for name in (PLAIN, TWICED)}
    assert of[PLAIN] == of[TWICED]
    assert len(of[PLAIN]) == 12


def test_without_a_conversion_the_same_weights_are_twiced_for_the_bandwidth_alone(
    options, tmp_path, no_page, monkeypatch
):
    looked = []

    def remembered(options):
        found = looked_at(options)
        looked.extend(found[0])
        return found

    monkeypatch.setattr(run_module, "looked_at", remembered)
    plain = dataclasses.replace(options, convert="", layers="all", options=(), out=tmp_path, spectrum_images=1)
    run(dataclasses.replace(plain, map_images=0), "", told())
    found = read_analysis(tmp_path)
    assert list(found.models) == [PLAIN]
    labels = list(dict.fromkeys(row["label"] for row in found.bandwidth))
    assert labels == [NAME, f"{NAME}, twiced in every layer with the same weights"]
    assert not any(key.startswith("heads") for key in found.arrays[PLAIN])
    # The model itself was left as it was.
    assert spec(looked[0].build()) == []
    values = {label: [row["value"] for row in found.bandwidth if row["label"] == label] for label in labels}
    assert len(values[NAME]) == 9
    # It is what a conversion by hand answers.
    model = looked[0].build()
    convert(model, "twicing")
    images, _ = looked[0].case.inputs().sampled()
    with torch.no_grad():
        own = model(images).argmax(1)
        with scaled_logits(model, 2.0):
            assert values[labels[1]][-1] == pytest.approx((model(images).argmax(1) == own).double().mean().item())


def test_several_models_are_told_apart(checkpoint, tmp_path):
    second = tmp_path / "other.pth"
    torch.save(network(seed=2).state_dict(), second)
    options = dataclasses.replace(OPTIONS, models=(NAME, NAME), checkpoint=(checkpoint, second))
    models, folder, left_out = looked_at(options)
    labels = [one.case.label for one in models]
    assert labels[0].startswith(f"{NAME} (trained.pth ")
    assert labels[1].startswith(f"{NAME} (other.pth ")
    assert folder.parent == Path("runs")
    assert left_out == []
    with pytest.raises(ValueError, match="the same model was named twice"):
        looked_at(dataclasses.replace(options, checkpoint=(checkpoint, checkpoint)))


def test_random_weights_are_said_and_attention_that_cannot_be_seen_is_made_to(monkeypatch):
    models, _, left_out = looked_at(OPTIONS)
    assert left_out == ["Weights are random: give --checkpoint FILE or --pretrained to see trained models."]
    network = models[0].case.build().network
    for block in network.blocks:
        block.attn.fused_attn = False
    assert all(block.attn.fused_attn for block in models[0].build().network.blocks)


def test_photographs_are_seeded_views():
    first, again, other = (photograph_inputs(6, 48, seed) for seed in (0, 0, 1))
    pixels, labels = first.sampled()
    assert pixels.shape == (6, 3, 48, 48)
    assert labels is None
    assert torch.equal(pixels, again.load(range(6)))
    # The photographs themselves come first, whatever the seed.
    assert torch.equal(pixels[:2], other.load([0, 1]))
    assert not torch.equal(pixels[2:], other.load([2, 3, 4, 5]))
    assert "two sample photographs and 4 views cut from them, as no --images were given" in first.words
    assert torch.equal(photograph_inputs(1, 48, 0).load([0]), pixels[:1])
    assert len({tuple(one.flatten()[:50].tolist()) for one in pixels}) == 6
    assert VIEWS == 32


def test_never_more_views_than_make_sense(monkeypatch):
    from twicing.experiments.cases import inputs

    monkeypatch.setattr(inputs, "VIEWS", 3)
    assert photograph_inputs(100, 8, 0).count == 3


def test_a_folder_is_read_evenly_in_the_order_of_names(pictures):
    names = [f"class{place % 2}/{(3 * place) % 7}.png" for place in range(7)]
    seed_of = {name: seed for seed, name in enumerate(names)}
    found = folder_inputs(pictures, 3, 48)
    # Of three evenly spaced ones the first two are the outer ones.
    chosen = [sorted(names)[place] for place in (0, 4, 2)]
    from twicing.data.transforms import test_transform as transform_to

    expected = torch.stack([transform_to(48)(picture((60, 54), seed=seed_of[name])) for name in chosen])
    assert torch.equal(found.sampled()[0], expected)
    assert found.words == f"3 of the 7 pictures in {pictures}"
    assert folder_inputs(pictures, 100, 48).count == 7
    assert to_tensor(picture((60, 54), seed=0)).shape == (3, 54, 60)


def test_every_beginning_of_an_order_is_spread():
    for count in (1, 2, 5, 8, 13):
        assert sorted(spread(count)) == list(range(count))
    assert spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "name a run folder"),
        ({"models": ("vit_tiny_patch16_225",)}, "neither a folder nor one of timm's"),
        ({"layers": "1-2"}, "name it with --convert"),
        ({"options": ("gain=1",)}, "name it with --convert"),
        ({"convert": "twice"}, "Unknown mechanism 'twice'"),
        ({"convert": "twicing", "options": ("gian=1",)}, "gian"),
        ({"checkpoint": (Path("a"), Path("b"))}, "one file for each of the 1 models: got 2"),
        ({"checkpoint": (Path("nowhere.pth"),)}, "nowhere.pth is no file"),
        ({"data_dir": Path("data")}, "--data-dir is for run folders"),
        ({"images": Path("nowhere")}, "--images nowhere is not a folder"),
        ({"model_args": (*ARGUMENTS, "in_chans=1")}, "leave in_chans out"),
    ],
)
def test_options_that_do_not_fit_are_told(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(OPTIONS, out=tmp_path / "out", **changes), "", told())
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_a_broken_picture_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        folder_inputs(tmp_path, 3, 48)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        folder_inputs(tmp_path, 3, 48).sampled()


def test_a_checkpoint_of_another_mechanism_is_told_with_this_commands_options(checkpoint, tmp_path):
    ours = tmp_path / "ours.pth"
    spec = [{"mechanism": "twicing", "layers": [1], "options": {}}]
    torch.save({"state_dict": network().state_dict(), "twicing": {"spec": spec}}, ours)
    options = dataclasses.replace(OPTIONS, checkpoint=(ours,), convert="neutreno")
    with pytest.raises(ValueError, match="leave --convert out to look at what was trained"):
        looked_at(options)
