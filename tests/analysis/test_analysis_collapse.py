"""What is measured of a collapse: recomputed in float64, the same for any batch size, small however much is seen."""

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn

from twicing.adapters.surgery import convert
from twicing.analysis.capture import ATTENTION_OUTPUT, BLOCK_OUTPUT
from twicing.analysis.collapse import (
    ATTENTION,
    COSINE,
    CURVES,
    DISTANCE,
    ENTROPY,
    ENTROPY_SHARE,
    RANK,
    SHARE,
    TOKEN_METRICS,
    measure_collapse,
    rms_distance_to_mean,
)
from twicing.analysis.layer_similarity import METRICS

DEPTH, WIDTH, HEADS, TOKENS, INPUTS = 3, 24, 3, 17, 5


@pytest.fixture
def model(make_vit):
    return make_vit()


@pytest.fixture
def images():
    return torch.rand(INPUTS, 1, 8, 8)


def by_hand(model, images):
    """{(where, metric): [inputs, layers]} in float64 from the formulas, numpy and loops for the metrics."""
    model = copy.deepcopy(model).double()
    found = {key: [] for key in CURVES}
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images.double()))))
        for block in model.blocks:
            attn, tokens = block.attn, block.norm1(x)
            query, key, value = (p.unflatten(2, (HEADS, -1)).transpose(1, 2) for p in attn.qkv(tokens).chunk(3, dim=2))
            weights = torch.softmax(query @ key.mT / (WIDTH // HEADS) ** 0.5, dim=-1)
            mixed = weights @ value
            if hasattr(attn, "twicing_mechanism"):
                mixed = mixed + weights @ (value - mixed)
            merged = mixed.transpose(1, 2).flatten(2)
            x = x + attn.proj(merged)
            x = x + block.mlp(block.norm2(x))
            for where, states in ((BLOCK_OUTPUT, x), (ATTENTION_OUTPUT, merged)):
                measured = [metrics(one.numpy()) for one in states]
                for metric in measured[0]:
                    found[where, metric].append([one[metric] for one in measured])
            p = weights.numpy()
            entropy = -(p * np.log(p)).sum(-1).mean((1, 2))
            found[ATTENTION, ENTROPY].append(entropy)
            found[ATTENTION, ENTROPY_SHARE].append(entropy / np.log(TOKENS))
    return {key: np.array(values).T for key, values in found.items()}


def metrics(tokens):
    pairs = [
        tokens[i] @ tokens[j] / np.linalg.norm(tokens[i]) / np.linalg.norm(tokens[j])
        for i in range(len(tokens))
        for j in range(i)
    ]
    centred = tokens - tokens.mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    p = singular / singular.sum()
    p = p[p > 1e-12]
    return {
        COSINE: np.mean(pairs),
        SHARE: np.linalg.norm(centred) / np.linalg.norm(tokens),
        RANK: np.exp(-(p * np.log(p)).sum()),
        DISTANCE: np.sqrt(np.mean([np.linalg.norm(row) ** 2 for row in centred])),
    }


@pytest.mark.parametrize("converted", [None, "2-3"])
def test_it_is_what_the_formulas_say(model, images, converted):
    if converted:
        convert(model, "twicing", layers=converted)
    measured = measure_collapse(model, images.split(2))
    expected = by_hand(model, images)
    assert (measured.inputs, measured.layers, measured.tokens, measured.width) == (INPUTS, DEPTH, TOKENS, WIDTH)
    assert measured.largest_rank == TOKENS - 1
    assert set(measured.values) == set(CURVES) == set(expected)
    for key, values in expected.items():
        assert measured.values[key].shape == (INPUTS, DEPTH)
        assert measured.values[key].dtype == torch.float64
        np.testing.assert_allclose(measured.values[key].numpy(), values, rtol=2e-4, atol=2e-6, err_msg=str(key))
    # A model in float64 is measured in float64.
    exact = measure_collapse(copy.deepcopy(model).double(), images.double().split(5))
    for key, values in expected.items():
        np.testing.assert_allclose(exact.values[key].numpy(), values, rtol=1e-9, atol=1e-9, err_msg=str(key))


def test_the_batch_size_changes_nothing_but_rounding(model, images):
    one, all_at_once = (measure_collapse(model, images.split(size)) for size in (1, INPUTS))
    for key, values in one.values.items():
        torch.testing.assert_close(values, all_at_once.values[key], rtol=1e-4, atol=1e-6)


def test_no_bit_of_the_output_changes(model, images):
    seen = []
    model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    with torch.no_grad():
        expected = model(images)
    measure_collapse(model, [images])
    assert torch.equal(seen[1], expected)
    assert len(model._forward_hooks) == 1
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.blocks.modules())


def test_of_each_input_a_few_numbers_a_layer_are_kept(model):
    def kept():
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if issubclass(type(one), torch.Tensor))

    batch, sizes = 4, []
    measure_collapse(
        model, (torch.rand(batch, 1, 8, 8) for _ in range(5)), progress=lambda _count: sizes.append(kept())
    )
    # Two places with four metrics and two sizes each, and two entropies.
    # What earlier tests left behind may go while the first batch is measured.
    assert np.diff(sizes)[1:].tolist() == [batch * DEPTH * (2 * 6 + 2)] * 3


def test_progress_is_told_of_every_batch(model, images):
    counts = []
    measure_collapse(model, images.split(2), progress=counts.append)
    assert counts == [2, 2, 1]


def test_the_distance_to_the_mean_grows_with_the_tokens_and_the_share_does_not():
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(rms_distance_to_mean(3 * tokens), 3 * rms_distance_to_mean(tokens))
    torch.testing.assert_close(rms_distance_to_mean(tokens + 100), rms_distance_to_mean(tokens))
    assert rms_distance_to_mean(torch.ones(1, 5, 3, dtype=torch.bfloat16)).tolist() == [0.0]


def test_a_name_means_one_measure():
    # The similarity of a report calls ||X - mean|| / ||X|| the distance to the mean token.
    common = METRICS.keys() & TOKEN_METRICS.keys()
    assert common == {COSINE, RANK}
    assert all(METRICS[name] is TOKEN_METRICS[name] for name in common)


def test_what_cannot_be_measured_is_refused(model, images):
    with pytest.raises(ValueError, match=r"must be in eval mode.*model\.eval"):
        measure_collapse(copy.deepcopy(model).train(), [images])
    with pytest.raises(ValueError, match="nothing to measure on: give one input"):
        measure_collapse(model, [])
    with pytest.raises(ValueError, match="no attention layers"):
        measure_collapse(nn.Linear(2, 2).eval(), [images])


def test_inputs_of_several_lengths_are_refused(make_vit):
    model = make_vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"found 5 tokens of width 24, 17 tokens of width 24, and 3 inputs in a layer"):
        measure_collapse(model, [torch.rand(2, 1, 8, 8), torch.rand(1, 1, 4, 4)])


def test_a_model_that_loses_inputs_is_refused(make_vit, images):
    class Half(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x[: len(x) // 2])

    with pytest.raises(ValueError, match=r"the same 5 inputs.*and 2 inputs in a layer"):
        measure_collapse(Half(make_vit()).eval(), [images])
