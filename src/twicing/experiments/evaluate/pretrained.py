"""A vision transformer of timm as what is evaluated, with its own weights, a file's, or none; converted or not."""

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twicing.adapters.surgery import convert, spec
from twicing.data.folders import class_folders
from twicing.data.images import Images
from twicing.data.shifted import plain_set
from twicing.data.transforms import test_transform
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.subjects import HeldOut, Protocol, Subject
from twicing.experiments.evaluate.weights import Weights, fingerprint, load_weights, read_weights
from twicing.experiments.results import BASELINE
from twicing.mechanisms.registry import find_mechanism
from twicing.models.vision import PixelModel
from twicing.names import nearest
from twicing.torchvision_import import mend_torchvision_import
from twicing.training.choice import balanced_order
from twicing.training.settings import parse_options

EPS = ("1/4/255", "1/2/255", "1/255", "2/255", "4/255")
NOISE = ("1/16", "1/8", "1/4")
VERDICT_EPS = "1/2/255"
IMAGENET_CLASSES = 1000


def timm_subject(options: Evaluate) -> Subject:
    """The model that the options name; nothing is built yet but to see that it can be.

    Raises ValueError for an unknown name, arguments or weights that do not fit, a mechanism that is unknown or not the
    one that the weights were trained with, and both --pretrained and --checkpoint.
    """
    _check_name(options.model)
    try:
        return _subject(options)
    except ValueError as error:
        # The class around timm's model is ours: whoever typed a name knows that alone.
        raise ValueError(str(error).replace(PixelModel.__name__, options.model)) from error


def _subject(options: Evaluate) -> Subject:
    if options.pretrained and options.checkpoint:
        raise ValueError("--pretrained and --checkpoint are two sources of the same weights: give one of them.")
    weights = read_weights(options.checkpoint) if options.checkpoint else None
    model = _built(options, weights)
    found = spec(model)
    mechanism = "+".join(dict.fromkeys(entry["mechanism"] for entry in found)) or BASELINE
    layers = ",".join(str(layer) for entry in found for layer in entry["layers"])
    where = options.layers if options.mechanism != BASELINE else layers
    label = options.model if not found else f"{options.model}, {mechanism}{'' if where == 'all' else f' [{where}]'}"
    return Subject(
        label=label,
        seed=options.seed,
        mechanism=mechanism,
        layers=where or "all",
        control=False,
        folder_name=re.sub(r"[^a-zA-Z0-9.-]+", "-", label).strip("-"),
        weights=_source(options),
        classes=int(model.network.num_classes),  # type: ignore[arg-type]
        image_size=image_size(model.network),
        names_classes=False,
        protocol=Protocol(f"evaluate {options.model}", tuple(model.std.flatten().tolist()), EPS, NOISE, VERDICT_EPS),
        build=lambda: model,
        held_out=lambda: _held_out(options, model),
    )


def imagenet_synsets() -> tuple[str, ...]:
    """The synsets of ImageNet's 1,000 classes in the order of the models' logits, as timm ships them."""
    mend_torchvision_import()
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def synsets_of(name: str) -> tuple[str, ...]:
    """The synsets of the 200 classes of "ImageNet-A" or "ImageNet-R", as timm ships them."""
    mend_torchvision_import()
    file = resources.files("timm.data") / "_info" / f"{name.lower().replace('-', '_')}_synsets.txt"
    return tuple(file.read_text(encoding="utf-8").split())


def image_size(network: nn.Module) -> int:
    """Pixels each way of the images that a model of timm takes. Raises ValueError where they are not square."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    height, width = size or network.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width} pixels: expected square ones.")
    return int(height)


def _check_name(name: str) -> None:
    mend_torchvision_import()
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        near = nearest(name, known)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(
            f"{name!r} is neither a run folder (with a config.json) nor one of timm's {len(known)} models.{hint}"
        )


def _built(options: Evaluate, weights: Weights | None) -> PixelModel:
    network, mean, std = _network(options)
    model = PixelModel(network, mean, std)
    asked = options.mechanism != BASELINE
    if not asked and (options.layers != "all" or options.options):
        raise ValueError("--layers and --options are of a mechanism: name it with --mechanism.")
    if asked:
        find_mechanism(options.mechanism)
        try:
            convert(model, options.mechanism, layers=options.layers, options=parse_options(options.options))
        except TypeError as error:
            raise ValueError(f"The mechanism {options.mechanism!r} cannot be built: {error}") from error
    if weights is not None:
        assert options.checkpoint is not None
        _follow_spec(model, weights, asked, options.checkpoint)
        load_weights(network, weights, options.checkpoint)
    return model.eval()


def _follow_spec(model: nn.Module, weights: Weights, asked: bool, path: Path) -> None:
    if weights.spec is None:
        return
    if not asked:
        convert(model, spec=weights.spec)
    elif spec(model) != weights.spec:
        raise ValueError(
            f"{path} was trained with {weights.spec or 'standard attention'}, and the command asks for {spec(model)}: "
            "leave --mechanism out to evaluate what was trained, or save its state dict alone."
        )


def _network(options: Evaluate) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    import timm
    from timm.data.config import resolve_model_data_config

    arguments: dict[str, Any] = parse_options(options.model_args)
    try:
        # A model without weights is random: from a fixed seed, so that it is the same model each time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = timm.create_model(options.model, pretrained=options.pretrained, **arguments)
    except OSError as error:
        raise ValueError(
            f"timm has no weights of {options.model} in its cache and could not download them: give --checkpoint FILE, "
            "or try again where there is a network."
        ) from error
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm cannot make {options.model} with {arguments or 'its defaults'}: {error}") from error
    pixels = resolve_model_data_config(network)
    return network, pixels["mean"], pixels["std"]


def _source(options: Evaluate) -> str:
    if options.checkpoint:
        return f"{options.checkpoint.name} {fingerprint(options.checkpoint)}"
    return "timm's pretrained ones" if options.pretrained else f"random, of seed {options.seed}: not trained"


def _held_out(options: Evaluate, model: PixelModel) -> HeldOut:
    if options.data_dir is None:
        raise ValueError(f"{options.model} needs --data-dir, the folder of held-out images with one folder per class.")
    root = next((root for name in ("val", "test") if (root := options.data_dir / name).is_dir()), options.data_dir)
    transform = test_transform(image_size(model.network), options.transform)
    images = _folders(root, int(model.network.num_classes), transform)  # type: ignore[arg-type]
    return HeldOut(images, torch.arange(len(images)), balanced_order(images.labels))


def _folders(root: Path, classes: int, transform: Callable[[Any], Tensor]) -> Images:
    if classes == IMAGENET_CLASSES:
        return plain_set(root, imagenet_synsets(), transform)
    images = class_folders(root, transform=transform)
    if len(images.classes) != classes:
        raise ValueError(
            f"{root} holds {len(images.classes)} class folders, and the model has {classes} classes: "
            "give the images it was trained for, or --model-args num_classes=..."
        )
    return images
