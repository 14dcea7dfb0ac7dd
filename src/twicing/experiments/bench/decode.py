"""`twicing bench decode`: what one more token costs with a cache, twicing against plain attention.

A step waits for memory: it reads keys and values, and twicing the residuals too. So the ratio of the bytes is the goal.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.experiments.bench.cases import parse_device, parse_dtype
from twicing.experiments.bench.options import DecodeOptions
from twicing.experiments.bench.rows import MEASURED, DecodeRow, Row, Timed, timed
from twicing.experiments.bench.run import check_effort, check_numbers, record, record_name, threads
from twicing.experiments.bench.screen import Screen
from twicing.experiments.bench.timing import interleaved
from twicing.ops.attention import twicing_attention
from twicing.ops.decode import decode_step
from twicing.ops.decode_state import DecodeState
from twicing.testing import make_inputs, relative_rms
from twicing.testing.budget import FP64_BUDGET

STANDARD = "order 1"
# A sequence that short is also decoded from its beginning, and held against attention of the whole.
WHOLE_TOKENS = 64

Token = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Cache:
    """So many tokens in the cache of one attention layer, and the one that comes next."""

    tokens: int
    batch: int
    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.heads} heads, {self.key_heads} of keys"

    @property
    def is_grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.key_heads != self.heads

    def byte_ratio(self, order: int) -> float:
        """Bytes that a step reads, to those of plain attention: R has the width of V, but the query's heads."""
        return 1.0 if order == 1 else 1.0 + self.heads / (2.0 * self.key_heads)

    def drawn(self, tokens: int, seed: int) -> Token:
        """Normal query, key and value of so many tokens."""
        query, key, value = make_inputs(
            (self.batch, self.heads, tokens, self.width),
            key_heads=self.key_heads,
            generator=torch.Generator().manual_seed(seed),
            dtype=self.dtype,
            device=self.device,
        )
        return query, key, value

    def filled(self, order: int) -> DecodeState:
        """A state with random keys, values and residuals, and room for one token: a prompt would take minutes."""
        state = DecodeState(order=order, capacity=self.tokens + 1)
        residuals, keys, values = self.drawn(self.tokens, seed=0)
        named = {"keys": keys, "values": values, "residuals": residuals}
        for name in ("keys", "values", "residuals")[: 1 + order]:
            state.extended(name, named[name])
        state.keep(self.tokens)
        return state


def bench_decode(options: DecodeOptions, screen: Screen) -> bool:
    """Measure, show tables, and write options.out/decode-....csv; returns whether it came to the end.

    Raises ValueError for options that mean nothing.
    """
    check_effort(options.repeats, options.seconds)
    caches = _caches(options)
    device = caches[0].device
    with threads(options.threads):
        path = options.out / f"{record_name('decode', device, options.dtype)}.csv"
        with screen.progress(len(caches)) as step, torch.no_grad():
            _, finished = record(_measured(caches, options, step), path, device, screen)
    return finished


