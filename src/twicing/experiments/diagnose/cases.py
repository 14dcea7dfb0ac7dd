"""What is diagnosed: the models that the options name."""

from pathlib import Path

from twicing.experiments.cases.case import Case, Put, folder_kind, refuse
from twicing.experiments.cases.inputs import Wanted
from twicing.experiments.cases.timm import timm_case
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.report import DIAGNOSIS
from twicing.experiments.results import BASELINE


def cases_of(options: Diagnose) -> tuple[list[Case], Path, list[str]]:
    """The models that the options name, the folder for what is found, and what is left out, in sentences.

    Raises ValueError where options do not fit together or a model cannot be made.
    """
    folder = Path(options.model)
    wanted = Wanted(options.inputs, options.images, options.text, options.tokens, options.seed)
    notes: list[str] = []
    if folder.is_dir() and folder_kind(folder) == "transformers":
        from twicing.experiments.cases.hugging_face import hugging_face_case

        put = Put(options.convert, options.layers, options.options)
        case = hugging_face_case(folder, options, wanted, put, answers=False)
    elif folder.is_dir():
        from twicing.experiments.diagnose.run_folder import run_folder_cases

        cases, notes = run_folder_cases(folder, options)
        return cases, options.out or folder / DIAGNOSIS, notes
    else:
        case = _of_timm(options, wanted)
        if options.checkpoint is None and not options.pretrained:
            notes = ["The weights are random: give --checkpoint FILE or --pretrained for a trained model."]
    return [case], options.out or Path("runs") / f"diagnose-{case.folder_name}", notes


def _of_timm(options: Diagnose, wanted: Wanted) -> Case:
    refuse(options, ("text", "tokens", "arms", "seeds", "data_dir"), f"{options.model} is a model of timm")
    asked = Evaluate(
        options.model,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        mechanism=options.convert or BASELINE,
        layers=options.layers,
        options=options.options,
        model_args=options.model_args,
        seed=options.seed,
    )
    return timm_case(asked, wanted, "to diagnose")
