"""One model looked into: spectra, products, heat maps, logits in parts. All numbers of the page but the bandwidth's."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twicing.analysis.attention_inputs import AttentionInputs, record_attention
from twicing.analysis.heat_maps import Patches, patches_of
from twicing.analysis.logit_parts import PARTS, centred_rows, logit_parts, mean_square
from twicing.analysis.products import mean_of_heads, product_ranks
from twicing.analysis.rollout import rollout
from twicing.analysis.spectrum import eigenvalues, fits_theory, is_causal, is_real, rank_of, singular_values
from twicing.analysis.spectrum_filter import STANDARD, TWICED, Filter, filters_of

# Early to late, as many columns as a page has room for.
MOST_LAYERS = 5
A, OWN = "A", "own"
# Numbers that are there only where it is known what a layer makes of A.
OF_P = ("fits_theory_p", "largest_modulus_p", "largest_singular_p", "effective_rank_p", "singular_miss")
Arrays = dict[str, NDArray[Any]]
Passed = Callable[[int], None]


@dataclass
class Found:
    """What was found in one model.

    about: layers, heads, tokens, whether attention is causal, the formula of each layer. spectrum: a row for each layer
    and head, means over the inputs. products: a row for each depth and kind. logit_parts: a row for each head and part.
    notes: what is not there, in sentences. arrays: what figures are drawn from, by name.
    """

    about: dict[str, Any] = field(default_factory=dict)
    spectrum: list[dict[str, Any]] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)
    logit_parts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    arrays: Arrays = field(default_factory=dict)


def some_layers(layers: int) -> list[int]:
    """At most MOST_LAYERS layers, early to late and evenly spaced, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(1, layers, min(layers, MOST_LAYERS))})


def look_into(
    model: nn.Module,
    inputs: Tensor,
    device: torch.device,
    *,
    pictures: bool,
    maps: int,
    draw: bool,
    passed: Passed = lambda _: None,
) -> Found:
    """Measure one model on these inputs, one at a time: every layer's matrices of one input are held at once.

    inputs: [n, C, H, W] or windows of a text, [n, N], on any device. pictures: whether they are. maps: on how many
    pictures heat maps are made. draw: whether arrays are kept. passed: told after each input.
    Matrices are formed and taken apart in float64.
    Raises ValueError where the library does not know the model's attention, or its matrices are not finite.
    """
    filters = filters_of(model)
    found = Found()
    _note_unknown(found, filters)
    if maps and not pictures:
        found.notes.append("There are no heat maps: a text is no picture that they could be laid over.")
    known = [one for one in filters.values() if one is not None]
    own = known if len(known) == len(filters) else None
    ranks: list[dict[str, Tensor]] = []
    heads: list[dict[str, Tensor]] = []
    for place, one in enumerate(inputs):
        matrices = list(_matrices(model, one.to(device)).values())
        ranks.append(_product_ranks(matrices, own))
        heads.append(_spectra(matrices, filters, found.arrays if draw and place == 0 else {}))
        if draw and pictures and place < maps:
            _add_maps(found, model, matrices, own, one)
        passed(1)
    _add_about(found, matrices, filters)
    found.spectrum = _spectrum_rows(heads, filters)
    found.products = [
        {"kind": kind, "depth": depth, "effective_rank": rank}
        for kind in ranks[0]
        for depth, rank in enumerate(torch.stack([one[kind] for one in ranks]).mean(0).tolist(), start=1)
    ]
    _add_logit_parts(found, model, inputs.to(device), draw)
    return found


def _in_double(inputs: AttentionInputs) -> Tensor:
    mask = inputs.attn_mask
    exact = dataclasses.replace(
        inputs,
        query=inputs.query.double(),
        key=inputs.key.double(),
        attn_mask=mask.double() if mask is not None and mask.is_floating_point() else mask,
    )
    return exact.matrix()[0].cpu()


