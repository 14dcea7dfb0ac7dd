"""Heat maps over their images, and the four parts of the logits, as grids of small pictures inside the page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from twicing.analysis.heat_maps_overlay import DIVERGING, overlay
from twicing.analysis.logit_parts import PARTS
from twicing.experiments.analyze.figures import shown_models
from twicing.experiments.analyze.keep import Analysis
from twicing.experiments.analyze.measure import OWN, A, some_layers
from twicing.experiments.statistics import small

# Pixels each way: sharp enough for sixteen patches, small enough for a page of a hundred.
CELL = 160
MOST_HEADS = 6


@dataclass(frozen=True)
class Cell:
    """One small picture. source: as a data URI. alt: what it shows. note: its numbers."""

    source: str
    alt: str
    note: str


@dataclass(frozen=True)
class Grid:
    """Small pictures in rows and columns. rows: the model, what is shown of it, and its pictures. width: of each."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    caption: str
    width: str = "7rem"


def map_grids(analysis: Analysis) -> list[Grid]:
    """One grid for each image, models below each other and layers from early to late; then one by heads."""
    models = [name for name in shown_models(analysis) if "pictures" in analysis.arrays.get(name, {})]
    if not models:
        return []
    images = min(len(analysis.arrays[name]["pictures"]) for name in models)
    grids = [_by_layers(analysis, models, place) for place in range(images)]
    return [*grids, *_by_heads(analysis, models)]


def part_grids(analysis: Analysis) -> list[Grid]:
    """The four parts of the first layer's logits, a row for each model."""
    models = [name for name in shown_models(analysis) if f"parts/{PARTS[0]}" in analysis.arrays.get(name, {})]
    if not models:
        return []
    rows = []
    for name in models:
        parts = [analysis.arrays[name][f"parts/{part}"] for part in PARTS]
        limit = float(max(np.abs(part).max() for part in parts))
        cells = [
            Cell(
                _matrix(part, limit),
                f"{label} logits of layer 1, {analysis.models[name]['label']}",
                f"±{small(float(np.abs(part).max()), digits=2)}",
            )
            for label, part in zip(PARTS, parts, strict=True)
        ]
        rows.append((analysis.models[name]["label"], "", tuple(cells)))
    caption = (
        f"Logits of layer 1, queries downwards and keys to the right, mean over heads and {analysis.unit}, without "
        "each row's mean, which softmax does not see; blue is negative, white 0, red positive, on one scale for each "
        "model, and the number is the largest modulus. "
        f"{'Above the diagonal lie keys that a query does not see. ' if analysis.causal else ''}"
        "Our reading of figure 1 of arXiv 2506.10371: the standard deviation in LayerNorm, where one comes before the "
        "layer, is held at each token's own, so that the four and a constant rest sum to the logits exactly."
    )
    return [Grid("Logits of tokens and positions", PARTS, tuple(rows), caption, width="12rem")]


def _by_layers(analysis: Analysis, models: Sequence[str], image: int) -> Grid:
    most = max(len(some_layers(analysis.models[name]["layers"])) for name in models)
    rows: list[tuple[str, str, tuple[Cell, ...]]] = []
    for name in models:
        arrays, label = analysis.arrays[name], analysis.models[name]["label"]
        numbers = some_layers(analysis.models[name]["layers"])
        picture = arrays["pictures"][image] / 255
        for kind in (A, OWN):
            if f"heads/{kind}" not in arrays:
                continue
            formulas = _formulas(analysis, name, kind, numbers)
            words = formulas[0] if len(set(formulas)) == 1 else "what each layer applies"
            for way, maps in (("mean over heads", _mean_heads(arrays, kind)), ("rollout", arrays[f"rollout/{kind}"])):
                cells = [
                    _over(picture, heat, f"{way} of {formula} in layer {layer}, {label}", f"layer {layer}")
                    for layer, formula, heat in zip(numbers, formulas, maps[image], strict=True)
                ]
                rows.append((label, f"{way} of {words}", (_plain(picture), *cells)))
    caption = (
        "What the class token takes from each patch (without a class token, the mean over patches): in a layer, mean "
        "over its heads; and by rollout (Abnar and Zuidema, arXiv 2005.00928) from the first layer to that one, half "
        "of each step being the residual connection. Every map has its own scale, dark to bright; where entries are "
        "negative, blue to red, white at 0. Below each: its smallest and largest number. A map shows what attention "
        "mixes, not what the model decides by."
    )
    columns = ("image", *("early" if n == 0 else "late" if n == most - 1 else "" for n in range(most)))
    return Grid(f"Heat maps, image {image + 1}", columns, tuple(rows), caption)


def _by_heads(analysis: Analysis, models: Sequence[str]) -> list[Grid]:
    rows: list[tuple[str, str, tuple[Cell, ...]]] = []
    most = 0
    for name in models:
        arrays, about = analysis.arrays[name], analysis.models[name]
        numbers = some_layers(about["layers"])
        picture = arrays["pictures"][0] / 255
        for place in sorted({0, len(numbers) // 2, len(numbers) - 1}):
            kind = OWN if f"heads/{OWN}" in arrays else A
            heads = arrays[f"heads/{kind}"][0, place][:MOST_HEADS]
            layer = numbers[place]
            (words,) = _formulas(analysis, name, kind, [layer])
            cells = [
                _over(picture, heat, f"head {head} of {words} in layer {layer}, {about['label']}", f"head {head}")
                for head, heat in enumerate(heads, start=1)
            ]
            rows.append((about["label"], f"{words}, layer {layer}", tuple(cells)))
            most = max(most, len(cells))
    caption = (
        f"The first image, each head by itself (the first {MOST_HEADS} where there are more), as the layer applies it."
    )
    return [Grid("Heat maps by head", tuple(f"head {head}" for head in range(1, most + 1)), tuple(rows), caption)]


def _formulas(analysis: Analysis, name: str, kind: str, layers: Sequence[int]) -> list[str]:
    """Of what the maps of these layers are."""
    return ["A" if kind == A else analysis.models[name]["formulas"][str(layer)] for layer in layers]


def _mean_heads(arrays: dict[str, NDArray[Any]], kind: str) -> NDArray[Any]:
    mean: NDArray[Any] = arrays[f"heads/{kind}"].mean(2)
    return mean


def _over(picture: NDArray[Any], heat: NDArray[Any], alt: str, where: str) -> Cell:
    # Three digits of the larger one; the other as exactly.
    largest = float(np.abs(heat).max())
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    low, high = (f"{round(float(end), decimals) + 0.0:.{decimals}f}" for end in (heat.min(), heat.max()))
    return Cell(_jpeg(overlay(picture, heat)), alt, f"{where}: {low} to {high}")


def _plain(picture: NDArray[Any]) -> Cell:
    pixels = np.round(255 * picture).astype(np.uint8).transpose(1, 2, 0)
    return Cell(_jpeg(pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)), "the image", "")


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    # Small images stay pixels, large ones are averaged.
    enlarged = max(image.size) < CELL
    image = image.resize((CELL, CELL), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)
    return _uri(image, "JPEG", quality=88)


def _matrix(values: NDArray[Any], limit: float) -> str:
    colors = colormaps[DIVERGING](np.clip(0.5 + values / (2 * limit if limit else 1), 0, 1))[..., :3]
    pixels = Image.fromarray(np.round(255 * colors).astype(np.uint8))
    factor = max(1, CELL // len(values))
    size = (factor * len(values), factor * len(values))
    return _uri(pixels.resize(size, Image.Resampling.NEAREST), "PNG", optimize=True)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
