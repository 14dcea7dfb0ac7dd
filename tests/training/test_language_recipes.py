"""Recipes of language models: what the protocols say, what cannot be set, and what a model of them costs."""

import dataclasses

import pytest
import torch

from twicing.analysis.layer_similarity import layer_similarity
from twicing.data.text import prepare_corpus
from twicing.data.text_sources import plain_text
from twicing.training.language import build_language_model, learning_rate_factor
from twicing.training.language_cost import block_multiply_adds, equal_cost_inner
from twicing.training.language_data import load_text, prepare_text, probe_windows
from twicing.training.language_recipes import LANGUAGE_RECIPES, find_language_recipe, ptb, text_demo
from twicing.training.settings import apply_settings, settable_keys


def test_the_published_protocol_of_wikitext_103():
    small, medium = find_language_recipe("wikitext103_small"), find_language_recipe("wikitext103_medium")
    linear = find_language_recipe("wikitext103_linear")
    for recipe in (small, medium):
        assert recipe.vocabulary == 267_735
        assert recipe.cutoffs == (20_000, 40_000, 200_000)
        assert (recipe.depth, recipe.heads, recipe.inner, recipe.norm) == (16, 8, 2048, "post")
        assert (recipe.dropout, recipe.attention_dropout, recipe.clip) == (0.1, 0.0, 0.25)
        assert (recipe.learning_rate, recipe.warmup_steps, recipe.weight_decay) == (2.5e-4, 2000, 0)
        assert (recipe.tokens, recipe.order, recipe.positions) == ("words", "contiguous", "sinusoidal")
    assert (small.width, small.length, small.batch_size, small.steps) == (128, 256, 96, 500_000)
    assert (medium.width, medium.length, medium.batch_size, medium.steps) == (256, 384, 56, 400_000)
    assert (small.baseline, linear.baseline) == ("standard", "linear")


def test_the_protocol_of_arxiv_2604_03190():
    recipe = find_language_recipe("wikitext103_10m")
    with torch.device("meta"):
        model = build_language_model(recipe, 0, recipe.vocabulary)
    assert sum(p.numel() for p in model.parameters()) == 7_419_392
    # Fifteen passes over ten million tokens.
    assert recipe.steps * recipe.batch_size * recipe.length == pytest.approx(15 * recipe.train_tokens, rel=0.002)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.warmup_steps, recipe.clip) == (3e-4, 0.01, 1500, 1.0)


@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_every_recipe_says_what_it_measures(name):
    recipe = find_language_recipe(name)
    assert recipe.name == name
    assert str(recipe.depth) in recipe.headline
    assert len(recipe.primary) == 3
    unit = {"words": "word", "words and marks": "word or mark", "bpe": "BPE token"}[recipe.tokens]
    assert [primary.metric for primary in recipe.primary[:2]] == [f"test perplexity per {unit}, segments"] * 2
    assert recipe.primary[1].conditions["share"] in recipe.evaluation.swap_shares
    assert recipe.primary[1].conditions["mode"] in recipe.evaluation.swap_modes
    assert recipe.evaluation.swap_shares[0] == "0"
    assert recipe.evaluation.swap_shares[-1] == "0.1"


def test_an_unknown_recipe_is_told():
    with pytest.raises(ValueError, match=r"unknown recipe 'ptp': did you mean 'ptb'"):
        find_language_recipe("ptp")


