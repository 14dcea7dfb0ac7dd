"""Perplexity by segments and by a sliding window against loops that predict one word at a time, in fp64."""

import math

import pytest
import torch

from twicing.models.language import language_model
from twicing.training.language_perplexity import (
    Perplexity,
    perplexity_name,
    segment_perplexity,
    sliding_window_perplexity,
)

LENGTH = 6


@pytest.fixture(params=[(), (10, 30)], ids=["plain", "adaptive"])
def model(request):
    model = language_model(
        seed=0, vocabulary=50, length=LENGTH, depth=2, width=16, heads=2, inner=24, cutoffs=request.param
    )
    # At the initial weights all words are as likely, and a wrong target would not show.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def text(n, seed=0):
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def one_word(model, window, target):
    return -model.log_probabilities(window[None].long())[0, -1, target].item()


def naive_segments(model, stream, wanted, length):
    losses = []
    for start in range(0, len(stream) - 1, length):
        window = stream[start : min(start + length, len(stream) - 1)]
        log_p = model.log_probabilities(window[None].long())[0]
        losses += [-log_p[i, wanted[start + i + 1]].item() for i in range(len(window))]
    return losses


def naive_sliding(model, stream, wanted, length, last):
    losses = []
    first = stream[: min(length, last)]
    log_p = model.log_probabilities(first[None].long())[0]
    losses += [-log_p[i, wanted[i + 1]].item() for i in range(len(first))]
    for target in range(len(first) + 1, last + 1):
        losses.append(one_word(model, stream[target - length : target], wanted[target]))
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("n", [2, 5, 7, 8, 13, 25, 27])
def test_segments_are_those_of_the_loop(n, batch_size, model):
    stream = text(n)
    found = segment_perplexity(model, stream, batch_size=batch_size)
    losses = naive_segments(model, stream, stream, LENGTH)
    assert found.tokens == len(losses) == n - 1
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-10)
    assert found.way == "segments"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("n", [2, 5, 7, 8, 13, 25])
def test_the_sliding_window_is_that_of_the_loop(n, batch_size, model):
    stream = text(n)
    found = sliding_window_perplexity(model, stream, batch_size=batch_size)
    losses = naive_sliding(model, stream, stream, LENGTH, n - 1)
    assert found.tokens == len(losses) == n - 1
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert found.way == "sliding window"


def test_the_two_are_not_the_same(model):
    stream = text(25)
    found = segment_perplexity(model, stream).nats, sliding_window_perplexity(model, stream).nats
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("length", [1, 3, 6])
def test_another_length_of_the_window(length, model):
    stream = text(17)
    segments = naive_segments(model, stream, stream, length)
    sliding = naive_sliding(model, stream, stream, length, 16)
    assert segment_perplexity(model, stream, length=length).nats == pytest.approx(sum(segments) / 16, rel=1e-12)
    assert sliding_window_perplexity(model, stream, length=length).nats == pytest.approx(sum(sliding) / 16, rel=1e-12)


def test_other_targets_are_predicted_from_the_inputs(model):
    """Word swap in the inputs only."""
    stream, wanted = text(20), text(20, seed=1)
    segments = naive_segments(model, stream, wanted, LENGTH)
    sliding = naive_sliding(model, stream, wanted, LENGTH, 19)
    assert segment_perplexity(model, stream, targets=wanted).nats == pytest.approx(sum(segments) / 19, rel=1e-12)
    assert sliding_window_perplexity(model, stream, targets=wanted).nats == pytest.approx(sum(sliding) / 19, rel=1e-12)


@pytest.mark.parametrize(("tokens", "last"), [(1, 1), (4, 4), (6, 6), (7, 7), (15, 15), (19, 19), (99, 19), (0, 19)])
def test_only_so_many_tokens_of_the_sliding_window(tokens, last, model):
    stream = text(20)
    found = sliding_window_perplexity(model, stream, tokens=tokens, batch_size=4)
    losses = naive_sliding(model, stream, stream, LENGTH, last)
    assert found.tokens == last == len(losses)
    assert found.nats == pytest.approx(sum(losses) / last, rel=1e-12)


def test_progress_rises_to_one(model):
    for measure in (segment_perplexity, sliding_window_perplexity):
        shares = []
        measure(model, text(40), batch_size=3, progress=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert len(shares) > 2


def test_no_gradients_and_no_change_of_mode(model):
    segment_perplexity(model, text(20))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_names_tell_unit_and_way():
    assert perplexity_name("test", "word") == "test perplexity per word, segments"
    assert Perplexity(1.0, 10, "sliding window").metric("valid", "BPE token") == (
        "valid perplexity per BPE token, sliding window"
    )
    assert Perplexity(1e4, 10, "segments").value == math.inf
    assert math.isnan(Perplexity(math.nan, 10, "segments").value)


@pytest.mark.parametrize("measure", [segment_perplexity, sliding_window_perplexity])
@pytest.mark.parametrize(
    ("stream", "options", "message"),
    [
        (text(1), {}, r"a text is \[n\] tokens, n of 2 or more, .*: got \[1\] and \[1\]"),
        (text(9).view(3, 3), {}, r"got \[3, 3\] and \[3, 3\]"),
        (text(9), {"targets": text(8)}, r"got \[9\] and \[8\]"),
        (text(9), {"length": 0}, "length and batch_size must be 1 or larger: got 0 and 64"),
        (text(9), {"batch_size": 0}, "length and batch_size must be 1 or larger: got 6 and 0"),
    ],
)
def test_what_cannot_be_measured(measure, stream, options, message, model):
    with pytest.raises(ValueError, match=message):
        measure(model, stream, **options)


@pytest.mark.parametrize("measure", [segment_perplexity, sliding_window_perplexity])
def test_a_model_in_training_mode_is_refused(measure, model):
    with pytest.raises(ValueError, match=r"eval mode.*call model.eval\(\) first"):
        measure(model.train(), text(9))
