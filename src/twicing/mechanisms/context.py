"""What crosses layers within one forward pass: values of earlier layers, and what earlier layers chose to remember.

Hosts make it and hand it to the mechanisms that ask for it (Mechanism.reads_values_of, Mechanism.remembers).
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Context:
    """What one layer may read from earlier layers of the same forward pass, and leave to later ones.

    values_by_layer: values [B, H, N, D] by layer number, as the layers' own mechanisms got them, never detached.
    memory: what remember() put there in earlier layers.
    broken: why nothing can be read, as a sentence; None where all is well.
    It belongs to its forward pass: a copy or a pickle of it holds nothing.
    """

    def __init__(
        self,
        values_by_layer: Mapping[int, Tensor] | None = None,
        memory: Mapping[str, Any] | None = None,
        *,
        broken: str | None = None,
        without_grad: bool = False,
    ) -> None:
        # Own dicts: an earlier layer may be computed again, and must not see what later ones added.
        self.values_by_layer = dict(values_by_layer or {})
        self.memory = dict(memory or {})
        self.broken = broken
        # Whether something in here was made with gradients switched off.
        self.without_grad = without_grad

    def values(self, layer: int) -> Tensor:
        """The values of a layer, counted from 1: [B, H, N, D], fewer heads under grouped queries, with their graph.

        Raises RuntimeError where they are not there, saying why.
        """
        self._refuse_broken()
        if layer not in self.values_by_layer:
            there = ", ".join(map(str, self.values_by_layer)) or "none"
            raise RuntimeError(
                f"The values of layer {layer} are not in the context; there are those of the layers: {there}. "
                f"A mechanism declares what it reads: reads_values_of = ({layer},)."
            )
        return self.values_by_layer[layer]

    def recall(self, name: str, default: Any = None) -> Any:
        """What an earlier layer of this forward pass remembered under this name, or the default."""
        self._refuse_broken()
        return self.memory.get(name, default)

    def remember(self, name: str, thing: Any) -> None:
        """Leave something to later layers of this forward pass, with `remembers = True`. Never detach it."""
        self._refuse_broken()
        self.memory[name] = thing
        self.without_grad = self.without_grad or not torch.is_grad_enabled()

    def record(self, layer: int, values: Tensor) -> None:
        """For hosts: put in a layer's values."""
        self.values_by_layer[layer] = values
        self.without_grad = self.without_grad or not torch.is_grad_enabled()

    def copy(self) -> "Context":
        """For hosts: a context that holds the same and goes its own way from here."""
        return Context(self.values_by_layer, self.memory, broken=self.broken, without_grad=self.without_grad)

    def only(self, layers: Collection[int]) -> "Context":
        """For hosts: a context of its own with the values of these layers and all that was remembered."""
        values = {layer: values for layer, values in self.values_by_layer.items() if layer in layers}
        return Context(values, self.memory, broken=self.broken, without_grad=self.without_grad)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Tensors between layers carry it: copied or saved they must not drag a graph along. An empty dict is what
        # torch.load(weights_only=True) can read.
        return OrderedDict, ()

    def _refuse_broken(self) -> None:
        if self.broken is not None:
            raise RuntimeError(self.broken)


def declared_reads(mechanism: nn.Module, layer: int, name: str) -> tuple[int, ...] | None:
    """The layers whose values a mechanism reads, () where it only remembers; None where it needs no context.

    Raises TypeError or ValueError where it declares something else than earlier layers.
    """
    reads = getattr(mechanism, "reads_values_of", ())
    if not isinstance(reads, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in reads):
        raise TypeError(f"reads_values_of of the mechanism {name!r} must be a tuple of layer numbers: got {reads!r}.")
    if not all(1 <= number < layer for number in reads):
        raise ValueError(
            f"The mechanism {name!r} in layer {layer} reads the values of the layers {list(reads)}: each must come "
            "before its own layer, counted from 1; its own values are the argument `value`."
        )
    return reads if reads or getattr(mechanism, "remembers", False) else None