def test_what_can_be_set():
    changed = apply_settings(ptb(), ["depth=2", "norm=post", "evaluation.swap_shares=0,0.04", "cutoffs=100,1000"])
    assert (changed.depth, changed.norm, changed.cutoffs) == (2, "post", (100, 1000))
    assert changed.evaluation.swap_shares == ("0", "0.04")
    keys = settable_keys(ptb())
    assert not {"name", "data", "tokens", "vocabulary", "baseline", "attention_passes", "primary"} & set(keys)
    assert {"width", "order", "clip", "training_length", "evaluation.sliding_tokens"} <= set(keys)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("norm=batch", "norm must be one of post, pre: got 'batch'"),
        ("order=random", "order must be one of contiguous, shuffled"),
        ("positions=none", "positions must be one of sinusoidal, learned"),
        ("activation=tanh", "activation must be one of relu, gelu"),
        ("depth=0", "depth must be 1 or larger: got 0"),
        ("min_count=0", "min_count must be 1 or larger"),
        ("train_tokens=-1", "train_tokens must be 0 or larger"),
        ("heads=5", "width must be even and a multiple of heads: got 48 and 5"),
        ("dropout=1", "dropout must be from 0 to below 1"),
        ("clip=0", "clip must be a finite number above 0"),
        ("learning_rate=nan", "learning_rate must be a finite number above 0"),
        ("weight_decay=-1", "weight_decay must be a finite number 0 or larger"),
        ("warmup_steps=600", "warmup_steps must be below the 600 steps of the training: got 600"),
        ("evaluation.swap_shares=0.1,0.05", "evaluation.swap_shares must be shares from 0 to 1 in ascending order"),
        ("evaluation.swap_shares=0,1.5", "evaluation.swap_shares must be shares from 0 to 1 in ascending order"),
        ("evaluation.swap_modes=targets", "evaluation.swap_modes must be of inputs only"),
        ("evaluation.sliding_tokens=-1", "evaluation.sliding_tokens must be 0 or larger"),
    ],
)
def test_what_cannot(setting, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(text_demo(), [setting])


def test_fields_that_are_no_settings_are_checked_too():
    for change, message in (
        ({"data": "web"}, "data must be one of files, imdb, python"),
        ({"tokens": "runes"}, "unknown kind of tokens 'runes'"),
        ({"tokens": "bpe"}, "vocabulary must say how many BPE tokens to learn: got 0"),
        ({"attention_passes": 3}, "attention_passes must be 1 or 2: got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(text_demo(), **change)


def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine():
    recipe = dataclasses.replace(text_demo(), epochs=10, steps_per_epoch=10, warmup_steps=20)
    factors = [learning_rate_factor(step, recipe) for step in range(100)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[20] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0, abs=5e-4)
    assert learning_rate_factor(100, recipe) == 0
    assert learning_rate_factor(0, dataclasses.replace(recipe, warmup_steps=0)) == 1


def test_multiply_adds_are_those_that_the_products_have():
    """Counted on a small model: two for every number of a weight matrix and token, and pairs of tokens one by one."""
    recipe = dataclasses.replace(text_demo(), depth=3, width=16, heads=2, inner=24, length=7)
    model = build_language_model(recipe, 0, 50)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    pairs = sum(1 for i in range(7) for j in range(7) if j <= i)
    assert block_multiply_adds(recipe) == 7 * matrices + 3 * 2 * pairs * 16
    assert block_multiply_adds(recipe, 2) == block_multiply_adds(recipe) + 2 * pairs * 16
    twice = dataclasses.replace(recipe, attention_passes=2)
    once_more = block_multiply_adds(twice) - block_multiply_adds(recipe)
    assert once_more == 3 * (7 * 4 * 16**2 + 2 * pairs * 16)


@pytest.mark.parametrize("layers", [0, 1, 2, 8])
def test_the_wide_control_costs_what_twicing_does(layers):
    recipe = ptb()
    wide = dataclasses.replace(recipe, inner=equal_cost_inner(recipe, layers))
    one_unit = recipe.depth * 2 * recipe.length * recipe.width
    assert abs(block_multiply_adds(wide) - block_multiply_adds(recipe, layers)) <= one_unit / 2
    assert (wide.inner > recipe.inner) == (layers > 0)


def test_costs_of_layers_that_are_not_there():
    with pytest.raises(ValueError, match="twiced_layers must be from 0 to 8, the recipe's depth: got 9"):
        block_multiply_adds(ptb(), 9)
    with pytest.raises(ValueError, match="a layer with 2 attention passes cannot be twiced"):
        equal_cost_inner(dataclasses.replace(ptb(), attention_passes=2), 1)


def small_text(folder, length=2000):
    folder.mkdir(exist_ok=True)
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").write_text(" ".join(f"w{i % 60}" for i in range(length)) + "\n")
    return folder


def test_a_text_is_prepared_once_and_mapped_afterwards(tmp_path):
    data = small_text(tmp_path / "data")
    recipe = dataclasses.replace(ptb(), vocabulary=0, batch_size=2)
    shares = []
    corpus = prepare_text(recipe, tmp_path / "run" / "text", data, shares.append)
    assert corpus.counts["train"] == 2001
    assert shares[-1] == 1
    assert torch.equal(load_text(recipe, tmp_path / "run" / "text").test, corpus.test)


@pytest.mark.parametrize(("probes", "expected"), [(3, 3), (0, 31), (99, 31)])
def test_probes_are_the_first_windows_of_the_test_part(probes, expected, tmp_path):
    recipe = apply_settings(ptb(), [f"evaluation.probes={probes}", "batch_size=2"])
    recipe = dataclasses.replace(recipe, vocabulary=0, cutoffs=())
    corpus = prepare_text(recipe, tmp_path / "text", small_text(tmp_path / "data"))
    windows = probe_windows(recipe, corpus)
    assert windows.shape == (expected, 64)
    assert torch.equal(windows.flatten(), corpus.test[: expected * 64].long())
    # What the report does with them.
    model = build_language_model(dataclasses.replace(recipe, depth=2), 0, len(corpus.vocabulary)).eval()
    found = layer_similarity(model, windows[:2])
    assert found["block output", "mean pairwise cosine"].shape == (2,)


def test_settings_of_the_recipe_reach_the_text(tmp_path):
    data = small_text(tmp_path / "data")
    recipe = dataclasses.replace(ptb(), vocabulary=0, batch_size=2, vocabulary_limit=20, train_tokens=500)
    corpus = prepare_text(recipe, tmp_path / "a", data)
    assert (len(corpus.vocabulary), corpus.counts["train"]) == (20, 500)
    rare = dataclasses.replace(recipe, vocabulary_limit=0, min_count=34)
    # 2,000 words in turns of 60: the first twenty come once more than the others.
    assert len(prepare_text(rare, tmp_path / "b", data).vocabulary) == 20 + 2


def test_the_text_must_be_the_one_that_the_recipe_is_for(tmp_path):
    data = small_text(tmp_path / "data")
    with pytest.raises(ValueError, match=r"ptb is for a vocabulary of 10,000, and data has 61: give the text"):
        prepare_text(ptb(), tmp_path / "text", data)
    with pytest.raises(ValueError, match="more than 16 windows of 64 tokens: it has 801 tokens"):
        prepare_text(dataclasses.replace(ptb(), vocabulary=0), tmp_path / "b", small_text(tmp_path / "short", 800))
    with pytest.raises(ValueError, match="ptb needs --data-dir, the folder with a text file for each of train"):
        prepare_text(ptb(), tmp_path / "text")
    with pytest.raises(ValueError, match=r"imdb_lm needs --data-dir, the folder with train.jsonl.xz"):
        prepare_text(find_language_recipe("imdb_lm"), tmp_path / "text")
    with pytest.raises(ValueError, match="text_demo comes with Python and reads no folder"):
        prepare_text(text_demo(), tmp_path / "text", data)


def test_bpe_learns_as_many_tokens_as_the_recipe_says(tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers (the extra 'hf')")
    data = small_text(tmp_path / "data")
    recipe = dataclasses.replace(find_language_recipe("wikitext103_10m"), train_tokens=0, batch_size=2, vocabulary=300)
    corpus = prepare_text(recipe, tmp_path / "text", data)
    assert (len(corpus.vocabulary), corpus.vocabulary.unit) == (300, "BPE token")


def test_the_demo_needs_no_data(tmp_path):
    corpus = prepare_text(text_demo(), tmp_path / "text")
    assert corpus.name == "Python's documentation"
    assert corpus.vocabulary.unit == "word or mark"


def test_penn_treebank_is_the_text_of_its_recipe(real_data, tmp_path):
    corpus = prepare_text(ptb(), tmp_path / "text", real_data / "text" / "ptb")
    # As published: the preprocessed text of Mikolov et al., the ends of lines counted.
    assert corpus.counts == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert len(corpus.vocabulary) == ptb().vocabulary == 10_000
    assert corpus.vocabulary.unit == "word"


def test_a_text_of_another_recipe_is_refused_when_it_is_loaded(tmp_path):
    prepare_corpus(plain_text(small_text(tmp_path / "data")), tmp_path / "text")
    with pytest.raises(ValueError, match="ptb is for a vocabulary of 10,000"):
        load_text(ptb(), tmp_path / "text")
