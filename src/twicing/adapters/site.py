"""What mechanisms and analysis see of a host: one attention layer, where it is, and what it would be turned into.

A host's adapter makes these; a new host is one file that finds its sites, and one line in surgery.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """With what a layer was converted. It lies beside the mechanism, so that copies and pickles of a model know it.

    mechanism: a registered name or an import path, by which it can be built again if `findable`.
    options: all of them, defaults included; JSON values.
    layer, layers: which layer of how many it was in the model that was converted, counted from 1.
    """

    mechanism: str
    options: dict[str, Any]
    findable: bool
    layer: int
    layers: int


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One layer of self-attention in a model.

    layer: counted from 1, in module order. path: the attention module's, as in model.get_submodule().
    stack: the path of what holds the blocks. block: the module whose output is the block output, [B, N, C].
    attention: the attention module. merge: the module whose input is the attention output with its heads
        concatenated, [B, N, H * D] (H = num_heads, D = head_dim).
    converted_class: a direct subclass of the attention's class, which adds no state and whose forward() calls
        `self.twicing_mechanism(query, key, value, ..., context=context_of(self))`. It may have twicing_installed() and
        twicing_restored(), which are called after it took the host's place and before the host's own class returns, and
        a static twicing_refusal(attention), which says why a host cannot be converted as it is set, or None.
    value_source: the child of the attention whose output holds the values, or "" where there is none. read_values:
        takes that output and gives values [B, H, N, D] as mechanisms get them, fewer heads under grouped queries; it
        must survive pickling.
    """

    layer: int
    path: str
    stack: str
    block: nn.Module
    attention: nn.Module
    merge: nn.Module
    num_heads: int
    head_dim: int
    converted_class: type[nn.Module]
    value_source: str
    read_values: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        kind = type(self.attention)
        host = kind.__mro__[1] if is_converted(self.attention) else kind
        return f"layer {self.layer} = {self.path}: {host.__name__}"

    @property
    def converted(self) -> str | None:
        """The name of the mechanism that it was converted to, or None where it is the host's own attention."""
        return entry_of(self.attention).mechanism if is_converted(self.attention) else None


def is_converted(module: nn.Module) -> bool:
    """Whether the module is attention that holds a mechanism of ours."""
    return "twicing_mechanism" in module._modules


def entry_of(attention: nn.Module) -> Entry:
    """With what a converted attention was converted."""
    return vars(attention)["twicing_entry"]


def mechanism_of(attention: nn.Module) -> nn.Module:
    """The mechanism that a converted attention holds."""
    return attention.get_submodule("twicing_mechanism")


def install(site: AttentionSite, mechanism: nn.Module, entry: Entry) -> None:
    """Turn the host's attention into a converted one, in place: the object, its hooks and parameters stay the same.

    The class of the one instance is exchanged. So it can be copied, pickled, compiled and exported like any module,
    and what holds a reference to it (a hook, an optimiser, an average of the weights) notices nothing.
    """
    site.attention.add_module("twicing_mechanism", mechanism)
    vars(site.attention)["twicing_entry"] = entry
    site.attention.__class__ = site.converted_class
    _tell(site.attention, "twicing_installed")


def restore(attention: nn.Module) -> None:
    """Turn a converted attention back into the host's own; the mechanism, and what it learned, are dropped."""
    _tell(attention, "twicing_restored")
    attention.__class__ = type(attention).__mro__[1]
    del attention.twicing_mechanism
    del vars(attention)["twicing_entry"]


def _tell(attention: nn.Module, what: str) -> None:
    method = getattr(attention, what, None)
    if method is not None:
        method()
