"""A comparison of language models: every number of a job computed again by hand, and what its page shows."""

import dataclasses
import json
from math import exp

import pytest
import torch
import torch.nn.functional as F

from twicing.adapters.surgery import find_sites, spec
from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.arms import Arm, arms_under_test
from twicing.experiments.controls import controls_of
from twicing.experiments.equal_time import step_time_ratio
from twicing.experiments.findings import exploratory_measures, primary_rows, read_run
from twicing.experiments.job import parts_of, read_job, read_notes, run_job, share_done
from twicing.experiments.language_job import LANGUAGE, converted_language_model
from twicing.experiments.plan import Plan, Resources
from twicing.experiments.programmes import find_any_recipe, programme_of
from twicing.experiments.report import write_report
from twicing.experiments.results import environment, select, write_json, write_records
from twicing.experiments.results_table import results_markdown
from twicing.robustness.word_swap import swap_words
from twicing.training.classification import load_trained
from twicing.training.language_data import load_text
from twicing.training.language_perplexity import sliding_window_perplexity
from twicing.training.language_recipes import LANGUAGE_RECIPES
from twicing.training.settings import apply_settings
from twicing.training.streams import stream_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TINY = apply_settings(
    find_any_recipe("text_demo"),
    [
        *("epochs=2", "steps_per_epoch=12", "warmup_steps=4", "depth=2", "width=16", "heads=2", "inner=32"),
        *("length=16", "batch_size=8", "vocabulary_limit=300", "learning_rate=0.02"),
        *("evaluation.probes=4", "evaluation.sliding_tokens=40", "evaluation.swap_shares=0,0.04,0.1"),
        "evaluation.swap_modes=inputs only,paper_compat",
    ],
)
SEED = 1
SEGMENTS = "test perplexity per word or mark, segments"
CLEAN = {"threat": "clean"}


@pytest.fixture(scope="module")
def plan():
    tested = arms_under_test(["twicing@2"], ["all"])
    two = [arm for arm in controls_of(TINY, tested, 1.0) if arm.label == "two-attentions"]
    return Plan(TINY, (*tested, *two), (SEED,))


