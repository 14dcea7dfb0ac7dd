"""The one effect that is demanded of the demonstration: twicing lowers the similarity of tokens, far outside any doubt.

Nothing is demanded of accuracies, in either direction: they are what the comparison is there to find out.
"""

import pytest

from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.arms import arms_under_test
from twicing.experiments.controls import controls_of
from twicing.experiments.statistics import paired_difference
from twicing.training.classification import build_model, train_classifier
from twicing.training.recipe import digits
from twicing.training.settings import apply_settings
from twicing.training.split import load_split

SEEDS = (0, 1, 2)


def similarity_after(recipe, arm, seed, folder):
    """Mean pairwise cosine after the last block, before any training and after it."""
    model = arm.apply(build_model(recipe, seed))
    split = load_split(recipe, seed)
    values = []
    for train in (False, True):
        if train:
            train_classifier(model, recipe, split, seed, folder, lambda share: None)
        found = layer_similarity(model.eval(), split.test.load(split.probes.tolist()))
        values.append(found["block output", "mean pairwise cosine"][-1].item())
    return values


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_twicing_lowers_the_similarity_of_tokens(tmp_path):
    recipe = apply_settings(digits(), ["epochs=1"])
    tested = arms_under_test(["twicing"], ["all"])
    arms = [*tested, *(arm for arm in controls_of(recipe, tested, 1.0) if arm.label == "smooth-more")]
    found = {
        arm.label: {seed: similarity_after(recipe, arm, seed, tmp_path / f"{arm.label}{seed}") for seed in SEEDS}
        for arm in arms
    }
    for place, when in enumerate(("initialisation", "trained")):
        standard, twiced, more = ({s: found[label][s][place] for s in SEEDS} for label in found)
        difference = paired_difference(standard, twiced)
        assert difference.high < 0, when
        # Smoothing more instead of less does not do it: it is not the second pass as such.
        assert all(more[seed] > twiced[seed] for seed in SEEDS), when
