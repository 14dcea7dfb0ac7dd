"""Converted models in use: compiled, exported, checkpointed, under autocast, trained."""

import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from twicing.adapters.surgery import convert, undo
from twicing.testing import relative_rms


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, *batches):
    """Gradients of all parameters after a forward for each batch, in order, and then one backward through all."""
    model.zero_grad()
    loss = sum(F.cross_entropy(model(batch), torch.tensor([1, 7])) for batch in batches)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(one, other, budget):
    assert one.keys() == other.keys()
    for name in one:
        assert relative_rms(one[name], other[name]) < budget, name


@pytest.mark.parametrize("learned", [False, True], ids=["fixed-gain", "learned-gain"])
def test_compiles_into_one_graph(learned, small_vit, images):
    model = small_vit().double()
    convert(model, "twicing", layers="2-3", options={"learn_gain": learned})
    images = images.double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert relative_rms(compiled(images), model(images)) < 1e-13
    assert counter.frame_count == 1
    expected = gradients(model, images)
    assert_close(gradients(compiled._orig_mod, images), expected, 1e-12)
    compiled.zero_grad()
    F.cross_entropy(compiled(images), torch.tensor([1, 7])).backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-12)


def test_undo_reaches_a_model_that_was_compiled_after_the_conversion(small_vit, images):
    model = small_vit()
    untouched = model(images)
    job = convert(model, "twicing")
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(compiled(images), untouched)
    job.undo()
    assert torch.equal(compiled(images), untouched)


def test_exports(small_vit, images, tmp_path):
    model = small_vit()
    convert(model, "twicing", options={"learn_gain": True})
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert relative_rms(loaded(images), model(images)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"gain": 0.5, "learn_gain": True}], ids=["gain 1", "learned"])
def test_feature_extractors_by_torch_fx_trace_it(options, small_vit, images):
    model = small_vit()
    convert(model, "twicing", options=options)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
    assert torch.equal(traced(images[:1]), model(images[:1]))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, small_vit, images):
    from timm.layers.config import set_reentrant_ckpt, use_reentrant_ckpt

    model, images = small_vit().double().train(), images.double()
    convert(model, "twicing", options={"learn_gain": True})
    expected = gradients(model, images, 0.5 * images)
    model.set_grad_checkpointing(True)
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(reentrant)
    try:
        assert_close(gradients(model, images, 0.5 * images), expected, 1e-12)
    finally:
        set_reentrant_ckpt(before)


def test_two_forwards_and_then_one_backward(small_vit, images):
    model, images = small_vit().double(), images.double()
    convert(model, "twicing", options={"learn_gain": True})
    together = gradients(model, images, 0.5 * images)
    one, other = gradients(model, images), gradients(model, 0.5 * images)
    assert_close(together, {name: one[name] + other[name] for name in one}, 1e-12)
    assert all(grad.abs().max() > 0 for name, grad in together.items() if "gain" in name)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed-gain", "learned-gain"])
def test_autocast(learned, small_vit, images):
    model = small_vit()
    untouched = model(images)
    convert(model, "twicing", options={"learn_gain": learned})
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    # Seven bits of mantissa through three layers; standard attention would be much further off.
    assert relative_rms(output.float(), expected) < 0.05
    assert relative_rms(untouched, expected) > 0.2


def test_a_bfloat16_model_with_a_learned_gain_runs_and_learns(small_vit, images):
    model = small_vit().bfloat16()
    convert(model, "twicing", options={"learn_gain": True})
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    gradients(model, images.bfloat16())
    before = model.blocks[0].attn.twicing_mechanism.gain.clone()
    optimiser.step()
    after = model.blocks[0].attn.twicing_mechanism.gain
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)


def test_an_optimiser_made_before_stays_valid(small_vit, images):
    def trained(convert_first):
        model = small_vit().double()
        if convert_first:
            convert(model, "twicing")
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if not convert_first:
            convert(model, "twicing")
        for _ in range(2):
            gradients(model, images.double())
            optimiser.step()
        undo(model)
        return model.state_dict()

    first, second = trained(True), trained(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_pickle_opens_in_a_fresh_process(small_vit, images, tmp_path):
    model = small_vit()
    convert(model, "twicing")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, images, model(images).detach())))
    code = (
        "import pickle, sys, torch\n"
        "model, images, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(images), expected)\n"
        "assert type(model.blocks[0].attn).__name__ == 'ConvertedAttention'\n"
    )
    # The host's classes come first in the file, so that timm is imported before our adapter can mend torchvision.
    mend = "from twicing.torchvision_import import mend_torchvision_import; mend_torchvision_import()\n"
    done = subprocess.run(
        [sys.executable, "-c", mend + code, tmp_path / "model.pickle"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_published_size_of_deit_tiny():
    import timm

    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    keys = list(model.state_dict())
    count = sum(p.numel() for p in model.parameters())
    job = convert(model, "twicing", layers="10-12")
    assert count == 5_717_416
    assert (job.new_parameters, job.layers) == (0, (10, 11, 12))
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == count
