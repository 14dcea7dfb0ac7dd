"""The shifted test sets on small made folders, with the real class lists where they are there."""

import numpy as np
import pytest
import torch
from PIL import Image

from twicing.data.shifted import (
    IMAGENET_C,
    IMAGENET_C_EXTRA,
    CentreCrop,
    imagenet_c,
    imagenet_c_folders,
    plain_set,
    subset,
)
from twicing.data.transforms import test_transform as transform_of
from twicing.torchvision_import import mend_torchvision_import

SYNSETS = ("n03", "n01", "n02", "n07", "n05")  # not sorted: the order is the model's
SMALL = CentreCrop(4)


def picture(path, grey, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def one_image_each(root, names):
    """root/name/a.png, whose grey level is the place of its name."""
    for place, name in enumerate(names):
        picture(root / name / "a.png", place)
    return root


def torchvision_functions():
    mend_torchvision_import()
    from torchvision.transforms.functional import center_crop, to_tensor

    return center_crop, to_tensor


def grey_levels(images):
    return (images.load(range(len(images)))[:, 0, 0, 0] * 255).round().int().tolist()


def test_labels_follow_the_models_order_and_not_the_alphabet(tmp_path):
    images = plain_set(one_image_each(tmp_path, SYNSETS), SYNSETS, SMALL)
    assert images.classes == SYNSETS
    assert images.labels.tolist() == grey_levels(images) == [0, 1, 2, 3, 4]


def test_numbered_folders_are_classes_in_numeric_order(tmp_path):
    synsets = [f"n{place:08d}" for place in range(12)]
    images = plain_set(one_image_each(tmp_path, map(str, range(12))), synsets, SMALL)
    assert images.classes == tuple(map(str, range(12)))
    assert images.labels.tolist() == grey_levels(images) == list(range(12))  # not 0, 1, 10, 11, 2


def test_classes_that_are_called_by_numbers_are_taken_by_their_name(tmp_path):
    names = ("5", "0", "10", "2", "1", "3", "4", "6", "7", "8", "9")
    images = plain_set(one_image_each(tmp_path, names), names, SMALL)
    assert images.labels.tolist() == grey_levels(images) == list(range(11))


def test_a_set_of_some_classes_cuts_the_logits_to_them(tmp_path):
    for name, grey in (("n02", 10), ("n05", 20), ("n03", 30)):
        picture(tmp_path / name / "b.png", grey)
        picture(tmp_path / name / "a.png", grey)
    (tmp_path / "README.txt").write_text("not a class")
    cut = subset(tmp_path, SYNSETS, SMALL)
    assert cut.images.classes == ("n03", "n02", "n05")
    assert cut.images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert grey_levels(cut.images) == [30, 30, 10, 10, 20, 20]
    assert cut.columns.tolist() == [0, 2, 4]
    # Class n01 (column 1) is the surest of all, and n07 the second: neither is in the set.
    logits = torch.tensor([[0.1, 9.0, 0.5, 5.0, 0.3], [0.6, 9.0, 0.5, 8.0, 0.7]])
    assert torch.equal(cut.cut(logits), torch.tensor([[0.1, 0.5, 0.3], [0.6, 0.5, 0.7]]))
    assert cut.cut(logits).argmax(1).tolist() == [1, 2]


@pytest.mark.parametrize("name", ["a", "r"])
def test_imagenet_a_and_r_have_the_classes_of_the_released_lists(tmp_path, real_data, name):
    meta = real_data / "meta"
    synsets = (meta / "imagenet_synsets.txt").read_text().split()
    folders = (meta / f"imagenet_{name}_synsets.txt").read_text().split()
    columns = [int(line) for line in (meta / f"imagenet_{name}_indices.txt").read_text().split()]
    file = picture(tmp_path / "one.png", 7)
    for folder in folders:
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "x.png").hardlink_to(file)
    cut = subset(tmp_path / "set", synsets, SMALL)
    assert len(cut.columns) == 200
    assert cut.columns.tolist() == columns
    assert list(cut.images.classes) == folders
    logits = torch.zeros(1, 1000)
    logits[0, columns[150]] = 1
    logits[0, next(place for place in range(1000) if place not in columns)] = 2
    assert cut.cut(logits).argmax(1).item() == 150


def test_imagenets_own_thousand_classes_are_taken_whole(tmp_path, real_data):
    synsets = (real_data / "meta" / "imagenet_synsets.txt").read_text().split()
    file = picture(tmp_path / "one.png", 7)
    for folder in synsets:
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "x.png").hardlink_to(file)
    assert plain_set(tmp_path / "set", synsets, SMALL).labels.tolist() == list(range(1000))


def test_the_centre_is_cut_out_of_the_released_files_and_nothing_is_resized(tmp_path):
    center_crop, to_tensor = torchvision_functions()
    pixels = np.random.default_rng(0).integers(0, 256, (229, 240, 3), dtype=np.uint8)
    path = tmp_path / "n01" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    seen = imagenet_c(tmp_path, ["n01"]).load([0])[0]
    assert torch.equal(seen, to_tensor(Image.fromarray(pixels[2:226, 8:232])))
    assert torch.equal(seen, center_crop(to_tensor(Image.fromarray(pixels)), [224, 224]))


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5)])
def test_odd_margins_are_halved_as_torchvision_does(size):
    center_crop, to_tensor = torchvision_functions()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(SMALL(image), center_crop(to_tensor(image), [4, 4]))


