"""The benchmarks on a machine with nothing but torch: python -m twicing.experiments.bench ops '{"dtype": "bfloat16"}'.

The options are those of `twicing bench`, as JSON; where the packages of the command line are, that is nicer.
"""

import json
import sys
from pathlib import Path
from typing import Any

from twicing.experiments.bench.decode import bench_decode
from twicing.experiments.bench.linear import bench_linear
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.model import bench_model
from twicing.experiments.bench.ops import bench_ops
from twicing.experiments.bench.options import DecodeOptions, ModelOptions, OpsOptions
from twicing.experiments.bench.screen import PlainScreen
from twicing.names import listed

_BENCHES: dict[str, tuple[Any, Any]] = {
    "ops": (OpsOptions, bench_ops),
    "decode": (DecodeOptions, bench_decode),
    "model": (ModelOptions, bench_model),
    "linear": (LinearOptions, bench_linear),
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named; 0 where it came to the end."""
    name, given, *_ = [*arguments, "{}"] if arguments else ["", ""]
    if name not in _BENCHES:
        raise SystemExit(f"Unknown benchmark {name!r}: {listed(name, _BENCHES)}")
    kind, bench = _BENCHES[name]
    try:
        return 0 if bench(_options(kind, json.loads(given)), PlainScreen()) else 130
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'twicing[lab]'") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _options(kind: Any, given: dict[str, Any]) -> Any:
    """The options with what was given: lists become tuples, and `out` a path."""
    unknown = sorted(set(given) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r}: {listed(unknown[0], kind.__dataclass_fields__)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "out" in values:
        values["out"] = Path(values["out"])
    return kind(**values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