@pytest.fixture(scope="module")
def jobs(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    resources = Resources(cache=folder / "data")
    said = programme_of(TINY).prepare(TINY, resources, lambda share: None)
    assert said.startswith("Python's documentation: ")
    assert "unit: word or mark" in said
    jobs = plan.jobs(folder, resources)
    with torch.random.fork_rng(devices=[]):
        for job in jobs:
            torch.manual_seed(7)  # whatever was drawn before must not matter
            run_job(job, environment(), lambda part, share: None)
    assert all(share_done(job) == 1 for job in jobs)
    return {job.arm.label: job for job in jobs}


@pytest.fixture(scope="module")
def by_hand(jobs):
    job = jobs["twicing [2]"]
    corpus = load_text(TINY, job.resources.cache)
    model = converted_language_model(job, SEED, len(corpus.vocabulary))
    load_trained(model, SEED, job.folder)
    return model.eval(), corpus


def found(job, metric, conditions):
    records, _ = read_job(job)
    [record] = [one for one in select(records, metric=metric) if one.conditions == conditions]
    return record


def perplexity(model, inputs, targets, length):
    """Token by token, in fp64."""
    total, count = 0.0, 0
    for start in range(0, len(inputs) - 1, length):
        window = inputs[start : start + length][: len(inputs) - 1 - start].long()
        with torch.no_grad():
            log_p = model.log_probabilities(window[None])[0].double()
        wanted = targets[start + 1 : start + 1 + len(window)].long()
        total += F.nll_loss(log_p, wanted, reduction="sum").item()
        count += len(wanted)
    assert count == len(inputs) - 1
    return exp(total / count)


def test_perplexities_are_those_of_the_trained_model(jobs, by_hand):
    model, corpus = by_hand
    job = jobs["twicing [2]"]
    for part in ("valid", "test"):
        stream = getattr(corpus, part)
        record = found(job, SEGMENTS.replace("test", part), CLEAN)
        assert record.value == pytest.approx(perplexity(model, stream, stream, TINY.length), rel=1e-5)
        assert record.n == len(stream) - 1
    ends = found(job, SEGMENTS.replace("test", "valid"), {"epoch": 2, "step": 24})
    assert ends.value == pytest.approx(found(job, SEGMENTS.replace("test", "valid"), CLEAN).value, rel=1e-6)
    slid = found(job, "test perplexity per word or mark, sliding window", CLEAN)
    assert slid.n == 40
    assert slid.value == pytest.approx(sliding_window_perplexity(model, corpus.test, tokens=40).value, rel=1e-5)
    assert slid.value != found(job, SEGMENTS, CLEAN).value


def test_swapped_words_are_those_of_the_seed(jobs, by_hand):
    model, corpus = by_hand
    for mode, share in (("inputs only", "0.04"), ("inputs only", "0.1"), ("paper_compat", "0.015")):
        generator = torch.Generator().manual_seed(stream_seed(SEED, 40, 0))
        swapped = swap_words(corpus.test, corpus.vocabulary, share, mode=mode, generator=generator)
        record = found(jobs["twicing [2]"], SEGMENTS, {"threat": "word swap", "mode": mode, "share": share})
        expected = perplexity(model, swapped.inputs, swapped.targets, TINY.length)
        assert record.value == pytest.approx(expected, rel=1e-5)
    swaps = select(read_job(jobs["standard"])[0], conditions={"threat": "word swap"})
    assert sorted((one.conditions["mode"], one.conditions["share"]) for one in swaps) == [
        *(("inputs only", "0.04"), ("inputs only", "0.1"), ("paper_compat", "0.015"))
    ]
    assert read_notes(jobs["standard"]) == ['Word swap: "AAA" is not in the vocabulary and became <unk>.']


def test_swapped_words_are_the_same_where_weights_are_of_other_seeds(jobs, monkeypatch):
    seeds = []

    def swap(*_given, generator, **_options):
        seeds.append(generator.initial_seed())
        raise InterruptedError

    monkeypatch.setattr("twicing.experiments.language_job.swap_words", swap)
    for offset in (0, 1000):
        arm = dataclasses.replace(jobs["standard"].arm, seed_offset=offset)
        bench = LANGUAGE.open(dataclasses.replace(jobs["standard"], arm=arm), lambda part, share: None)
        with pytest.raises(InterruptedError):
            bench.word_swap()
    assert seeds == [stream_seed(SEED, 40, 0)] * 2


def test_similarity_is_of_the_first_windows_of_the_test_part(jobs, by_hand):
    model, corpus = by_hand
    windows = corpus.test[: 4 * TINY.length].view(4, TINY.length).long()
    expected = layer_similarity(model, windows)["block output", "mean pairwise cosine"]
    for layer in (1, 2):
        conditions = {"layer": layer, "where": "block output", "when": "trained"}
        record = found(jobs["twicing [2]"], "mean pairwise cosine", conditions)
        assert record.value == pytest.approx(expected[layer - 1].item(), rel=1e-6)
        assert record.n == 4


def test_arms_begin_with_the_same_weights_and_differ_in_their_formula(jobs):
    standard, twiced = (
        converted_language_model(jobs[label], SEED, 50).state_dict() for label in ("standard", "twicing [2]")
    )
    assert standard.keys() == twiced.keys()
    assert all(torch.equal(standard[name], twiced[name]) for name in standard)
    specs = {label: read_job(job)[0][0].spec for label, job in jobs.items()}
    assert specs["standard"] == []
    assert specs["twicing [2]"][0]["layers"] == [2]
    assert specs["two-attentions"][0]["mechanism"] == "two attentions a block"
    assert "similarity" not in parts_of(jobs["two-attentions"])


def test_the_page_shows_perplexities_swaps_and_curves(plan, jobs, tmp_path):
    write_json(tmp_path / "config.json", plan.identity() | {"command": "twicing compare text_demo"})
    write_records(tmp_path / "results.jsonl", [record for job in jobs.values() for record in read_job(job)[0]])
    write_json(tmp_path / "notes.json", read_notes(jobs["standard"]))
    run = read_run(tmp_path)
    rows = primary_rows(run)
    assert {row.measure.name for row in rows} == {primary.name for primary in TINY.primary}
    assert {one.better for one in exploratory_measures(run) if "perplexity" in one.metric} == {"lower"}
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for words in ("<h2>Word swap</h2>", "words swapped, in %", "became &lt;unk&gt;", "The valid part chose no epoch"):
        assert words in page, words
    assert "swapping targets too (&#34;paper_compat&#34;) can lower perplexity" in page
    for words in ("held-out images", "Gradient masking", "an image point"):
        assert words not in page, words
    table = results_markdown(tmp_path)
    assert "standard reaches a valid perplexity per word or mark, segments of" in table
    assert "word swap 0.015 (paper_compat)" in table


def test_a_recipe_may_have_another_baseline_than_softmax_attention():
    recipe = dataclasses.replace(TINY, baseline="linear")
    model = programme_of(recipe).trial_model(recipe)
    Arm("standard", "standard", "all", "").apply(model, recipe.baseline)
    assert [site.converted for site in find_sites(model)] == ["linear", "linear"]
    model = programme_of(recipe).trial_model(recipe)
    Arm("twicing-linear [2]", "twicing-linear", "2", "").apply(model, recipe.baseline)
    assert [site.converted for site in find_sites(model)] == ["linear", "twicing-linear"]
    assert {tuple(entry["layers"]) for entry in spec(model)} == {(1,), (2,)}


def test_the_controls_are_fitted_to_language_models():
    arms = arms_under_test(["twicing"], ["all"])
    controls = {arm.label: arm for arm in controls_of(TINY, arms, 1.25)}
    assert len(controls) == 5
    wide = controls["standard-wide"].recipe(TINY)
    # (N + 1) / 4 hidden units more for each twiced layer of as many.
    assert wide.inner == TINY.inner + 4
    assert "a feed-forward part of 36 instead of 32 hidden units" in controls["standard-wide"].meaning
    assert controls["standard-equal-time"].recipe(TINY).steps == 30
    assert step_time_ratio(TINY, arms[1], steps=2) >= 1


def test_neutreno_has_its_default_of_texts():
    [_, arm] = arms_under_test(["neutreno"], ["all"], programme_of(TINY).options)
    assert arm.options == {"lam": 0.4}


@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_every_recipe_makes_a_plan_that_json_holds(name):
    recipe = find_any_recipe(name)
    identity = Plan(recipe, tuple(arms_under_test(["twicing"], ["all"])), (0,)).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["primary"][-1]["conditions"]["layer"] == recipe.depth
