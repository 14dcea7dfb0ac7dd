"""What is looked at: the trained models of a run folder, or models of timm, each with the pictures it is shown."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from twicing.experiments.analyze.keep import ANALYSIS
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.analyze.pictures import Pictures, folder_pictures, held_out_pictures, photographs
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.pretrained import timm_subject
from twicing.experiments.evaluate.subjects import Subject, trained_subjects
from twicing.experiments.plan import CONFIG
from twicing.experiments.results import BASELINE
from twicing.training.settings import parse_options

# Curves and maps of more models than this cannot be told apart.
MOST_SHOWN = 4


@dataclass(frozen=True)
class Looked:
    """One model. shown: whether it is drawn where not every model can be. trained: whether its weights are.

    pictures: reads so many of what it is shown. twice: whether it is to be twiced as well in the bandwidth test.
    """

    subject: Subject
    shown: bool
    trained: bool
    pictures: Callable[[int], Pictures]
    twice: bool = False

    @property
    def name(self) -> str:
        """What tables and the JSON call it."""
        return self.subject.name

    def build(self) -> nn.Module:
        """The model, in eval mode, its attention through scaled_dot_product_attention, where it can be seen."""
        model = self.subject.build()
        for module in model.modules():
            # timm has a second way to compute the same, by hand, which TIMM_FUSED_ATTN=0 asks for.
            if getattr(module, "fused_attn", True) is False:
                module.fused_attn = True  # type: ignore[assignment]
        return model


def looked_at(options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    """The models that the options name, the folder for what is found, and what is left out, in sentences.

    Raises ValueError where options do not fit together or a model cannot be made.
    """
    folders = [name for name in options.models if (Path(name) / CONFIG).is_file()]
    if folders and len(options.models) > 1:
        raise ValueError(f"{folders[0]} is a run folder: look at it alone, or at models of timm side by side.")
    if folders:
        return _of_run(Path(folders[0]), options)
    return _of_timm(options)


def _of_run(run: Path, options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    given = {
        "--images": options.images is not None,
        "--checkpoint": bool(options.checkpoint),
        "--pretrained": options.pretrained,
        "--convert": bool(options.convert),
        "--layers": options.layers != "all",
        "--options": bool(options.options),
        "--model-args": bool(options.model_args),
    }
    wrong = [name for name, there in given.items() if there]
    if wrong:
        raise ValueError(
            f"{run} is a run folder, whose models have weights, mechanisms and held-out images of their own: "
            f"leave {', '.join(wrong)} out."
        )
    subjects, untrained = trained_subjects(run, options.data_dir)
    # Images are compared between models, and each seed holds out its own.
    of_seed = [one for one in subjects if one.seed == subjects[0].seed]
    of_seed = ([one for one in of_seed if not one.control] or of_seed)[:MOST_SHOWN]
    models = [Looked(one, one in of_seed, True, _held_out(one)) for one in subjects]
    return models, options.out or run / ANALYSIS, [f"Not trained yet: {', '.join(untrained)}."] * bool(untrained)


def _held_out(subject: Subject) -> Callable[[int], Pictures]:
    return lambda count: held_out_pictures(subject.held_out(), count)


def _of_timm(options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    if not options.models:
        raise ValueError("name a run folder, or one or more of timm's vision transformers.")
    if len(options.checkpoint) not in (0, len(options.models)):
        raise ValueError(
            f"--checkpoint takes one file for each of the {len(options.models)} models: got {len(options.checkpoint)}."
        )
    if not options.convert and (options.layers != "all" or options.options):
        raise ValueError("--layers and --options are of a mechanism: name it with --convert.")
    if options.data_dir is not None:
        raise ValueError("--data-dir is for run folders: give models of timm their pictures with --images.")
    if parse_options(options.model_args).get("in_chans", 3) != 3:
        raise ValueError("pictures have three colours: leave in_chans out of --model-args.")
    subjects = []
    for place, name in enumerate(options.models):
        plain = Evaluate(
            name,
            checkpoint=options.checkpoint[place] if options.checkpoint else None,
            pretrained=options.pretrained,
            model_args=options.model_args,
            seed=options.seed,
        )
        subjects.append(_timm(plain))
        if options.convert:
            converted = dataclasses.replace(
                plain, mechanism=options.convert, layers=options.layers, options=options.options
            )
            subjects.append(_timm(converted))
    subjects = _told_apart(subjects)
    trained = bool(options.checkpoint) or options.pretrained
    models = [
        Looked(one, place < MOST_SHOWN, trained, _pictures(one, options), twice=_as_it_is(one) and not options.convert)
        for place, one in enumerate(subjects)
    ]
    untrained = [] if trained else ["Weights are random: give --checkpoint FILE or --pretrained to see trained models."]
    return models, options.out or Path("runs") / f"analyze-{subjects[0].folder_name}", untrained


def _timm(options: Evaluate) -> Subject:
    try:
        return timm_subject(options)
    except ValueError as error:
        # Its sentences name the option of `twicing evaluate`.
        raise ValueError(str(error).replace("--mechanism", "--convert").replace("to evaluate", "to look at")) from error


def _as_it_is(subject: Subject) -> bool:
    return subject.mechanism == BASELINE


def _told_apart(subjects: list[Subject]) -> list[Subject]:
    """The same name with other weights gets them behind it. Raises ValueError where all of it is the same."""
    labels = [one.label for one in subjects]
    named = [
        dataclasses.replace(one, label=f"{one.label} ({one.weights})") if labels.count(one.label) > 1 else one
        for one in subjects
    ]
    if len({one.label for one in named}) < len(named):
        raise ValueError(f"the same model was named twice ({named[0].label}): name it once, or give other weights.")
    return named


def _pictures(subject: Subject, options: Analyze) -> Callable[[int], Pictures]:
    if options.images is not None:
        folder = options.images
        return lambda count: folder_pictures(folder, count, subject.image_size)
    return lambda count: photographs(count, subject.image_size, options.seed)
