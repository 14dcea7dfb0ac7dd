"""The report of a conversion: what was replaced, how many parameters are new, and the way back."""

from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from twicing.adapters import crossing
from twicing.adapters.site import AttentionSite, Entry, is_converted, mechanism_of, restore

_NOT_THE_MODEL = "This is the report of a conversion: the model was changed in place; use the model"


@dataclass(frozen=True)
class Change:
    """One layer, and the mechanism that its attention is to hold. reads: see declared_reads()."""

    site: AttentionSite
    mechanism: nn.Module
    entry: Entry
    reads: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.site} -> {named(self.entry, self.mechanism)}"

    def stands(self) -> bool:
        """Whether the layer still holds this mechanism."""
        attention = self.site.attention
        return is_converted(attention) and mechanism_of(attention) is self.mechanism


class Conversion:
    """What convert() did: print it, or take it back with undo(). It is not the model.

    layers: the numbers of the layers that were converted, counted from 1.
    new_parameters: how many numbers there are to learn that were not there before.
    """

    def __init__(self, model: nn.Module, sites: list[AttentionSite], changes: list[Change]):
        self._model_name = type(model).__name__
        self._changes = tuple(changes)
        self._blocks = tuple(site.block for site in sites)
        self.layers = tuple(change.site.layer for change in changes)
        self.new_parameters = sum(p.numel() for change in changes for p in change.mechanism.parameters())

    def undo(self) -> None:
        """Give these layers their own attention back; what other conversions did to the model stays.

        Raises ValueError where all of it was undone before.
        """
        standing = [change for change in self._changes if change.stands()]
        if self._changes and not standing:
            raise ValueError("There is nothing to undo: this conversion was already undone.")
        converted = [change.site.attention for change in standing]
        crossing.disconnect(converted, (module for block in self._blocks for module in block.modules()))
        for attention in converted:
            restore(attention)

    def _read(self) -> list[str]:
        """What the converted layers read of others, in words; nothing where they read nothing."""
        readers: dict[int, list[int]] = {}
        for change in self._changes:
            for layer in change.reads or ():
                readers.setdefault(layer, []).append(change.site.layer)
        return [
            f"  The values of layer {layer} are read by {crossing.layers_in_words(numbers)}; what layer {layer} "
            "computes is not changed by that."
            for layer, numbers in sorted(readers.items())
        ]

    def __str__(self) -> str:
        if not self._changes:
            return f"{self._model_name}: nothing was converted."
        count = len(self._changes)
        if self.new_parameters:
            new = f"{self.new_parameters}, so make the optimiser now"
        elif any(change.mechanism.state_dict() for change in self._changes):
            new = "none, so optimisers stay valid, but new buffers add state-dict keys"
        else:
            new = "none, so state-dict keys and optimisers stay valid"
        return "\n".join(
            [
                f"{self._model_name}: {count} attention layer{'s' if count > 1 else ''} converted.",
                *(f"  {change}" for change in self._changes),
                *self._read(),
                f"  New parameters: {new}. To take it back: .undo(), or twicing.undo(model).",
            ]
        )

    __repr__ = __str__

    def __call__(self, *_inputs: object, **_options: object) -> NoReturn:
        raise TypeError(f"{_NOT_THE_MODEL}: model(x), not job(x).")

    def __getattr__(self, name: str) -> NoReturn:
        # Names with an underscore are what copying, pickling and notebooks ask for.
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"{_NOT_THE_MODEL}: model.{name}, not job.{name}.")


def named(entry: Entry, mechanism: nn.Module) -> str:
    """A mechanism in words, "twicing (order 2, gain 1)"."""
    details = mechanism.extra_repr()
    return f"{entry.mechanism} ({details})" if details else entry.mechanism
