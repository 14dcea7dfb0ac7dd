"""Models with a mechanism that reads earlier layers in use: parts of the forward, wrapped, compiled, cast, copied."""

import copy
import io
import pickle

import pytest
import torch
from by_hand import FORMULAS, MECHANISMS, Mixing, features, logits, mixing, neutreno
from torch import nn
from torch.utils.checkpoint import checkpoint

from twicing.adapters.surgery import convert, undo
from twicing.mechanisms import Context
from twicing.models.vision import PixelModel
from twicing.testing import relative_rms

BUDGET = 1e-12
EVERY = pytest.mark.parametrize("name", MECHANISMS)


@pytest.fixture
def vit(small_vit):
    return small_vit().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model, output):
    model.zero_grad()
    output.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def batch_tokens(vit, images):
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def assert_close(seen, expected, budget=BUDGET):
    assert seen.keys() == expected.keys()
    for name in seen:
        assert float((seen[name] - expected[name]).norm()) <= budget * max(float(expected[name].norm()), 1e-3), name


# --- parts of the forward ---------------------------------------------------------------------------------------------


@EVERY
def test_forward_features_and_intermediates(name, vit, images):
    blocks = features(vit, images, FORMULAS[name])
    convert(vit, MECHANISMS[name])
    assert relative_rms(vit.forward_features(images), vit.norm(blocks[-1])) < BUDGET
    _, seen = vit.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    for (tokens, prefix), truth in zip(seen, blocks, strict=True):
        assert relative_rms(torch.cat([prefix, tokens], 1), truth) < BUDGET
    (first,) = vit.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert relative_rms(first.flatten(2).mT, blocks[1][:, 1:]) < BUDGET


def test_masks_reach_neutreno(vit, images):
    """With everything masked but the token itself, A is the identity, and U = V + lambda (V_1 - V)."""
    mask = torch.eye(17, dtype=torch.bool)
    identity = [
        block.detach() for block in features(vit, images, lambda *at: neutreno()(at[0], mask.double(), *at[2:]))
    ]
    convert(vit, "neutreno")
    assert relative_rms(vit.forward_features(images, attn_mask=mask), vit.norm(identity[-1])) < BUDGET
    assert not torch.equal(vit.forward_features(images, is_causal=True), vit.forward_features(images))


@EVERY
def test_a_model_inside_another(name, vit, images):
    model = PixelModel(vit, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).double()
    truth = logits(vit, (images - 0.5) / 0.25, FORMULAS[name])
    job = convert(model, MECHANISMS[name])
    assert "network.blocks.0.attn" in str(job)
    assert relative_rms(model(images), truth) < BUDGET


@EVERY
def test_gradients_of_the_images(name, vit, images):
    """What an attack follows."""
    images.requires_grad_()
    (expected,) = torch.autograd.grad(logits(vit, images, FORMULAS[name]).square().sum(), images)
    convert(vit, MECHANISMS[name])
    (seen,) = torch.autograd.grad(vit(images).square().sum(), images)
    assert relative_rms(seen, expected) < BUDGET


@EVERY
def test_training_with_drop_path_and_dropout_is_the_same_when_checkpointed(name, small_vit, images):
    model = small_vit(drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.2).double().train()
    convert(model, MECHANISMS[name])
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(5)
        found.append(gradients(model, model(images)))
    assert_close(*found)
    assert all(gradient.isfinite().all() for gradient in found[0].values())


def test_half_of_the_model_twiced_and_half_regularised(vit, images):
    def both(layer, A, v, earlier, memory):
        smoothed = A @ v
        return smoothed + A @ (v - smoothed) if layer == 1 else neutreno()(layer, A, v, earlier, memory)

    truth = logits(vit, images, both)
    first = convert(vit, "twicing", layers=1)
    convert(vit, "neutreno", layers="2-3")
    assert relative_rms(vit(images), truth) < BUDGET
    first.undo()
    assert relative_rms(vit(images), logits(vit, images, neutreno())) < BUDGET


# --- casts, copies, functions -----------------------------------------------------------------------------------------


