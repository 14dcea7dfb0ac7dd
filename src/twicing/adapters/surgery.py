"""Put a mechanism into the attention layers of someone's model, say what is in there, and take it out again.

Sites are found, all mechanisms are built, and only then is anything replaced. This file knows no host.
"""

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from twicing.adapters import crossing
from twicing.adapters.conversion import Change, Conversion, named
from twicing.adapters.layers import Layers, chosen_layers
from twicing.adapters.refusals import KNOWN_ATTENTION, refuse_unchangeable, refuse_unknown_attention
from twicing.adapters.site import AttentionSite, Entry, entry_of, install, is_converted, mechanism_of, restore
from twicing.mechanisms import registry
from twicing.mechanisms.context import declared_reads
from twicing.mechanisms.options import build, complete_options

__all__ = ["AttentionSite", "Conversion", "convert", "describe", "find_sites", "spec", "undo"]

# A module that every model of the host has imported, and the adapter that finds its attention.
_ADAPTERS = {
    "timm": "twicing.adapters.timm",
    "transformers.modeling_utils": "twicing.adapters.transformers",
    "torch": "twicing.adapters.torch_mha",
    "twicing.models.language": "twicing.adapters.language_sites",
}
_SPEC_KEYS = {"mechanism", "layers", "options"}


def convert(
    model: nn.Module,
    mechanism: str | registry.Factory | None = None,
    *,
    layers: Layers = "all",
    options: Mapping[str, Any] | None = None,
    spec: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
) -> Conversion:
    """Replace the attention of the model by a mechanism, in place, and return a report with an undo().

    mechanism: a registered name ("twicing"), an import path ("package.file:Class"), or a factory
        (layer, num_heads, head_dim, **options) -> module, such as a subclass of twicing.mechanisms.Mechanism.
    layers: counted from 1, as the papers count: "all", "10-12", "first-3", "last-3", "1,4,7-9", 5 or [10, 11].
    options: of the mechanism, such as {"gain": 0.5}; JSON values.
    spec: instead of all these, what spec() returned for another model; [] changes nothing.
    Parameters, state-dict keys, hooks and the object itself stay as they are; a mechanism that learns something adds
    its parameters below "...attn.twicing_mechanism", on the layer's device: make the optimiser afterwards. Weights do
    not know their formula: keep spec(model) beside them. Compile, wrap or quantise after the conversion.
    A mechanism that reads earlier layers (neutreno) gets their values, converted or not, from the same forward pass,
    with their gradients; layers count within the model that is passed. Checkpoint whole blocks, non-reentrantly.
    Raises ValueError or TypeError, and leaves the model untouched, where the model, a layer, the mechanism or an
    option is not known or does not fit.
    """
    requests = _requests(mechanism, layers, options, spec)
    refuse_unchangeable(model)
    # An empty spec is that of every unconverted model, also of one whose attention is not known.
    sites = find_sites(model) if requests else []
    if requests and not sites:
        raise ValueError(_nothing_found(model))
    changes = [change for request in requests for change in _built(sites, *request)]
    _refuse_repeated(changes)
    readers = {change.site.layer: change.reads for change in changes if change.reads is not None}
    crossing.refuse_unreadable(sites, readers)
    crossing.refuse_other_numbering(sites, readers)
    for change in changes:
        install(change.site, change.mechanism, change.entry)
    crossing.connect(sites, readers)
    return Conversion(model, sites, changes)


def undo(model: nn.Module) -> None:
    """Give all converted layers of the model their own attention back; it is then what it was, bit for bit.

    Works on copies too. What a mechanism learned is dropped.
    Raises ValueError where nothing is converted, or where the model is a part of one whose layers read each other.
    """
    converted = [module for module in model.modules() if is_converted(module)]
    if not converted:
        raise ValueError(f"There is nothing to undo: no layer of {type(model).__name__} is converted.")
    crossing.refuse_part(converted, model.modules(), type(model).__name__)
    crossing.disconnect(converted, model.modules())
    for attention in converted:
        restore(attention)


def spec(model: nn.Module) -> list[dict[str, Any]]:
    """What is converted, as JSON values: [{"mechanism": name, "layers": [10, 11], "options": {...}}, ...], or [].

    Belongs beside every saved state dict: convert(model, spec=...) makes an unconverted model the same again.
    A model that cannot be converted has the empty one.
    Raises ValueError where a layer was converted by something without a name, such as a lambda.
    """
    entries: list[dict[str, Any]] = []
    if not any(is_converted(module) for module in model.modules()):
        return entries
    for site in find_sites(model):
        if not is_converted(site.attention):
            continue
        entry = entry_of(site.attention)
        if not entry.findable:
            raise ValueError(
                f"Layer {site.layer} was converted with {entry.mechanism}, which cannot be found by its name: use a "
                "class or function at the top of a module (or register() it), so that a spec can name it."
            )
        same = [e for e in entries if (e["mechanism"], e["options"]) == (entry.mechanism, entry.options)]
        if same:
            same[0]["layers"].append(site.layer)
        else:
            options = copy.deepcopy(entry.options)
            entries.append({"mechanism": entry.mechanism, "layers": [site.layer], "options": options})
    return entries


