"""What `twicing bench linear` can be told: the command line is made of this dataclass."""

from dataclasses import dataclass
from pathlib import Path

from twicing.experiments.bench.options import FOLDER


@dataclass(frozen=True)
class LinearOptions:
    """Time linear attention, plain and twiced, against the number of tokens: slopes, ratio, and where softmax crosses.

    Correctness first, against the dense matrix in fp64. Writes a CSV; prints the slopes of time and memory (1 is
    linear), and from how many tokens on linear attention is faster than softmax attention.

    Example: twicing bench linear --lengths 1024 4096 16384 --threads 2
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Numbers of tokens."""
    softmax_up_to: int = 8192
    """Time softmax attention too, up to so many tokens: its time grows with their square."""
    causal: bool = True
    """Measure causal attention too."""
    batch: int = 1
    """Sequences side by side."""
    heads: int = 4
    """Heads."""
    width: int = 64
    """Width of a head."""
    feature_map: str = "elu+1"
    """elu+1, relu or dpfp."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of the CPU; torch's own choice by default."""
    repeats: int = 50
    """Measure each contender so often ..."""
    seconds: float = 0.6
    """... or for so many seconds, whichever is less (but three times at least)."""
    memory: bool = True
    """Measure peak memory too, each time in a process of its own on the CPU."""
    out: Path = FOLDER
    """The folder for the CSV."""
