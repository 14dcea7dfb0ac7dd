"""Data sets by the names of timm's create_dataset, such as "hfds/owner/name" or "torch/cifar10".

Only sets whose images can be indexed: the order of a stream (tfds, wds, hfids) is its reader's, not (seed, epoch)'s.
What has to be fetched is fetched by the packages behind the name, because the user gave it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a name needs beside timm.
PACKAGES = {"hfds": "datasets"}
STREAMS = ("hfids", "tfds", "wds")


@dataclass(frozen=True, eq=False)
class TimmImages:
    """One split of such a set; its images are decoded when they are asked for.

    transform: from an RGB picture of Pillow to [C, H, W], float32, in [0, 1].
    """

    dataset: Any
    labels: Tensor
    classes: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Any:
        """Decode one image, as RGB. Raises ValueError naming it where it is broken.

        Not by indexing timm's data set, which puts the next image in the place of a broken one.
        """
        from PIL import Image

        reader = getattr(self.dataset, "reader", None)
        try:
            if reader is None:
                return self.dataset[index][0].convert("RGB")
            with reader[index][0] as file:
                return Image.open(file).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {index} of {self.source} is broken: {error}.") from error

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the transformed images, [b, C, H, W]. Raises ValueError naming a broken one."""
        return torch.stack([self.transform(self.open(int(index))) for index in indices])


def timm_images(name: str, root: Path | None, transform: Callable[[Any], Tensor]) -> tuple[TimmImages, TimmImages]:
    """The splits to train on and held out ("train" and "validation") of the data set of that name.

    root: where it lies or may be put. Raises ValueError for a stream or what timm cannot read, ImportError naming the
    package that is missing.
    """
    kind = name.partition("/")[0].lower()
    if kind in STREAMS:
        raise ValueError(
            f"{name} is read as a stream, which cannot be shuffled by (seed, epoch): take a folder or a set that can "
            "be indexed, such as hfds/... of the same data."
        )
    if kind not in ("torch", *PACKAGES):
        raise ValueError(f"dataset must read like hfds/owner/name or torch/name: got {name!r}. For a folder leave it.")
    train, held_out = (_split(name, kind, root, split, transform) for split in ("train", "validation"))
    if train.classes != held_out.classes:
        raise ValueError(f"{name} has other classes in its held-out split than in the one to train on.")
    return train, held_out


def _split(name: str, kind: str, root: Path | None, split: str, transform: Callable[[Any], Tensor]) -> TimmImages:
    from timm.data.dataset_factory import create_dataset

    try:
        dataset = create_dataset(name, root=None if root is None else str(root), split=split)
        labels, classes = _labels(dataset), _classes(dataset)
    except ImportError as error:
        raise ImportError(f"{name} needs the package {PACKAGES.get(kind, error.name)}: pip install it.") from error
    except (AssertionError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"timm cannot read the split {split} of {name}: {str(error).strip() or repr(error)}"
        ) from error
    return TimmImages(dataset, labels, classes or _numbers(labels), transform, f"the split {split} of {name}")


def _labels(dataset: Any) -> Tensor:
    reader = getattr(dataset, "reader", None)
    if reader is None:
        # torchvision's sets keep them under one of two names.
        targets = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    elif hasattr(reader, "iter_targets"):
        targets = list(reader.iter_targets())
    else:
        targets = [reader[index][1] for index in range(len(reader))]
    return torch.as_tensor(targets, dtype=torch.int64)


def _classes(dataset: Any) -> tuple[str, ...]:
    names = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    return tuple(str(name) for name in sorted(names, key=names.__getitem__))


def _numbers(labels: Tensor) -> tuple[str, ...]:
    return tuple(str(label) for label in range(int(labels.max()) + 1))