def describe(model: nn.Module) -> str:
    """The attention layers of the model, one a line, and what each was converted to; or why it cannot be converted."""
    name = type(model).__name__
    try:
        sites = find_sites(model)
    except ValueError as error:
        return f"{name}: {error}"
    converted = sum(is_converted(site.attention) for site in sites)
    lines = [f"{name}: {len(sites)} attention layers, {converted or 'none'} converted."]
    for site in sites:
        line = f"  {site}, {site.num_heads} heads of {site.head_dim}"
        if is_converted(site.attention):
            line += f" -> {named(entry_of(site.attention), mechanism_of(site.attention))}"
        lines.append(line + crossing.read_by(site.block))
    return "\n".join(lines)


def _nothing_found(model: nn.Module) -> str:
    name = type(model).__name__
    if _found(model)[1]:
        return f"{name} holds cross-attention only, which has no residual to smooth: there is no layer to convert."
    return f"No attention was found in {name}: known is {KNOWN_ATTENTION}."


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention layers of the model, in module order, counted from 1; [] where it has no attention.

    Raises ValueError where some of its attention is not known, or where it has several stacks of layers, so that
    counting them would be ambiguous.
    """
    sites, passed_over = _found(model)
    refuse_unknown_attention(model, [site.attention for site in sites], passed_over)
    stacks = list(dict.fromkeys(site.stack for site in sites))
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(stacks)} separate stacks of attention layers "
            f"({', '.join(stack or 'the model itself' for stack in stacks)}), "
            "so that counting layers would be ambiguous: pass the part that is meant, such as model.encoder."
        )
    return sites


def _found(model: nn.Module) -> tuple[list[AttentionSite], list[nn.Module]]:
    """The attention layers that adapters know, and the modules of attention that they know to be no layers."""
    sites: list[AttentionSite] = []
    passed_over: list[nn.Module] = []
    for imported, adapter in _ADAPTERS.items():
        if imported in sys.modules:
            host = importlib.import_module(adapter)
            passed_over += host.no_layers(model)
            not_theirs = {id(part) for module in passed_over for part in module.modules()}
            sites += [site for site in host.find_sites(model) if id(site.attention) not in not_theirs]
    return sites, passed_over


def _requests(
    mechanism: str | registry.Factory | None,
    layers: Layers,
    options: Mapping[str, Any] | None,
    spec: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None,
) -> list[tuple[str | registry.Factory, Layers, Mapping[str, Any] | None]]:
    """The conversions that are asked for, as (mechanism, layers, options)."""
    if spec is None:
        if mechanism is None:
            raise ValueError("convert() needs a mechanism, such as 'twicing', or a spec=... that twicing.spec() made.")
        return [(mechanism, layers, options)]
    if mechanism is not None or layers != "all" or options is not None:
        raise ValueError("A spec says everything: pass it without a mechanism, layers and options.")
    entries = [spec] if isinstance(spec, Mapping) else spec
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != _SPEC_KEYS:
            raise ValueError(
                "A spec is a list of entries {'mechanism': ..., 'layers': [...], 'options': {...}}, as twicing.spec() "
                f"makes it: got the entry {entry!r}."
            )
    return [(entry["mechanism"], entry["layers"], entry["options"]) for entry in entries]


def _built(
    sites: list[AttentionSite],
    mechanism: str | registry.Factory,
    layers: Layers,
    options: Mapping[str, Any] | None,
) -> list[Change]:
    """The changes of one request: its mechanisms are built, on their layer's device, and nothing is replaced yet."""
    factory = registry.find_mechanism(mechanism) if isinstance(mechanism, str) else mechanism
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            "mechanism must be a name or a factory (layer, num_heads, head_dim, **options) -> module, which builds "
            f"one for each layer: got {factory!r}."
        )
    name = mechanism if isinstance(mechanism, str) else registry.name_of(factory)
    findable = name is not None
    name = name or registry.import_path(factory)
    complete = complete_options(factory, name, options)
    changes = []
    for number in chosen_layers(layers, len(sites)):
        site = sites[number - 1]
        _refuse_as_it_is_set(site)
        own_options = copy.deepcopy(complete)
        built = build(factory, name, own_options, site.layer, site.num_heads, site.head_dim)
        like = next(site.attention.parameters())
        built.to(device=like.device, dtype=like.dtype).train(site.attention.training)
        reads = declared_reads(built, site.layer, name)
        entry = Entry(name, own_options, findable, site.layer, len(sites))
        changes.append(Change(site, built, entry, reads))
    return changes


def _refuse_as_it_is_set(site: AttentionSite) -> None:
    """Raise where the host's settings leave no room for a mechanism."""
    refusal = getattr(site.converted_class, "twicing_refusal", None)
    why = None if refusal is None or is_converted(site.attention) else refusal(site.attention)
    if why is not None:
        raise ValueError(why)


def _refuse_repeated(changes: list[Change]) -> None:
    layers: set[int] = set()
    built: set[int] = set()
    for change in changes:
        site = change.site
        if is_converted(site.attention):
            raise ValueError(
                f"Layer {site.layer} ({site.path}) is already converted to {site.converted}: undo that first."
            )
        if site.layer in layers:
            raise ValueError(f"The spec names layer {site.layer} more than once.")
        if id(change.mechanism) in built:
            raise ValueError(
                f"The factory gave the same module for two layers (the second is layer {site.layer}): build a new one "
                "each time."
            )
        layers.add(site.layer)
        built.add(id(change.mechanism))
