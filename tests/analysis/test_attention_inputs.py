"""record_attention sees what layers attend with, changes no bit, leaves nothing behind, and never fails silently."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twicing.adapters.surgery import convert, find_sites
from twicing.analysis.attention_inputs import AttentionInputs, record_attention

DEPTH, WIDTH, HEADS, TOKENS = 3, 24, 3, 17
MECHANISMS = (None, "standard", "twicing", "neutreno")


def matrix(inputs):
    return inputs.matrix()


def mean_row(inputs):
    return inputs.matrix().mean((1, 2))


@pytest.fixture
def model(make_vit):
    return make_vit()


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8)


def by_hand(model, images):
    """A of every layer in float64, from the formulas of timm's block, with `core` as its attention."""
    model = copy.deepcopy(model).double()
    found = []
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images.double()))))
        for block in model.blocks:
            attn, tokens = block.attn, block.norm1(x)
            query, key, value = (
                part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in attn.qkv(tokens).chunk(3, dim=2)
            )
            weights = torch.softmax(query @ key.mT / (WIDTH // HEADS) ** 0.5, dim=-1)
            found.append(weights)
            mixed = weights @ value
            if hasattr(attn, "twicing_mechanism"):
                mixed = mixed + weights @ (value - mixed)
            x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
    return found


@pytest.mark.parametrize("converted", [None, "2-3"])
def test_the_matrix_is_what_the_formulas_say(model, converted, images):
    if converted:
        convert(model, "twicing", layers=converted)
    expected = by_hand(model, images)
    with record_attention(model, reduce=matrix) as recorded:
        model(images)
    assert recorded.layers == (1, 2, 3)
    for layer in recorded.layers:
        measured = recorded.tensor(layer)
        assert measured.shape == (4, HEADS, TOKENS, TOKENS)
        assert measured.dtype == torch.float32
        torch.testing.assert_close(measured.double(), expected[layer - 1], rtol=1e-4, atol=1e-6)
        # Layers differ by far more than that.
        assert all((other - measured).abs().max() > 0.02 for other in expected if other is not expected[layer - 1])


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_bit_of_output_or_gradient_changes(mechanism, training, make_vit, images):
    model = make_vit(drop_path_rate=0.2)
    if mechanism:
        convert(model, mechanism)
    model.train(training)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = twin(images)
    expected.square().sum().backward()
    torch.manual_seed(1)
    with record_attention(model, reduce=matrix):
        logits = model(images)
    logits.square().sum().backward()
    assert torch.equal(logits, expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) if theirs.grad is not None else ours.grad is None


class Interrupted(nn.Module):
    """A projection in which somebody presses Ctrl-C, or an error happens."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, _tokens):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["interrupt", "error"])
@pytest.mark.parametrize("mechanism", [None, "twicing"])
def test_everything_is_gone_afterwards_even_after_an_error_in_a_layer(model, error, mechanism, images):
    if mechanism:
        convert(model, mechanism)
    before = torch.overrides._len_torch_function_stack()
    projection, model.blocks[1].attn.proj = model.blocks[1].attn.proj, Interrupted(error)
    with pytest.raises(type(error)), record_attention(model, reduce=matrix) as recorded:
        model(images)
    model.blocks[1].attn.proj = projection
    assert torch.overrides._len_torch_function_stack() == before
    model(images)
    assert [len(recorded.forwards(layer)) for layer in (1, 2, 3)] == [1, 1, 0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_after_an_error_that_was_caught_inside_it_goes_on(model, images):
    projection, model.blocks[1].attn.proj = model.blocks[1].attn.proj, Interrupted(ZeroDivisionError())
    with record_attention(model, reduce=mean_row) as recorded:
        with pytest.raises(ZeroDivisionError):
            model(images)
        model.blocks[1].attn.proj = projection
        for layer in (1, 2):
            recorded.forwards(layer).clear()
        model(images)
    assert [len(recorded.forwards(layer)) for layer in (1, 2, 3)] == [1, 1, 1]


def test_every_forward_appends(model, images):
    with record_attention(model, reduce=mean_row) as recorded:
        model(images)
        model(images[:1])
    assert [len(rows) for rows in recorded.forwards(2)] == [4, 1]
    torch.testing.assert_close(*recorded.tensor(2)[[0, 4]])


def test_only_a_copy_of_what_reduce_returns_is_kept(model, images):
    seen = []

    def first_row(inputs):
        seen.extend(weakref.ref(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
        full = inputs.matrix()
        seen.append(weakref.ref(full))
        return full[:, 0, 0]

    with torch.no_grad(), record_attention(model, reduce=first_row) as recorded:
        model(images)
        gc.collect()
        assert len(seen) == 4 * DEPTH
        assert not any(reference() is not None for reference in seen)
    assert recorded.tensor(1).untyped_storage().nbytes() == 4 * TOKENS * 4
    assert all(rows.untyped_storage().nbytes() == 4 * TOKENS * 4 for rows in recorded.forwards(3))


def test_reduce_runs_without_gradients_and_without_autocast(make_vit, images):
    # Norms give fp32 under autocast, and the kernel casts it.
    model, kinds = make_vit(qk_norm=True), []

    def product(inputs):
        kinds.append((inputs.query.dtype, (inputs.query.float() @ inputs.key.float().mT).dtype))
        assert not inputs.value.requires_grad
        assert not torch.is_grad_enabled()
        return inputs.query[0, 0, 0]

    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        with record_attention(model, reduce=product):
            assert torch.equal(model(images), expected)
    # The kernel sees what autocast makes of the query; what reduce computes is not cast.
    assert kinds == [(torch.bfloat16, torch.float32)] * DEPTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(model, dtype, images):
    model.to(dtype)
    with record_attention(model, reduce=matrix) as recorded:
        model(images.to(dtype))
    assert recorded.tensor(3).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(recorded.tensor(3).sum(-1), torch.ones_like(recorded.tensor(3).sum(-1)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mechanism", [None, "twicing"])
def test_a_recomputation_by_checkpointing_is_not_recorded(model, mechanism, reentrant, images):
    if mechanism:
        convert(model, mechanism)

    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)

    outer = Checkpointed(model).eval()
    with record_attention(outer, reduce=mean_row) as recorded:
        outer(images.requires_grad_()).sum().backward()
    assert [len(recorded.forwards(layer)) for layer in (1, 2, 3)] == [1, 1, 1]


def test_a_layer_that_never_calls_sdpa_is_an_error_that_says_what_to_do(make_vit, images):
    model = make_vit(fused=False)
    before = torch.overrides._len_torch_function_stack()
    with (
        pytest.raises(
            RuntimeError, match=r"layer 1 = blocks\.0\.attn: Attention called .* no times: .*fused_attn = True"
        ),
        record_attention(model, reduce=matrix),
    ):
        model(images)
    assert torch.overrides._len_torch_function_stack() == before
    # What the sentence advises helps, and shows the same matrices.
    convert(model, "standard")
    with record_attention(model, reduce=matrix) as recorded:
        model(images)
    torch.testing.assert_close(recorded.tensor(2).double(), by_hand_plain(model, images)[1], rtol=1e-4, atol=1e-6)


def by_hand_plain(model, images):
    """by_hand() of standard attention."""
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        del block.attn.twicing_mechanism
    return by_hand(twin, images)


def test_what_lies_outside_the_layers_is_not_recorded(model, images):
    class Pooled(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            logits = self.body(x)
            return F.scaled_dot_product_attention(logits[:, None], logits[:, None], logits[:, None])

    with record_attention(Pooled(model), reduce=mean_row) as recorded:
        Pooled(model)(images)
    assert [len(recorded.forwards(layer)) for layer in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize("mechanism", [None, "twicing"])
@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_masks_are_seen(model, mechanism, kind):
    if mechanism:
        convert(model, mechanism)
    attention, tokens = model.blocks[0].attn, torch.randn(2, TOKENS, WIDTH)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if kind == "bool":
        # A query that may attend to nothing.
        allowed[5] = False
    mask = {"bool": allowed, "float": torch.zeros(TOKENS, TOKENS).masked_fill(~allowed, -torch.inf), "causal": None}
    with record_attention(model, reduce=matrix) as recorded:
        attention(tokens, attn_mask=mask[kind], is_causal=kind == "causal")
        for block in model.blocks[1:]:
            block.attn(tokens)
    measured = recorded.tensor(1)
    assert bool((measured[..., ~allowed] == 0).all())
    rows = allowed.any(-1).float().expand(2, HEADS, TOKENS)
    torch.testing.assert_close(measured.sum(-1), rows)


def test_grouped_queries_a_scale_and_a_half_precision_mask():
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 3)
    bias = torch.randn(5, 5).bfloat16()
    inputs = AttentionInputs(query.bfloat16(), key.bfloat16(), value.bfloat16(), bias, scale=0.7, enable_gqa=True)
    wide_query, wide_key = query.bfloat16().double(), key.bfloat16().double().repeat_interleave(2, dim=1)
    expected = torch.softmax(0.7 * wide_query @ wide_key.mT + bias.double(), dim=-1)
    torch.testing.assert_close(inputs.matrix().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(inputs.values(), value.bfloat16().repeat_interleave(2, dim=1))


def test_the_mode_covers_the_layers_alone(model, images):
    depths = []
    model.blocks[0].register_forward_hook(lambda *_: depths.append(torch.overrides._len_torch_function_stack()))
    outside = torch.overrides._len_torch_function_stack()
    with record_attention(model, reduce=mean_row):
        model(images)
    assert depths == [outside]
    assert len(find_sites(model)) == DEPTH
