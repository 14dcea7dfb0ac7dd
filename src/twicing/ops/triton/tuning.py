"""How the kernels are cut into blocks, and which kernels serve a call: a small table, and no autotuning.

The entries fit into the shared memory of a Hopper GPU, and at D = 64 nearly into its registers, as the compiler says
(for sm_90, without a GPU); none has been timed yet. A benchmark tries others inside `tried(...)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Where one program owns a head, fewer heads than this leave most of the GPU idle: an H200 has 132 multiprocessors.
LEAST_HEADS = 132
# Up to so many tokens, all of A of a head is kept in registers.
SMALL_TOKENS = 256
# Where one program owns a head that has no causal order, its dQ should stay in the cache.
HEAD_BACKWARD_TOKENS = 1024


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of A in one tile, warps of a program, and stages of the pipeline that loads tiles."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Entry:
    """What serves widths up to `width` (D or Dv, the larger), for numbers of 2 bytes and of 4 (None: nothing)."""

    width: int
    half: Blocks
    single: Blocks | None


# Exact fp32 products need no tensor cores, and many registers: small tiles.
_SINGLE = Blocks(32, 16, 4, 1)
_SINGLE_SQUARE = Blocks(16, 16, 4, 1)

TABLE: dict[str, tuple[_Entry, ...]] = {
    "smooth": (
        _Entry(64, Blocks(128, 64, 4, 3), _SINGLE),
        _Entry(128, Blocks(128, 64, 8, 2), _SINGLE_SQUARE),
        _Entry(256, Blocks(64, 32, 8, 2), _SINGLE_SQUARE),
    ),
    "causal_head": (
        _Entry(64, Blocks(128, 64, 8, 1), _SINGLE),
        _Entry(128, Blocks(64, 32, 4, 2), _SINGLE_SQUARE),
        _Entry(256, Blocks(32, 32, 4, 1), _SINGLE_SQUARE),
    ),
    "small_head": (_Entry(64, Blocks(128, 256, 8, 1), None),),
    "boosted_gradient": (
        _Entry(64, Blocks(64, 128, 8, 2), _SINGLE),
        _Entry(128, Blocks(64, 64, 8, 2), _SINGLE_SQUARE),
        _Entry(256, Blocks(32, 32, 4, 1), _SINGLE_SQUARE),
    ),
    "key_gradients": (
        _Entry(64, Blocks(64, 128, 8, 2), _SINGLE_SQUARE),
        _Entry(128, Blocks(32, 64, 8, 1), _SINGLE_SQUARE),
        _Entry(256, Blocks(16, 32, 4, 1), _SINGLE_SQUARE),
    ),
    "query_gradients": (
        _Entry(64, Blocks(128, 64, 8, 2), _SINGLE),
        _Entry(128, Blocks(64, 32, 4, 1), _SINGLE_SQUARE),
        _Entry(256, Blocks(32, 16, 4, 1), _SINGLE_SQUARE),
    ),
    "head_backward": (
        _Entry(64, Blocks(64, 64, 8, 1), _SINGLE_SQUARE),
        _Entry(128, Blocks(32, 32, 4, 1), _SINGLE_SQUARE),
        _Entry(256, Blocks(16, 16, 4, 1), _SINGLE_SQUARE),
    ),
}

_tried: dict[str, Blocks] = {}
_tried_schedule: list[str] = []
SCHEDULES = ("auto", "heads", "blocks")


def blocks_of(kernel: str, width: int, element_size: int) -> Blocks | None:
    """The blocks of a kernel for D or Dv, the larger, and bytes of a number; None where it does not serve those."""
    if kernel in _tried:
        return _tried[kernel]
    for entry in TABLE[kernel]:
        if width <= entry.width:
            return entry.half if element_size == 2 else entry.single
    return None


def forward_kernel(tokens: int, heads: int, width: int, element_size: int, is_causal: bool, order: int) -> str:
    """Which kernel makes the output: "smooth" (two sweeps, in parallel over blocks), "causal_head" or "small_head"."""
    if order == 1 or not _by_head(heads):
        return "smooth"
    if is_causal:
        return "causal_head"
    is_small = tokens <= SMALL_TOKENS and blocks_of("small_head", width, element_size) is not None
    return "small_head" if is_small else "smooth"


def backward_kernel(tokens: int, heads: int, is_causal: bool) -> str:
    """Which kernels make the gradients: "head_backward", or three in parallel over blocks, "key_gradients"."""
    if not _by_head(heads) or not (is_causal or tokens <= HEAD_BACKWARD_TOKENS or "heads" in _tried_schedule[-1:]):
        return "key_gradients"
    return "head_backward"


@contextmanager
def tried(schedule: str = "auto", **kernels: Blocks) -> Iterator[None]:
    """Other blocks for some kernels, and one program per head ("heads") or per block ("blocks") where there are both.

    For tests and benchmarks, in one thread. Raises ValueError for a name that is none.
    """
    unknown = [name for name in kernels if name not in TABLE] + [schedule] * (schedule not in SCHEDULES)
    if unknown:
        raise ValueError(
            f"No kernel or schedule {unknown[0]!r}: kernels are {', '.join(TABLE)}; schedules {SCHEDULES}."
        )
    before = dict(_tried)
    _tried.update(kernels)
    _tried_schedule.append(schedule)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
        _tried_schedule.pop()


def _by_head(heads: int) -> bool:
    schedule = _tried_schedule[-1] if _tried_schedule else "auto"
    return heads >= LEAST_HEADS if schedule == "auto" else schedule == "heads"
