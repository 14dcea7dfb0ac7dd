"""Make docs/results.md from run folders of comparisons and of scripts/retrofit.py; every number on it is theirs.

Run it: python scripts/results_page.py runs/mnist runs/cifar10 runs/ptb runs/retrofit
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from twicing.experiments.results_table import results_markdown

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
INTRODUCTION = """# Results

Made by `python scripts/results_page.py RUN...` from run folders alone. The command above a table makes its run again.

How to read a table: the first number of a cell is the mean over seeds ± their standard deviation; below it the mean
difference to standard attention on the same seed with its paired 95 % interval (Student's t, uncorrected); below that
what it shows. Primary metrics were declared before the run, and their words are corrected by Holm over mechanisms and
primary metrics; all other words are uncorrected. Controls test the experiment and are outside of the correction.
"No difference shown" is not "equal": the smallest difference that could have been shown stands beside it. eps50 is the
median over images of the smallest PGD eps that fools the model, a share of the pixel range. Robustness counts as
established only where no check found a sign of gradient masking. Step ratios are of trainings that ran side by side
while the machine did other work as well, which their intervals show; `twicing bench model` times steps properly.
CIFAR-10 was read from JPEG files, so it is CIFAR-10 (JPEG): its accuracies cannot be compared with published ones.
Penn Treebank's learning rate is the one of 0.002, 0.005 and 0.01 that standard attention did best with on the valid
part, with one seed; its seeds then spread so far that only large differences could have been shown."""


def page(folders: Sequence[Path]) -> str:
    """The whole page, with a section for each run folder in the order given."""
    return "\n\n".join([INTRODUCTION, *(section(folder).strip() for folder in folders)]) + "\n"


def section(folder: Path) -> str:
    """What a run folder has to say; a retrofit has written it itself."""
    written = folder / "results.md"
    return written.read_text(encoding="utf-8") if written.exists() else results_markdown(folder)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("name the run folders: python scripts/results_page.py RUN...")
    PAGE.write_text(page([Path(name) for name in sys.argv[1:]]), encoding="utf-8")
