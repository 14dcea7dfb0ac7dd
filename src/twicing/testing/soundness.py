"""Is a mechanism sound? One call says so, or names every check that failed."""

from collections.abc import Collection

from twicing.names import listed
from twicing.testing.budget import Formula
from twicing.testing.checks import CHECKS, Factory, Subject, UnsoundError


class MechanismError(AssertionError):
    """A mechanism failed a check. `failed` maps the name of each failed check to what was seen."""

    def __init__(self, name: str, failed: dict[str, str]) -> None:
        self.failed = failed
        lines = [f"{name} fails {len(failed)} of the checks of check_mechanism():"]
        super().__init__("\n".join(lines + [f"  {check}: {seen}" for check, seen in failed.items()]))


def check_mechanism(
    factory: Factory, *, formula: Formula | None = None, causal: bool = True, skip: Collection[str] = ()
) -> None:
    """Raise MechanismError, naming each check of CHECKS that fails, where a mechanism is not sound.

    factory: (layer, num_heads, head_dim) -> module, whose forward is that of twicing.mechanisms.base.Mechanism.
    formula: what it claims to compute from the smoother v -> A v and the values, A = softmax(scale Q K^T + mask), as
        `check_mechanism(MyTwicing, formula=twicing.boost)`. Where the output is a well-known wrong one, the error
        names it.
    causal: False for a mechanism that is for encoders only.
    skip: names of checks that do not apply, as "permutation" for one that knows positions.
    Checked for layer 1 without dropout, on the CPU, in fp64 where exactness is asked. Draws nothing from the global
    random state.
    """
    for name in skip:
        if name not in CHECKS:
            raise ValueError(f"Unknown check {name!r}: {listed(name, CHECKS)}")
    subject = Subject(factory, formula, causal)
    failed: dict[str, str] = {}
    for name, check in CHECKS.items():
        if name in skip or (name == "causality" and not causal):
            continue
        try:
            check(subject)
        except UnsoundError as seen:
            failed[name] = str(seen)
        except Exception as error:
            # Whatever a mechanism raises is a finding about it, and the other checks still have something to say.
            failed[name] = f"raised {type(error).__name__}: {error}"
    if failed:
        raise MechanismError(getattr(factory, "__name__", repr(factory)), failed)
