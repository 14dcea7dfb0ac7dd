"""Crops of the two photographs that come with scikit-learn: "China" and "Flower", with edges and texture."""

import torch
from torch import Tensor

# Upper left corners: roof tiles against the sky, and petals.
CORNERS = ((120, 240), (180, 280))


def crops(side: int) -> tuple[Tensor, ...]:
    """One square crop of each photograph, [3, side, side], float64 in [0, 1].

    Raises ImportError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("The photographs need scikit-learn, which is missing: pip install 'twicing[lab]'") from error
    pictures = load_sample_images().images
    return tuple(
        torch.tensor(picture[top : top + side, left : left + side], dtype=torch.float64).permute(2, 0, 1) / 255
        for picture, (top, left) in zip(pictures, CORNERS, strict=True)
    )
