"""Corruption error and mCE of ImageNet-C: a model's errors in units of AlexNet's.

Hendrycks and Dietterich, arXiv 1903.12261, section 4.1, and their released evaluation. For the released files only:
corruptions that are generated otherwise have no AlexNet to be compared with.
"""

import math
from collections.abc import Mapping, Sequence

# AlexNet's error over all five severities, as a share of the images.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Published with three digits only.
ALEXNET_EXTRA_ERRORS = {"speckle_noise": 0.845, "gaussian_blur": 0.787, "spatter": 0.718, "saturate": 0.658}
SEVERITIES = 5


def corruption_error(kind: str, errors: Sequence[float]) -> float:
    """CE = sum_s E_s / sum_s E_s^AlexNet over the five severities s; 1 is as bad as AlexNet, 0 is no error at all.

    kind: one of ImageNet-C's fifteen or of its extra four. errors: five shares of images (1 - accuracy, top-1).
    Papers print it in percent. Raises ValueError for another kind, and for errors that are not five shares.
    Source: arXiv 1903.12261, section 4.1.
    """
    reference = (ALEXNET_ERRORS | ALEXNET_EXTRA_ERRORS).get(kind)
    if reference is None:
        names = ", ".join([*ALEXNET_ERRORS, *ALEXNET_EXTRA_ERRORS])
        raise ValueError(f"AlexNet's error is known for ImageNet-C's corruptions only ({names}): got {kind!r}.")
    if len(errors) != SEVERITIES:
        raise ValueError(f"the corruption error of {kind} needs five errors, one per severity: got {len(errors)}.")
    if not all(0 <= error <= 1 for error in errors):
        raise ValueError(f"errors must be shares of the images, 0 to 1: got {list(errors)} for {kind}.")
    return math.fsum(errors) / SEVERITIES / reference


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE, the mean corruption error over all fifteen; the extra four may be among the errors and are left out.

    errors: kind -> five shares of images, as in corruption_error().
    Raises ValueError where one of the fifteen is missing or a kind is unknown.
    Source: arXiv 1903.12261, section 4.1.
    """
    return _mean(errors, ALEXNET_ERRORS, "mCE needs all fifteen corruptions")


def extra_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Mean corruption error over the extra four alone, which no mCE counts; AlexNet's errors there are rounded.

    errors: as in mean_corruption_error(). Raises ValueError where one of the four is missing or a kind is unknown.
    """
    return _mean(errors, ALEXNET_EXTRA_ERRORS, "the mean over the extra corruptions needs all four")


def _mean(errors: Mapping[str, Sequence[float]], kinds: Mapping[str, float], demand: str) -> float:
    relative = {kind: corruption_error(kind, severities) for kind, severities in errors.items()}
    missing = [kind for kind in kinds if kind not in relative]
    if missing:
        raise ValueError(f"{demand}: {', '.join(missing)} missing.")
    return math.fsum(relative[kind] for kind in kinds) / len(kinds)
