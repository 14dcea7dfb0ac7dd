"""Weights from a file, into a model of timm, whichever of the usual forms the file has.

A plain state dict; one below "state_dict" or "model", as training scripts save it; or a checkpoint of ours, which also
holds the conversion that its weights were trained with (weights do not know their formula).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from twicing.names import few

# Where training scripts put the weights, and what wrappers put before their names.
HOLDERS = ("state_dict", "model")
PREFIXES = ("_orig_mod.", "module.", "model.", "network.")
SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """Weights by name, without the names of wrappers. spec: the conversion they belong to, None where nobody says."""

    tensors: dict[str, Tensor]
    spec: list[dict[str, Any]] | None


def read_weights(path: Path) -> Weights:
    """Read a checkpoint (.safetensors, or anything that torch.load takes with weights_only=True).

    Raises ValueError where the file is not there, damaged, holds more than weights, or none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: give --checkpoint the file that holds the weights.")
    found = _read(path)
    ours = found.get("twicing") if isinstance(found, dict) else None
    spec = ours.get("spec") if isinstance(ours, dict) else None
    for holder in HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(holder), dict):
            found = found[holder]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, at the top or below "
            f"{' or '.join(map(repr, HOLDERS))}. Save model.state_dict()."
        )
    return Weights(_without_wrappers(found), spec)


def load_weights(network: nn.Module, weights: Weights, path: Path) -> None:
    """Load the weights into the network, every one of them and nothing else.

    Raises ValueError naming what is missing, unknown or of another shape.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights.tensors]
    unknown = [name for name in weights.tensors if name not in wanted]
    other = [
        f"{name} is {list(tensor.shape)} instead of {list(wanted[name].shape)}"
        for name, tensor in weights.tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    faults = [f"{few(missing, SHOWN)} missing"] * bool(missing) + [f"{few(unknown, SHOWN)} unknown"] * bool(unknown)
    faults += [few(other, SHOWN)] * bool(other)
    if faults:
        raise ValueError(
            f"{path} does not fit the model: {', '.join(faults)}. "
            "Name the model it is of, with its --model-args (num_classes, img_size) and its --mechanism."
        )
    network.load_state_dict(weights.tensors)


def fingerprint(path: Path) -> str:
    """The first 16 digits of the file's SHA-256: another file has another one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): give a whole file.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged, or it holds Python objects, which could run code. "
            "Save the state dict alone."
        ) from error
    except OSError:
        raise
    # What is no checkpoint makes the reader stumble anywhere: RuntimeError, EOFError, IndexError, KeyError, ...
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of PyTorch: give a whole file.") from error


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # An average of the weights beside them, as ours keep it, is not what was trained.
    inside = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema.")}
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in inside)), None)
    return _without_wrappers({name.removeprefix(prefix): t for name, t in inside.items()}) if prefix else inside
