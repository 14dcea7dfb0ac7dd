"""What an evaluation consists of: for every model its parts, each with the settings that decide its numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from twicing.data.images import FolderImages, Images
from twicing.data.shifted import IMAGENET_C_SIDE, ClassSubset, imagenet_c, imagenet_c_folders, plain_set, subset
from twicing.data.transforms import SHARES, test_transform
from twicing.experiments.evaluate import bench as on
from twicing.experiments.evaluate.options import ATTACKS, NO_ATTACK, Evaluate
from twicing.experiments.evaluate.pretrained import IMAGENET_CLASSES, imagenet_synsets, synsets_of
from twicing.experiments.evaluate.subjects import Subject
from twicing.experiments.parts import Part
from twicing.names import listed
from twicing.robustness.corruptions import CORRUPTIONS, SMALLEST_SIDE
from twicing.robustness.threat import Threat, as_fraction

GENERATE_ALL = "generated"
HELD_OUT = "held-out"
ADVERSARIAL = "adversarial"
# The sizes that papers of this line plot, in normalised units.
COMPAT_EPS = [f"{size}/255" for size in range(1, 7)]


@dataclass(frozen=True)
class Task:
    """One part of one model's evaluation; its file has its name.

    settings: what decides its numbers beside the model. images: the set that its answers are on, HELD_OUT or another.
    last: it looks at the seed's other models, and so comes after all their parts. passes: about how many times the
    model is shown an image, at most; needs nothing but the order of magnitude.
    """

    subject: Subject
    name: str
    settings: dict[str, Any]
    images: str
    passes: int
    run: Callable[[on.Bench], Part]
    last: bool = False


def tasks_of(subjects: list[Subject], options: Evaluate, folder: Path) -> list[Task]:
    """All parts that the options ask for, model by model; folders of test sets are listed, nothing is decoded.

    Raises ValueError for unknown attacks, sizes and corruptions, for test sets that are incomplete or of other classes,
    and where nothing is asked for.
    """
    _check(options, subjects[0])
    # One recipe, or one model: all subjects take images of one size and have the same classes.
    sets = _Sets(options, subjects[0])
    tasks = [task for subject in subjects for task in _tasks(subject, options, sets, folder)]
    if "verdict" in options.attacks:
        tasks += [_verdict(subject, subjects, options, folder) for subject in subjects]
    if not tasks:
        raise ValueError("there is nothing to evaluate: name --attacks, --corruptions or a test set.")
    return tasks


def file_of(subject: Subject, folder: Path, name: str) -> Path:
    """Where a finished part of a model is kept."""
    return folder / subject.folder_name / f"{name}.json"


class _Sets:
    """The other test sets that were named, each listed once for all models."""

    def __init__(self, options: Evaluate, subject: Subject):
        named = (options.imagenet_c, options.imagenet_a, options.imagenet_r, options.imagenet_v2, options.sketch)
        self.by_kind: dict[str, dict[int, FolderImages]] = {}
        self.others: dict[str, Images | ClassSubset] = {}
        if not any(named):
            return
        _check_imagenet(subject, options)
        synsets, transform = imagenet_synsets(), test_transform(subject.image_size, options.transform)
        for name, root in (("ImageNet-A", options.imagenet_a), ("ImageNet-R", options.imagenet_r)):
            if root is not None:
                self.others[name] = subset(root, synsets, transform, own=synsets_of(name))
        for name, root in (("ImageNet-V2", options.imagenet_v2), ("ImageNet-Sketch", options.sketch)):
            if root is not None:
                self.others[name] = plain_set(root, synsets, transform)
        if options.imagenet_c is not None:
            for (kind, severity), place in imagenet_c_folders(options.imagenet_c, options.imagenet_c_kinds).items():
                self.by_kind.setdefault(kind, {})[severity] = imagenet_c(place, synsets)
        _check_equal_numbers(self.by_kind)


def _tasks(subject: Subject, options: Evaluate, sets: _Sets, folder: Path) -> list[Task]:
    n, eps = options.images, list(options.eps or subject.protocol.eps)
    noise = list(options.noise or subject.protocol.noise)
    pgd = {"steps": options.pgd_steps, "restarts": options.pgd_restarts}
    spsa = {"iterations": options.spsa_iterations, "samples": options.spsa_samples}
    probes: dict[str, Any] = {"images": n}

    def task(name: str, settings: dict[str, Any], passes: int, run: Callable[..., Part], *given: Any) -> Task:
        return Task(subject, name, settings, HELD_OUT, passes, partial(_call, run, given))

    found: list[Task] = []
    for attack in dict.fromkeys(options.attacks):
        if attack == "clean":
            found.append(task("clean", {}, 10_000, on.clean))
        elif attack == "noise":
            found.append(task("noise", probes | {"sd": noise}, n * len(noise), on.noise, noise))
        elif attack == "fgsm":
            found.append(task("fgsm", probes | {"eps": eps}, 4 * n * len(eps), on.signed_step, eps))
        elif attack == "pgd":
            passes = 6 * n * options.pgd_steps * options.pgd_restarts * len(eps)
            found.append(task("pgd", probes | pgd | {"eps": eps}, passes, on.pgd_curve, eps))
        elif attack == "spsa":
            passes = 2 * n * options.spsa_iterations * options.spsa_samples
            found += [task(_named("spsa", size), probes | spsa, passes, on.spsa_at, size) for size in eps]
        elif attack == "autoattack":
            # One batch shares AutoAttack's random numbers.
            settings = probes | {"batch_size": options.batch_size}
            found += [task(_named("autoattack", size), settings, 1000 * n, on.autoattack_at, size) for size in eps]
        elif attack == "paper_compat":
            settings = probes | {"eps": COMPAT_EPS}
            found.append(task("paper_compat", settings, 60 * n * len(COMPAT_EPS), on.as_papers_do, COMPAT_EPS))
    for kind in _corruptions(options):
        found.append(task(f"corruption-{kind}", probes, 5 * n, on.corruption, kind))
    found += _of_other_sets(subject, options.transform, sets)
    if "verdict" in options.attacks:
        size, images = options.verdict_eps or subject.protocol.verdict_eps, options.verdict_images
        settings = {"eps": size, "images": images, "steps": options.pgd_steps}
        file = folder / subject.folder_name / f"{ADVERSARIAL}.npy"
        found.append(task(ADVERSARIAL, settings, 4 * images * options.pgd_steps, on.adversarial, size, file))
    return found


def _of_other_sets(subject: Subject, transform: str, sets: _Sets) -> list[Task]:
    tasks = []
    for kind, images in sets.by_kind.items():
        n = {str(severity): len(one) for severity, one in images.items()}
        run = partial(on.released_corruption, kind=kind, images=images)
        tasks.append(Task(subject, f"imagenet-c-{kind}", {"images": n}, on.IMAGENET_C, sum(n.values()), run))
    for name, others in sets.others.items():
        count = len(others.images) if isinstance(others, ClassSubset) else len(others)
        settings = {"images": count, "transform": transform}
        run = partial(on.shifted, name=name, images=others)
        tasks.append(Task(subject, name.lower(), settings, name, count, run))
    return tasks


def _verdict(subject: Subject, subjects: list[Subject], options: Evaluate, folder: Path) -> Task:
    eps = options.verdict_eps or subject.protocol.verdict_eps
    others = [other for other in subjects if other.seed == subject.seed and other is not subject]
    files = {other.label: folder / other.folder_name / f"{ADVERSARIAL}.npy" for other in others}
    settings = {
        "eps": eps,
        "images": options.verdict_images,
        "steps": options.pgd_steps,
        "spsa_iterations": options.spsa_iterations,
        "spsa_samples": options.spsa_samples,
        "others": {other.label: other.weights for other in others},
    }
    passes = options.verdict_images * (1500 + 2 * options.spsa_iterations * options.spsa_samples // 2)
    run = partial(_call, on.verdict, (eps, files))
    return Task(subject, "verdict", settings, HELD_OUT, passes, run, last=True)


def _call(run: Callable[..., Part], given: tuple[Any, ...], bench: on.Bench) -> Part:
    return run(bench, *given)


def _named(attack: str, eps: str) -> str:
    """A part's name that is a file's name too: "spsa-1_255"."""
    return f"{attack}-{eps.replace('/', '_')}"


def _corruptions(options: Evaluate) -> list[str]:
    return list(CORRUPTIONS) if GENERATE_ALL in options.corruptions else list(dict.fromkeys(options.corruptions))


def _check(options: Evaluate, subject: Subject) -> None:
    if NO_ATTACK in options.attacks and len(options.attacks) > 1:
        raise ValueError(f"--attacks {NO_ATTACK} stands alone: got {' '.join(options.attacks)}.")
    for attack in options.attacks:
        if attack not in (*ATTACKS, NO_ATTACK):
            raise ValueError(f"unknown attack {attack!r}: {listed(attack, (*ATTACKS, NO_ATTACK))}")
    for kind in options.corruptions:
        if kind != GENERATE_ALL and kind not in CORRUPTIONS:
            raise ValueError(f"unknown corruption {kind!r}: {listed(kind, [GENERATE_ALL, *CORRUPTIONS])}")
    sizes = [_size(eps, "--eps") for eps in options.eps]
    if any(low >= high for low, high in pairwise(sizes)) or 0 in sizes:
        raise ValueError(f"--eps are sizes above 0, each larger than the one before: got {' '.join(options.eps)}.")
    if options.verdict_eps is not None and _size(options.verdict_eps, "--verdict-eps") == 0:
        raise ValueError("--verdict-eps is a size above 0: got 0.")
    if options.transform not in SHARES:
        raise ValueError(f"--transform is one of {', '.join(SHARES)}: got {options.transform!r}.")
    for sd in options.noise:
        if as_fraction(sd, "--noise") <= 0:
            raise ValueError(f"--noise are standard deviations above 0: got {sd}.")
    counts = ("verdict_images", "batch_size", "pgd_steps", "pgd_restarts", "spsa_iterations", "spsa_samples")
    for name, least in {"images": 0, **dict.fromkeys(counts, 1)}.items():
        if (count := getattr(options, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or larger: got {count}.")
    if options.imagenet_c_kinds and options.imagenet_c is None:
        raise ValueError("--imagenet-c-kinds are of --imagenet-c: name its folder.")
    if options.corruptions and subject.image_size < SMALLEST_SIDE:
        raise ValueError(
            f"the generated corruptions are for images of {SMALLEST_SIDE} pixels or more, and {subject.label} takes "
            f"{subject.image_size}: leave --corruptions out."
        )


def _size(eps: str, option: str) -> Fraction:
    try:
        return Threat(eps).eps
    except ValueError as error:
        raise ValueError(f"{option} {eps}: {error}") from error


def _check_equal_numbers(by_kind: Mapping[str, Mapping[int, FolderImages]]) -> None:
    counts = {images.root: len(images) for severities in by_kind.values() for images in severities.values()}
    if len(set(counts.values())) > 1:
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise ValueError(
            f"{fewest} holds {counts[fewest]} images and {most} {counts[most]}: all severities are of the same images. "
            "Unpack the archives again."
        )


def _check_imagenet(subject: Subject, options: Evaluate) -> None:
    if subject.classes != IMAGENET_CLASSES:
        raise ValueError(
            f"ImageNet's test sets need a model of its {IMAGENET_CLASSES} classes: "
            f"{subject.label} has {subject.classes}."
        )
    if subject.names_classes and subject.held_out().images.classes != imagenet_synsets():
        raise ValueError(
            f"ImageNet's test sets need classes that are called by its synsets, as n01440764: {subject.label} was "
            f"trained on {', '.join(subject.held_out().images.classes[:3])}, ..."
        )
    if options.imagenet_c is not None and subject.image_size != IMAGENET_C_SIDE:
        raise ValueError(
            f"ImageNet-C is released for {IMAGENET_C_SIDE} pixels and not to be resized: "
            f"{subject.label} takes {subject.image_size}."
        )