def _matrices(model: nn.Module, one: Tensor) -> dict[int, Tensor]:
    """Every layer's A, [H, N, N], float64, on the CPU."""
    with record_attention(model, reduce=_in_double) as recorded, torch.no_grad():
        model(one[None])
    return {layer: recorded.forwards(layer)[0] for layer in recorded.layers}


def _product_ranks(matrices: Sequence[Tensor], own: Sequence[Filter] | None) -> dict[str, Tensor]:
    """The effective ranks of products, [layers], by kind: heads averaged, or each in a chain and the ranks averaged."""
    twiced = [TWICED.of(matrix) for matrix in matrices]
    ranks = {
        "A, mean over heads": product_ranks(mean_of_heads(matrices)),
        "2A - A^2, mean over heads": product_ranks(mean_of_heads(twiced)),
        "A, chains of heads": product_ranks(matrices).mean(-1),
        "2A - A^2, chains of heads": product_ranks(twiced).mean(-1),
    }
    # What the model itself does, where that is neither.
    if own is not None and any(one != own[0] for one in own):
        mixed = [one.of(matrix) for one, matrix in zip(own, matrices, strict=True)]
        ranks["as the layers do, mean over heads"] = product_ranks(mean_of_heads(mixed))
    return ranks


def _shown(own: Filter | None) -> Filter | None:
    """The p(A) that is shown beside A: the layer's own, or what twicing would make of a standard layer's A."""
    return TWICED if own == STANDARD else own


def _spectra(matrices: Sequence[Tensor], filters: dict[int, Filter | None], arrays: Arrays) -> dict[str, Tensor]:
    """Per layer and head, [layers, H], of one input; the spectra themselves go into arrays."""
    kept: dict[str, list[Tensor]] = {}
    for matrix, (layer, own) in zip(matrices, filters.items(), strict=True):
        spectrum, singular = eigenvalues(matrix), singular_values(matrix)
        arrays[f"eigenvalues/{layer}"] = spectrum.numpy()
        arrays[f"singular/{layer}"] = singular.numpy()
        numbers = {
            "fits_theory": fits_theory(spectrum).double().mean(-1),
            "complex": (~is_real(spectrum)).double().mean(-1),
            "negative": (is_real(spectrum) & (spectrum.real < 0) & ~fits_theory(spectrum)).double().mean(-1),
            "largest_imaginary": spectrum.imag.abs().amax(-1),
            "largest_singular": singular.amax(-1),
            "effective_rank": rank_of(singular),
        }
        shown = _shown(own)
        if shown is not None:
            of_p, mapped = singular_values(shown.of(matrix)), _mapped(shown, singular)
            moved = shown.of_eigenvalues(spectrum)
            arrays[f"singular_p/{layer}"] = of_p.numpy()
            arrays[f"eigenvalues_p/{layer}"] = moved.numpy()
            numbers |= {
                "fits_theory_p": fits_theory(moved).double().mean(-1),
                "largest_modulus_p": moved.abs().amax(-1),
                "largest_singular_p": of_p.amax(-1),
                "effective_rank_p": rank_of(of_p),
                "singular_miss": (of_p - mapped).abs().amax(-1) / of_p.amax(-1),
            }
        for name, values in numbers.items():
            kept.setdefault(name, []).append(values)
        if shown is None:
            for name in OF_P:
                kept.setdefault(name, []).append(torch.full_like(singular[..., 0], torch.nan))
    return {name: torch.stack(values) for name, values in kept.items()}


def _mapped(shown: Filter, singular: Tensor) -> Tensor:
    """What singular values would be if they followed the polynomial as eigenvalues do, descending."""
    return shown.of_eigenvalues(singular).abs().sort(-1, descending=True).values


def _spectrum_rows(heads: Sequence[dict[str, Tensor]], filters: dict[int, Filter | None]) -> list[dict[str, Any]]:
    means = {name: torch.stack([one[name] for one in heads]).mean(0) for name in heads[0]}
    rows = []
    for place, (layer, own) in enumerate(filters.items()):
        shown = _shown(own)
        for head in range(means["fits_theory"].shape[1]):
            row: dict[str, Any] = {"layer": layer, "head": head + 1, "p": shown.formula if shown else None}
            for name, mean in means.items():
                value = float(mean[place, head])
                row[name] = None if np.isnan(value) else value
            rows.append(row)
    return rows