def test_autocast(small_vit):
    vit, images = small_vit(), torch.randn(2, 3, 16, 16)
    truth, standard = logits(vit, images, neutreno()), vit(images)
    convert(vit, "neutreno")
    for checkpointed in (False, True):
        vit.set_grad_checkpointing(checkpointed)
        with torch.autocast("cpu", torch.bfloat16):
            output = vit(images)
        assert output.dtype == torch.bfloat16
        assert relative_rms(output.float(), truth) < 0.05
        assert all(grad.isfinite().all() for grad in gradients(vit, output.float()).values())
    assert relative_rms(standard, truth) > 0.2


def test_a_first_layer_outside_autocast(small_vit):
    """Values of two dtypes meet; the output has that of the layer."""
    vit, images = small_vit(), torch.randn(2, 3, 16, 16)
    truth = features(vit, images, neutreno())[-1]
    convert(vit, "neutreno")
    x = vit.blocks[0](batch_tokens(vit, images))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(vit.blocks[2](vit.blocks[1](x)), truth) < 0.05


def average(model):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model).module


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "average": average}


@EVERY
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_after_a_forward_work_and_can_be_undone_by_themselves(copied, name, vit, images):
    untouched = vit(images)
    convert(vit, MECHANISMS[name])
    output = vit(images)
    truth = output.detach().clone()
    twin = copied(vit)
    assert torch.equal(twin(images), truth)
    undo(twin)
    assert torch.equal(twin(images), untouched)
    assert torch.equal(vit(images), truth)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in twin.modules())
    output.square().sum().backward()
    # The copy's own weights, not the model's.
    convert(twin, MECHANISMS[name])
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.mul_(2)
    assert not torch.equal(twin(images), truth)
    assert torch.equal(vit(images), truth)


@EVERY
def test_tokens_between_layers_are_copied_and_saved_without_what_they_carry(name, vit, images):
    convert(vit, MECHANISMS[name])
    with torch.no_grad():
        x = vit.blocks[0](batch_tokens(vit, images))
    assert isinstance(x._twicing_context, Context)
    file = io.BytesIO()
    torch.save(x, file)
    assert file.tell() < 2 * x.numel() * x.element_size()
    file.seek(0)
    for copied in (copy.deepcopy(x), torch.load(file, weights_only=True), pickle.loads(pickle.dumps(x))):
        assert torch.equal(copied, x)
        assert not isinstance(getattr(copied, "_twicing_context", None), Context)
        with pytest.raises(RuntimeError, match=r"came into layer 2 \(blocks\.1\.attn\) are not the tensor that"):
            vit.blocks[1](copied)


@EVERY
def test_functional_call_and_grad(name, vit, images):
    expected = gradients(vit, logits(vit, images, FORMULAS[name]))
    convert(vit, MECHANISMS[name])
    parameters = {key: parameter.detach() for key, parameter in vit.named_parameters()}
    seen = torch.func.grad(lambda p: torch.func.functional_call(vit, p, (images,)).square().sum())(parameters)
    assert_close(seen, expected)
    doubled = {key: 2 * parameter for key, parameter in parameters.items()}
    output = torch.func.functional_call(vit, doubled, (images,))
    vit.load_state_dict(doubled)
    assert torch.equal(vit(images), output)


@EVERY
def test_vmap(name, vit, images):
    convert(vit, MECHANISMS[name])
    # The fused kernel has no rule for batches and says so in a warning.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        batched = torch.func.vmap(lambda image: vit(image[None])[0])(images)
        assert relative_rms(batched, vit(images)) < BUDGET


def test_a_second_derivative(vit, images):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        convert(vit, "neutreno")
        images = images[:1].requires_grad_()

        def penalty(output):
            (gradient,) = torch.autograd.grad(output.square().sum(), images, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), images)[0]

        assert relative_rms(penalty(vit(images)), penalty(logits(vit, images, neutreno()))) < 1e-11


# The compiler looks at the .grad of what enters a graph in the middle of a model, of an unconverted one as well.
LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# --- compiled and exported --------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_into_one_graph(small_vit, images):
    vit = small_vit(depth=2).double()
    truth = logits(vit, images, mixing)
    expected = gradients(vit, truth)
    convert(vit, Mixing)
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    output = compiled(images)
    assert relative_rms(output, truth) < BUDGET
    assert_close(gradients(vit, output), expected)
    assert relative_rms(compiled(2 - images), logits(vit, 2 - images, mixing)) < BUDGET


