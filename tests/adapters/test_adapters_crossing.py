"""Mechanisms that read earlier layers, in a real ViT: the outputs and all gradients against the same thing by hand."""

import gc
import threading
import weakref

import pytest
import torch
from by_hand import FORMULAS, MECHANISMS, Mixing, features, logits, mixing, neutreno
from timm.models.vision_transformer import ResPostBlock
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from twicing.adapters.surgery import convert, undo
from twicing.testing import relative_rms

# Three layers and their backward in fp64.
BUDGET = 1e-12
EVERY = pytest.mark.parametrize("name", MECHANISMS)


@pytest.fixture
def vit(small_vit):
    return small_vit().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(output):
    """Random enough that no gradient cancels."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    return (output * weights).sum()


def grads(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(seen, expected, budget=BUDGET):
    assert seen.keys() == expected.keys()
    for name in seen:
        # Keys' biases have no gradient but rounding.
        scale = max(float(expected[name].norm()), 1e-3)
        assert float((seen[name] - expected[name]).norm()) <= budget * scale, name


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 2, 3), (2, 3), (3,), (2,)], ids=str)
def test_neutreno_is_the_formula_wherever_it_stands(layers, vit, images):
    truth = logits(vit, images, neutreno(layers))
    convert(vit, "neutreno", layers=list(layers))
    assert relative_rms(vit(images), truth) < BUDGET
    assert_close(grads(vit, loss(vit(images))), grads(vit, loss(truth)))


def test_what_reads_more_and_remembers_is_the_formula_too(vit, images):
    truth = logits(vit, images, mixing)
    convert(vit, Mixing)
    assert relative_rms(vit(images), truth) < BUDGET
    assert_close(grads(vit, loss(vit(images))), grads(vit, loss(truth)))


WRONG = {
    "wrong sign": neutreno(sign=-1),
    "another lambda": neutreno(lam=0.4),
    "values of the layer before": neutreno(first=lambda earlier: earlier[max(earlier)]),
    "no correction": neutreno(layers=()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_truth_rejects_wrong_formulas(wrong, vit, images):
    expected = logits(vit, images, WRONG[wrong])
    convert(vit, "neutreno")
    assert relative_rms(vit(images), expected) > 1e-3


def test_the_truth_rejects_detached_values(vit, images):
    detached = logits(vit, images, neutreno(first=lambda earlier: earlier[1].detach()))
    convert(vit, "neutreno")
    output = vit(images)
    assert relative_rms(output, detached) < BUDGET
    seen, wrong = grads(vit, loss(output)), grads(vit, loss(detached))
    assert relative_rms(seen["blocks.0.attn.qkv.weight"], wrong["blocks.0.attn.qkv.weight"]) > 1e-3
    assert_close({"head.weight": seen["head.weight"]}, {"head.weight": wrong["head.weight"]})


def test_an_unconverted_first_layer_computes_the_same_bits(vit, images):
    seen = []
    vit.blocks[0].register_forward_hook(lambda block, args, output: seen.append(output.detach().clone()))
    untouched = vit(images)
    convert(vit, "neutreno", layers="2-3")
    assert type(vit.blocks[0].attn).__name__ == "Attention"
    assert not torch.equal(vit(images), untouched)
    assert torch.equal(seen[0], seen[1])


def test_lambda_zero_and_layer_one_are_standard(vit, images):
    untouched = vit(images)
    convert(vit, "neutreno", options={"lam": 0.0})
    assert torch.equal(vit(images), untouched)
    undo(vit)
    convert(vit, "neutreno", layers=1)
    assert torch.equal(vit(images), untouched)


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": True}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}, {"block_fn": ResPostBlock}],
    ids=["qk-norm", "registers", "no-class-token", "norm-after"],
)
def test_other_members_of_the_family(change, small_vit, images):
    vit = small_vit(**change).double()
    truth = vit.norm(features(vit, images, neutreno((2, 3)))[-1])
    convert(vit, "neutreno", layers="2-3")
    assert relative_rms(vit.forward_features(images), truth) < BUDGET


# --- forwards of their own --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_two_forwards_and_then_two_backwards(checkpointed, name, vit, images):
    expected = [grads(vit, loss(logits(vit, batch, FORMULAS[name]))) for batch in (images, 2 - images)]
    convert(vit, MECHANISMS[name])
    vit.set_grad_checkpointing(checkpointed)
    first, second = loss(vit(images)), loss(vit(2 - images))
    assert_close(grads(vit, first), expected[0])
    assert_close(grads(vit, second), expected[1])


@EVERY
def test_two_forwards_and_then_two_backwards_in_the_other_order(name, vit, images):
    expected = [grads(vit, loss(logits(vit, batch, FORMULAS[name]))) for batch in (images, 2 - images)]
    convert(vit, MECHANISMS[name])
    vit.set_grad_checkpointing(True)
    first, second = loss(vit(images)), loss(vit(2 - images))
    assert_close(grads(vit, second), expected[1])
    assert_close(grads(vit, first), expected[0])


@EVERY
def test_micro_batches_whose_layers_take_turns(name, vit, images):
    """As a pipeline runs them: layer 1 of the second batch comes before layer 2 of the first."""
    batches = [images, 2 - images]
    expected = [features(vit, batch, FORMULAS[name])[-1] for batch in batches]
    convert(vit, MECHANISMS[name])
    tokens = [vit.norm_pre(vit._pos_embed(vit.patch_embed(batch))) for batch in batches]
    for block in vit.blocks:
        tokens = [block(x) for x in tokens]
    for seen, truth in zip(tokens, expected, strict=True):
        assert relative_rms(seen, truth) < BUDGET
        assert_close(grads(vit, loss(seen)), grads(vit, loss(truth)))


@EVERY
def test_two_threads_at_once(name, vit, images):
    batches = [images, 2 - images]
    expected = [logits(vit, batch, FORMULAS[name]).detach() for batch in batches]
    convert(vit, MECHANISMS[name])
    # Each waits for the other after every block, so that their layers interleave.
    together = threading.Barrier(2, timeout=20)
    for block in vit.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: None if together.wait() >= 0 else args)
    seen = {}

    def run(which):
        torch.set_num_threads(1)
        with torch.no_grad():
            seen[which] = vit(batches[which])

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for which in (0, 1):
        assert relative_rms(seen[which], expected[which]) < BUDGET


# --- activation checkpointing -----------------------------------------------------------------------------------------


def whole_stack(vit, images):
    return vit.head(vit.norm(checkpoint(vit.blocks, tokens_of(vit, images), use_reentrant=False))[:, 0])


def in_pairs(vit, images):
    return vit.head(vit.norm(checkpoint_sequential(vit.blocks, 2, tokens_of(vit, images), use_reentrant=False))[:, 0])


def model_itself(vit, images):
    return checkpoint(vit, images, use_reentrant=False)


def without_early_stop(vit, images):
    vit.set_grad_checkpointing(True)
    return vit(images)


def tokens_of(vit, images):
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


@EVERY
@pytest.mark.parametrize("how", [whole_stack, in_pairs, model_itself, without_early_stop])
def test_a_recomputation_sees_the_context_of_its_own_forward(how, name, vit, images):
    expected = [grads(vit, loss(logits(vit, batch, FORMULAS[name]))) for batch in (images, 2 - images)]
    convert(vit, MECHANISMS[name])
    with torch.utils.checkpoint.set_checkpoint_early_stop(how is not without_early_stop):
        outputs = [loss(how(vit, batch)) for batch in (images, 2 - images)]
    assert_close(grads(vit, outputs[0]), expected[0])
    assert_close(grads(vit, outputs[1]), expected[1])


@pytest.fixture
def reentrant():
    from timm.layers.config import set_reentrant_ckpt, use_reentrant_ckpt

    before = use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(before)


def test_timm_checkpoints_without_reentrance_unless_told(vit):
    from timm.layers.config import use_reentrant_ckpt

    assert not use_reentrant_ckpt()


@EVERY
def test_reentrant_checkpointing_is_refused_in_the_forward(name, reentrant, vit, images):
    convert(vit, MECHANISMS[name])
    vit.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match=r"layer 2 \(blocks\.1\.attn\) reads .* Use use_reentrant=False"):
        vit(images)
    # Where there is nothing to recompute, it does no harm.
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        output = vit(images)
    assert relative_rms(output, logits(vit, images, FORMULAS[name])) < BUDGET


@EVERY
def test_reentrant_checkpointing_of_the_first_layer_alone_is_refused(name, vit, images):
    convert(vit, MECHANISMS[name])
    x = checkpoint(vit.blocks[0], tokens_of(vit, images), use_reentrant=True)
    with pytest.raises(RuntimeError, match="computed with gradients switched off, though the tokens have gradients"):
        vit.blocks[1](x)


def test_reentrant_checkpointing_between_what_is_read_and_what_reads_is_refused(vit, images):
    """Layer 2 only passes on what layer 1 left, and says so itself when it was handed something without gradients."""
    convert(vit, "neutreno", layers=3)
    x = checkpoint(vit.blocks[0], tokens_of(vit, images), use_reentrant=True)
    with pytest.raises(RuntimeError, match="reads of earlier layers was computed with gradients switched off"):
        vit.blocks[2](vit.blocks[1](x))


@EVERY
def test_reentrant_checkpointing_of_a_reading_layer_is_refused_in_the_backward(name, vit, images):
    convert(vit, MECHANISMS[name])
    x = vit.blocks[1](vit.blocks[0](tokens_of(vit, images)))
    output = checkpoint(vit.blocks[2], x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"came into layer 3 \(blocks\.2\.attn\) are not .* Re-entrant activation"):
        loss(output).backward()


def test_reentrant_checkpointing_of_layers_that_only_pass_on_is_right(vit, images):
    expected = grads(vit, loss(logits(vit, images, neutreno((3,)))))
    convert(vit, "neutreno", layers=3)
    x = checkpoint(vit.blocks[1], vit.blocks[0](tokens_of(vit, images)), use_reentrant=True)
    assert_close(grads(vit, loss(vit.head(vit.norm(vit.blocks[2](x))[:, 0]))), expected)


@EVERY
def test_reentrant_checkpointing_of_the_whole_stack_is_right(name, vit, images):
    """Everything that is read is computed again inside, with its gradients."""
    expected = grads(vit, loss(logits(vit, images, FORMULAS[name])))
    convert(vit, MECHANISMS[name])
    x = checkpoint(vit.blocks, tokens_of(vit, images), use_reentrant=True)
    assert_close(grads(vit, loss(vit.head(vit.norm(x)[:, 0]))), expected)


def test_checkpointing_the_attention_alone_is_refused(vit, images):
    convert(vit, "neutreno")
    attn = vit.blocks[1].attn
    plain = attn.forward
    output = checkpoint_inside(attn, lambda: vit(images))
    with pytest.raises(RuntimeError, match=r"The attention of layer 2 \(blocks\.1\.attn\) was run outside its block"):
        loss(output).backward()
    assert attn.forward == plain


def test_checkpoints_within_checkpoints_are_refused(vit, images):
    """The inner recomputation is handed a tensor that the outer one made anew."""

    def stack(x):
        for block in vit.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    convert(vit, "neutreno")
    output = checkpoint(stack, tokens_of(vit, images), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"came into layer 3 .* checkpoints within checkpoints"):
        loss(output).backward()


def test_saved_tensors_that_are_moved_away_are_refused(vit, images):
    convert(vit, "neutreno")
    vit.set_grad_checkpointing(True)
    with torch.autograd.graph.save_on_cpu():
        output = vit(images)
    with pytest.raises(RuntimeError, match=r"came into layer 3 .* hooks that replace saved tensors"):
        loss(output).backward()


def checkpoint_inside(module, run):
    """run() with the module's forward under a checkpoint of its own."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    try:
        return run()
    finally:
        del module.forward


