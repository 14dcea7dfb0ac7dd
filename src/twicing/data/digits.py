"""Handwritten digits: 1,797 real images of 8 x 8 pixels that come with scikit-learn, and their six folds.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from collections import Counter

import torch
from torch import Tensor

FOLDS = 6
# Fixed, so that "seed k" means the same held-out images in every run and on every machine.
SHUFFLE_SEED = 0


def load_digits() -> tuple[Tensor, Tensor]:
    """Read the digits: images [1797, 1, 8, 8] in [0, 1] (grey level / 16, float32) and labels [1797] (0-9, int64).

    No normalisation: that belongs inside the model. Raises ImportError where scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn, which is missing: pip install 'twicing[lab]'") from error
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target, dtype=torch.int64)


def fold(labels: Tensor, k: int, folds: int = FOLDS) -> tuple[Tensor, Tensor]:
    """Split for seed k: (train_index, test_index), each ascending; fold k is held out.

    labels: [n] whole numbers; every fold has each class's share. Folds 0 to folds - 1 hold out every image exactly
    once; a larger k wraps around to k % folds. A function of (labels, k, folds) alone: the shuffle's seed is fixed.
    Raises ValueError for a negative k, labels that are not [n], or a class with fewer images than folds.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise ImportError("Folds need scikit-learn, which is missing: pip install 'twicing[lab]'") from error
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be [n] whole numbers: got {labels.dtype} of shape {list(labels.shape)}.")
    if k < 0:
        raise ValueError(f"k must be 0 or larger, the number of the fold to hold out: got {k}.")
    if folds < 2:
        raise ValueError(f"folds must be 2 or more, or nothing would be left to train on: got {folds}.")
    smallest = min(Counter(labels.tolist()).values(), default=0)
    if smallest < folds:
        raise ValueError(f"every class needs an image in each of the {folds} folds: the smallest class has {smallest}.")
    splits = StratifiedKFold(folds, shuffle=True, random_state=SHUFFLE_SEED).split(labels, labels)
    train, test = list(splits)[k % folds]
    return torch.from_numpy(train), torch.from_numpy(test)