def _caches(options: DecodeOptions) -> list[Cache]:
    dtype, device = parse_dtype(options.dtype), parse_device(options.device)
    for name in ("lengths", "groups"):
        check_numbers(name, getattr(options, name), least=1)
    if min(options.batch, options.heads, options.width) < 1:
        raise ValueError(
            f"--batch, --heads and --width must be 1 or larger: got {options.batch}, {options.heads}, {options.width}."
        )
    for group in options.groups:
        if options.heads % group:
            raise ValueError(f"--groups must divide --heads: got {group} and {options.heads}.")
    return [
        Cache(tokens, options.batch, options.heads, options.heads // group, options.width, dtype, device)
        for group in options.groups
        for tokens in options.lengths
    ]


def _measured(caches: list[Cache], options: DecodeOptions, step: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of all lengths of one kind of heads, for one table."""
    for key_heads in dict.fromkeys(cache.key_heads for cache in caches):
        rows: list[Row] = []
        for cache in (cache for cache in caches if cache.key_heads == key_heads):
            step(str(cache))
            rows += _rows(cache, options)
        yield rows


def _rows(cache: Cache, options: DecodeOptions) -> list[Row]:
    orders = {STANDARD: 1, "order 2 (twicing)": 2}
    status = {name: complaint(cache, order) or MEASURED for name, order in orders.items()}
    status["SDPA, own cache"] = MEASURED
    calls = {name: _next_token(cache, order) for name, order in orders.items() if status[name] == MEASURED}
    calls["SDPA, own cache"] = _sdpa_next_token(cache)
    spreads = interleaved(calls, cache.device, repeats=options.repeats, seconds=options.seconds)
    standard = spreads[STANDARD].median if STANDARD in spreads else None
    rows: list[Row] = []
    for name in status:
        order = orders.get(name, 1)
        time = timed(spreads[name]) if name in spreads else Timed(status[name])
        ratio = None if standard is None or time.median_ms is None else time.median_ms / standard
        rows.append(
            DecodeRow(
                **vars(time),
                tokens=cache.tokens,
                batch=cache.batch,
                heads=cache.heads,
                key_heads=cache.key_heads,
                width=cache.width,
                dtype=str(cache.dtype).removeprefix("torch."),
                contender=name,
                order=order,
                ratio=ratio,
                byte_ratio=cache.byte_ratio(order),
                ratio_over_bytes=None if ratio is None else ratio / cache.byte_ratio(order),
            )
        )
    return rows


def _next_token(cache: Cache, order: int) -> Callable[[], Tensor]:
    """One step; the token is forgotten again, so that every call finds the same cache."""
    state, token = cache.filled(order), cache.drawn(1, seed=1)

    def step() -> Tensor:
        output = decode_step(*token, state, enable_gqa=cache.is_grouped)
        state.crop(cache.tokens)
        return output

    return step


def _sdpa_next_token(cache: Cache) -> Callable[[], Tensor]:
    """Plain attention as people write it: the new key and value go into a buffer, and SDPA reads it."""
    query, key, value = cache.drawn(1, seed=1)
    _, keys, values = cache.drawn(cache.tokens + 1, seed=0)

    def step() -> Tensor:
        keys[:, :, -1:], values[:, :, -1:] = key, value
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=cache.is_grouped)

    return step


def complaint(cache: Cache, order: int, step: Callable[..., Tensor] = decode_step) -> str | None:
    """Why cached decoding of this order gets no time, or None where it is right.

    The step that is timed is held against fp64 attention to what its cache holds; that a cache comes to hold the right
    things, by decoding a short sequence from its beginning and holding it against causal attention of the whole.
    """
    short = replace(cache, tokens=min(cache.tokens, WHOLE_TOKENS))
    for what, off, budget in (_step_error(cache, order, step), _sequence_error(short, order, step)):
        # Not `off > budget`, which NaN would pass.
        if not off <= budget:
            return f"wrong: {what} off by {off:.1e} (relative RMS), the budget is {budget:.1e}"
    return None


def _step_error(cache: Cache, order: int, step: Callable[..., Tensor]) -> tuple[str, float, float]:
    state, token = cache.filled(order), cache.drawn(1, seed=1)
    before = [tensor for tensor in (state.keys, state.values, state.residuals) if tensor is not None]
    tensors = [tensor.clone() for tensor in before]
    output = step(*token, state, enable_gqa=cache.is_grouped)
    honest = _by_definition(token, tensors)
    expected = _by_definition([tensor.double() for tensor in token], [tensor.double() for tensor in tensors])
    return "a step", relative_rms(output, expected), _budget(honest, expected)


def _by_definition(token: Token | list[Tensor], cached: list[Tensor]) -> Tensor:
    """o = a V, r = 2 v - o, u = a R for the new row a of A, in the dtype of the arguments; order 1 has no R cached."""
    query, key, value = token
    repeat = query.shape[1] // key.shape[1]
    key, value, keys, values = (t.repeat_interleave(repeat, 1) for t in (key, value, *cached[:2]))
    row = (query @ torch.cat([keys, key], dim=2).mT / math.sqrt(query.shape[-1])).softmax(-1)
    smoothed = row @ torch.cat([values, value], dim=2)
    if len(cached) == 2:
        return smoothed
    return row @ torch.cat([cached[2], 2.0 * value - smoothed], dim=2)


def _sequence_error(cache: Cache, order: int, step: Callable[..., Tensor]) -> tuple[str, float, float]:
    query, key, value = cache.drawn(cache.tokens, seed=2)
    state = DecodeState(order=order, capacity=cache.tokens)
    tokens = zip(query.split(1, 2), key.split(1, 2), value.split(1, 2), strict=True)
    output = torch.cat([step(*token, state, enable_gqa=cache.is_grouped) for token in tokens], dim=2)
    whole = partial(twicing_attention, is_causal=True, enable_gqa=cache.is_grouped, order=order, backend="reference")
    honest, expected = whole(query, key, value), whole(query.double(), key.double(), value.double())
    return "a decoded sequence", relative_rms(output, expected), _budget(honest, expected)


def _budget(honest: Tensor, expected: Tensor) -> float:
    return FP64_BUDGET if honest.dtype == torch.float64 else 2.0 * relative_rms(honest, expected)