# --- what is frozen ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_frozen_layers(checkpointed, name, vit, images):
    for part in (vit.patch_embed, vit.blocks[0]):
        part.requires_grad_(False)
    expected = grads(vit, loss(logits(vit, images, FORMULAS[name])))
    convert(vit, MECHANISMS[name])
    vit.set_grad_checkpointing(checkpointed)
    assert_close(grads(vit, loss(vit(images))), expected)


@EVERY
@pytest.mark.parametrize("lower", [1, 2])
def test_lower_layers_under_no_grad(lower, name, vit, images):
    """Fine-tuning of the upper layers, as it is often written: what lies below is a constant."""

    def upper(x, layers):
        for block in layers:
            x = block(x)
        return vit.head(vit.norm(x)[:, 0])

    twin_truth = logits(vit, images, FORMULAS[name])
    everything = grads(vit, loss(twin_truth))
    convert(vit, MECHANISMS[name])
    with torch.no_grad():
        x = tokens_of(vit, images)
        for block in vit.blocks[:lower]:
            x = block(x)
    output = upper(x, vit.blocks[lower:])
    assert relative_rms(output, twin_truth) < BUDGET
    seen = grads(vit, loss(output))
    assert not any(key.startswith("blocks.0") for key in seen)
    # Nothing below the cut takes part in the gradients of what lies above it.
    assert_close(seen, {key: everything[key] for key in seen})
    leaf = x.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="are not the tensor that the layer before put out"):
        upper(leaf, vit.blocks[lower:])
    assert relative_rms(upper(x.requires_grad_(), vit.blocks[lower:]), twin_truth) < BUDGET


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, name, vit, images):
    truth = logits(vit, images, FORMULAS[name])
    convert(vit, MECHANISMS[name])
    with mode():
        assert relative_rms(vit(images), truth) < BUDGET
    assert relative_rms(vit(images), truth) < BUDGET


