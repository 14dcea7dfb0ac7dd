"""twicing evaluate on a run folder: every trained model, its numbers computed again by hand, resumed, never mixed."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from twicing.experiments import attacking
from twicing.experiments.arms import Arm
from twicing.experiments.evaluate import bench as bench_module
from twicing.experiments.evaluate import tasks
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.page import write_page
from twicing.experiments.evaluate.run import evaluate
from twicing.experiments.evaluate.section import evaluation_section
from twicing.experiments.evaluate.subjects import trained_subjects
from twicing.experiments.job import part_file
from twicing.experiments.plan import Plan, open_folder
from twicing.experiments.results import environment, read_json, read_predictions, read_records, select, write_json
from twicing.experiments.vision_job import converted_model
from twicing.robustness.attacks import fgsm
from twicing.robustness.masking import masking_verdict
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.paper_compat import paper_compat
from twicing.robustness.spsa import spsa
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained, train_classifier
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import load_split
from twicing.training.streams import stream_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ACCURACY = "accuracy [share of images]"
RECIPE = apply_settings(
    digits(),
    [
        *("epochs=2", "depth=2", "width=16", "heads=2", "batch_size=32", "learning_rate=4e-3"),
        *("evaluation.eps=1/64,1/16", "evaluation.noise=1/8", "evaluation.verdict_seeds=0"),
    ],
)
ARMS = (
    Arm("standard", "standard", "all", ""),
    Arm("twicing [2]", "twicing", "2", "", {"gain": 0.5}),
    Arm("standard (other seeds)", "standard", "all", "", control=True, seed_offset=100_000),
)
PLAN = Plan(RECIPE, ARMS, (0, 1))
ATTACKS = ("clean", "noise", "fgsm", "pgd", "spsa", "paper_compat", "verdict")
QUICK = Evaluate(
    "",
    attacks=ATTACKS,
    images=30,
    pgd_steps=2,
    spsa_iterations=1,
    spsa_samples=2,
    verdict_images=21,
    verdict_eps="1/64",
    batch_size=13,
    device="cpu",
)


def quiet():
    return Console(quiet=True)


def run_evaluation(options, command="twicing evaluate"):
    return evaluate(options, quiet(), command)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Two arms trained with seed 0, one of them and a control with seed 1 too; the rest of the plan is not trained."""
    folder = tmp_path_factory.mktemp("run")
    open_folder(folder, PLAN, "twicing compare", 1, environment(), "now")
    for job in PLAN.jobs(folder):
        if (job.arm.label, job.seed) in (("standard", 0), ("twicing [2]", 0), ("standard (other seeds)", 1)):
            draw_seed = job.seed + job.arm.seed_offset
            job.folder.mkdir()
            split = load_split(RECIPE, job.seed)
            train_classifier(converted_model(job, draw_seed), RECIPE, split, draw_seed, job.folder, lambda _: None)
            write_json(part_file(job, "training"), {})
    return folder


@pytest.fixture(scope="module")
def evaluated(run_folder):
    with pytest.MonkeyPatch.context() as patch:
        # 100 steps with 5 restarts are tested where the verdict is; here they would cost more than all the rest.
        quick = functools.partial(masking_verdict, strong_steps=3, strong_restarts=1)
        patch.setattr(attacking, "masking_verdict", quick)
        return run_evaluation(dataclasses.replace(QUICK, model=str(run_folder))).parent


def job_of(run_folder, label, seed=0):
    return next(job for job in PLAN.jobs(run_folder) if (job.arm.label, job.seed) == (label, seed))


def trained(run_folder, label, seed=0):
    job = job_of(run_folder, label, seed)
    model = converted_model(job, seed + job.arm.seed_offset)
    load_trained(model, seed + job.arm.seed_offset, job.folder)
    return model.eval()


def value(records, conditions, arm="twicing [2]", metric=ACCURACY, seed=0):
    (record,) = [
        one for one in select(records, metric=metric, arm=arm, seed=seed) if dict(one.conditions) == dict(conditions)
    ]
    return record.value


