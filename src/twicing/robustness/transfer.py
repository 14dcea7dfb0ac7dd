"""Transfer: images made against one model are shown to another one.

Papernot et al., arXiv 1605.07277. A defence that only hides its gradients falls to images made elsewhere.
"""

import torch
from torch import Tensor

from twicing.robustness.search import Model, Search
from twicing.robustness.threat import Threat


def transfer(
    model: Model, adversarial: Tensor, images: Tensor, labels: Tensor, threat: Threat, *, batch_size: int = 256
) -> Tensor:
    """Return which images this model gets right, [n] bool, when it is shown those made against another model.

    adversarial: [n, ...], one for each of images and inside the threat's set, such as AttackResult.adversarial.
    An image that this model has wrong without an attack stays wrong, whatever the other model made of it.
    model, images, labels: as in pgd(). Raises what pgd() raises, and ValueError for adversarial images that are not as
    many, not of the same shape, or outside the threat's set.
    """
    with torch.inference_mode(False), torch.no_grad():
        search = Search(model, images, labels, threat, batch_size)
        check_inside(adversarial, search.images, threat)
        for indices in search.standing_batches():
            search.judge(indices, adversarial[indices])
        return search.correct


def check_inside(adversarial: Tensor, images: Tensor, threat: Threat) -> None:
    """Raise ValueError unless every adversarial image lies in the threat's set around its image."""
    if adversarial.shape != images.shape or adversarial.dtype != images.dtype:
        raise ValueError(
            f"adversarial must hold one image for each of images, {images.dtype} of shape {list(images.shape)}: "
            f"got {adversarial.dtype} of shape {list(adversarial.shape)}."
        )
    threat.check_images(adversarial)
    # One rounding of a float32 pixel is allowed, as the attack may have run on another device.
    low, high = threat.bounds
    largest = (adversarial - images).abs().max().item()
    if largest > float(threat.eps) + 1e-6 * (high - low):
        raise ValueError(
            f"adversarial must lie within eps = {threat.eps_label} of images: got a change of {largest:.4g}, "
            "so these were made for a larger threat or for other images."
        )