# --- nothing outlives the forward, and nothing waits for the garbage collector ----------------------------------------


class Watch:
    """Weak references to the outputs of all projections and blocks of a model."""

    def __init__(self, vit):
        self.seen = []
        for block in vit.blocks:
            block.register_forward_hook(self.hook)
            block.attn.qkv.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        self.seen.append(weakref.ref(output))

    def alive(self):
        """How many still are, without the help of the garbage collector: memory on a GPU would not wait for it."""
        return sum(reference() is not None for reference in self.seen)


@pytest.fixture
def _no_collector():
    gc.disable()
    yield
    gc.enable()


@EVERY
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_no_graph_is_kept(checkpointed, name, vit, images):
    convert(vit, MECHANISMS[name])
    watch = Watch(vit)
    vit.set_grad_checkpointing(checkpointed)
    output = vit(images)
    assert watch.alive()
    del output
    assert watch.alive() == 0
    loss(vit(images)).backward()
    assert watch.alive() == 0
    with torch.no_grad():
        vit(images)
    assert watch.alive() == 0


def test_values_are_let_go_after_the_last_layer_that_reads_them(small_vit, images):
    vit = small_vit(depth=5).double()
    carried = []
    convert(vit, Mixing, layers="1-4")
    for block in vit.blocks:
        block.register_forward_hook(
            lambda module, args, output: carried.append(getattr(output, "_twicing_context", None))
        )
    vit(images)
    assert [sorted(context.values_by_layer) for context in carried[:3]] == [[1], [1, 2], [1, 3]]
    # Layer 4 is the last that reads: its output is a plain tensor again.
    assert carried[3:] == [None, None]