def test_it_writes_beside_the_run_and_names_what_is_not_trained(run_folder, evaluated):
    assert evaluated == run_folder / "evaluation"
    names = {path.name for path in evaluated.iterdir()}
    assert names >= {"evaluation.html", "evaluation.json", "results.jsonl", "predictions.npz", "verdicts.json"}
    subjects, untrained = trained_subjects(run_folder, None)
    assert [subject.name for subject in subjects] == [
        "standard, seed 0",
        "twicing [2], seed 0",
        "standard (other seeds), seed 1",
    ]
    assert sorted(untrained) == ["standard (other seeds), seed 0", "standard, seed 1", "twicing [2], seed 1"]
    assert [subject.control for subject in subjects] == [False, False, True]


@pytest.mark.parametrize(("label", "seed"), [("standard", 0), ("twicing [2]", 0), ("standard (other seeds)", 1)])
def test_every_number_is_that_of_the_trained_model(run_folder, evaluated, label, seed):
    records = read_records(evaluated / "results.jsonl")
    model = trained(run_folder, label, seed)
    split = load_split(RECIPE, seed)
    everything = split.test.load(range(len(split.test)))
    right = model(everything).argmax(1) == split.test.labels
    assert value(records, {"threat": "clean"}, label, seed=seed) == pytest.approx(right.double().mean().item())
    chosen = balanced_order(split.test.labels)[:30].sort().values
    images, labels = everything[chosen], split.test.labels[chosen]

    def generator(stream):
        return torch.Generator().manual_seed(stream_seed(seed, stream, 0))

    noisy = gaussian_noise(images, "1/8", generator=generator(bench_module.NOISE_STREAM))
    under_noise = model(noisy).argmax(1) == labels
    of_spsa = spsa(
        model,
        images,
        labels,
        Threat("1/16"),
        iterations=1,
        samples=2,
        generator=generator(bench_module.SPSA_STREAM),
    ).correct
    of_fgsm = fgsm(model, images, labels, Threat("1/64")).correct
    sweep = pgd_sweep(model, images, labels, ["1/64", "1/16"], steps=2, generator=generator(bench_module.PGD_STREAM))
    of_papers = paper_compat(
        model.network, images, labels, mean=RECIPE.mean, std=RECIPE.std, eps="6/255",
        generator=generator(bench_module.COMPAT_STREAM),
    )  # fmt: skip
    expected = {
        "pgd, paper_compat (unverified) eps=6/255 normalised": of_papers.correct,
        "clean": right,
        "noise sd=1/8": under_noise,
        "fgsm eps=1/64": of_fgsm,
        "pgd eps=1/64": sweep.correct[0],
        "pgd eps=1/16": sweep.correct[1],
        "spsa eps=1/16": of_spsa,
    }
    found = read_predictions(evaluated / "predictions.npz")[label, seed]
    assert found.index.tolist() == split.test_index.tolist()
    assert found.probes.tolist() == chosen.tolist()
    for key, correct in expected.items():
        assert found.correct[key].tolist() == correct.tolist(), key
    eps_of = {"pgd eps=1/16": {"threat": "pgd", "eps": "1/16"}, "noise sd=1/8": {"threat": "noise", "sd": "1/8"}}
    for key, conditions in eps_of.items():
        assert value(records, conditions, label, seed=seed) == pytest.approx(expected[key].double().mean().item())
    assert value(records, {"threat": "pgd"}, label, metric="eps50 [share of pixel range]", seed=seed) >= 0


def test_records_say_where_they_come_from(evaluated):
    records = read_records(evaluated / "results.jsonl")
    (record,) = select(records, metric=ACCURACY, arm="twicing [2]", conditions={"threat": "clean"})
    assert (record.recipe, record.mechanism, record.layers, record.n) == ("digits", "twicing", "2", 300)
    assert record.spec[0]["options"]["gain"] == 0.5
    assert record.versions.keys() >= {"torch", "timm", "python"}
    assert len({(one.metric, one.arm, one.seed, json.dumps(one.conditions)) for one in records}) == len(records)


