"""The data of a recipe: what is held out, what is chosen, and what each wrong folder is told."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from twicing.training.choice import balanced_order
from twicing.training.recipe import cifar10, digits, imagefolder, imagenet_deit_tiny, mnist
from twicing.training.settings import apply_settings
from twicing.training.split import ChosenImages, load_split, prepare_data, with_classes


@pytest.fixture
def mnist_folder(tmp_path):
    draw = np.random.default_rng(0)
    labels = {"train": np.repeat(np.arange(10), 6), "test": np.repeat(np.arange(10), 3)}
    arrays = {f"{part}_y": y for part, y in labels.items()}
    arrays |= {f"{part}_x": draw.integers(0, 256, (len(y), 28, 28), dtype=np.uint8) for part, y in labels.items()}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path


def test_digits_are_held_out_fold_by_fold():
    index = []
    for k in range(6):
        split = load_split(digits(), k)
        index += split.test_index.tolist()
        assert len(split.train) + len(split.test) == 1797
        train = {image.numpy().tobytes() for image in split.train.load(range(len(split.train)))}
        # The data set itself holds no image twice.
        assert not train & {image.numpy().tobytes() for image in split.test.load(range(len(split.test)))}
        assert split.probes.tolist() == list(range(len(split.test)))
    assert sorted(index) == list(range(1797))


def test_mnist_holds_its_own_part_out(mnist_folder):
    recipe = apply_settings(
        mnist(), ["evaluation.probes=20", "evaluation.verdict_images=20", "evaluation.spsa_images=5"]
    )
    one, other = load_split(recipe, 0, mnist_folder), load_split(recipe, 1, mnist_folder)
    assert (len(one.train), len(one.test)) == (60, 30)
    assert one.test_index.tolist() == list(range(30))
    assert torch.equal(one.probes, other.probes)
    # The file is sorted by class, and the probes are not its first images.
    assert Counter(one.test.labels[one.probes].tolist()) == dict.fromkeys(range(10), 2)
    assert one.probes.tolist() == sorted(one.probes.tolist())
    everything = load_split(apply_settings(mnist(), ["evaluation.probes=0"]), 0, mnist_folder)
    # Ascending: as many probes as images are kept without their positions (experiments/results.py, Correctness).
    assert everything.probes.tolist() == list(range(30))


def test_fewer_images_to_train_on_are_a_fixed_choice_with_every_class(mnist_folder):
    recipe = apply_settings(mnist(), ["train_images=20"])
    splits = [load_split(recipe, k, mnist_folder) for k in range(2)]
    assert torch.equal(splits[0].train.load(range(20)), splits[1].train.load(range(20)))
    assert Counter(splits[0].train.labels.tolist()) == dict.fromkeys(range(10), 2)
    assert len(splits[0].train) == 20
    assert len(splits[0].test) == 30
    with pytest.raises(ValueError, match="train_images must not exceed the 60 there are: got 61"):
        load_split(apply_settings(mnist(), ["train_images=61"]), 0, mnist_folder)


def test_chosen_images_are_the_images_at_their_positions(grey_images):
    images = grey_images(9)
    chosen = ChosenImages(images, torch.tensor([7, 2, 4]))
    assert chosen.labels.tolist() == [1, 2, 1]
    assert chosen.classes == ("a", "b", "c")
    assert torch.equal(chosen.load([2, 0]), images.load([4, 7]))
    assert len(chosen) == 3


@pytest.mark.parametrize("counts", [(50, 50), (90, 10), (7, 1, 2), (5,)])
def test_every_beginning_of_a_balanced_order_holds_the_classes_in_their_shares(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        found = Counter(labels[order[:n]].tolist())
        for label, count in enumerate(counts):
            assert abs(found[label] - n * count / len(labels)) <= 1
    assert order[labels[order] == 0].tolist() != sorted(order[labels[order] == 0].tolist()), "the first, not a choice"


def test_classes_are_found_in_the_data(made_up_folder):
    for recipe in (imagefolder(), imagenet_deit_tiny()):
        assert with_classes(recipe, made_up_folder) == dataclasses.replace(recipe, classes=4)
    assert with_classes(digits()) == digits()
    with pytest.raises(ValueError, match="imagefolder is set to 5 classes, and the data have 4: set classes to that"):
        load_split(apply_settings(imagefolder(), ["classes=5"]), 0, made_up_folder)


def test_folders_give_images_of_the_recipes_size(made_up_folder):
    recipe = with_classes(apply_settings(imagefolder(), ["image_size=32"]), made_up_folder)
    split = load_split(recipe, 0, made_up_folder)
    assert (len(split.train), len(split.test)) == (36, 12)
    assert split.test.load([0, 5]).shape == (2, 3, 32, 32)
    assert split.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    with Image.open(made_up_folder / "val" / "class-1" / "2.png") as file:
        picture = file.copy()
    # 256 / 224: the shorter side to 8/7 of the size, then the centre.
    scale = 36 / min(picture.size)
    by_hand = picture.resize([36 if side == min(picture.size) else int(side * scale) for side in picture.size], 3)
    corner = [round((side - 32) / 2) for side in by_hand.size]
    by_hand = np.asarray(by_hand)[corner[1] : corner[1] + 32, corner[0] : corner[0] + 32].transpose(2, 0, 1)
    assert torch.equal(split.test.load([5])[0], torch.from_numpy(by_hand.copy()).float() / 255)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (mnist(), r"^mnist needs --data-dir, the folder that holds mnist\.npz\.$"),
        (cifar10(), r"^cifar10 needs --data-dir, the folder that holds train/ and test/"),
        (imagefolder(), r"^imagefolder needs --data-dir, the folder that holds train/ and val/"),
        (imagenet_deit_tiny(), r"^imagenet_deit_tiny needs --data-dir, .* \(or set dataset=hfds/\.\.\.\)\.$"),
    ],
)
def test_a_missing_folder_is_asked_for(recipe, message, tmp_path):
    for call in (with_classes, prepare_data, lambda recipe: load_split(recipe, 0)):
        with pytest.raises(ValueError, match=message):
            call(recipe)
    with pytest.raises(ValueError, match=rf"nothing does not exist: give --data-dir, {message.split(', ')[1][:10]}"):
        with_classes(recipe, tmp_path / "nothing")


def test_a_folder_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"digits comes with scikit-learn and reads no folder: leave --data-dir"):
        with_classes(digits(), tmp_path)


def test_images_of_another_size_are_refused(mnist_folder):
    wrong = dataclasses.replace(mnist(), image_size=14)
    with pytest.raises(ValueError, match=r"mnist takes images of \[1, 14, 14\] .*: the data have \[1, 28, 28\]\."):
        load_split(wrong, 0, mnist_folder)
    with pytest.raises(ValueError, match="mnist is set to 9 classes, and the data have 10: give the data it is for"):
        load_split(dataclasses.replace(mnist(), classes=9), 0, mnist_folder)


def test_a_batch_that_cannot_be_is_refused_before_training(made_up_folder):
    recipe = with_classes(apply_settings(imagenet_deit_tiny(), ["image_size=32"]), made_up_folder)
    with pytest.raises(ValueError, match="batch_size must not exceed the images to train on: got 1024 and 36"):
        prepare_data(recipe, made_up_folder)


def test_a_broken_image_is_told_by_its_name_before_training(made_up_folder, tmp_path):
    import shutil

    root = tmp_path / "pictures"
    shutil.copytree(made_up_folder, root)
    recipe = with_classes(apply_settings(imagefolder(), ["image_size=32"]), root)
    prepare_data(recipe, root)
    whole = (root / "val" / "class-2" / "1.png").read_bytes()
    (root / "val" / "class-2" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1\.png"):
        prepare_data(recipe, root)


def test_a_large_set_is_looked_into_class_by_class(made_up_folder, tmp_path, monkeypatch):
    from twicing.data.images import FolderImages

    opened = []
    load = FolderImages.load
    monkeypatch.setattr(FolderImages, "load", lambda self, which: (opened.extend(which), load(self, which))[1])
    recipe = apply_settings(imagenet_deit_tiny(), ["image_size=32", "batch_size=8"])
    prepare_data(with_classes(recipe, made_up_folder), made_up_folder)
    assert opened == [0, 0, 0, 9, 18, 27, 0, 3, 6, 9]


def test_cifar10_reads_class_folders_and_keeps_what_it_decoded(tmp_path):
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(10):
            (tmp_path / "data" / part / f"class-{label}").mkdir(parents=True)
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / part / f"class-{label}" / "0.png")
    recipe = apply_settings(
        cifar10(), ["evaluation.probes=10", "evaluation.verdict_images=10", "evaluation.spsa_images=5"]
    )
    prepare_data(recipe, tmp_path / "data", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    split = load_split(recipe, 0, tmp_path / "data", tmp_path / "cache")
    assert split.train.load([0]).shape == (1, 3, 32, 32)
    assert len(split.probes) == 10