class StopError(Exception):
    pass


@EVERY
@pytest.mark.parametrize("where", ["block", "attention", "mlp"])
@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_nothing_behind(kind, where, name, vit, images):
    truth = logits(vit, images, FORMULAS[name]).detach()
    convert(vit, MECHANISMS[name])
    watch = Watch(vit)

    def stop(module, args):
        raise kind

    block = vit.blocks[1]
    handle = {"block": block, "attention": block.attn, "mlp": block.mlp}[where].register_forward_pre_hook(stop)
    with pytest.raises(kind):
        vit(images)
    handle.remove()
    if kind is KeyboardInterrupt:
        # No hook runs then: what is left lasts until the next forward, and no one else can read it.
        with pytest.raises(RuntimeError, match="run outside its block"):
            vit.blocks[2].attn(torch.zeros(2, 17, 48, dtype=torch.float64))
        with torch.no_grad():
            vit(images)
    assert watch.alive() == 0
    assert relative_rms(vit(images), truth) < BUDGET


@pytest.mark.usefixtures("_no_collector")
def test_a_model_that_is_dropped_is_gone_at_once(vit, images):
    convert(vit, "neutreno")
    vit(images)
    layer = weakref.ref(vit.blocks[0].attn)
    del vit.blocks[0]
    assert layer() is None
