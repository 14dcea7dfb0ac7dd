"""Whether an arm's attacks are to be believed: the verdicts on gradient masking that a run folder holds, in words.

verdicts.json: {"<arm>": {"<seed>": {"passed", "eps", "images", "sentence", "checks": [{"name", "passed", "seen"}],
"accuracies": {"<attack>": share}}}}; accuracies may be left out.
A folder without the file was not examined, and then no attack of it shows robustness.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twicing.experiments.results import read_json

VERDICTS = "verdicts.json"
NOT_LOOKED_FOR = "gradient masking was not looked for"
NO_SIGN = "no sign of gradient masking"
NOT_ESTABLISHED = "robustness not established"


@dataclass(frozen=True)
class SeenCheck:
    """One check of a verdict. seen: the numbers that it saw, in a short sentence."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class SeedVerdict:
    """The verdict on one trained model, made at one eps on so many images.

    strongest: the accuracy that its longest PGD left, None where that is not recorded.
    """

    seed: int
    passed: bool
    eps: str
    images: int
    checks: tuple[SeenCheck, ...]
    strongest: float | None = None

    @property
    def failed(self) -> list[SeenCheck]:
        """The checks that it did not pass."""
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True)
class ArmVerdict:
    """The verdicts on an arm's models; none of them where gradient masking was not looked for."""

    arm: str
    seeds: tuple[SeedVerdict, ...]

    @property
    def passed(self) -> bool | None:
        """Whether every model that was examined passed; None where none was."""
        return all(one.passed for one in self.seeds) if self.seeds else None

    @property
    def words(self) -> str:
        """The verdict in words, with its reason where it is not good."""
        if not self.seeds:
            return NOT_LOOKED_FOR
        if self.passed:
            return f"{NO_SIGN} ({_seeds([one.seed for one in self.seeds])})"
        return f"{NOT_ESTABLISHED}: {self.reason}"

    @property
    def reason(self) -> str:
        """Every check that failed, with the first numbers that it saw and the seeds on which it failed."""
        failed: dict[str, list[tuple[int, str]]] = {}
        for one in self.seeds:
            for check in one.failed:
                failed.setdefault(check.name, []).append((one.seed, check.seen))
        return "; ".join(
            f"{name} ({_seeds([seed for seed, _ in seen])}: {seen[0][1].rstrip('.')})" for name, seen in failed.items()
        )


Verdicts = Mapping[str, ArmVerdict]


def verdict_on(verdicts: Verdicts, arm: str) -> ArmVerdict:
    """The verdict on an arm, which may be that nobody looked."""
    return verdicts.get(arm, ArmVerdict(arm, ()))


def doubt(verdicts: Verdicts, *arms: str) -> str:
    """What stands next to a claim about these arms' robustness: empty only where every one of them passed.

    A difference is a claim about both of its sides: standard that only looks robust makes the other look weak.
    """
    found = [verdict_on(verdicts, arm) for arm in arms]
    failed = [one.arm for one in found if one.passed is False]
    unknown = [one.arm for one in found if one.passed is None]
    parts = [f"the verdict on gradient masking failed for {' and '.join(failed)}"] if failed else []
    if unknown:
        parts.append(NOT_LOOKED_FOR + (f" in {' and '.join(unknown)}" if len(unknown) < len(found) else ""))
    return f"{NOT_ESTABLISHED}, as {', and '.join(parts)}" if parts else ""


def read_verdicts(folder: Path) -> dict[str, ArmVerdict]:
    """The verdicts of a run folder by arm; empty where it has no verdicts.json.

    Raises ValueError, naming file, arm and seed, where an entry is not what it should be.
    """
    path = folder / VERDICTS
    if not path.is_file():
        return {}
    entries = read_json(path)
    found = {}
    for arm, by_seed in _mapping(entries, path, "the file").items():
        seeds = _mapping(by_seed, path, f"arm {arm!r}")
        of_seeds = [_verdict(entry, seed, path, f"arm {arm!r}, seed {seed}") for seed, entry in seeds.items()]
        found[arm] = ArmVerdict(arm, tuple(sorted(of_seeds, key=lambda one: one.seed)))
    return found


def _mapping(value: Any, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}, {where}: expected an object, got {value!r}. {_REMEDY}")
    return value


def _verdict(entry: Any, seed: str, path: Path, where: str) -> SeedVerdict:
    given = _mapping(entry, path, where)
    try:
        checks = tuple(
            SeenCheck(str(check["name"]), _truth(check["passed"]), str(check["seen"])) for check in given["checks"]
        )
        left = [float(value) for name, value in given.get("accuracies", {}).items() if _LONGEST.fullmatch(name)]
        one = SeedVerdict(
            int(seed),
            _truth(given["passed"]),
            str(given["eps"]),
            int(given["images"]),
            checks,
            min(left, default=None),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, {where}: a verdict is incomplete or of another form ({error}). {_REMEDY}") from error
    if one.passed is bool(one.failed):
        raise ValueError(
            f"{path}, {where}: passed is {one.passed}, and of its {len(checks)} checks {len(one.failed)} failed: "
            f"the two do not fit. {_REMEDY}"
        )
    return one


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


# As in "PGD-100 x 5": steps and restarts.
_LONGEST = re.compile(r"PGD-\d+ x \d+")
_REMEDY = "Delete the file and run the same command again."


def _seeds(seeds: list[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)}"
