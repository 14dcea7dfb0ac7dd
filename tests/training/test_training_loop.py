"""What the loop leaves in a checkpoint, which trainings that were begun earlier have to find there."""

import pytest
import torch
from killed_language_training import small_recipe, train_here

from twicing.training.checkpoint import CHECKPOINT


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_checkpoints_keep_the_curve_where_earlier_versions_did(tmp_path):
    """A class renamed, or a field of a row, and a training that was interrupted would go on without its curve."""
    _, curve = train_here(small_recipe(epochs=1), tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["callbacks"]
    assert state == {"_Bookkeeping": {"curve": [vars(row) for row in curve], "seconds": curve[-1].seconds}}
    assert set(vars(curve[0])) == {"epoch", "step", "loss", "valid_perplexity", "seconds"}
