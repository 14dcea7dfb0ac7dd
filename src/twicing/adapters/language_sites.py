"""Models that say themselves where their attention is: anything with a method attention_sites(), as our own have.

The method yields AttentionSites with paths from the model that has it; this library's language model is one.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from twicing.adapters.site import AttentionSite


def find_sites(model: nn.Module) -> Iterator[AttentionSite]:
    """The attention layers of all parts of the model that tell theirs, in module order, numbered from 1.

    Raises what they raise, ValueError where they do not know their own attention.
    """
    layer = 0
    for path, part in model.named_modules():
        tell = getattr(part, "attention_sites", None)
        if not callable(tell):
            continue
        for site in tell():
            layer += 1
            before = f"{path}." if path else ""
            yield replace(site, layer=layer, path=before + site.path, stack=before + site.stack)


def no_layers(model: nn.Module) -> list[nn.Module]:  # noqa: ARG001
    """Attention that is no layer to convert: these models have none."""
    return []
