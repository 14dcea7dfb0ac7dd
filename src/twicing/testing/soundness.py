"""Is a mechanism sound? One call says so, or names every check that failed."""

from collections.abc import Collection
from dataclasses import replace

from twicing.names import listed
from twicing.testing.budget import Formula
from twicing.testing.checks import CHECKS, LATER, Factory, FormulaAcross, Subject, UnsoundError


class MechanismError(AssertionError):
    """A mechanism failed a check. `failed` maps the name of each failed check to what was seen."""

    def __init__(self, name: str, failed: dict[str, str]) -> None:
        self.failed = failed
        lines = [f"{name} fails {len(failed)} of the checks of check_mechanism():"]
        super().__init__("\n".join(lines + [f"  {check}: {seen}" for check, seen in failed.items()]))


def check_mechanism(
    factory: Factory,
    *,
    formula: Formula | None = None,
    formula_across: FormulaAcross | None = None,
    causal: bool = True,
    skip: Collection[str] = (),
) -> None:
    """Raise MechanismError, naming each check of CHECKS that fails, where a mechanism is not sound.

    factory: (layer, num_heads, head_dim) -> module, whose forward is that of twicing.mechanisms.base.Mechanism.
    formula: what it claims to compute from the smoother v -> A v and the values, A = softmax(scale Q K^T + mask), as
        `check_mechanism(MyTwicing, formula=twicing.boost)`. Where the output is a well-known wrong one, the error
        names it. Of a mechanism that needs a context it is the claim for layer 1 alone.
    formula_across: the claim for later layers of a mechanism that needs a context, from the smoother, the values, and
        the values of earlier layers by number, as `lambda smooth, v, earlier: smooth(v) + 0.6 * (earlier[1] - v)`.
    causal: False for a mechanism that is for encoders only.
    skip: names of checks that do not apply, as "permutation" for one that knows positions.
    Checked without dropout, on the CPU, in fp64 where exactness is asked, for layer 1, and if that is sound for layer
    3: a mechanism that declares so gets its context there from layers 1 and 2, as in a model, and what it reads is an
    input like any other for masks, permutation and gradients. Draws nothing from the global random state.
    """
    for name in skip:
        if name not in CHECKS:
            raise ValueError(f"Unknown check {name!r}: {listed(name, CHECKS)}")
    first = Subject(factory, formula, causal)
    failed = _failed(first, skip)
    if not failed:
        later = replace(first, layer=LATER, formula_across=formula_across)
        failed = {name: f"in layer {LATER}: {seen}" for name, seen in _failed(later, skip).items()}
    if failed:
        raise MechanismError(getattr(factory, "__name__", repr(factory)), failed)


def checked(factory: Factory, name: str) -> Factory:
    """The factory itself, where it passes check_mechanism() as attention for encoders, which vision models are.

    Raises ValueError, naming the failed checks and what was seen, where training it would give meaningless numbers.
    """
    try:
        check_mechanism(factory, causal=False)
    except MechanismError as error:
        seen = "; ".join(f"{check}: {what}" for check, what in error.failed.items())
        raise ValueError(
            f"The mechanism {name!r} is not sound, so that numbers from it would mean nothing. It fails {seen}. "
            "twicing.testing.check_mechanism() repeats this, and docs/own_mechanism.md says what each check asks."
        ) from error
    return factory


def _failed(subject: Subject, skip: Collection[str]) -> dict[str, str]:
    failed: dict[str, str] = {}
    for name, check in CHECKS.items():
        if name in skip or (name == "causality" and not subject.causal):
            continue
        try:
            check(subject)
        except UnsoundError as seen:
            failed[name] = str(seen)
        except Exception as error:
            # Whatever a mechanism raises is a finding about it, and the other checks still have something to say.
            failed[name] = f"raised {type(error).__name__}: {error}"
    return failed
