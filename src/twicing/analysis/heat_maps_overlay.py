"""A heat map laid over its image, as pixels."""

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

# Dark to bright for shares; blue to red, white at 0, where entries may be negative.
SEQUENTIAL, DIVERGING = "inferno", "RdBu_r"
# The image stays recognisable, in grey so that colour is the map's alone.
OPACITY = 0.62


def overlay(image: NDArray[np.floating], heat: NDArray[np.floating], limit: float | None = None) -> NDArray[np.uint8]:
    """The image in grey beneath the map's colours, [height, width, 3].

    image: [C, height, width] in [0, 1]. heat: [rows, columns], each number the colour of a whole patch.
    A map without negative numbers goes from its smallest to its largest; one with them from -limit to limit, white at
    0; limit: by default the largest modulus.
    Raises ValueError where the map's grid does not divide the image.
    """
    _, height, width = image.shape
    rows, columns = heat.shape
    if height % rows or width % columns:
        raise ValueError(f"{rows} x {columns} patches do not divide an image of {height} x {width} pixels.")
    colors = colormaps[DIVERGING if heat.min() < 0 else SEQUENTIAL](_scaled(heat, limit))[..., :3]
    spread = colors.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    grey = image.mean(0)[..., None]
    return np.round(255 * (OPACITY * spread + (1 - OPACITY) * grey)).astype(np.uint8)


def _scaled(heat: NDArray[np.floating], limit: float | None) -> NDArray[np.floating]:
    if heat.min() < 0:
        limit = float(np.abs(heat).max()) if limit is None else limit
        return np.clip(0.5 + heat / (2 * limit), 0, 1)
    span = float(heat.max() - heat.min())
    return np.zeros_like(heat) if span == 0 else (heat - heat.min()) / span
