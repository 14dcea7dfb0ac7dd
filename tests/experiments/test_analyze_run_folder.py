"""twicing analyze on a run folder: numbers computed again by hand from the trained models, and the report's part."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from twicing.analysis.logit_parts import logit_parts
from twicing.experiments.analyze import run as run_module
from twicing.experiments.analyze import section as section_module
from twicing.experiments.analyze.keep import read_analysis
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.page import read_section, write_page
from twicing.experiments.analyze.run import run
from twicing.experiments.analyze.section import lost_by_seed, report_section
from twicing.experiments.analyze.subjects import looked_at
from twicing.experiments.arms import Arm
from twicing.experiments.job import part_file
from twicing.experiments.plan import Plan, open_folder
from twicing.experiments.results import environment, write_json
from twicing.experiments.statistics import number
from twicing.experiments.trained import trained_jobs
from twicing.experiments.vision_job import converted_model
from twicing.training.checkpoint import CHECKPOINT, identity
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import load_split

RECIPE = apply_settings(digits(), ["epochs=1", "depth=3", "width=16", "heads=2", "batch_size=32", "learning_rate=4e-3"])
ARMS = (
    Arm("standard", "standard", "all", ""),
    Arm("twicing [2-3]", "twicing", "2-3", "", {"gain": 0.5}),
    Arm("neutreno", "neutreno", "all", ""),
    Arm("two-attentions", "standard", "all", "", control=True, changes={"attention_passes": 2}),
    Arm("smooth-more", "twicing", "all", "", {"gain": -1.0}, control=True),
)
PLAN = Plan(RECIPE, ARMS, (0, 1))
TRAINED = [(arm.label, 0) for arm in ARMS] + [("standard", 1), ("twicing [2-3]", 1)]
IMAGES = 3
OPTIONS = Analyze((), spectrum_images=IMAGES, map_images=1, bandwidth_images=40, batch_size=17, device="cpu")


def told():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A comparison whose weights were drawn instead of trained: large ones, so that its heads differ."""
    folder = tmp_path_factory.mktemp("analyzed")
    open_folder(folder, PLAN, "twicing compare", 1, environment(), "now")
    for job in PLAN.jobs(folder):
        if (job.arm.label, job.seed) in TRAINED:
            model = converted_model(job, job.seed)
            draw = torch.Generator().manual_seed(TRAINED.index((job.arm.label, job.seed)))
            state = {
                f"model.{name}": weights + 0.15 * torch.randn(weights.shape, generator=draw)
                for name, weights in model.state_dict().items()
            }
            job.folder.mkdir()
            torch.save(
                {"state_dict": state, "twicing": identity(model, RECIPE.name, job.seed)}, job.folder / CHECKPOINT
            )
            write_json(part_file(job, "training"), {})
    return folder


@pytest.fixture(scope="module")
def said():
    return told()


@pytest.fixture
def no_page(monkeypatch):
    """Numbers only: drawing takes longer than measuring."""
    monkeypatch.setattr(run_module, "read_section", lambda folder: None)
    monkeypatch.setattr(run_module, "write_page", lambda folder, section: folder / "analysis.html")
    monkeypatch.setattr(run_module, "print_results", lambda section, console: None)


@pytest.fixture(scope="module")
def analyzed(run_folder, said):
    options = dataclasses.replace(OPTIONS, models=(str(run_folder),))
    return run(options, "twicing analyze RUN", said).parent


@pytest.fixture(scope="module")
def numbers(analyzed):
    return json.loads((analyzed / "analysis.json").read_text())


def trained(run_folder, label, seed=0):
    job = next(job for job in PLAN.jobs(run_folder) if (job.arm.label, job.seed) == (label, seed))
    model = converted_model(job, seed)
    load_trained(model, seed, job.folder)
    return model.eval()


def held_out(seed, count):
    test = load_split(RECIPE, seed).test
    chosen = balanced_order(test.labels)[:count].tolist()
    return test.load(chosen), test.labels[chosen]


