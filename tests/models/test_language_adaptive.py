"""Adaptive softmax with tied weights against torch's own, against the definition in fp64, and its gradients."""

import pytest
import torch

from twicing.models.adaptive import TiedSoftmax

WORDS, WIDTH, CUTOFFS = 50, 16, (10, 25, 40)


@pytest.fixture(params=[(), (10,), CUTOFFS], ids=["plain", "one cluster", "three clusters"])
def softmax(request):
    softmax = TiedSoftmax(WORDS, WIDTH, request.param).double()
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter)
    return softmax


@pytest.fixture
def weight():
    return torch.randn(WORDS, WIDTH, dtype=torch.float64)


def by_definition(softmax, x, weight):
    """log p of every word for one x, word by word, with sums written out."""
    first, *_ = [*softmax.cutoffs, WORDS]
    if not softmax.cutoffs:
        scores = (weight @ x).exp()
        return (scores / scores.sum()).log()
    head = torch.cat([weight[:first] @ x + softmax.bias[:first], softmax.cluster_weight @ x + softmax.cluster_bias])
    head = head.exp() / head.exp().sum()
    probabilities = list(head[:first])
    bounds = [*softmax.cutoffs, WORDS]
    for k in range(len(bounds) - 1):
        scores = (weight[bounds[k] : bounds[k + 1]] @ x + softmax.bias[bounds[k] : bounds[k + 1]]).exp()
        probabilities += list(head[first + k] * scores / scores.sum())
    return torch.stack(probabilities).log()


def test_log_probabilities_are_those_of_the_definition(softmax, weight):
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    found = softmax.log_probabilities(x, weight)
    expected = torch.stack([by_definition(softmax, one, weight) for one in x.flatten(0, 1)]).view(3, 2, WORDS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 2, dtype=torch.float64))


def test_losses_are_the_log_probabilities_of_the_targets(softmax, weight):
    """Every word once, cut-offs and last words among them, in no order."""
    targets = torch.randperm(WORDS).view(5, 10)
    x = torch.randn(5, 10, WIDTH, dtype=torch.float64)
    expected = -softmax.log_probabilities(x, weight).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(softmax.losses(x, targets, weight), expected, rtol=1e-12, atol=1e-12)


def test_losses_where_no_target_is_in_some_cluster(softmax, weight):
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    targets = torch.tensor([0, 9, 3, 0])
    expected = -softmax.log_probabilities(x, weight)[torch.arange(4), targets]
    torch.testing.assert_close(softmax.losses(x, targets, weight), expected, rtol=1e-12, atol=1e-12)


def test_it_is_torchs_adaptive_softmax_with_the_projections_taken_out(weight):
    """torch's keeps a table of its own, projects before each cluster, and has no bias within one."""
    ours = TiedSoftmax(WORDS, WIDTH, CUTOFFS).double()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, WORDS, CUTOFFS, div_value=1.0, head_bias=True).double()
    with torch.no_grad():
        torch.nn.init.normal_(ours.cluster_weight)
        torch.nn.init.normal_(ours.cluster_bias)
        ours.bias[: CUTOFFS[0]].normal_()
        theirs.head.weight.copy_(torch.cat([weight[: CUTOFFS[0]], ours.cluster_weight]))
        theirs.head.bias.copy_(torch.cat([ours.bias[: CUTOFFS[0]], ours.cluster_bias]))
        for tail, low, high in zip(theirs.tail, CUTOFFS, [*CUTOFFS[1:], WORDS], strict=True):
            tail[0].weight.copy_(torch.eye(WIDTH))
            tail[1].weight.copy_(weight[low:high])
    x, targets = torch.randn(64, WIDTH, dtype=torch.float64), torch.randint(WORDS, (64,))
    torch.testing.assert_close(ours.losses(x, targets, weight), -theirs(x, targets).output)
    torch.testing.assert_close(ours.log_probabilities(x, weight), theirs.log_prob(x))


def test_gradients_reach_features_table_and_biases(softmax, weight):
    x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    table = weight.requires_grad_()
    targets = torch.randint(WORDS, (12,))
    upstream = torch.randn(12, dtype=torch.float64)
    inputs = [x, table, *softmax.parameters()]
    found = torch.autograd.grad(softmax.losses(x, targets, table), inputs, upstream)
    by_word = torch.stack([by_definition(softmax, one, table) for one in x])
    picked = -by_word[torch.arange(12), targets]
    for ours, expected in zip(found, torch.autograd.grad(picked, inputs, upstream), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_half_precision_sums_in_single(weight):
    softmax = TiedSoftmax(WORDS, WIDTH, CUTOFFS).bfloat16()
    x = torch.randn(7, WIDTH).bfloat16()
    assert softmax.losses(x, torch.arange(7), weight.bfloat16()).dtype == torch.float32
    assert softmax.log_probabilities(x, weight.bfloat16()).dtype == torch.float32


def test_without_cut_offs_there_is_nothing_to_learn():
    assert list(TiedSoftmax(WORDS, WIDTH).parameters()) == []


def test_parameters_with_cut_offs():
    softmax = TiedSoftmax(WORDS, WIDTH, CUTOFFS)
    assert {name: tuple(p.shape) for name, p in softmax.named_parameters()} == {
        "bias": (WORDS,),
        "cluster_weight": (3, WIDTH),
        "cluster_bias": (3,),
    }
    assert "cut-offs [10, 25, 40]" in repr(softmax)


@pytest.mark.parametrize("cutoffs", [(0,), (10, 10), (20, 10), (50,), (10, 60), (-1,)])
def test_cut_offs_must_rise_within_the_vocabulary(cutoffs):
    with pytest.raises(ValueError, match=r"cutoffs must rise from 1 to below 50, the size of the vocabulary: got \["):
        TiedSoftmax(WORDS, WIDTH, cutoffs)
