"""What `twicing bench ops | decode | model` can be told: the command line is made of these dataclasses.

The default shapes are those that the library's goals are stated for.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("runs/bench")


@dataclass(frozen=True)
class OpsOptions:
    """Time one attention call: SDPA once and twice, the papers' dense form, and every backend of twicing.

    Contenders that miss their budget of error against fp64 get no time. Writes a CSV and a plot.

    Example: twicing bench ops --shapes 32x3x197x64 2x8x1024x64-causal --threads 2
    """

    shapes: tuple[str, ...] = (
        "32x3x197x64",
        "8x8x256x16",
        "2x8x1024x64",
        "2x8x1024x64-causal",
        "1x8x4096x64",
        "1x8x4096x64-causal",
    )
    """Batch, heads, tokens and width, BxHxNxD, with -causal behind it for causal attention."""
    contenders: tuple[str, ...] = ()
    """Time these only (SDPA is always there, for the ratios); all by default."""
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
    """The folder for the CSV and the plot."""


@dataclass(frozen=True)
class DecodeOptions:
    """Time cached decoding per new token: twicing against plain attention, and against the bytes that each reads.

    Example: twicing bench decode --lengths 1024 4096
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens in the cache."""
    batch: int = 1
    """Sequences side by side."""
    heads: int = 8
    """Query heads."""
    groups: tuple[int, ...] = (1, 4)
    """Query heads that share a key head: 1 is multi-head, 4 is grouped-query attention."""
    width: int = 64
    """Width of a head."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of the CPU; torch's own choice by default."""
    repeats: int = 200
    """Measure each contender so often ..."""
    seconds: float = 1.0
    """... or for so many seconds, whichever is less (but three times at least)."""
    out: Path = FOLDER
    """The folder for the CSV."""


@dataclass(frozen=True)
class ModelOptions:
    """The papers' cost table for a vision transformer of timm: time per image, training step, multiply-adds.

    Example: twicing bench model --batch 32 --seconds 5
    """

    model: str = "deit_tiny_patch16_224"
    """A vision transformer of timm, by name; its weights are random."""
    layers: tuple[str, ...] = ("10-12", "7-12", "1-12")
    """Which layers are twiced, counted from 1: all, 10-12, first-3, last-3, or 1,2,3; one row each, beside the standard
    model."""
    backends: tuple[str, ...] = ("auto", "sdpa")
    """What computes twicing: the first for all rows, and a row more for each other one, with the last layers."""
    dtype: str = "float32"
    """float32, or bfloat16 or float16 by autocast."""
    batch: int = 16
    """Images of a batched forward and of a training step."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of the CPU; torch's own choice by default."""
    repeats: int = 1000
    """Measure each model so often (the papers: 1000, after as many to warm up) ..."""
    seconds: float = 8.0
    """... or for so many seconds, whichever is less (but three times at least)."""
    out: Path = FOLDER
    """The folder for the CSV."""
