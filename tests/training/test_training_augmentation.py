"""Augmentation: a function of seed, pass, image and repeat, whoever computes it, and DeiT's own where it is DeiT's."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from twicing.training.augmentation import Augmentation, FileTransform, augment_pixels
from twicing.training.loaders import TrainingImages, held_out_loader, train_loader
from twicing.training.mixing import Mixing
from twicing.training.order import Slice
from twicing.training.recipe import imagefolder, imagenet_deit_tiny, mnist
from twicing.training.settings import apply_settings
from twicing.training.split import load_split, with_classes
from twicing.training.streams import drawing_from

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def augmented(pixels, numbers, repeats=None, *, n=20, seed=0, pass_number=0, **settings):
    return augment_pixels(
        pixels,
        numbers,
        repeats or [0] * len(numbers),
        augmentation=Augmentation(**settings),
        seed=seed,
        pass_number=pass_number,
        n=n,
    )


def test_pixels_are_left_alone_where_nothing_is_set():
    pixels = torch.rand(3, 1, 8, 8)
    assert augmented(pixels, [0, 1, 2]) is pixels


def test_what_happens_to_an_image_depends_on_nothing_but_its_own_draw():
    pixels = torch.rand(20, 1, 8, 8)
    settings = {"flip": True, "pad_crop": 2}
    whole = augmented(pixels, range(20), **settings)
    part = augmented(pixels[[7, 3]], [7, 3], **settings)
    assert torch.equal(part, whole[[7, 3]])
    same = pixels[:1].expand(20, -1, -1, -1)
    for change in ({"seed": 1}, {"pass_number": 1}, {"repeats": [1] * 20}):
        assert not torch.equal(augmented(same, range(20), **settings), augmented(same, range(20), **settings, **change))


def test_half_of_the_images_are_mirrored():
    pixels = torch.rand(400, 1, 4, 4)
    flipped = augmented(pixels, range(400), n=400, flip=True)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])
    assert 0.4 < mirrored.double().mean() < 0.6


def test_a_crop_is_a_part_of_the_image_with_black_around():
    pixels = torch.rand(200, 1, 4, 4) + 0.1
    cut = augmented(pixels, range(200), n=200, pad_crop=1)
    around = torch.nn.functional.pad(pixels, [1, 1, 1, 1])
    corners = set()
    for image, wide in zip(cut, around, strict=True):
        found = [(y, x) for y in range(3) for x in range(3) if torch.equal(wide[:, y : y + 4, x : x + 4], image)]
        assert len(found) == 1
        corners.update(found)
    assert corners == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"erasing": 1.5}, r"augmentation\.erasing must be from 0 to 1: got 1\.5"),
        ({"mixup": -1}, r"augmentation\.mixup must be 0 or larger: got -1"),
        ({"smallest_crop": 0.0}, r"augmentation\.smallest_crop must be above 0 and at most 1: got 0\.0"),
        ({"repeats": 0}, r"augmentation\.repeats must be 1 or larger: got 0"),
        ({"pad_crop": -1}, r"augmentation\.pad_crop must be 0 or larger: got -1"),
        ({"rand_augment": "rand-q9"}, r"augmentation\.rand_augment must be in timm's notation, .*: got 'rand-q9'\."),
        ({"rand_augment": "m9"}, r"augmentation\.rand_augment must be in timm's notation"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_what_works_on_files_is_refused_for_pixels_and_the_other_way_round():
    message = r"augmentation\.erasing is for files, and mnist has images in memory: leave it as it is"
    with pytest.raises(ValueError, match=message):
        apply_settings(mnist(), ["augmentation.erasing=0.1"])
    with pytest.raises(ValueError, match=r"augmentation\.pad_crop is for images in memory, and imagefolder has image"):
        apply_settings(imagefolder(), ["augmentation.pad_crop=2"])


@pytest.mark.parametrize("seed", range(6))
def test_the_transform_is_deits_before_the_normalisation(picture, seed):
    """Random erasing comes after the normalisation in DeiT, and with the normalisation in the model before it."""
    from timm.data.transforms_factory import create_transform

    deits = create_transform(
        32,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.5,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
    )
    import dataclasses

    settings = dataclasses.replace(imagenet_deit_tiny().augmentation, erasing=0.5)
    ours = FileTransform(settings, 32, MEAN, STD)
    for transform in deits.transforms:
        if hasattr(transform, "device"):
            transform.device = "cpu"
    with drawing_from(seed):
        normalised = deits(picture)
    with drawing_from(seed):
        pixels = ours(picture)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close((pixels - mean) / std, normalised, atol=2e-6, rtol=0)


def test_only_what_is_erased_leaves_the_range_of_pixels(picture):
    """The noise is N(mean, std) as wide as DeiT's; every other pixel is one of 256 grey levels, exactly."""
    transform = FileTransform(Augmentation(erasing=1.0), 32, MEAN, STD)
    noise = []
    for seed in range(30):
        with drawing_from(seed):
            pixels = transform(picture)
        level = (pixels * 255).round() / 255
        erased = (pixels != level).any(0)
        assert 0 < erased.double().mean() < 0.5
        noise.append(pixels[:, erased])
    noise = torch.cat(noise, dim=1)
    torch.testing.assert_close(noise.mean(1), torch.tensor(MEAN), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(1), torch.tensor(STD), atol=0.01, rtol=0)
    assert noise.min() < 0
    plain = FileTransform(Augmentation(flip=True), 32, MEAN, STD)(picture)
    assert torch.equal(plain, (plain * 255).round() / 255)
    assert 0 <= plain.min() <= plain.max() <= 1


