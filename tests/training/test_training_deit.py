"""The recipe of DeiT, number by number, and its training against one written out by hand."""

import copy
import dataclasses
import math

import pytest
import torch

from twicing.data.images import MemoryImages
from twicing.training.augmentation import Augmentation
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.classification import build_model, train_classifier
from twicing.training.mixing import Mixing
from twicing.training.order import batch_order
from twicing.training.recipe import Cosine, digits, imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.split import Split
from twicing.training.streams import STEP_STREAM, stream_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def test_the_numbers_are_the_papers():
    """arXiv 2012.12877, table 9, with the batch and rate of the papers on attention: 4 x 256 images and 1e-3."""
    recipe = imagenet_deit_tiny()
    assert (recipe.image_size, recipe.patch_size, recipe.width, recipe.depth, recipe.heads) == (224, 16, 192, 12, 3)
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (300, 1024, 1e-3, 0.05)
    assert recipe.cosine == Cosine(warmup_epochs=5, warmup_rate=1e-6, last_rate=1e-5, cooldown_epochs=10)
    assert recipe.drop_path == 0.1
    assert recipe.augmentation == Augmentation(
        flip=True,
        smallest_crop=0.08,
        rand_augment="rand-m9-mstd0.5-inc1",
        colour_jitter=0.4,
        erasing=0.25,
        repeats=3,
        mixup=0.8,
        cutmix=1.0,
        switch=0.5,
        smoothing=0.1,
    )
    assert recipe.all_epochs == 310


def test_the_model_is_timms_with_timms_weights():
    from timm import create_model

    recipe = dataclasses.replace(imagenet_deit_tiny(), classes=1000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = create_model("deit_tiny_patch16_224", pretrained=False, drop_path_rate=0.1)
    ours = build_model(recipe, 4).network
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())
    assert [block.drop_path1.drop_prob for block in ours.blocks[1:]] == pytest.approx(
        [i * 0.1 / 11 for i in range(1, 12)]
    )
    assert str(ours) == str(theirs)


@pytest.fixture
def recipe(tiny):
    """All of DeiT's training that images in memory can have."""
    small = tiny(digits(), "epochs=3", "batch_size=8", "ema_decay=0.8", "drop_path=0.2", "weight_decay=0.3")
    return dataclasses.replace(
        small,
        classes=3,
        cosine=Cosine(warmup_epochs=1, warmup_rate=1e-4, last_rate=1e-5, cooldown_epochs=1),
        augmentation=Augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=2),
    )


def rates(recipe):
    """Warm-up from 1e-4, cosine to 1e-5, then 1e-5: the rate of each epoch."""
    top, last = recipe.learning_rate, recipe.cosine.last_rate
    cosine = [last + 0.5 * (top - last) * (1 + math.cos(math.pi * epoch / 3)) for epoch in (1, 2)]
    return [1e-4, *cosine, last]


def test_a_training_is_the_one_written_out_by_hand(recipe, grey_images, tmp_path):
    images, held_out = grey_images(20), grey_images(9, seed=1)
    split = Split(images, held_out, torch.arange(9), torch.arange(9))
    model = build_model(recipe, 2)
    by_hand = copy.deepcopy(model).train()
    curve = train_classifier(model, recipe, split, 2, tmp_path, lambda share: None)

    decayed = [
        w for name, w in by_hand.network.named_parameters() if w.ndim > 1 and name not in ("pos_embed", "cls_token")
    ]
    others = [w for w in by_hand.parameters() if not any(w is one for one in decayed)]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}])
    mixing, mean, step = Mixing(recipe.augmentation, 3, 2), copy.deepcopy(by_hand), 0
    order = batch_order(recipe, 20, 2)
    for epoch, rate in enumerate(rates(recipe)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        order.set_epoch(epoch)
        losses = []
        for part in order:
            torch.manual_seed(stream_seed(2, STEP_STREAM, step))
            mixed, targets = mixing(images.load(part.images), images.labels[list(part.images)], step)
            loss = -(targets * by_hand(mixed).log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            for averaged, weight in zip(mean.parameters(), by_hand.parameters(), strict=True):
                averaged.data = 0.8 * averaged.data + 0.2 * weight.data
        assert curve[epoch].loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert step == 8
    for (name, weight), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=2e-5, rtol=1e-4, msg=name)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)["state_dict"]
    for name, expected in mean.named_parameters():
        torch.testing.assert_close(saved[f"ema.module.{name}"], expected, atol=2e-5, rtol=1e-4, msg=name)


def test_smoothing_without_mixing_is_that_of_the_labels(recipe, grey_images, tmp_path):
    still = apply_settings(recipe, ["augmentation.mixup=0", "augmentation.cutmix=0", "learning_rate=1e-30"])
    still = apply_settings(still, ["cosine.last_rate=0", "cosine.warmup_rate=0", "drop_path=0", "ema_decay=0"])
    still = apply_settings(still, ["augmentation.smoothing=0.3", "augmentation.repeats=1"])
    images = grey_images(20)
    model = build_model(still, 2)
    split = Split(images, images, torch.arange(20), torch.arange(20))
    curve = train_classifier(model, still, split, 2, tmp_path, lambda share: None)
    with torch.no_grad():
        shares = 0.7 * torch.nn.functional.one_hot(images.labels, 3) + 0.1
        expected = -(shares * model.eval()(images.load(range(20))).log_softmax(1)).sum(1).mean().item()
    assert curve[0].loss == pytest.approx(expected, rel=1e-5)
    assert "ema" not in str(torch.load(tmp_path / CHECKPOINT, weights_only=True)["state_dict"].keys())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochs=5"], r"cosine\.warmup_epochs must be below epochs: got 5 and 5\."),
        (["cosine.last_rate=-1"], r"cosine\.last_rate must be a finite number 0 or larger: got -1\.0\."),
        (["batch_size=7"], r"mixup and cutmix mix pairs, so batch_size must be even: got 7\."),
        (["ema_decay=1"], r"ema_decay must be from 0 to below 1: got 1\.0\."),
        (["drop_path=-0.1"], r"drop_path must be from 0 to below 1: got -0\.1\."),
        (["channels=1"], r"unknown key 'channels'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(imagenet_deit_tiny(), settings)


def test_images_in_memory_may_be_float(recipe, tmp_path):
    pixels = torch.rand(16, 1, 8, 8)
    images = MemoryImages(pixels, torch.arange(16) % 3, ("a", "b", "c"))
    split = Split(images, images, torch.arange(16), torch.arange(16))
    train_classifier(build_model(recipe, 0), recipe, split, 0, tmp_path, lambda share: None)
    # CutMix writes into the batch, never into the data.
    assert torch.equal(images.pixels, pixels)