def _note_unknown(found: Found, filters: dict[int, Filter | None]) -> None:
    unknown = [str(layer) for layer, own in filters.items() if own is None]
    if unknown:
        found.notes.append(
            f"What layer {', '.join(unknown)} multiplies its values by is not known: only A is shown, "
            "the softmax of its queries and keys, and its mechanism may do something else with them."
        )


def _add_about(found: Found, matrices: Sequence[Tensor], filters: dict[int, Filter | None]) -> None:
    found.about = {
        "layers": len(matrices),
        "heads": max(matrix.shape[0] for matrix in matrices),
        "tokens": matrices[0].shape[-1],
        "causal": all(is_causal(matrix) for matrix in matrices),
        "formulas": {str(layer): own.formula if own else None for layer, own in filters.items()},
    }


def _add_maps(
    found: Found, model: nn.Module, matrices: Sequence[Tensor], own: Sequence[Filter] | None, image: Tensor
) -> None:
    patches = _patches(found, model, matrices[0].shape[-1])
    if patches is None:
        return
    kinds = {A: list(matrices)}
    if own is not None and any(one != STANDARD for one in own):
        kinds[OWN] = [one.of(matrix) for one, matrix in zip(own, matrices, strict=True)]
    chosen = [layer - 1 for layer in some_layers(len(matrices))]
    for kind, of_layers in kinds.items():
        heads = torch.stack([patches.laid_out(of_layers[place]) for place in chosen])
        rolled = rollout(of_layers)
        _append(found.arrays, f"heads/{kind}", heads)
        _append(found.arrays, f"rollout/{kind}", torch.stack([patches.laid_out(rolled[place]) for place in chosen]))
    _append(found.arrays, "pictures", (255 * image.cpu()).round().to(torch.uint8))


def _patches(found: Found, model: nn.Module, tokens: int) -> Patches | None:
    try:
        patches = patches_of(model, tokens)
    except ValueError as error:
        sentence = str(error)
    else:
        if patches.enough:
            return patches
        sentence = (
            f"An image has {patches.rows} x {patches.columns} patches here, too few for a heat map to say where in it "
            "attention goes, so there is none."
        )
    found.notes = [*dict.fromkeys([*found.notes, sentence])]
    return None


def _append(arrays: Arrays, name: str, values: Tensor) -> None:
    new = values[None].numpy() if values.dtype == torch.uint8 else values[None].float().numpy()
    arrays[name] = np.concatenate([arrays[name], new]) if name in arrays else new


def _add_logit_parts(found: Found, model: nn.Module, inputs: Tensor, draw: bool) -> None:
    """Rows of how much the parts of layer 1's logits vary within a row, and their means over inputs and heads."""
    sizes: dict[str, list[Tensor]] = {}
    means: dict[str, list[Tensor]] = {}
    try:
        for one in inputs:
            split = logit_parts(model, one[None])
            for name, part in (split.parts | {"rest": split.rest, "all": split.logits}).items():
                centred = centred_rows(part[0].cpu(), causal=split.causal)
                sizes.setdefault(name, []).append(mean_square(centred, causal=split.causal))
                if name in PARTS:
                    means.setdefault(name, []).append(centred.mean(0))
    except ValueError as error:
        found.notes.append(f"No logits in parts: {error}")
        return
    found.logit_parts = [
        {"head": head, "part": name, "sd": value}
        for name, squares in sizes.items()
        for head, value in enumerate(torch.stack(squares).mean(0).sqrt().tolist(), start=1)
    ]
    if draw:
        found.arrays |= {f"parts/{name}": torch.stack(ones).mean(0).float().numpy() for name, ones in means.items()}
