"""Layer similarity is the mean over images of the metrics on what capture records, in any batch size."""

import pytest
import torch
from torch import nn

from twicing.analysis.capture import PLACES, capture
from twicing.analysis.layer_similarity import METRICS, layer_similarity
from twicing.data.digits import load_digits


@pytest.fixture(scope="module")
def model(make_vit):
    return make_vit()


@pytest.fixture(scope="module")
def images():
    return load_digits()[0][:30]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_it_is_the_mean_of_the_metrics_over_the_images(batch_size, model, images):
    measured = layer_similarity(model, images, batch_size=batch_size)
    with capture(model) as captured:
        model(images)
    assert set(measured) == {(where, metric) for where in PLACES for metric in METRICS}
    for (where, metric), curve in measured.items():
        expected = [METRICS[metric](captured.tensor(where, layer)).mean() for layer in (1, 2, 3)]
        assert curve.dtype == torch.float64
        torch.testing.assert_close(curve, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_the_names_are_those_of_the_report(model, images):
    assert list(layer_similarity(model, images[:2])) == [
        (where, metric)
        for where in ("attention output", "block output")
        for metric in ("mean pairwise cosine", "distance to the mean token", "effective rank of centred tokens")
    ]


def test_smoothing_to_the_mean_shows_as_collapse(make_vit, images):
    """Queries and keys of zero make A V the mean of V: the attention outputs of all tokens are the same."""
    model = make_vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight[:48])
    curves = layer_similarity(model, images)
    torch.testing.assert_close(curves["attention output", "mean pairwise cosine"], torch.ones(3, dtype=torch.float64))
    assert curves["attention output", "distance to the mean token"].max() < 1e-5
    assert curves["block output", "distance to the mean token"].min() > 0.1


def test_the_model_is_left_as_it_was(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer_similarity(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_in_training_mode_is_refused(model, images):
    try:
        with pytest.raises(ValueError, match=r"the model must be in eval mode.*call model\.eval\(\) first"):
            layer_similarity(model.train(), images)
    finally:
        model.eval()


@pytest.mark.parametrize(("n", "batch_size"), [(0, 64), (3, 0)])
def test_nothing_to_measure_is_refused(n, batch_size, model, images):
    with pytest.raises(ValueError, match=f"got {n} images and {batch_size}"):
        layer_similarity(model, images[:n], batch_size=batch_size)
