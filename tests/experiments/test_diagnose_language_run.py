"""twicing diagnose on a run folder of language models: causal layers, the held-out text, weights drawn anew."""

from dataclasses import replace

import pytest
import torch

from twicing.adapters.surgery import spec
from twicing.analysis.collapse import ATTENTION, ENTROPY, ENTROPY_SHARE
from twicing.experiments.arms import Arm
from twicing.experiments.diagnose.cases import cases_of
from twicing.experiments.diagnose.diagnosis import diagnose_case
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.job import part_file
from twicing.experiments.language_job import converted_language_model
from twicing.experiments.plan import Plan, Resources, open_folder
from twicing.experiments.results import environment, write_json
from twicing.experiments.run import DATA_CACHE
from twicing.training.language import train_language_model
from twicing.training.language_data import prepare_text
from twicing.training.language_recipes import text_demo
from twicing.training.settings import apply_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TOKENS, DEPTH, INPUTS = 16, 2, 4
SETTINGS = ("epochs=1", "steps_per_epoch=2", "depth=2", "width=16", "heads=2", "inner=16", "length=16", "batch_size=4")
RECIPE = apply_settings(text_demo(), [*SETTINGS, "warmup_steps=1"])
ARMS = (
    Arm("standard", "standard", "all", ""),
    Arm("twicing [2]", "twicing", "2", ""),
    Arm("two-attentions", "standard", "all", "", control=True, changes={"attention_passes": 2}),
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plan = Plan(RECIPE, ARMS, (0,))
    open_folder(folder, plan, "twicing compare", 1, environment(), "now")
    corpus = prepare_text(RECIPE, folder / DATA_CACHE)
    for job in plan.jobs(folder, Resources(cache=folder / DATA_CACHE)):
        model = converted_language_model(job, 0, len(corpus.vocabulary))
        job.folder.mkdir()
        train_language_model(model, job.recipe, corpus, 0, job.folder, lambda _: None)
        write_json(part_file(job, "training"), {})
    return folder, corpus


def test_windows_of_the_held_out_text_and_causal_entropy(run_folder):
    folder, corpus = run_folder
    cases, _, notes = cases_of(replace(Diagnose(str(folder)), inputs=INPUTS, draws=1, device="cpu"))
    assert [case.name for case in cases] == ["standard, seed 0", "twicing [2], seed 0"]
    assert notes == [
        "two-attentions, seed 0 is left out: its blocks attend twice, so that the attention of a layer has no meaning."
    ]
    assert [entry["layers"] for entry in spec(cases[1].build())] == [[2]]
    assert spec(cases[1].draw(5)) == spec(cases[1].build())
    inputs = cases[0].inputs()
    ids = inputs.load(range(INPUTS))
    windows = corpus.test[: len(corpus.test) // TOKENS * TOKENS].view(-1, TOKENS)
    assert torch.equal(ids, windows[[place * len(windows) // INPUTS for place in range(INPUTS)]].long())
    assert inputs.words == f"4 windows of 16 tokens from the part of {corpus.name} that was held out from training"
    found = diagnose_case(
        cases[0], draws=1, seed=0, batch_size=3, device=torch.device("cpu"), progress=lambda _share: None
    )
    assert (found.model.tokens, found.model.width, found.model.layers) == (TOKENS, 16, DEPTH)
    # Uniform causal attention has log n nats in row n: nothing can have more.
    most = float(torch.arange(1, TOKENS + 1).double().log().mean())
    # Fresh weights are small, so that these are close to uniform.
    fresh = found.draws[0].values
    assert fresh[ATTENTION, ENTROPY].max() <= most
    assert float(fresh[ATTENTION, ENTROPY].mean()) == pytest.approx(most, rel=0.05)
    assert float(fresh[ATTENTION, ENTROPY_SHARE].mean()) == pytest.approx(1.0, abs=0.05)


def test_a_run_whose_text_is_gone_is_told(run_folder):
    folder, _ = run_folder
    (folder / DATA_CACHE).rename(folder / "moved")
    try:
        with pytest.raises(ValueError, match=r"data holds no prepared text"):
            cases_of(replace(Diagnose(str(folder)), device="cpu"))
    finally:
        (folder / "moved").rename(folder / DATA_CACHE)