def test_the_verdict_sees_the_other_models_of_the_seed(evaluated):
    verdicts = read_json(evaluated / "verdicts.json")
    assert {arm: list(seeds) for arm, seeds in verdicts.items()} == {
        "standard": ["0"],
        "twicing [2]": ["0"],
        "standard (other seeds)": ["1"],
    }
    one = verdicts["twicing [2]"]["0"]
    assert (one["eps"], one["images"]) == ("1/64", 21)
    seen = {check["name"]: check for check in one["checks"]}
    assert "made against standard" in seen["transfer"]["seen"]
    alone = {check["name"]: check for check in verdicts["standard (other seeds)"]["1"]["checks"]}
    assert not alone["transfer"]["passed"]
    records = read_records(evaluated / "results.jsonl")
    conditions = {"threat": "transfer", "eps": "1/64", "from": "standard"}
    assert 0 <= value(records, conditions) <= 1
    assert select(records, arm="standard (other seeds)", conditions={"threat": "transfer"}) == []


@pytest.fixture
def copied(run_folder, evaluated, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def test_only_what_is_missing_is_done_again_and_comes_out_the_same(copied, monkeypatch):
    folder = copied / "evaluation"
    before = (folder / "results.jsonl").read_text()
    kept = folder / "standard-seed0" / "spsa-1_64.json"
    marked = kept.read_text().replace('"seconds": ', '"seconds": 1')
    kept.write_text(marked)
    (folder / "twicing-2-seed0" / "pgd.json").unlink()
    (folder / "results.jsonl").unlink()
    calls = []
    monkeypatch.setattr(attacking, "pgd_sweep", lambda *a, **k: calls.append(1) or pgd_sweep(*a, **k))
    monkeypatch.setattr(bench_module, "spsa", lambda *a, **k: pytest.fail("a finished part was done again"))
    run_evaluation(dataclasses.replace(QUICK, model=str(copied)))
    assert calls == [1]
    assert kept.read_text() == marked

    def values(text):
        kept = ("metric", "arm", "seed", "conditions", "value")
        return [[json.loads(line)[key] for key in kept] for line in text.splitlines()]

    assert values((folder / "results.jsonl").read_text()) == values(before)


def test_ctrl_c_keeps_what_is_finished(copied, monkeypatch):
    shutil.rmtree(copied / "evaluation")

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "spsa", interrupted)
    options = dataclasses.replace(QUICK, model=str(copied), attacks=("clean", "spsa"))
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(options)
    assert [path.name for path in (copied / "evaluation").glob("*/*.json")] == ["clean.json"]
    monkeypatch.undo()
    run_evaluation(options)
    assert len(list((copied / "evaluation").glob("*/*.json"))) == 3 * (1 + 2)


def test_a_later_command_adds_parts_and_both_are_kept(copied):
    options = dataclasses.replace(QUICK, model=str(copied), attacks=("noise",), noise=("1/4",), out=copied / "other")
    run_evaluation(options, "first")
    run_evaluation(dataclasses.replace(options, attacks=("fgsm",), eps=("1/8",)), "second")
    records = read_records(copied / "other" / "results.jsonl")
    threats = {(one.conditions["threat"], one.conditions.get("eps"), one.conditions.get("sd")) for one in records}
    assert threats == {("noise", None, "1/4"), ("fgsm", "1/8", None)}
    assert read_json(copied / "other" / "evaluation.json")["commands"] == ["first", "second"]


def test_other_settings_are_not_mixed_with_those_that_are_there(copied):
    options = dataclasses.replace(QUICK, model=str(copied))
    for changes in ({"images": 29}, {"pgd_steps": 3}, {"eps": ("1/64",)}):
        with pytest.raises(ValueError, match=r"was made with other settings \(.*\): name another folder with --out"):
            run_evaluation(dataclasses.replace(options, **changes))


def test_a_model_that_was_trained_again_is_another_one(copied):
    checkpoint = copied / "standard-seed0" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["model.network.head.bias"] += 1
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match=r"holds another evaluation \(standard, seed 0.weights: .* name another"):
        run_evaluation(dataclasses.replace(QUICK, model=str(copied)))


