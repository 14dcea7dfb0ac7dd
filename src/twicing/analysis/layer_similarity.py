"""Similarity of the tokens layer by layer, averaged over images: the curve in which a collapse shows.

arXiv 2503.00687, with two further measures that tell a common mean token from a lost dimension.
"""

import torch
from torch import Tensor, nn

from twicing.analysis.capture import PLACES, capture
from twicing.analysis.similarity import distance_to_mean, effective_rank, mean_pairwise_cosine

METRICS = {
    "mean pairwise cosine": mean_pairwise_cosine,
    "distance to the mean token": distance_to_mean,
    "effective rank of centred tokens": effective_rank,
}


def layer_similarity(model: nn.Module, images: Tensor, *, batch_size: int = 64) -> dict[tuple[str, str], Tensor]:
    """Average the metrics of similarity.py over the images, at every layer's attention output and block output.

    images: [n, ...], what the model takes; the model in eval mode, as dropout would change the tokens.
    Returns {(where, metric): [layers], float64, on the CPU}, layers in the model's order; where and metric read as in
    the report: ("block output", "mean pairwise cosine"). Holds the tokens of one layer and one batch at a time.
    Raises ValueError for a model in training mode or no images, and what capture() raises.
    """
    if model.training:
        raise ValueError("the model must be in eval mode, as dropout would change the tokens: call model.eval() first.")
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"it takes an image and a batch_size of 1 or more: got {len(images)} images and {batch_size}.")
    with capture(model, reduce=_measure) as captured, torch.no_grad():
        for start in range(0, len(images), batch_size):
            model(images[start : start + batch_size])
    means = {
        where: torch.stack([captured.tensor(where, layer).mean(0) for layer in captured.layers]) for where in PLACES
    }
    return {(where, metric): means[where][:, i] for where in PLACES for i, metric in enumerate(METRICS)}


def _measure(tokens: Tensor) -> Tensor:
    """Return [B, metrics] on the CPU: [B, N, C] measured in every way."""
    return torch.stack([metric(tokens) for metric in METRICS.values()], dim=1).double().cpu()
