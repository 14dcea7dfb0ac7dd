"""Non-local means, and its twiced form: average pixels whose surroundings look alike, then smooth what was left behind.

A pixel's weights are a softmax of minus the squared distance between patches, so the filter is Nadaraya-Watson on
patches, and attention with patches as queries and keys. Buades, Coll and Morel, CVPR 2005; arXiv 2503.00687, section
2.2, and section 3.1 for the repeated filter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.ops.boost import Smoother, boost


class NonlocalMeans:
    """The filter of one guiding image: A, with A_ij = softmax over the window of -mean|P_i - P_j|^2 / (2 h^2).

    guide: [C, H, W], float, whose patches say which pixels are alike; usually the noisy image.
    patch: the side of a patch, odd; patches are mirrored at the border. search: how far the window reaches, in pixels;
        a pixel sees (2 search + 1)^2 pixels, fewer at the border.
    Distances are formed once; smoother(h) gives A for one bandwidth. Rows of A sum to 1; A is not symmetric.
    Raises ValueError for a guide that is no [C, H, W], an even patch, or a patch or window that does not fit.
    """

    def __init__(self, guide: Tensor, *, patch: int = 5, search: int = 7) -> None:
        if guide.ndim != 3 or not guide.is_floating_point():
            raise ValueError(f"guide must be one float image [C, H, W]: got {guide.dtype} {list(guide.shape)}.")
        height, width = guide.shape[1:]
        if patch < 1 or patch % 2 == 0 or patch // 2 >= min(height, width):
            raise ValueError(f"patch must be odd and less than twice the image's {height} x {width}: got {patch}.")
        if not 1 <= search < min(height, width):
            raise ValueError(f"search must be from 1 to the image's side ({height} x {width}) less 1: got {search}.")
        self.search = search
        self.squared_distances = _squared_distances(guide, patch, search)

    def smoother(self, bandwidth: float) -> Smoother:
        """A as a function: values [C, H, W] -> A values. bandwidth: h > 0, in units of the pixels' values."""
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be a positive number, in units of the pixels' values: got {bandwidth}.")
        weights = (self.squared_distances / (-2 * bandwidth**2)).softmax(0)
        return lambda values: (weights[:, None] * _shifted(values, self.search)).sum(0)

    def matrix(self, bandwidth: float) -> Tensor:
        """A itself, [H W, H W]: for small images."""
        height, width = self.squared_distances.shape[1:]
        pixels = height * width
        smooth = self.smoother(bandwidth)
        each = torch.eye(pixels, dtype=self.squared_distances.dtype).view(pixels, height, width)
        return smooth(each).reshape(pixels, pixels).T


def nonlocal_means(
    image: Tensor,
    *,
    bandwidth: float,
    patch: int = 5,
    search: int = 7,
    order: int = 1,
    gain: float = 1.0,
    passes: int = 1,
) -> Tensor:
    """Denoise an image [C, H, W] with its own patches; order 2 twices the filter.

    passes: how often the (boosted) filter is applied; A stays that of the noisy image, as in arXiv 2503.00687,
    section 3.1. The other arguments are those of NonlocalMeans and twicing.boost(). Returns [C, H, W].
    Raises ValueError for what does not fit, and for fewer passes than 1.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, how often the filter is applied: got {passes}.")
    smooth = NonlocalMeans(image, patch=patch, search=search).smoother(bandwidth)
    for _ in range(passes):
        image = boost(smooth, image, order, gain)
    return image


def psnr(image: Tensor, clean: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error), in dB; infinite for equal images."""
    error = float((image - clean).square().mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _shifted(values: Tensor, reach: int) -> Tensor:
    """Every shift of [C, H, W] within the reach, [(2 reach + 1)^2, C, H, W], zero where it leaves the image."""
    height, width = values.shape[1:]
    padded = F.pad(values, (reach,) * 4)
    # A view: nothing is copied until the weights are applied.
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, *values.shape)


def _squared_distances(guide: Tensor, patch: int, search: int) -> Tensor:
    """Mean squared difference of the patches around a pixel and around each shift of it, [shifts, H, W]."""
    height, width = guide.shape[1:]
    border = patch // 2
    mirrored = F.pad(guide[None], (border,) * 4, mode="reflect")[0] if border else guide
    inside = _shifted(torch.ones_like(guide[:1]), search)[:, 0] > 0
    distances = []
    for place in range((2 * search + 1) ** 2):
        down, right = place // (2 * search + 1) - search, place % (2 * search + 1) - search
        moved = torch.roll(mirrored, (-down, -right), (1, 2))
        squares = (moved - mirrored).square().mean(0)
        # roll() wraps around, but only into patches whose centre lies outside, which get no weight.
        distances.append(F.avg_pool2d(squares[None, None], patch, 1)[0, 0])
    return torch.stack(distances).view(-1, height, width).masked_fill(~inside, torch.inf)
