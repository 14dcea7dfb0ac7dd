"""Capture records what the layers put out, changes no bit of it, leaves nothing behind, and never fails silently."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from twicing.adapters.surgery import convert, find_sites
from twicing.analysis.capture import ATTENTION_OUTPUT, BLOCK_OUTPUT, PLACES, capture

DEPTH, WIDTH, HEADS, TOKENS = 3, 24, 3, 17
HOSTS = {"fused": {}, "unfused": {"fused": False}, "distilled": {"distilled": True}}


@pytest.fixture
def model(make_vit):
    return make_vit()


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8)


def by_hand(model, images):
    """The residual stream of timm's block, written out: {(where, layer): tensor}."""
    expected = {}
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for layer, block in enumerate(model.blocks, start=1):
            attn, tokens = block.attn, block.norm1(x)
            query, key, value = (
                part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in attn.qkv(tokens).chunk(3, dim=2)
            )
            weights = torch.softmax(query @ key.transpose(2, 3) * (WIDTH // HEADS) ** -0.5, dim=-1)
            merged = (weights @ value).transpose(1, 2).flatten(2)
            expected[ATTENTION_OUTPUT, layer] = merged
            x = x + attn.proj(merged)
            x = x + block.mlp(block.norm2(x))
            expected[BLOCK_OUTPUT, layer] = x
    return expected


@pytest.mark.parametrize("host", HOSTS)
def test_it_records_what_the_formulas_say(host, make_vit, images):
    model = make_vit(**HOSTS[host])
    with capture(model) as captured:
        model(images)
    assert captured.layers == (1, 2, 3)
    for (where, layer), expected in by_hand(model, images).items():
        measured = captured.tensor(where, layer)
        assert measured.shape == (4, TOKENS + (host == "distilled"), WIDTH)
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)


def test_a_converted_model_shows_another_attention_output(model, images):
    with capture(model) as before:
        model(images)
    convert(model, "twicing", layers="2")
    with capture(model) as after:
        model(images)
    changed = {
        where: [not torch.equal(before.tensor(where, layer), after.tensor(where, layer)) for layer in (1, 2, 3)]
        for where in PLACES
    }
    assert changed == {ATTENTION_OUTPUT: [False, True, True], BLOCK_OUTPUT: [False, True, True]}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mechanism", [None, "twicing"])
@pytest.mark.parametrize("host", HOSTS)
def test_no_bit_of_output_or_gradient_changes(host, mechanism, training, make_vit, images):
    model = make_vit(**HOSTS[host], drop_path_rate=0.2)
    if mechanism:
        convert(model, mechanism)
    model.train(training)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = twin(images)
    expected.square().sum().backward()
    torch.manual_seed(1)
    with capture(model):
        logits = model(images)
    logits.square().sum().backward()
    assert torch.equal(logits, expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) if theirs.grad is not None else ours.grad is None


@pytest.mark.parametrize("fails", [False, True], ids=["normal end", "error inside"])
def test_the_hooks_are_gone_afterwards(model, fails, images):
    try:
        with capture(model) as captured:
            model(images)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    model(images)
    assert len(captured.forwards(BLOCK_OUTPUT, 1)) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_is_not_covered_by_ours(model):
    with pytest.raises(ZeroDivisionError), capture(model):
        raise ZeroDivisionError


def test_every_forward_appends(model, images):
    with capture(model) as captured:
        model(images)
        model(images[:1])
    assert [len(tokens) for tokens in captured.forwards(ATTENTION_OUTPUT, 2)] == [4, 1]
    assert captured.tensor(ATTENTION_OUTPUT, 2).shape == (5, TOKENS, WIDTH)
    torch.testing.assert_close(*captured.tensor(BLOCK_OUTPUT, 3)[[0, 4]])


def test_forward_features_is_seen_too(model, images):
    with capture(model) as captured:
        model.forward_features(images)
    assert captured.tensor(BLOCK_OUTPUT, 3).shape == (4, TOKENS, WIDTH)


def test_a_model_inside_a_model_is_found(model, images):
    outer = nn.Sequential(nn.Identity(), model).eval()
    with capture(outer) as captured:
        outer(images)
    assert captured.layers == (1, 2, 3)


def test_records_are_detached_copies(model, images):
    with capture(model) as captured:
        model(images)
    assert not captured.tensor(BLOCK_OUTPUT, 1).requires_grad

    class WritesOver(nn.Module):
        """A last layer that works in place, as some hosts do."""

        def forward(self, x):
            return x.mul_(0)

    plain = captured.tensor(BLOCK_OUTPUT, 3)
    model.norm = WritesOver()
    with torch.no_grad(), capture(model) as captured:
        model(images)
    assert torch.equal(captured.tensor(BLOCK_OUTPUT, 3), plain)


def test_reduce_keeps_nothing_else_alive(model, images):
    seen = []

    def class_token(tokens):
        seen.append(weakref.ref(tokens))
        return tokens[:, 0]

    with torch.no_grad(), capture(model, reduce=class_token) as captured:
        model(images)
        gc.collect()
        assert len(seen) == 2 * DEPTH
        assert not any(reference() is not None for reference in seen)
    class_tokens = captured.tensor(BLOCK_OUTPUT, 2)
    assert class_tokens.shape == (4, WIDTH)
    assert class_tokens.untyped_storage().nbytes() == 4 * WIDTH * 4
    with capture(model) as whole:
        model(images)
    assert torch.equal(class_tokens, whole.tensor(BLOCK_OUTPUT, 2)[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(model, dtype, images):
    model.to(dtype)
    with capture(model) as captured:
        model(images.to(dtype))
    assert captured.tensor(ATTENTION_OUTPUT, 1).dtype == dtype
    assert captured.tensor(BLOCK_OUTPUT, 3).isfinite().all()


def test_under_autocast_and_inference_mode(model, images):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        # A product inside reduce is not rounded to bfloat16 by the model's autocast.
        with capture(model, reduce=lambda tokens: tokens.float() @ tokens.float().mT) as captured:
            assert torch.equal(model(images), expected)
    assert captured.tensor(ATTENTION_OUTPUT, 1).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_by_checkpointing_is_not_recorded(model, reentrant, images):
    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)

    outer = Checkpointed(model).eval()
    with capture(outer) as captured:
        outer(images.requires_grad_()).sum().backward()
    assert len(captured.forwards(BLOCK_OUTPUT, 1)) == 1


def test_a_model_that_did_not_run_is_an_error(model):
    with pytest.raises(RuntimeError, match="nothing was captured: run the model itself inside"), capture(model):
        pass


def test_layers_that_did_not_run_are_named(model, images):

    def part_only():
        with capture(model):
            model.blocks[:2](model._pos_embed(model.patch_embed(images)))

    with pytest.raises(RuntimeError, match="1 forwards were seen, but attention output of layer 3: 0; block output of"):
        part_only()


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match=r"attention"), capture(nn.Sequential(nn.Linear(2, 2))):
        pass


def test_a_compiled_model_is_refused(model):
    message = "compiled model cannot be looked into: the model is one. Capture the plain model .*_orig_mod"
    with pytest.raises(ValueError, match=message), capture(torch.compile(model, backend="eager")):
        pass


def test_a_compiled_block_is_refused(model):
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled model cannot be looked into: blocks\.1 is one"), capture(model):
        pass


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_refused(model):
    outer = nn.Sequential(model, torch.jit.trace(nn.Linear(10, 2), torch.zeros(1, 10)))
    with pytest.raises(ValueError, match="scripted model cannot be looked into: 1 is one"), capture(outer):
        pass


def test_an_unknown_place_or_layer_is_an_error(model, images):
    with capture(model) as captured:
        model(images)
    with pytest.raises(KeyError, match=r"nothing is captured at .*block outputs.* of layer 1: .*layers \[1, 2, 3\]"):
        captured.forwards("block outputs", 1)
    with pytest.raises(KeyError, match="of layer 0"):
        captured.tensor(BLOCK_OUTPUT, 0)


class ReturnsPair(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x), "attention weights"


def test_of_a_block_that_returns_a_tuple_the_first_tensor_is_taken(model, monkeypatch):
    blocks = [ReturnsPair(block) for block in model.blocks]
    sites = [
        SimpleNamespace(layer=site.layer, merge=site.merge, block=block)
        for site, block in zip(find_sites(model), blocks, strict=True)
    ]
    monkeypatch.setattr("twicing.analysis.capture.find_sites", lambda _: sites)
    tokens = torch.randn(2, TOKENS, WIDTH)
    with capture(model) as captured:
        for block in blocks:
            block(tokens)
    assert torch.equal(captured.tensor(BLOCK_OUTPUT, 1), model.blocks[0](tokens))


def test_a_block_that_returns_no_tensor_is_an_error(model, monkeypatch):
    monkeypatch.setattr(model.blocks[0], "forward", lambda x: {"tokens": x})
    with pytest.raises(TypeError, match="the block output of layer 1 must be a tensor: got dict"), capture(model):
        model(torch.rand(1, 1, 8, 8))
