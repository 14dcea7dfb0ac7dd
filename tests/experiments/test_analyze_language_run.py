"""twicing analyze on a run folder of language models: causal matrices by hand, and the last word of each window."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from twicing.experiments.analyze.keep import read_analysis
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.run import run
from twicing.experiments.analyze.subjects import looked_at
from twicing.experiments.arms import Arm
from twicing.experiments.job import part_file
from twicing.experiments.language_job import converted_language_model
from twicing.experiments.plan import Plan, Resources, open_folder
from twicing.experiments.results import environment, write_json
from twicing.experiments.run import DATA_CACHE
from twicing.training.checkpoint import CHECKPOINT, identity
from twicing.training.classification import load_trained
from twicing.training.language_data import prepare_text
from twicing.training.language_recipes import text_demo
from twicing.training.settings import apply_settings

TOKENS, COUNT = 12, 5
RECIPE = apply_settings(text_demo(), ["depth=2", "width=16", "heads=2", "inner=16", f"length={TOKENS}"])
ARMS = (
    Arm("standard", "standard", "all", ""),
    Arm("twicing [2]", "twicing", "2", ""),
    Arm("two-attentions", "standard", "all", "", control=True, changes={"attention_passes": 2}),
)
PLAN = Plan(RECIPE, ARMS, (0,))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A comparison whose weights were drawn instead of trained: large ones, so that its heads differ."""
    folder = tmp_path_factory.mktemp("analyzed")
    open_folder(folder, PLAN, "twicing compare", 1, environment(), "now")
    corpus = prepare_text(RECIPE, folder / DATA_CACHE)
    for place, job in enumerate(jobs_of(folder)):
        model = converted_language_model(job, 0, len(corpus.vocabulary))
        draw = torch.Generator().manual_seed(place)
        state = {
            f"model.{name}": weights + 0.3 * torch.randn(weights.shape, generator=draw)
            for name, weights in model.state_dict().items()
        }
        job.folder.mkdir()
        torch.save({"state_dict": state, "twicing": identity(model, RECIPE.name, 0)}, job.folder / CHECKPOINT)
        write_json(part_file(job, "training"), {})
    return folder, corpus


def jobs_of(folder):
    return PLAN.jobs(folder, Resources(cache=folder / DATA_CACHE))