def test_draws_within_leave_the_draws_outside_alone():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with drawing_from(7):
        inside = drawn()
    assert drawn() == expected
    with drawing_from(7):
        assert drawn() == inside
    with drawing_from(8):
        assert not set(drawn()) & set(inside)


def deit(folder, *more):
    sizes = ["image_size=32", "batch_size=8", *more]
    return with_classes(apply_settings(imagenet_deit_tiny(), sizes), folder)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_change_nothing(made_up_folder):
    recipe = deit(made_up_folder)
    images = load_split(recipe, 0, made_up_folder).train
    found = []
    for workers in (0, 2):
        loader = train_loader(images, recipe, 3, workers=workers)
        found.append([])
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found[-1] += list(loader)
    assert len(found[0]) == 2 * 4
    for (a, a_labels, _), (b, b_labels, _) in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)
    assert not torch.equal(found[0][0][0], found[0][4][0])


def test_versions_of_an_image_differ_and_another_seed_gives_others(made_up_folder):
    recipe = deit(made_up_folder)
    images = load_split(recipe, 0, made_up_folder).train
    training = TrainingImages(images, recipe, 3)
    pixels, labels, share = training[Slice((5, 5, 30), (0, 1, 0), 0, 1.0)]
    assert labels.tolist() == [0, 0, 3]
    assert share == 1
    assert not torch.equal(pixels[0], pixels[1])
    assert torch.equal(training[Slice((30,), (0,), 0, 1.0)][0][0], pixels[2])
    assert not torch.equal(training[Slice((30,), (0,), 1, 1.0)][0][0], pixels[2])
    assert not torch.equal(TrainingImages(images, recipe, 4)[Slice((30,), (0,), 0, 1.0)][0][0], pixels[2])


def test_files_without_augmentation_are_the_test_images(made_up_folder):
    recipe = with_classes(
        apply_settings(imagefolder(), ["image_size=32", "augmentation.flip=false", "augmentation.smallest_crop=1"]),
        made_up_folder,
    )
    split = load_split(recipe, 0, made_up_folder)
    pixels, labels, _ = TrainingImages(split.train, recipe, 0)[Slice((8, 9), (0, 0), 0, 1.0)]
    assert torch.equal(pixels, split.train.load([8, 9]))
    assert labels.tolist() == [0, 1]
    (held_out,) = held_out_loader(split.test)
    assert torch.equal(held_out[0], split.test.load(range(12)))
    assert torch.equal(held_out[1], split.test.labels)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_gives_shares_of_two_images_and_of_their_classes(settings):
    """Worked out from the targets: the share of the image itself is what its class got, smoothing taken away."""
    mixing = Mixing(Augmentation(**settings, smoothing=0.1), 4, seed=0)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    kinds = set()
    for step in range(12):
        mixed, targets = mixing(images.clone(), labels, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        share = (targets[0, 0] - 0.025) / 0.9
        wanted = 0.9 * (share * torch.eye(4) + (1 - share) * torch.eye(4).flip(0)) + 0.025
        torch.testing.assert_close(targets, wanted)
        if torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-6):
            kinds.add("mixup")
        else:
            kinds.add("cutmix")
            theirs = (mixed == images.flip(0)).all(1)
            assert torch.equal(torch.where(theirs[:, None], images.flip(0), images), mixed)
            assert theirs[0].double().mean().item() == pytest.approx(1 - share.item(), abs=1e-6)
        again, _ = mixing(images.clone(), labels, step)
        assert torch.equal(again, mixed)
    assert kinds == set(settings)
    others = [Mixing(Augmentation(**settings, smoothing=0.1), 4, seed=1)(images.clone(), labels, 11)[1]]
    others += [mixing(images.clone(), labels, step)[1] for step in range(11)]
    assert not any(torch.equal(other, targets) for other in others), "the same share for another seed or step"


def test_two_slices_mix_as_the_whole_batch_does():
    mixing = Mixing(Augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1), 4, seed=0)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    for step in range(6):
        whole, targets = mixing(images.clone(), labels, step)
        for places in ([0, 1, 6, 7], [2, 3, 4, 5]):
            part, part_targets = mixing(images[places].clone(), labels[places], step)
            assert torch.equal(part, whole[places])
            assert torch.equal(part_targets, targets[places])
