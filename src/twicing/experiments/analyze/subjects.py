"""What is looked at: trained models of a run folder, a model of transformers, or models of timm, and what each sees."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from twicing.experiments.analyze.keep import ANALYSIS
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.cases.case import Case, Put, folder_kind, refuse
from twicing.experiments.cases.inputs import Wanted
from twicing.experiments.cases.timm import timm_case
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.results import BASELINE
from twicing.names import few

# Curves and maps of more models than this cannot be told apart.
MOST_SHOWN = 4


@dataclass(frozen=True)
class Looked:
    """One model. shown: whether it is drawn where not every model can be.

    twice: whether it is to be twiced as well in the bandwidth test.
    """

    case: Case
    shown: bool
    twice: bool = False

    def build(self) -> nn.Module:
        """The model, in eval mode, its attention through scaled_dot_product_attention, where it can be seen."""
        model = self.case.build()
        for module in model.modules():
            # timm has a second way to compute the same, by hand, which TIMM_FUSED_ATTN=0 asks for.
            if getattr(module, "fused_attn", True) is False:
                module.fused_attn = True  # type: ignore[assignment]
        return model


def looked_at(options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    """The models that the options name, the folder for what is found, and what is left out, in sentences.

    Raises ValueError where options do not fit together or a model cannot be made.
    """
    if not options.models:
        raise ValueError("name a run folder, a folder that transformers saved, or vision transformers of timm.")
    folders = [Path(name) for name in options.models if Path(name).is_dir()]
    if not folders:
        return _of_timm(options)
    kind = folder_kind(folders[0])
    if len(options.models) > 1:
        what = "a run folder" if kind == "ours" else "a folder of transformers"
        raise ValueError(f"{folders[0]} is {what}: look at it alone, or at models of timm side by side.")
    return _of_run(folders[0], options) if kind == "ours" else _of_transformers(folders[0], options)


def _of_run(run: Path, options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    from twicing.experiments.cases.run_folder import OF_OTHERS, OWN, hidden, job_case
    from twicing.experiments.trained import trained_jobs

    refuse(options, OF_OTHERS, f"{run} {OWN}")
    jobs, untrained = trained_jobs(run, options.data_dir)
    left_out = [f"Not trained yet: {few(untrained)}."] if untrained else []
    cases = []
    for job in jobs:
        reason = hidden(job)
        if reason:
            left_out.append(f"{job.name}: {reason}")
        else:
            cases.append(job_case(job, _most(options), answers=True))
    if not cases:
        raise ValueError(f"nothing could be looked into: {' '.join(left_out)}")
    # Inputs are compared between models, and each seed holds out its own.
    of_seed = [one for one in cases if one.seed == cases[0].seed]
    of_seed = ([one for one in of_seed if not one.control] or of_seed)[:MOST_SHOWN]
    return [Looked(one, one in of_seed) for one in cases], options.out or run / ANALYSIS, left_out


def _of_transformers(folder: Path, options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    from twicing.experiments.cases.hugging_face import hugging_face_case

    put = Put(options.convert, options.layers, options.options)
    # Without a mechanism, put sees to it that no options of one were given.
    puts = [Put(), put] if options.convert else [put]
    cases = [hugging_face_case(folder, options, _wanted(options), one, answers=True) for one in puts]
    return _side_by_side(cases, options), _out(options, cases[0]), []


def _of_timm(options: Analyze) -> tuple[list[Looked], Path, list[str]]:
    refuse(options, ("text", "tokens"), f"{', '.join(options.models)} is of timm, whose models see pictures")
    if len(options.checkpoint) not in (0, len(options.models)):
        raise ValueError(
            f"--checkpoint takes one file for each of the {len(options.models)} models: got {len(options.checkpoint)}."
        )
    if not options.convert and (options.layers != "all" or options.options):
        raise ValueError("--layers and --options are of a mechanism: name it with --convert.")
    if options.data_dir is not None:
        raise ValueError("--data-dir is for run folders: give models of timm their pictures with --images.")
    cases = []
    for place, name in enumerate(options.models):
        plain = Evaluate(
            name,
            checkpoint=options.checkpoint[place] if options.checkpoint else None,
            pretrained=options.pretrained,
            model_args=options.model_args,
            seed=options.seed,
        )
        asked = [plain]
        if options.convert:
            put_in = {"mechanism": options.convert, "layers": options.layers, "options": options.options}
            asked.append(dataclasses.replace(plain, **put_in))  # type: ignore[arg-type]
        cases += [timm_case(one, _wanted(options), "to look at") for one in asked]
    # The seed drew their weights, where they are not trained.
    cases = [dataclasses.replace(one, seed=options.seed) for one in _told_apart(cases)]
    trained = bool(options.checkpoint) or options.pretrained
    untrained = [] if trained else ["Weights are random: give --checkpoint FILE or --pretrained to see trained models."]
    return _side_by_side(cases, options), _out(options, cases[0]), untrained


def _side_by_side(cases: list[Case], options: Analyze) -> list[Looked]:
    return [
        Looked(one, place < MOST_SHOWN, twice=one.mechanism == BASELINE and not options.convert)
        for place, one in enumerate(cases)
    ]


def _out(options: Analyze, first: Case) -> Path:
    return options.out or Path("runs") / f"analyze-{first.folder_name}"


def _most(options: Analyze) -> int:
    return max(options.spectrum_images, options.map_images, options.bandwidth_images)


def _wanted(options: Analyze) -> Wanted:
    return Wanted(_most(options), options.images, options.text, options.tokens, options.seed)


def _told_apart(cases: list[Case]) -> list[Case]:
    """The same name with other weights gets them behind it. Raises ValueError where all of it is the same."""
    labels = [one.label for one in cases]
    named = [
        dataclasses.replace(one, label=f"{one.label} ({one.weights})") if labels.count(one.label) > 1 else one
        for one in cases
    ]
    if len({one.label for one in named}) < len(named):
        raise ValueError(f"the same model was named twice ({named[0].label}): name it once, or give other weights.")
    return named