@pytest.fixture(scope="module")
def options(run_folder):
    return Analyze((str(run_folder[0]),), spectrum_images=2, bandwidth_images=COUNT, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def said():
    return io.StringIO()


@pytest.fixture(scope="module")
def analyzed(options, said):
    return run(options, "twicing analyze RUN", Console(file=said, width=120)).parent


@pytest.fixture(scope="module")
def numbers(analyzed):
    return json.loads((analyzed / "analysis.json").read_text())


def trained(run_folder, label):
    folder, corpus = run_folder
    job = next(job for job in jobs_of(folder) if job.arm.label == label)
    model = converted_language_model(job, 0, len(corpus.vocabulary))
    load_trained(model, 0, job.folder)
    return model.eval()


def windows(corpus, wanted):
    """The wanted ones of COUNT windows, evenly spaced over the held-out text."""
    full = corpus.test[: len(corpus.test) // TOKENS * TOKENS].view(-1, TOKENS).long()
    return full[[place * len(full) // COUNT for place in wanted]]


def matrices_by_hand(model, ids):
    """A of every layer, [B, H, N, N], from hooks on the common projection."""
    found = []

    def see(_module, _inputs, output):
        q, k, _ = output.double().reshape(*output.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        found.append((q @ k.mT / math.sqrt(8)).masked_fill(later, -torch.inf).softmax(-1))

    handles = [block.attention.qkv.register_forward_hook(see) for block in model.blocks]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def rows_of(table, model, **where):
    return [row for row in table if row["model"] == model and all(row[key] == value for key, value in where.items())]


def test_models_are_looked_at_on_windows_of_the_held_out_text(run_folder, numbers, said):
    _, corpus = run_folder
    assert list(numbers["models"]) == ["standard, seed 0", "twicing [2], seed 0"]
    about = numbers["about"]
    assert about["shown"] == f"5 windows of 12 tokens from the part of {corpus.name} that was held out from training"
    assert (about["unit"], about["spectrum_inputs"], about["causal"]) == ("windows", 2, True)
    (left_out,) = numbers["left_out"]
    assert left_out.startswith("two-attentions, seed 0: its blocks attend twice")
    model = numbers["models"]["twicing [2], seed 0"]
    assert (model["layers"], model["heads"], model["tokens"]) == (2, 2, TOKENS)
    assert model["formulas"] == {"1": "A", "2": "2A - A^2"}
    assert "Note: There are no heat maps" in said.getvalue()


@pytest.mark.parametrize(("label", "twiced"), [("standard", ()), ("twicing [2]", (2,))])
def test_spectra_are_those_of_causal_matrices(run_folder, numbers, label, twiced):
    # The two that are looked into lie at both ends and not side by side.
    found = matrices_by_hand(trained(run_folder, label), windows(run_folder[1], (0, 4)))
    for layer, matrices in enumerate(found, start=1):
        for head in range(2):
            (row,) = rows_of(numbers["spectrum"], f"{label}, seed 0", layer=layer, head=head + 1)
            ranks, largest, of_p = [], [], []
            for matrix in matrices[:, head].numpy():
                singular = np.linalg.svd(matrix, compute_uv=False)
                share = singular / singular.sum()
                ranks.append(np.exp(-(share * np.log(share)).sum()))
                largest.append(singular[0])
                of_p.append(np.linalg.svd(2 * matrix - matrix @ matrix, compute_uv=False)[0])
            assert row["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-4)
            assert row["largest_singular"] == pytest.approx(np.mean(largest), rel=1e-4)
            assert row["largest_singular_p"] == pytest.approx(np.mean(of_p), rel=1e-4)
            # The first token attends to itself alone, and a triangle's eigenvalues are its diagonal.
            assert (row["fits_theory"], row["complex"], row["largest_imaginary"]) == (1, 0, 0)
            assert row["largest_modulus_p"] == pytest.approx(1)
            assert row["p"] == "2A - A^2"


def test_eigenvalues_are_the_diagonal(run_folder, analyzed):
    arrays = read_analysis(analyzed).arrays["standard, seed 0"]
    diagonal = matrices_by_hand(trained(run_folder, "standard"), windows(run_folder[1], (0,)))[1][0].diagonal(
        dim1=-2, dim2=-1
    )
    expected = diagonal.sort(-1, descending=True).values.numpy()
    assert arrays["eigenvalues/2"].real == pytest.approx(expected, abs=1e-5)
    assert not arrays["eigenvalues/2"].imag.any()
    assert arrays["eigenvalues_p/2"].real == pytest.approx(2 * expected - expected**2, abs=1e-5)


@pytest.mark.parametrize("label", ["standard", "twicing [2]"])
def test_the_bandwidth_test_is_the_last_words_under_scaled_weights(run_folder, numbers, label):
    ids = windows(run_folder[1], range(COUNT))
    for factor in (0.5, 1.0, 2.0):
        model = trained(run_folder, label)
        with torch.no_grad():
            for block in model.blocks:
                block.attention.qkv.weight[:16] *= factor
            losses = model.losses(ids[:, :-1], ids[:, 1:])[:, -1]
        (row,) = rows_of(numbers["bandwidth"], f"{label}, seed 0", factor=factor)
        assert (row["measure"], row["n"]) == ("log-probability", COUNT)
        assert row["value"] == pytest.approx(-float(losses.double().mean()), rel=1e-5)
    assert {row["label"] for row in numbers["bandwidth"]} == {"standard", "twicing [2]"}


def test_logits_come_in_parts_of_words_and_positions(run_folder, numbers):
    model, ids = trained(run_folder, "standard"), windows(run_folder[1], (0, 4))
    found = {row["part"]: row["sd"] for row in rows_of(numbers["logit_parts"], "standard, seed 0") if row["head"] == 1}
    captured = []
    handle = model.blocks[0].attention.qkv.register_forward_hook(lambda _m, _i, output: captured.append(output))
    with torch.no_grad():
        model(ids)
    handle.remove()
    q, k, _ = captured[0].double().reshape(2, TOKENS, 3, 2, 8).permute(2, 0, 3, 1, 4)
    squares, entries = 0.0, 0
    for logits in (q @ k.mT / math.sqrt(8))[:, 0]:
        for place, row in enumerate(logits, start=1):
            squares += float((row[:place] - row[:place].mean()).square().sum())
            entries += place
    assert found["all"] == pytest.approx(math.sqrt(squares / entries), rel=1e-4)
    assert list(found) == ["token-token", "token-position", "position-token", "position-position", "rest", "all"]


def test_the_page_speaks_of_windows_and_is_true_of_causal_attention(analyzed):
    text = (analyzed / "analysis.html").read_text()
    for sentence in (
        "Means over layers, heads and windows.",
        "Attention is causal here: A is triangular",
        "They are the diagonal of A",
        "There are no heat maps: a text is no picture",
        "Above the diagonal lie keys that a query does not see.",
        "to the last token of each window",
        "Log-probability of the last token with scaled logits",
    ):
        assert sentence in text, sentence
    assert "image" not in text.replace("data:image", "").replace("<img", "")
    assert "Between the dotted ends" not in text
    assert "Real eigenvalues of A in" not in text
    assert "over seeds" not in text
    assert "<h2>Heat maps" not in text
    assert '<span class="formula">2A − A^2</span>' in text  # noqa: RUF001
    assert not any(name.startswith("heads") for name in read_analysis(analyzed).arrays["standard, seed 0"])


def test_options_of_other_models_are_refused(options):
    with pytest.raises(ValueError, match=r"is a run folder, .*held-out data of their own: leave --text, --tokens out"):
        looked_at(replace(options, text="book.txt", tokens=9))