def matrices_by_hand(model, images):
    """A of every image, [layers, B, H, N, N], from the weights: hooks on the projection's output alone."""
    found = []

    def see(_module, _inputs, output):
        batch, tokens, _ = output.shape
        q, k, _ = output.double().reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT / math.sqrt(8)).softmax(-1))

    handles = [block.attn.qkv.register_forward_hook(see) for block in model.network.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return torch.stack(found).numpy()


def rank(matrix):
    share = np.linalg.svd(matrix, compute_uv=False)
    share = share / share.sum()
    return np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())


def read_csv(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def rows_of(table, model, **where):
    return [row for row in table if row["model"] == model and all(row[key] == value for key, value in where.items())]


def test_it_lies_below_the_run_and_says_what_is_left_out(run_folder, analyzed, numbers, said):
    assert analyzed == run_folder / "analysis"
    names = {path.name for path in analyzed.iterdir()}
    tables = {"spectrum", "products", "bandwidth", "logit_parts", "eigenvalues", "singular_values"}
    assert names == {"analysis.html", "analysis.json", "arrays.npz"} | {f"{table}.csv" for table in tables}
    assert list(numbers["models"]) == [
        "standard, seed 0",
        "standard, seed 1",
        "twicing [2-3], seed 0",
        "twicing [2-3], seed 1",
        "neutreno, seed 0",
        "smooth-more, seed 0",
    ]
    not_trained, not_known = numbers["left_out"]
    assert not_trained.startswith("Not trained yet: ")
    for label in ("neutreno", "two-attentions", "smooth-more"):
        assert f"{label}, seed 1" in not_trained
    assert not_trained.count("seed") == 3
    assert not_known.startswith("two-attentions, seed 0: ")
    output = said.file.getvalue()
    assert "[6 of 6] smooth-more, seed 0" in output
    assert str(analyzed / "analysis.html") in output.replace("\n", "")
    assert "4 x 4 patches here, too few for a heat map" in output


def test_the_terminal_says_what_p_of_a_is(analyzed, said):
    output = " ".join(said.file.getvalue().split())
    assert output.count("p(A) is the effective matrix, which the layer multiplies its values by; where that is A") == 1


def test_formulas_and_sizes_are_told(numbers):
    model = numbers["models"]["twicing [2-3], seed 0"]
    assert (model["layers"], model["heads"], model["tokens"]) == (3, 2, 17)
    half = "I - (I - A)(I - gA), g = 0.5"
    assert model["formulas"] == {"1": "A", "2": half, "3": half}
    assert model["layers_converted"] == "2-3"
    assert numbers["models"]["standard, seed 0"]["layers_converted"] == "none"
    assert numbers["models"]["smooth-more, seed 0"]["formulas"]["1"] == "A^2"
    assert [one["shown"] for one in numbers["models"].values()] == [True, False, True, False, True, False]
    (unknown, *_) = numbers["models"]["neutreno, seed 0"]["notes"]
    assert unknown.startswith("What layer 1, 2, 3 multiplies its values by is not known")
    assert numbers["about"]["command"] == "twicing analyze RUN"
    assert numbers["about"]["spectrum_inputs"] == IMAGES


@pytest.mark.parametrize(("label", "seed"), [("standard", 1), ("twicing [2-3]", 0), ("smooth-more", 0)])
def test_spectra_are_those_of_the_trained_matrices(run_folder, numbers, label, seed):
    model = trained(run_folder, label, seed)
    matrices = matrices_by_hand(model, held_out(seed, IMAGES)[0])
    name = f"{label}, seed {seed}"
    assert len(rows_of(numbers["spectrum"], name)) == 6
    for layer in range(3):
        gain = {"standard": 1, "twicing [2-3]": 1 if layer == 0 else 0.5, "smooth-more": -1}[label]
        for head in range(2):
            (row,) = rows_of(numbers["spectrum"], name, layer=layer + 1, head=head + 1)
            expected = {}
            for matrix in matrices[layer, :, head]:
                eigenvalues, singular = np.linalg.eigvals(matrix), np.linalg.svd(matrix, compute_uv=False)
                p = (1 + gain) * matrix - gain * matrix @ matrix
                of_p, moved = np.linalg.svd(p, compute_uv=False), np.linalg.eigvals(p)
                mapped = np.sort(np.abs((1 + gain) * singular - gain * singular**2))[::-1]
                found = {
                    "fits_theory": theory_share(eigenvalues),
                    "complex": np.mean(np.abs(eigenvalues.imag) > 1e-6),
                    "negative": np.mean((np.abs(eigenvalues.imag) <= 1e-6) & (eigenvalues.real < -1e-6)),
                    "largest_imaginary": np.abs(eigenvalues.imag).max(),
                    "largest_singular": singular[0],
                    "effective_rank": rank(matrix),
                    "fits_theory_p": theory_share(moved),
                    "largest_modulus_p": np.abs(moved).max(),
                    "largest_singular_p": of_p[0],
                    "effective_rank_p": rank(p),
                    "singular_miss": np.abs(of_p - mapped).max() / of_p[0],
                }
                for key, value in found.items():
                    expected.setdefault(key, []).append(value)
            for key, values in expected.items():
                assert row[key] == pytest.approx(np.mean(values), abs=2e-5), (key, layer, head)


def theory_share(values):
    return np.mean((np.abs(values.imag) <= 1e-6) & (values.real >= -1e-6) & (values.real <= 1 + 1e-6))


def test_of_an_unknown_mechanism_only_a_is_there(numbers):
    for row in rows_of(numbers["spectrum"], "neutreno, seed 0"):
        assert row["p"] is None
        assert row["singular_miss"] is row["fits_theory_p"] is row["effective_rank_p"] is None
        assert 0 <= row["fits_theory"] <= 1
    kinds = {row["kind"] for row in rows_of(numbers["products"], "neutreno, seed 0")}
    assert "as the layers do, mean over heads" not in kinds


def test_products_are_those_of_the_trained_matrices(run_folder, numbers):
    matrices = matrices_by_hand(trained(run_folder, "twicing [2-3]"), held_out(0, IMAGES)[0])
    twiced = 2 * matrices - matrices @ matrices
    own = np.stack([matrices[0], *(1.5 * one - 0.5 * one @ one for one in matrices[1:])])
    for kind, chosen in (("A", matrices), ("2A - A^2", twiced), ("as the layers do", own)):
        for depth in (1, 2, 3):
            means, chains = [], []
            for image in range(IMAGES):
                product, heads = np.eye(17), [np.eye(17), np.eye(17)]
                for layer in range(depth):
                    product = chosen[layer, image].mean(0) @ product
                    heads = [chosen[layer, image, head] @ heads[head] for head in range(2)]
                means.append(rank(product))
                chains += [rank(one) for one in heads]
            rows = rows_of(numbers["products"], "twicing [2-3], seed 0", depth=depth)
            found = {row["kind"]: row["effective_rank"] for row in rows}
            assert found[f"{kind}, mean over heads"] == pytest.approx(np.mean(means), rel=1e-4)
            if kind != "as the layers do":
                assert found[f"{kind}, chains of heads"] == pytest.approx(np.mean(chains), rel=1e-4)


@pytest.mark.parametrize(("label", "seed"), [("standard", 1), ("twicing [2-3]", 0)])
def test_the_bandwidth_test_is_that_of_scaled_weights(run_folder, numbers, label, seed):
    images, labels = held_out(seed, 40)
    for factor in (0.5, 1.0, 2.0):
        model = trained(run_folder, label, seed)
        with torch.no_grad():
            for block in model.network.blocks:
                block.attn.qkv.weight[:16] *= factor
                block.attn.qkv.bias[:16] *= factor
            right = (model(images).argmax(1) == labels).double().mean().item()
        (row,) = rows_of(numbers["bandwidth"], f"{label}, seed {seed}", factor=factor)
        assert (row["measure"], row["n"]) == ("accuracy", 40)
        assert row["value"] == pytest.approx(right)
    assert len(rows_of(numbers["bandwidth"], f"{label}, seed {seed}")) == 9


def test_what_is_lost_is_against_unscaled_logits():
    rows = [
        {"label": label, "seed": seed, "factor": factor, "value": value}
        for label, seed, values in (("a", 0, (0.2, 0.8, 0.6)), ("a", 3, (0.5, 0.5, 0.5)), ("b", 0, (0, 1, 1)))
        for factor, value in zip((0.5, 1.0, 2.0), values, strict=True)
    ]
    assert lost_by_seed(rows, "a") == pytest.approx({0: 0.4, 3: 0.0})
    assert lost_by_seed(rows, "b") == pytest.approx({0: 0.5})


def test_parts_of_the_logits_are_there_by_head(run_folder, numbers):
    rows = rows_of(numbers["logit_parts"], "standard, seed 0")
    assert len(rows) == 6 * 2
    # A root mean square over all images, not a mean of each image's.
    parts = logit_parts(trained(run_folder, "standard"), held_out(0, IMAGES)[0]).parts["token-token"]
    centred = parts - parts.mean(-1, keepdim=True)
    expected = centred.square().mean((0, 2, 3)).sqrt()
    assert [row["sd"] for row in rows if row["part"] == "token-token"] == pytest.approx(expected.tolist(), rel=1e-6)
    by_part = {row["part"]: row["sd"] for row in rows if row["head"] == 1}
    assert list(by_part) == ["token-token", "token-position", "position-token", "position-position", "rest", "all"]
    assert all(value > 0 for value in by_part.values())
    # Parts that add up cannot vary less together than the largest leaves over.
    others = sum(value for name, value in by_part.items() if name not in ("token-token", "all"))
    assert abs(by_part["all"] - by_part["token-token"]) <= others


def test_the_tables_say_what_the_json_says(analyzed, numbers):
    for name in ("spectrum", "products", "bandwidth", "logit_parts"):
        rows = read_csv(analyzed, name)
        assert len(rows) == len(numbers[name])
        assert rows[5] == {key: "" if value is None else str(value) for key, value in numbers[name][5].items()}


def test_spectra_themselves_are_kept_for_what_is_drawn(run_folder, analyzed):
    rows = read_csv(analyzed, "eigenvalues")
    shown = ["standard, seed 0", "twicing [2-3], seed 0", "neutreno, seed 0"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == shown
    assert list(read_analysis(analyzed).arrays) == shown
    matrices = matrices_by_hand(trained(run_folder, "twicing [2-3]"), held_out(0, 1)[0])
    mine = [row for row in rows if (row["model"], row["layer"], row["head"]) == ("twicing [2-3], seed 0", "3", "2")]
    found = [complex(float(row["A_real"]), float(row["A_imaginary"])) for row in mine]
    expected = np.linalg.eigvals(matrices[2, 0, 1])
    assert np.abs(np.array(found)[:, None] - expected[None]).min(1).max() < 1e-5
    # Rows sum to 1 as float64 has it, of queries and keys in float32 too.
    assert abs(found[0] - 1) < 1e-12
    moved = [complex(float(row["p(A)_real"]), float(row["p(A)_imaginary"])) for row in mine]
    assert moved == pytest.approx([1.5 * one - 0.5 * one**2 for one in found])
    singular = read_csv(analyzed, "singular_values")
    mine = [row for row in singular if (row["model"], row["layer"], row["head"]) == ("neutreno, seed 0", "1", "1")]
    assert len(mine) == 17
    assert {row["p(A)"] for row in mine} == {""}


@pytest.fixture(scope="module")
def section(analyzed):
    """Drawn a second time: the page was made of another one."""
    return read_section(analyzed)


def test_the_page_has_every_chapter_and_is_the_same_each_time(analyzed, section):
    page = (analyzed / "analysis.html").read_bytes()
    assert write_page(analyzed, section).read_bytes() == page
    text = page.decode()
    for title in (
        "Spectra of the attention",
        "Products of attention",
        "Logits of tokens and positions",
        "Bandwidth test",
    ):
        assert f"<h2>{title}" in text
    assert "<h2>Heat maps" not in text
    assert "too few for a heat map" in text
    assert "<script" not in text
    assert "None" not in text
    assert "nan" not in text.replace("nance", "")


def test_the_sections_table_is_the_mean_over_seeds(section, numbers):
    spectra = section.chapters[0].tables[0]
    line = next(line for line in spectra.lines if line.what == "largest singular value of A")
    by_seed = [
        np.mean([row["largest_singular"] for row in rows_of(numbers["spectrum"], f"standard, seed {seed}")])
        for seed in (0, 1)
    ]
    assert line.cells[0].mean == pytest.approx(np.mean(by_seed))
    assert line.cells[0].sd == pytest.approx(np.std(by_seed, ddof=1))
    assert line.cells[2].sd is None
    line = next(line for line in spectra.lines if line.what == "largest imaginary part in any head")
    by_seed = [
        max(row["largest_imaginary"] for row in rows_of(numbers["spectrum"], f"standard, seed {seed}"))
        for seed in (0, 1)
    ]
    assert line.cells[0].mean == pytest.approx(np.mean(by_seed))
    products = next(one for one in section.chapters if one.title == "Products of attention matrices")
    line = products.tables[0].lines[0]
    of_all = [rows_of(numbers["products"], f"standard, seed {seed}", kind=line.what, depth=3) for seed in (0, 1)]
    assert line.cells[0].mean == pytest.approx(np.mean([row["effective_rank"] for (row,) in of_all]))
    bandwidth = section.chapters[-1]
    assert bandwidth.title == "Bandwidth test"
    rows = numbers["bandwidth"]
    lost = [lost_by_seed(rows, label) for label in ("standard", "twicing [2-3]")]
    difference = np.mean([lost[1][seed] - lost[0][seed] for seed in (0, 1)])
    words = next(one for one in bandwidth.verdicts if one.startswith("twicing [2-3]: "))
    assert number(abs(difference)) in words
    assert [one.partition(":")[0] for one in bandwidth.verdicts] == ["twicing [2-3]", "neutreno", "smooth-more"]


def test_a_report_can_show_it(run_folder, section, tmp_path, monkeypatch):
    # One chapter: to draw all of them once more takes long.
    one = dataclasses.replace(section, chapters=section.chapters[-1:])
    monkeypatch.setattr(section_module, "analysis_section", {run_folder / "analysis": one}.get)
    html = report_section(run_folder)
    assert "<h3>Bandwidth test</h3>" in html
    assert "<h3>What is not shown</h3>" in html
    assert "twicing [2-3]: " in html
    assert "<h2>" not in html
    assert "<html" not in html
    assert report_section(tmp_path) is None
    monkeypatch.undo()
    assert report_section(tmp_path) is None


def test_the_page_links_the_report_of_its_run(section, tmp_path):
    folder = tmp_path / "analysis"
    folder.mkdir()
    # Without chapters: to draw them takes long.
    bare = dataclasses.replace(section, chapters=())
    assert "report.html" not in write_page(folder, bare).read_text()
    (tmp_path / "report.html").write_text("")
    assert '<a href="../report.html">' in write_page(folder, bare).read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "report.html" not in write_page(elsewhere, bare).read_text()


def test_of_many_that_are_not_trained_the_first_are_named(run_folder, monkeypatch):
    jobs, _ = trained_jobs(run_folder, None)
    monkeypatch.setattr(
        "twicing.experiments.trained.trained_jobs", lambda *_: (jobs[:1], [f"model {place}" for place in range(30)])
    )
    _, _, (not_trained, *_) = looked_at(dataclasses.replace(OPTIONS, models=(str(run_folder),)))
    assert not_trained == "Not trained yet: model 0, model 1, model 2, model 3, model 4 and 25 more."


def test_a_broken_analysis_is_told(run_folder, analyzed, tmp_path):
    copy = tmp_path / "analysis"
    copy.mkdir()
    for path in analyzed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert read_analysis(copy).models.keys() == read_analysis(analyzed).models.keys()
    (copy / "arrays.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="holds a broken analysis"):
        report_section(tmp_path)
    (copy / "analysis.json").write_text("{")
    with pytest.raises(ValueError, match="broken file"):
        report_section(tmp_path)
    with pytest.raises(ValueError, match="holds no analysis"):
        read_section(tmp_path)


def test_progress_counts_every_image(run_folder, tmp_path, monkeypatch, no_page):
    shown = []
    monkeypatch.setattr(run_module._Display, "passed", lambda self, images: shown.append(images))
    options = dataclasses.replace(
        OPTIONS, models=(str(run_folder),), spectrum_images=1, bandwidth_images=5, out=tmp_path / "new" / "out"
    )
    run(options, "", told())
    assert sum(shown) == 6 * (1 + 9 * 5)


def test_the_bandwidth_test_can_be_left_out_and_the_folder_replaced(run_folder, tmp_path, no_page):
    options = dataclasses.replace(OPTIONS, models=(str(run_folder),), spectrum_images=1, out=tmp_path)
    run(options, "first", told())
    assert (tmp_path / "bandwidth.csv").exists()
    run(dataclasses.replace(options, bandwidth_images=0), "second", told())
    assert not (tmp_path / "bandwidth.csv").exists()
    found = read_analysis(tmp_path)
    assert found.about["command"] == "second"
    assert (found.bandwidth, len(found.models)) == ([], 6)


def test_only_controls_are_drawn_where_there_is_nothing_else(run_folder, tmp_path, no_page):
    left = tmp_path / "run"
    open_folder(left, PLAN, "twicing compare", 1, environment(), "now")
    job = next(job for job in PLAN.jobs(left) if job.arm.label == "smooth-more")
    there = next(one for one in PLAN.jobs(run_folder) if one.arm.label == "smooth-more")
    job.folder.mkdir()
    for path in there.folder.iterdir():
        (job.folder / path.name).write_bytes(path.read_bytes())
    run(dataclasses.replace(OPTIONS, models=(str(left),), spectrum_images=1, bandwidth_images=2), "", told())
    (model,) = read_analysis(left / "analysis").models.values()
    assert model["shown"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert": "twicing"}, "leave --convert out"),
        ({"pretrained": True, "layers": "1"}, "leave --pretrained, --layers out"),
        ({"spectrum_images": 0}, "--spectrum-images is 1 or more: got 0"),
        ({"batch_size": 0}, "--batch-size is 1 or more"),
        ({"bandwidth_images": -1}, "--bandwidth-images is 0 or more"),
        ({"device": "tpu"}, "--device is cpu, cuda or auto"),
    ],
)
def test_options_that_do_not_fit_are_told(run_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(OPTIONS, models=(str(run_folder),), **changes), "", told())


def test_a_run_folder_is_looked_at_alone_and_other_folders_are_kept(run_folder, tmp_path):
    with pytest.raises(ValueError, match="is a run folder: look at it alone"):
        run(dataclasses.replace(OPTIONS, models=("vit_tiny_patch16_224", str(run_folder))), "", told())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no analysis"):
        run(dataclasses.replace(OPTIONS, models=(str(run_folder),), out=tmp_path), "", told())
    with pytest.raises(ValueError, match="is a file"):
        run(dataclasses.replace(OPTIONS, models=(str(run_folder),), out=tmp_path / "mine.txt"), "", told())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_diverged_model_is_left_out_in_a_sentence(run_folder, tmp_path, monkeypatch, no_page):
    from twicing.experiments.analyze.subjects import Looked

    build = Looked.build

    def diverged(self):
        model = build(self)
        if self.case.label != "standard":
            model.network.blocks[1].attn.qkv.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(Looked, "build", diverged)
    options = dataclasses.replace(OPTIONS, models=(str(run_folder),), spectrum_images=1, bandwidth_images=0)
    run(dataclasses.replace(options, out=tmp_path), "", told())
    found = read_analysis(tmp_path)
    assert list(found.models) == ["standard, seed 0", "standard, seed 1"]
    assert "twicing [2-3], seed 0: an attention matrix holds values that are not finite" in " ".join(found.left_out)