@LOOKS_AT_GRAD
@pytest.mark.usefixtures("_fresh_compiler")
def test_blocks_that_are_compiled_one_by_one_and_take_turns(small_vit, images):
    vit = small_vit(depth=2).double()
    batches = [images, 2 - images]
    expected = [features(vit, batch, neutreno())[-1] for batch in batches]
    convert(vit, "neutreno")
    for block in vit.blocks:
        block.compile(backend="aot_eager")
    tokens = [batch_tokens(vit, batch) for batch in batches]
    for block in vit.blocks:
        tokens = [block(x) for x in tokens]
    for seen, truth in zip(tokens, expected, strict=True):
        assert relative_rms(seen, truth) < BUDGET
    (wanted,) = torch.autograd.grad(expected[0].square().sum(), vit.blocks[0].attn.qkv.weight)
    (found,) = torch.autograd.grad(tokens[0].square().sum(), vit.blocks[0].attn.qkv.weight)
    assert relative_rms(found, wanted) < BUDGET
    x = checkpoint(vit.blocks[0], batch_tokens(vit, images), use_reentrant=True)
    with pytest.raises(RuntimeError, match="Use use_reentrant=False"):
        vit.blocks[1](x)


@LOOKS_AT_GRAD
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_with_checkpointing(small_vit, images):
    vit = small_vit(depth=2).double()
    expected = gradients(vit, logits(vit, images, neutreno()))
    convert(vit, "neutreno")
    vit.set_grad_checkpointing(True)
    compiled = torch.compile(vit, backend="aot_eager")
    assert_close(gradients(vit, compiled(images)), expected)


@EVERY
def test_exports(name, vit, images):
    convert(vit, MECHANISMS[name])
    exported = torch.export.export(vit, (images,)).module()
    assert relative_rms(exported(2 - images), vit(2 - images)) < BUDGET


# --- hooks of others --------------------------------------------------------------------------------------------------


def test_hooks_that_look_on_and_backward_hooks_do_no_harm(vit, images):
    expected = gradients(vit, logits(vit, images, neutreno()))
    seen = []
    vit.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    convert(vit, "neutreno")
    vit.blocks[0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    vit.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    assert_close(gradients(vit, vit(images)), expected)
    assert seen == [(2, 17, 48)] * 2


def test_a_hook_that_returns_another_output_is_refused(vit, images):
    convert(vit, "neutreno")
    handle = vit.blocks[0].register_forward_hook(lambda module, args, output: output + 0.1)
    with pytest.raises(RuntimeError, match=r"came into layer 2 .* hooks that replace saved tensors or outputs"):
        vit(images)
    handle.remove()
    vit(images)


def test_a_hook_of_before_the_conversion_may_change_the_output(vit, images):
    vit.blocks[0].register_forward_hook(lambda module, args, output: output + 0.1)
    convert(vit, "neutreno", options={"lam": 0.0})
    plain = vit(images)
    undo(vit)
    assert torch.equal(vit(images), plain)


def test_a_view_of_some_of_the_tokens_is_refused(vit, images):
    convert(vit, "neutreno")
    x = vit.blocks[0](batch_tokens(vit, images))
    with pytest.raises(RuntimeError, match="came into layer 2"):
        vit.blocks[1](x[:, :5])
    assert torch.equal(vit.blocks[1](x.view_as(x)), vit.blocks[1](x))


def test_a_projection_that_is_replaced_afterwards_is_refused(vit, images):
    """As low-rank adapters do it: what the old projection puts out is no longer what the layer's values are."""

    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.extra = nn.Linear(base.in_features, base.out_features).double()

        def forward(self, x):
            return self.base(x) + self.extra(x)

    convert(vit, "neutreno", layers="2-3")
    vit.blocks[0].attn.qkv = LowRank(vit.blocks[0].attn.qkv)
    with pytest.raises(RuntimeError, match=r"qkv of layer 1 \(blocks\.0\.attn\) was replaced after the conversion"):
        vit(images)
    undo(vit)
    convert(vit, "neutreno", layers="2-3")
    vit(images)


def test_the_formula_of_the_tests_is_not_linear_in_what_it_reads(vit, images):
    """mixing() stands for mechanisms that save what they read for their backward."""
    A = torch.full((5, 5), 0.2, dtype=torch.float64)
    v = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    once, twice = (mixing(2, A, v, {1: factor * v}, {}) for factor in (1, 2))
    assert not torch.allclose(twice - mixing(2, A, v, {1: 0 * v}, {}), 2 * (once - mixing(2, A, v, {1: 0 * v}, {})))