def made_imagenet_c(root, kinds=IMAGENET_C + IMAGENET_C_EXTRA):
    for kind in kinds:
        for severity in range(1, 6):
            (root / kind / str(severity)).mkdir(parents=True)
    return root


def test_all_fifteen_and_the_extra_ones_that_are_there(tmp_path):
    root = made_imagenet_c(tmp_path, (*IMAGENET_C, "spatter"))
    folders = imagenet_c_folders(root)
    assert len(folders) == 16 * 5
    assert folders["fog", 3] == root / "fog" / "3"
    assert ("spatter", 5) in folders
    assert ("saturate", 5) not in folders
    assert list(imagenet_c_folders(root, ["spatter", "fog"])) == [
        (kind, severity) for kind in ("spatter", "fog") for severity in (1, 2, 3, 4, 5)
    ]


def test_archives_that_were_unpacked_by_group_are_found(tmp_path):
    made_imagenet_c(tmp_path / "weather", ["fog"])
    made_imagenet_c(tmp_path / "extra", ["spatter"])
    folders = imagenet_c_folders(tmp_path, ["fog", "spatter"])
    assert folders["fog", 1] == tmp_path / "weather" / "fog" / "1"
    assert folders["spatter", 5] == tmp_path / "extra" / "spatter" / "5"


def test_missing_corruptions_and_severities_are_named(tmp_path):
    made_imagenet_c(tmp_path, [kind for kind in IMAGENET_C if kind not in ("fog", "snow")])
    with pytest.raises(ValueError, match="must hold a folder for each corruption: snow, fog missing"):
        imagenet_c_folders(tmp_path)
    with pytest.raises(ValueError, match="a folder for each corruption: spatter missing"):
        imagenet_c_folders(tmp_path, ["frost", "spatter"])
    (tmp_path / "frost" / "4").rmdir()
    with pytest.raises(ValueError, match=r"frost.4 is missing: every corruption has severities 1 to 5"):
        imagenet_c_folders(tmp_path, ["frost"])
    with pytest.raises(ValueError, match=r"fogg: no corruption of ImageNet-C; it has gaussian_noise, .* saturate"):
        imagenet_c_folders(tmp_path, ["fogg"])


def test_wrong_and_missing_classes_are_named(tmp_path):
    one_image_each(tmp_path, (*SYNSETS, "n99"))
    for read in (plain_set, subset):
        with pytest.raises(ValueError, match=r"named by the model's 5 classes \(as n03\): got n99\. "):
            read(tmp_path, SYNSETS, SMALL)
    with pytest.raises(ValueError, match=r"for each of the 8 classes: n10, n11 missing"):
        plain_set(tmp_path, (*SYNSETS, "n10", "n99", "n11"), SMALL)
    with pytest.raises(ValueError, match=r"each of the 13 classes: a, b, c, d, e and 2 more missing"):
        plain_set(tmp_path, (*SYNSETS, "n99", *"abcdefg"), SMALL)


def test_numbers_beyond_the_models_classes_are_no_classes(tmp_path):
    one_image_each(tmp_path, ["0", "1", "5"])
    with pytest.raises(ValueError, match="got 5"):
        plain_set(tmp_path, SYNSETS, SMALL)
    with pytest.raises(ValueError, match=r"got 0, 1, 5"):
        subset(tmp_path, SYNSETS, SMALL)


@pytest.mark.parametrize("read", [plain_set, subset])
def test_what_is_no_set_at_all_is_refused(tmp_path, read):
    with pytest.raises(ValueError, match="nowhere is not a folder: name the one"):
        read(tmp_path / "nowhere", SYNSETS, SMALL)
    with pytest.raises(ValueError, match="holds no folders"):
        read(tmp_path, SYNSETS, SMALL)
    one_image_each(tmp_path, SYNSETS)
    (tmp_path / "n05" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"n05 holds no image"):
        read(tmp_path, SYNSETS, SMALL)
    (tmp_path / "n05" / "a.png").write_bytes(b"this is no picture")
    images = read(tmp_path, SYNSETS, SMALL)
    images = images if read is plain_set else images.images
    with pytest.raises(ValueError, match=r"n05.a\.png cannot be read as an image"):
        images.load([4])


def test_files_of_another_size_than_the_released_ones_are_named(tmp_path):
    picture(tmp_path / "n01" / "a.png", 0, size=(224, 64))
    with pytest.raises(ValueError, match=r"a\.png is of 224 x 64 pixels: ImageNet-C's released files have 224"):
        imagenet_c(tmp_path, ["n01"])
    with pytest.raises(ValueError, match="a picture of 224 x 64 pixels is smaller than the crop of 65"):
        CentreCrop(65)(Image.new("RGB", (224, 64)))


def test_both_transforms_of_the_papers_fit(tmp_path):
    for folder in ("n01", "n02"):
        picture(tmp_path / folder / "a.png", 9, size=(40, 30))
    for crop in ("papers", "0.9"):
        assert plain_set(tmp_path, ["n01", "n02"], transform_of(32, crop)).load([0, 1]).shape == (2, 3, 32, 32)
