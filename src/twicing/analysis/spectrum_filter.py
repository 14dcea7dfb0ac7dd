"""Which matrix a layer multiplies its values by: a polynomial of A, read from its mechanism's order and gain."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twicing.adapters.site import AttentionSite, is_converted, mechanism_of
from twicing.analysis.capture import sites_to_look_into
from twicing.classical.eigencapacity import boosted_eigenvalue
from twicing.mechanisms.standard import Standard
from twicing.mechanisms.twicing import Twicing
from twicing.ops.boost import boost


@dataclass(frozen=True)
class Filter:
    """p(A) = I - (I - A)(I - g A)^(m - 1), which maps a layer's values to its output.

    order: m. gain: g, one number for all heads or one for each.
    """

    order: int = 2
    gain: tuple[float, ...] = (1.0,)

    def of(self, matrices: Tensor) -> Tensor:
        """p(A) of matrices A [..., H, N, N]; its rows sum to 1 where those of A do, its entries may be negative."""
        if self.order == 1:
            return matrices
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        return boost(lambda values: matrices @ values, identity, self.order, self._by_head(matrices, 2))

    def of_eigenvalues(self, spectrum: Tensor) -> Tensor:
        """p(x) of the eigenvalues x of A, [..., H, N]: exactly those of p(A), for any A; singular values are not."""
        if self.order == 1:
            return spectrum
        gain = self._by_head(spectrum.real, 1)
        return torch.cat(
            [
                boosted_eigenvalue(spectrum[..., head : head + 1, :], self.order, float(one))
                for head, one in enumerate(gain.flatten().expand(spectrum.shape[-2]))
            ],
            dim=-2,
        )

    @property
    def formula(self) -> str:
        """It in words: "A", "2A - A^2", "A^2", or order and gain."""
        known = {(1.0,): "2A - A^2", (-1.0,): "A^2", (0.0,): "A"}
        gains = tuple(sorted(set(self.gain)))
        if self.order == 1:
            return "A"
        if self.order == 2 and gains in known:
            return known[gains]
        size = f"{gains[0]:.3g}" if len(gains) == 1 else f"{gains[0]:.3g} to {gains[-1]:.3g}, by head"
        power = "" if self.order == 2 else f"^{self.order - 1}"
        return f"I - (I - A)(I - gA){power}, g = {size}"

    def _by_head(self, like: Tensor, axes: int) -> Tensor:
        gain = torch.tensor(self.gain, dtype=like.dtype, device=like.device)
        return gain.view(-1, *[1] * axes) if len(self.gain) > 1 else gain


STANDARD = Filter(order=1)
TWICED = Filter()


def filters_of(model: nn.Module) -> dict[int, Filter | None]:
    """The filter of every attention layer, by its number; None where the mechanism's matrix is not known.

    Known are the host's own attention, "standard" and "twicing"; another mechanism may be no matrix times the values
    at all (NeuTRENO adds values of layer 1).
    Raises ValueError for a model without attention layers that the library knows.
    """
    return {site.layer: _filter(site) for site in sites_to_look_into(model)}


def _filter(site: AttentionSite) -> Filter | None:
    if not is_converted(site.attention):
        return STANDARD
    mechanism = mechanism_of(site.attention)
    # Exactly these: a subclass may compute anything.
    if type(mechanism) is Standard:
        return STANDARD
    if type(mechanism) is not Twicing:
        return None
    gain = mechanism.gain
    if isinstance(gain, Tensor):
        return Filter(mechanism.order, tuple(gain.detach().flatten().tolist()))
    return STANDARD if mechanism.order == 1 else Filter(mechanism.order, (gain,))
