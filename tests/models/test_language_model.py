"""The language model: sizes of the published protocols, causality, positions, ties, and all of it by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from twicing.models.language import LanguageModel, language_model, reversed_sinusoids

SIZES = {"vocabulary": 50, "length": 12, "depth": 3, "width": 16, "heads": 2, "inner": 24, "cutoffs": (10, 30)}


def made(seed=0, **changes):
    return language_model(seed=seed, **(SIZES | changes)).eval()


PROTOCOLS = {
    "post": {},
    "pre": {
        "norm": "pre",
        "positions": "learned",
        "activation": "gelu",
        "attention_bias": True,
        "cutoffs": (),
    },
}


@pytest.fixture(params=PROTOCOLS)
def model(request):
    model = made(**PROTOCOLS[request.param]).double()
    # Biases and norms would be 0 and 1, and a wrong one would not show.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("width", "heads", "matrices", "blocks", "everything"),
    [(128, 8, 9_437_184, 9_480_192, 44_018_394), (256, 8, 20_971_520, 21_024_768, 89_833_434)],
    ids=["small", "medium"],
)
def test_parameter_counts_of_wikitext_103(width, heads, matrices, blocks, everything):
    with torch.device("meta"):
        model = LanguageModel(
            vocabulary=267_735,
            length=256,
            depth=16,
            width=width,
            heads=heads,
            inner=2048,
            cutoffs=(20_000, 40_000, 200_000),
        )
    found = list(model.blocks.parameters())
    assert sum(p.numel() for p in found if p.ndim == 2) == matrices
    assert sum(p.numel() for p in found) == blocks
    # About 44 and 90 million with the embedding, which is there once.
    assert sum(p.numel() for p in model.parameters()) == everything
    assert everything - blocks == 267_735 * (width + 1) + 3 * (width + 1)


@pytest.mark.parametrize(("width", "count"), [(256, 7_419_392), (288, 8_789_184)])
def test_parameter_counts_of_arxiv_2604_03190(width, count):
    """To the last parameter, so that pre-norms, biases and learned positions are what that paper has."""
    protocol = {"depth": 4, "heads": 4, "inner": 4 * width, "length": 256}
    with torch.device("meta"):
        model = LanguageModel(vocabulary=16_384, width=width, **protocol, **PROTOCOLS["pre"])
    assert sum(p.numel() for p in model.parameters()) == count


def by_hand(model, tokens, norm_first, learned):
    """One text [N], position by position and head by head."""
    weights = dict(model.named_parameters())

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def attention(x, name):
        q, k, v = linear(x, f"{name}.qkv").chunk(3, -1)
        out = torch.zeros_like(q)
        for head in (slice(0, 8), slice(8, 16)):
            for i in range(len(x)):
                scores = (k[: i + 1, head] @ q[i, head]) / math.sqrt(8)
                out[i, head] = scores.softmax(0) @ v[: i + 1, head]
        return linear(out, f"{name}.proj")

    def feed(x, name):
        hidden = linear(x, f"{name}.0")
        return linear(F.gelu(hidden) if norm_first else hidden.clamp(min=0), f"{name}.3")

    n = len(tokens)
    x = weights["embedding.weight"][tokens]
    if learned:
        x = x + weights["position.weight"][:n]
    else:
        place = torch.zeros(n, 16, dtype=torch.float64)
        for i in range(n):
            for j in range(8):
                angle = (n - 1 - i) / 10000 ** (2 * j / 16)
                place[i, j], place[i, 8 + j] = math.sin(angle), math.cos(angle)
        x = 4 * x + place
    for block in range(3):
        for layer, name in ((attention, "attention"), (feed, "feed")):
            inner, its_norm = f"blocks.{block}.{name}", f"blocks.{block}.{name}_norm"
            x = x + layer(norm(x, its_norm), inner) if norm_first else norm(x + layer(x, inner), its_norm)
    return norm(x, "last") if norm_first else x


def test_it_is_the_model_written_out_by_hand(model, tokens):
    norm_first = hasattr(model, "position")
    expected = torch.stack([by_hand(model, one, norm_first, norm_first) for one in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-6, atol=1e-6)
    short = torch.stack([by_hand(model, one[:5], norm_first, norm_first) for one in tokens])
    torch.testing.assert_close(model(tokens[:, :5]), short, rtol=1e-6, atol=1e-6)


def test_a_token_does_not_see_later_ones(model, tokens):
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


def test_texts_of_a_batch_do_not_see_each_other(model, tokens):
    torch.testing.assert_close(model(tokens)[:1], model(tokens[:1]))


def test_losses_are_those_of_the_log_probabilities(model, tokens):
    targets = tokens.roll(-1, 1)
    log_p = model.log_probabilities(tokens)
    assert log_p.shape == (2, 12, 50)
    torch.testing.assert_close(model.losses(tokens, targets), -log_p.gather(-1, targets[..., None]).squeeze(-1))
    torch.testing.assert_close(model.losses(tokens, targets), model.word_losses(model(tokens), targets))


def test_input_and_output_are_one_table(tokens):
    model = made()
    assert [name for name, p in model.named_parameters() if p.shape[0] == 50 and p.ndim == 2] == ["embedding.weight"]
    never_read = 49
    tokens = tokens.clamp(max=40)
    model.losses(tokens, tokens.roll(-1, 1)).sum().backward()
    # As an output it gets a gradient, in the head or a cluster that is used, though no text holds it.
    assert model.embedding.weight.grad[never_read].abs().sum() > 0


def test_sinusoids_end_at_zero():
    found = reversed_sinusoids(5, 6, like=torch.zeros((), dtype=torch.float64))
    assert found.shape == (5, 6)
    assert found[-1].tolist() == [0, 0, 0, 1, 1, 1]
    assert found[0, 0].item() == pytest.approx(math.sin(4))
    assert found[0, 5].item() == pytest.approx(math.cos(4 / 10000 ** (4 / 6)))


def test_weights_are_a_function_of_the_seed_and_leave_the_random_state(tokens):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, same, other = made(seed=5), made(seed=5), made(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_initial_weights():
    model = made(width=64, inner=128, vocabulary=500)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(parameter.mean().item()) < 0.006, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_dropout_is_on_in_training_only(tokens):
    model = made(dropout=0.5, attention_dropout=0.0)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_attention_dropout_is_on_in_training_only(tokens):
    model = made(attention_dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_two_passes_run_the_attention_twice(norm, tokens):
    once, twice = made(norm=norm), made(norm=norm, attention_passes=2)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    x = torch.randn(2, 12, 16)
    block = once.blocks[0]
    passed = x
    for _ in range(2):
        if norm == "pre":
            passed = passed + block.attention(block.attention_norm(passed))
        else:
            passed = block.attention_norm(passed + block.attention(passed))
    if norm == "pre":
        expected = passed + block.feed(block.feed_norm(passed))
    else:
        expected = block.feed_norm(passed + block.feed(passed))
    assert torch.equal(twice.blocks[0](x), expected)


def test_a_window_longer_than_the_learned_positions_is_refused():
    model = made(positions="learned")
    with pytest.raises(ValueError, match="with 12 learned positions takes windows up to that length: got 13"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    assert made()(torch.zeros(1, 13, dtype=torch.int64)).shape == (1, 13, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "none"}, "norm must be one of post, pre: got 'none'"),
        ({"positions": "rotary"}, "positions must be one of sinusoidal, learned: got 'rotary'"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu: got 'tanh'"),
        ({"heads": 3}, "width must be even and a multiple of heads: got 16 and 3"),
        ({"width": 15, "heads": 5}, "width must be even and a multiple of heads: got 15 and 5"),
    ],
)
def test_what_it_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        made(**change)


def test_copies_are_on_their_own(tokens):
    model = made()
    copied = copy.deepcopy(model)
    copied.embedding.weight.data.zero_()
    assert not torch.equal(copied.log_probabilities(tokens), model.log_probabilities(tokens))
