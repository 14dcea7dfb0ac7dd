"""What `twicing theory` can be told: the command line is made of this dataclass."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TheoryOptions:
    """Compute what the theory of twicing states, and where it ends: about a minute on one core, no data needed.

    Writes theory.html with figures, results.json with every number, and claims.csv.

    Example: twicing theory --only bias eigencapacity
    """

    only: tuple[str, ...] = ()
    """Run these only, by name; all by default. A wrong name prints the names there are."""
    seed: int = 0
    """Decides every random draw."""
    out: Path = Path("runs/theory")
    """The folder for the page and the numbers."""
