"""MNIST comes from its four arrays, unchanged; anything else in the file is refused with the file's name."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from made_folders import make_mnist

from twicing.data.mnist import load_mnist


def arrays(**changes):
    """Four good arrays, with changes; None leaves one out."""
    good = {
        "train_x": np.zeros((4, 28, 28), np.uint8),
        "train_y": np.array([0, 9, 1, 1]),
        "test_x": np.zeros((2, 28, 28), np.uint8),
        "test_y": np.array([3, 3]),
    }
    return {name: array for name, array in (good | changes).items() if array is not None}


def test_pixels_and_labels_are_those_of_the_file(tmp_path):
    path = make_mnist(tmp_path / "mnist.npz")
    with np.load(path) as stored:
        for part, images in zip(("train", "test"), load_mnist(path), strict=True):
            pixels = torch.from_numpy(stored[f"{part}_x"])
            assert images.load([3, 1]).shape == (2, 1, 28, 28)
            assert torch.equal(images.load(range(len(images))), pixels.unsqueeze(1) / 255)
            assert images.labels.tolist() == stored[f"{part}_y"].tolist()
            assert images.labels.dtype == torch.int64
            assert images.classes == tuple("0123456789")


def test_the_folder_will_do(tmp_path):
    train, test = load_mnist(make_mnist(tmp_path / "mnist.npz", train=30, test=10).parent)
    assert (len(train), len(test)) == (30, 10)
    assert len(load_mnist(str(make_mnist(tmp_path / "other.npz", train=11)))[0]) == 11


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint64])
def test_labels_of_any_whole_numbers(tmp_path, dtype):
    np.savez(tmp_path / "mnist.npz", **arrays(train_y=np.array([0, 9, 1, 1], dtype)))
    assert load_mnist(tmp_path)[0].labels.tolist() == [0, 9, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"test_y": None}, "train_x, train_y, test_x, test_y: test_y missing, got train_x", id="one missing"
        ),
        pytest.param(dict.fromkeys(arrays()), "test_x, test_y missing, got x_train. Save them", id="other names"),
        pytest.param({"train_x": np.zeros((4, 784), np.uint8)}, r"train_x must be uint8 of \[n, 28, 28\]", id="flat"),
        pytest.param({"test_x": np.zeros((2, 32, 32), np.uint8)}, r"test_x .*: got uint8 of \[2, 32, 32\]", id="large"),
        pytest.param({"train_x": np.zeros((4, 28, 28))}, r"got float64 of \[4, 28, 28\]", id="floats"),
        pytest.param({"test_x": np.zeros((0, 28, 28), np.uint8)}, r"got uint8 of \[0, 28, 28\]", id="no image"),
        pytest.param(
            {"train_y": np.zeros(3, int)}, r"train_y .* \[4\], one for each of train_x: got .* \[3\]", id="few"
        ),
        pytest.param({"test_y": np.zeros((2, 10), int)}, r"test_y .*: got int64 of \[2, 10\]", id="one-hot"),
        pytest.param({"test_y": np.zeros(2)}, r"whole numbers .*: got float64", id="float labels"),
        pytest.param({"test_y": np.zeros(2, bool)}, r"whole numbers .*: got bool", id="bool labels"),
        pytest.param({"test_y": np.array([3, 10])}, "digits from 0 to 9: got labels from 3 to 10", id="ten"),
        pytest.param({"train_y": np.array([-1, 2, 3, 4])}, "train_y .*: got labels from -1 to 4", id="negative"),
        pytest.param({"train_y": np.array(["0"] * 4)}, "whole numbers", id="text"),
        pytest.param({"train_y": np.array([None] * 4)}, "holds pickled objects, which could run code", id="pickled"),
    ],
)
def test_other_contents_are_refused(tmp_path, changes, message):
    path = tmp_path / "mnist.npz"
    np.savez(path, **(arrays(**changes) or {"x_train": np.zeros(1)}))
    with pytest.raises(ValueError, match=rf"mnist\.npz.*{message}"):
        load_mnist(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("mnist.npz", **arrays(test_y=np.array([Bomb(), Bomb()], dtype=object)))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickled"):
        load_mnist("mnist.npz")
    with pytest.raises(ValueError, match=r"plain\.npz is not an \.npz file"):
        load_mnist("plain.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["half", "text", "empty", "one array", "byte"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = make_mnist(tmp_path / "mnist.npz")
    content = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    damaged = {
        "half": content[: len(content) // 2],
        "text": b"hello",
        "empty": b"",
        "one array": (tmp_path / "one.npy").read_bytes(),
        "byte": content[:3000] + bytes([content[3000] ^ 255]) + content[3001:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(
        ValueError, match=r"mnist\.npz is (not an \.npz file, or it is truncated|damaged .*): get it ag"
    ):
        load_mnist(path)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "mnist.npz"):
        with pytest.raises(ValueError, match=r"mnist\.npz does not exist: give the \.npz file of MNIST or the folder"):
            load_mnist(path)


def test_without_numpy_it_says_what_to_install(tmp_path, monkeypatch):
    path = make_mnist(tmp_path / "mnist.npz")
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"NumPy, which is missing: pip install 'twicing\[lab\]'"):
        load_mnist(path)


def test_the_real_set(real_data):
    train, test = load_mnist(real_data / "vision")
    # The published counts of each digit, and the sum of all grey levels (the mean of the training images is 33.318).
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (train.pixels.sum().item(), test.pixels.sum().item()) == (1567298545, 264923200)
    assert train.pixels.shape == (60000, 1, 28, 28)
    assert train.load([59999]).max() <= 1
