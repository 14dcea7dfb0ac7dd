"""AutoAttack, the ensemble that others report: run by the package pyautoattack, judged here.

Croce and Hein, arXiv 2003.01690: APGD on two losses and FAB follow gradients, Square (arXiv 1912.00049) does not.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed
from twicing.robustness.search import AttackResult, Model, Search
from twicing.robustness.threat import Threat

# The ensembles of pyautoattack: "standard" is what is compared between papers, "rand" is for randomised models.
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
# The losses divide by a difference to the third or fourth largest logit.
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
MOST_TARGETS = 9


def auto_attack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    version: str = "standard",
    attacks: Sequence[str] = (),
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Run AutoAttack: one attack after the other, each on the images that still stand.

    version: "standard" (APGD by cross-entropy, targeted APGD, targeted FAB, Square with 5,000 queries), "plus", "rand";
    or attacks: some of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in their order, each as in "standard".
    Targeted attacks try nine other classes as published, and all others where there are fewer than ten.

    model, images, labels: as in pgd(); images [n, channels, height, width]. The attacks compute in float32; what they
    return is clipped to the threat and judged anew. Of an image that stands, `adversarial` is the image itself.
    zero_gradient_share is 0, as the package keeps its gradients to itself. notes: its own doubts, such as a randomised
    model or images without a gradient.
    generator: draws the seed of every attack. One batch shares its random numbers, so that, other than in pgd(), an
    image's outcome may depend on batch_size and on the other images. The default random state is left as it was.
    Leaves the model as it was: no parameter gets a gradient.
    Raises what pgd() raises; ValueError for an unknown version or attack, both at once, images that are not
    [n, C, H, W] and fewer classes than an attack needs; ImportError without pyautoattack (pip install 'twicing[lab]').
    Source: arXiv 2003.01690, section 5.
    """
    names = _ensemble(version, attacks)
    package = _package()
    with torch.inference_mode(False), torch.enable_grad():
        search = Search(model, images, labels, threat, batch_size)
        classes = _check_fits(search, names)
        notes: list[str] = []
        seed = draw_seed(generator)
        with _own_random_state(images.device), _own_tracing(), _own_log(notes):
            for indices in search.standing_batches():
                found = _run(package, search, indices, version, tuple(attacks), min(MOST_TARGETS, classes - 1), seed)
                search.judge(indices, found)
        label = f"autoattack, {', '.join(attacks) if attacks else version}"
        return search.result(label, tuple(dict.fromkeys(notes)))


def _ensemble(version: str, attacks: Sequence[str]) -> tuple[str, ...]:
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}: got {version!r}.")
    if not attacks:
        return VERSIONS[version]
    if version != "standard":
        raise ValueError(f"give either version or attacks: got {version!r} and {list(attacks)}.")
    if isinstance(attacks, str) or not set(attacks) <= set(FEWEST_CLASSES):
        raise ValueError(f"attacks must be a list of some of {', '.join(FEWEST_CLASSES)}: got {attacks!r}.")
    return tuple(attacks)


def _check_fits(search: Search, names: Sequence[str]) -> int:
    """Return the number of classes, or raise ValueError where an attack of the ensemble cannot run."""
    if search.images.ndim != 4:
        raise ValueError(
            "AutoAttack takes images of shape [n, channels, height, width] (Square draws squares): "
            f"got {list(search.images.shape)}."
        )
    classes = search.logits(search.images[:1]).shape[1]
    for name in names:
        if classes < FEWEST_CLASSES[name]:
            fitting = ", ".join(fit for fit, fewest in FEWEST_CLASSES.items() if fewest <= classes)
            raise ValueError(
                f"{name} needs {FEWEST_CLASSES[name]} classes or more: got a model of {classes}. "
                f"With these, choose attacks from {fitting}."
            )
    return classes


def _package() -> Any:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError("AutoAttack needs pyautoattack: pip install 'twicing[lab]'.") from error
    return AutoAttack


def _run(
    package: Any, search: Search, indices: Tensor, version: str, attacks: tuple[str, ...], targets: int, seed: int
) -> Tensor:
    """What pyautoattack makes of one batch: images of the pixel scale, in the dtype of the search's."""
    # The package knows pixels in [0, 1] and float32 only.
    low, high = search.threat.bounds
    images = search.images[indices]

    def logits(scaled: Tensor) -> Tensor:
        found: Tensor = _ImagesOnly.apply(search.model, scaled.to(images.dtype) * (high - low) + low)
        # Square writes into the logits it is given.
        return found.float().clone()

    ensemble = package(
        logits,
        eps=float(search.threat.eps) / (high - low),
        norm="Linf",
        seed=seed,
        device=images.device,
        version="custom" if attacks else version,
        attacks=list(attacks) or None,
    )
    if attacks:
        ensemble.apgd.n_restarts = ensemble.fab.n_restarts = 1
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
    found, _ = ensemble.run_standard_evaluation(
        ((images - low) / (high - low)).float(), search.labels[indices], batch_size=len(indices)
    )
    return found.to(images.dtype) * (high - low) + low


class _ImagesOnly(torch.autograd.Function):
    """model(images), whose backward goes to the images and to nothing else: FAB calls backward() on the logits."""

    @staticmethod
    def forward(ctx: Any, model: Model, images: Tensor) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return model(images)
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = model(ctx.images)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        # FAB asks for one class after the other.
        (found,) = torch.autograd.grad(ctx.logits, ctx.images, gradients, retain_graph=True)
        return None, found


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    # The package seeds the default generators.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _own_tracing() -> Iterator[None]:
    # Its check for models that call autograd switches the trace function off, with which coverage and debuggers work.
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _own_log(notes: list[str]) -> Iterator[None]:
    """Collect what the package warns of in notes, and keep it off the screen."""
    handler = _Collector(notes)
    logger = logging.getLogger("auto-attack")
    kept, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = kept


class _Collector(logging.Handler):
    def __init__(self, notes: list[str]):
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        # It ends by naming a page of another repository.
        self.notes.append(record.getMessage().split(" See flags_doc")[0])
