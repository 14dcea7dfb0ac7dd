"""The digits are the real ones, in pixel range, and six folds test each of them once, the same on every machine."""

import hashlib
import sys

import pytest
import torch

from twicing.data.digits import FOLDS, fold, load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_images_are_pixels_between_zero_and_one(digits):
    images, labels = digits
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert torch.equal(images * 16, (images * 16).round())
    assert labels.dtype == torch.int64
    # The set's own description: 178, 182, ... images of the digits 0, 1, ...
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_first_image_is_a_zero_as_published(digits):
    images, labels = digits
    assert labels[0] == 0
    assert (images[0, 0] * 16)[:2].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]


def test_six_folds_hold_out_every_image_once(digits):
    _, labels = digits
    held_out = []
    for k in range(FOLDS):
        train, test = fold(labels, k)
        assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(1797))
        assert len(test) in (299, 300)
        held_out.append(test)
    assert torch.equal(torch.cat(held_out).sort().values, torch.arange(1797))


def test_every_fold_has_every_class_in_its_share(digits):
    _, labels = digits
    for k in range(FOLDS):
        _, test = fold(labels, k)
        counts = labels[test].bincount(minlength=10)
        assert (counts - labels.bincount() / FOLDS).abs().max() <= 1


def test_folds_are_shuffled(digits):
    # The file's order groups its writers; unshuffled folds would hold out runs of neighbours.
    _, labels = digits
    _, test = fold(labels, 0)
    assert test.diff().max() > 20
    assert test[-1] > 1700


def test_a_fold_is_the_same_on_every_machine(digits):
    _, labels = digits
    _, test = fold(labels, 0)
    assert hashlib.sha256(" ".join(map(str, test.tolist())).encode()).hexdigest()[:16] == "7d7831559cdb428e"


def test_seed_six_wraps_to_fold_zero(digits):
    _, labels = digits
    assert torch.equal(fold(labels, 6)[1], fold(labels, 0)[1])
    assert not torch.equal(fold(labels, 1)[1], fold(labels, 0)[1])


def test_other_numbers_of_folds(digits):
    _, labels = digits
    assert torch.equal(torch.cat([fold(labels, k, folds=3)[1] for k in range(3)]).sort().values, torch.arange(1797))


@pytest.mark.parametrize(
    ("labels", "k", "folds", "message"),
    [
        pytest.param(torch.zeros(9), 0, 3, r"labels must be \[n\] whole numbers: got torch.float32", id="float labels"),
        pytest.param(torch.zeros(9, 1, dtype=torch.int64), 0, 3, r"of shape \[9, 1\]", id="two axes"),
        pytest.param(torch.zeros(9, dtype=torch.int64), -1, 3, "k must be 0 or larger.*got -1", id="negative fold"),
        pytest.param(torch.zeros(9, dtype=torch.int64), 0, 1, "folds must be 2 or more.*got 1", id="one fold"),
        pytest.param(torch.tensor([0, 0, 0, 1]), 0, 2, "the smallest class has 1", id="rare class"),
        pytest.param(torch.zeros(0, dtype=torch.int64), 0, 2, "the smallest class has 0", id="nothing"),
    ],
)
def test_fold_refuses(labels, k, folds, message):
    with pytest.raises(ValueError, match=message):
        fold(labels, k, folds)


@pytest.mark.parametrize("read", [load_digits, lambda: fold(torch.zeros(9, dtype=torch.int64), 0, 3)])
def test_without_scikit_learn_it_says_what_to_install(read, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is missing: pip install 'twicing\[lab\]'"):
        read()