def test_what_the_folder_lacks_is_said(copied, tmp_path):
    options = dataclasses.replace(QUICK, model=str(copied))
    (copied / "evaluation" / "standard-seed0" / "clean.json").write_text("{}")
    with pytest.raises(ValueError, match=r"clean\.json is no part of an evaluation: delete it"):
        run_evaluation(options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty and holds no evaluation"):
        run_evaluation(dataclasses.replace(options, out=tmp_path / "full"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing is a folder without config.json"):
        run_evaluation(dataclasses.replace(options, model=str(tmp_path / "nothing")))
    for checkpoint in copied.glob("*/last.ckpt"):
        checkpoint.unlink()
    with pytest.raises(ValueError, match="holds no trained model yet"):
        run_evaluation(options)


def test_a_run_of_another_version_is_refused(copied):
    config = read_json(copied / "config.json")
    write_json(copied / "config.json", config | {"recipe": config["recipe"] | {"unheard_of": 1}})
    with pytest.raises(ValueError, match="is not of a comparison or training of this version"):
        run_evaluation(dataclasses.replace(QUICK, model=str(copied)))
    del config["recipe"]["drop_path"]
    write_json(copied / "config.json", config)
    with pytest.raises(
        ValueError,
        match=r"made by another version of twicing \(recipe.drop_path is missing there\): use that one",
    ):
        run_evaluation(dataclasses.replace(QUICK, model=str(copied)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("pdg",)}, r"unknown attack 'pdg': did you mean 'pgd'\?"),
        ({"corruptions": ("fog",)}, "unknown corruption 'fog': known are 'generated', 'gaussian_noise'"),
        ({"corruptions": ("generated",)}, "for images of 28 pixels or more, and standard takes 8: leave --corruptions"),
        ({"eps": ("1/16", "1/64")}, "--eps are sizes above 0, each larger than the one before: got 1/16 1/64"),
        ({"eps": ("0",)}, "--eps are sizes above 0"),
        ({"eps": ("8",)}, "eps must not exceed the whole pixel range"),
        ({"noise": ("-1",)}, "--noise are standard deviations above 0: got -1"),
        ({"verdict_eps": "0"}, "--verdict-eps is a size above 0: got 0"),
        ({"images": -1}, "--images must be 0 or larger: got -1"),
        ({"batch_size": 0}, "--batch-size must be 1 or larger: got 0"),
        ({"eps": ("-1",)}, "--eps -1: eps must be 0 or larger"),
        ({"verdict_eps": "two"}, "--verdict-eps two: eps must read like"),
        ({"transform": "0.8"}, "--transform is one of papers, 0.9: got '0.8'"),
        ({"attacks": ("none", "pgd")}, "--attacks none stands alone: got none pgd"),
        ({"attacks": ("none",)}, "there is nothing to evaluate: name --attacks, --corruptions or a test set"),
        ({"imagenet_c_kinds": ("fog",)}, "--imagenet-c-kinds are of --imagenet-c: name its folder"),
        ({"pretrained": True, "mechanism": "twicing"}, "is a run folder, .*: leave --pretrained, --mechanism out"),
        ({"device": "tpu"}, "--device is cpu, cuda or auto: got 'tpu'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_done(run_folder, tmp_path, changes, message):
    options = dataclasses.replace(QUICK, model=str(run_folder), out=tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        run_evaluation(options)
    assert not (tmp_path / "out").exists()


def test_imagenets_sets_need_a_model_of_its_classes(run_folder, tmp_path):
    options = dataclasses.replace(QUICK, model=str(run_folder), out=tmp_path / "out", imagenet_a=tmp_path)
    with pytest.raises(ValueError, match="need a model of its 1000 classes: standard has 10"):
        run_evaluation(options)


def test_classes_that_are_no_synsets_are_not_taken_for_imagenets(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "IMAGENET_CLASSES", 10)
    options = dataclasses.replace(QUICK, model=str(run_folder), out=tmp_path / "out", imagenet_a=tmp_path)
    with pytest.raises(ValueError, match="called by its synsets, as n01440764: standard was trained on 0, 1, 2, "):
        run_evaluation(options)


def test_the_page_is_whole_and_made_of_the_files_alone(evaluated, tmp_path):
    page = (evaluated / "evaluation.html").read_text()
    assert "Evaluation of" in page
    assert "robustness not established" in page  # the single model of seed 1 has no other to transfer from
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    records = read_records(evaluated / "results.jsonl")
    assert f"{value(records, {'threat': 'clean'}):.3f}" in page
    section = evaluation_section(evaluated)
    assert section.arms == ("standard", "twicing [2]", "standard (other seeds)")
    assert section.styles["standard (other seeds)"].control
    (table,) = section.tables
    words = [line.what for line in table.lines]
    chosen = "as they are, the images disturbed below"
    assert words[:5] == ["as they are", chosen, "Gaussian noise sd 1/8", "FGSM eps 1/64", "FGSM eps 1/16"]
    compat = words.index("PGD as papers run it (unverified) eps 1/255 normalised")
    assert words[compat + 5] == "PGD as papers run it (unverified) eps 6/255 normalised"
    assert section.pictures[0].name == "paper-compat"
    assert words.index("SPSA eps 1/64") < words.index("SPSA eps 1/16")
    clean = table.lines[0]
    assert clean.n == "300 to 299" or clean.n == "299 to 300" or clean.n == "300"
    assert clean.cells[1].mean == value(records, {"threat": "clean"})
    assert evaluation_section(tmp_path) is None
    again = run_evaluation(dataclasses.replace(QUICK, model=str(evaluated.parent)))
    assert again.read_text() == page


def test_the_page_links_the_report_of_its_run(evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "evaluation")
    assert "report.html" not in write_page(tmp_path / "evaluation").read_text()
    (tmp_path / "report.html").write_text("")
    assert '<a href="../report.html">' in write_page(tmp_path / "evaluation").read_text()


def test_clean_accuracy_is_given_on_the_images_that_were_attacked_too(evaluated):
    (table,) = evaluation_section(evaluated).tables
    line = table.lines[1]
    assert line.n == table.lines[2].n == "30"
    for arm, cell in zip(("standard", "twicing [2]", "standard (other seeds)"), line.cells, strict=True):
        found = [one for one in read_predictions(evaluated / "predictions.npz").values() if one.arm == arm]
        right = [np.isin(one.index[one.correct["clean"]], one.positions("pgd eps=1/64")).sum() for one in found]
        assert cell.mean == pytest.approx(np.mean(right) / 30)
    assert "the line of the same images as they are" in table.note


def test_only_what_was_run_is_explained(run_folder, evaluated, tmp_path):
    def note(*attacks, images=30):
        options = dataclasses.replace(QUICK, model=str(run_folder), attacks=attacks, images=images)
        page = run_evaluation(dataclasses.replace(options, out=tmp_path / "-".join([*attacks, str(images)])))
        (table,) = evaluation_section(page.parent).tables
        return table.note

    explained = {"eps50": "eps50 is the median", "FGSM": "FGSM takes one step", "sizes": "Sizes are in units"}
    every = evaluation_section(evaluated).tables[0].note
    assert all(sentence in every for sentence in explained.values())
    assert note("clean") == "Accuracy as a share of the images, of which each line says how many."
    alone = note("clean", "fgsm")
    assert explained["FGSM"] in alone
    assert explained["sizes"] in alone
    assert "eps50" not in alone
    assert "PGD" not in alone
    assert "Only some of the images were disturbed" in alone
    assert "disturbed" not in note("clean", "noise", images=0)


def test_random_numbers_do_not_depend_on_the_batch_size(run_folder, evaluated, tmp_path):
    options = dataclasses.replace(QUICK, model=str(run_folder), out=tmp_path, batch_size=30, attacks=("noise", "pgd"))
    run_evaluation(options)
    one, other = (read_predictions(folder / "predictions.npz") for folder in (evaluated, tmp_path))
    for key, found in other.items():
        for threat in found.correct:
            assert np.array_equal(found.correct[threat], one[key].correct[threat])
