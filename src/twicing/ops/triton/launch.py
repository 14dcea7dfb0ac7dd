"""Start the kernels: sizes, strides, blocks and grids. Triton and the kernels are imported here, when first needed.

Every tensor is [B, H, N, D] by any strides; gain is [H or 1], key_mask [B, 1 or H, N] or None, seed [1] or None.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twicing.ops.triton import tuning
from twicing.ops.triton.tuning import Blocks

# The fewest rows, columns and width of a product that tensor cores make.
LEAST_SIDE = 16


@dataclass(frozen=True)
class Problem:
    """One call, as all kernels see it."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    gain: Tensor
    seed: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    order: int

    @property
    def batch_and_heads(self) -> int:
        """B H, of queries."""
        return self.query.shape[0] * self.query.shape[1]

    @property
    def tokens(self) -> int:
        """N."""
        return self.query.shape[2]

    @property
    def widths(self) -> tuple[int, int]:
        """D and Dv."""
        return self.query.shape[3], self.value.shape[3]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on the same device, in the query's dtype."""
        return torch.empty(shape, device=self.query.device, dtype=dtype or self.query.dtype)

    def blocks(self, kernel: str) -> Blocks:
        """The blocks of a kernel, which must serve these widths."""
        found = tuning.blocks_of(kernel, max(self.widths), self.query.element_size())
        assert found is not None
        return found

    def mask_and_strides(self) -> tuple[Tensor, tuple[int, ...]]:
        """Bytes and strides of the key mask; any pointer where there is none, since no kernel reads it then."""
        if self.key_mask is None:
            return self.query, (0, 0, 0)
        mask = self.key_mask.expand(self.query.shape[0], self.query.shape[1], self.tokens)
        return mask.view(torch.uint8), mask.stride()

    def options(self, blocks: Blocks) -> dict[str, Any]:
        """What every kernel is given by name."""
        batch, heads = self.query.shape[:2]
        width, value_width = self.widths
        return {
            "all_heads": batch * heads,
            "heads": heads,
            "group": heads // self.key.shape[1],
            "n": self.tokens,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "upscale": 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p),
            "D": width,
            "DV": value_width,
            "BLOCK_D": _padded(width),
            "BLOCK_DV": _padded(value_width),
            "HAS_DROPOUT": self.seed is not None,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def forward(problem: Problem, is_training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, [B, H, N, Dv]; and where is_training, O likewise and the row terms, [2, B, H, N] in fp32 (else empty)."""
    from twicing.ops.triton import forward_kernels as kernels

    shape = (*problem.query.shape[:3], problem.value.shape[3])
    output = problem.new(*shape)
    keeps_smoothed = is_training and problem.order == 2
    smoothed = problem.new(*shape) if keeps_smoothed else problem.new(0)
    terms = problem.new(2, *shape[:3], dtype=torch.float32) if is_training else problem.new(0, dtype=torch.float32)
    if output.numel() == 0:
        return output, smoothed, terms
    heads = problem.batch_and_heads
    size = problem.query.element_size()
    name = tuning.forward_kernel(problem.tokens, heads, max(problem.widths), size, problem.is_causal, problem.order)
    with _on(problem.query):
        if name == "causal_head":
            _causal_head(kernels, problem, output, smoothed, terms, is_training)
        elif name == "small_head":
            _small_head(kernels, problem, output, smoothed, terms, is_training)
        else:
            terms_needed = (
                terms if is_training or problem.order == 1 else problem.new(2, *shape[:3], dtype=torch.float32)
            )
            _smooth(kernels, problem, output, smoothed, terms_needed, is_training)
    return output, smoothed, terms


def _smooth(kernels: Any, problem: Problem, output: Tensor, smoothed: Tensor, terms: Tensor, is_training: bool) -> None:
    """Two sweeps in parallel over blocks of rows; with order 1, the first alone."""
    query, key, value = problem.query, problem.key, problem.value
    mask, mask_strides = problem.mask_and_strides()
    blocks = problem.blocks("smooth")
    options = problem.options(blocks) | {
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "IS_CAUSAL": problem.is_causal,
        "HAS_MASK": problem.key_mask is not None,
    }
    grid = (_cut(problem.tokens, blocks.rows) * problem.batch_and_heads,)
    seed = problem.gain if problem.seed is None else problem.seed
    is_twicing = problem.order == 2
    boosted = torch.empty_like(output) if is_twicing else output
    kernels.smooth_kernel[grid](
        query, key, value, mask, problem.gain, seed, smoothed if is_twicing else output, boosted, terms,
        query.stride(), key.stride(), value.stride(), mask_strides, _gain_stride(problem.gain),
        ORDER=problem.order,
        KEEPS_SMOOTHED=is_training or not is_twicing,
        KEEPS_TERMS=is_training or is_twicing,
        **options,
    )  # fmt: skip
    if is_twicing:
        kernels.smooth_again_kernel[grid](
            query, key, boosted, mask, seed, output, terms, query.stride(), key.stride(), mask_strides, **options
        )


def _causal_head(
    kernels: Any, problem: Problem, output: Tensor, smoothed: Tensor, terms: Tensor, is_training: bool
) -> None:
    """A single causal sweep, one program per head."""
    query, key, value = problem.query, problem.key, problem.value
    blocks = problem.blocks("causal_head")
    kernels.causal_head_kernel[(problem.batch_and_heads,)](
        query, key, value, problem.gain, problem.gain if problem.seed is None else problem.seed,
        output, smoothed, torch.empty_like(output), terms,
        query.stride(), key.stride(), value.stride(), _gain_stride(problem.gain),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        IS_TRAINING=is_training,
        **problem.options(blocks),
    )  # fmt: skip


def _small_head(
    kernels: Any, problem: Problem, output: Tensor, smoothed: Tensor, terms: Tensor, is_training: bool
) -> None:
    """A short head by one program that keeps A."""
    query, key, value = problem.query, problem.key, problem.value
    mask, mask_strides = problem.mask_and_strides()
    blocks = problem.blocks("small_head")
    columns = _padded(problem.tokens)
    rows = min(blocks.rows, columns)
    kernels.small_head_kernel[(problem.batch_and_heads,)](
        query, key, value, mask, problem.gain, problem.gain if problem.seed is None else problem.seed,
        output, smoothed, torch.empty_like(output), terms,
        query.stride(), key.stride(), value.stride(), mask_strides, _gain_stride(problem.gain),
        ROWS=rows,
        COLUMNS=columns,
        BLOCKS=_cut(problem.tokens, rows),
        HAS_MASK=problem.key_mask is not None,
        IS_TRAINING=is_training,
        **problem.options(blocks),
    )  # fmt: skip


def backward(
    problem: Problem, upstream: Tensor, output: Tensor, smoothed: Tensor, terms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK and dV of the shapes of query, key and value, and dg [B, H] in fp32, summed over rows."""
    from twicing.ops.triton import backward_kernels as kernels

    query, key, value = problem.query, problem.key, problem.value
    batch, heads, tokens, width = query.shape
    if output.numel() == 0:
        nothing = torch.zeros((batch, heads), device=query.device)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), nothing
    # Gradients of keys that heads share are summed here, in fp32 and in a fixed order.
    wide = torch.float32 if heads != key.shape[1] else query.dtype
    d_key = problem.new(batch, heads, tokens, width, dtype=wide)
    d_value = problem.new(*output.shape, dtype=wide)
    by_head = tuning.backward_kernel(tokens, problem.batch_and_heads, problem.is_causal) == "head_backward"
    d_query = problem.new(*query.shape, dtype=torch.float32 if by_head else query.dtype)
    with _on(query):
        run = _head_backward if by_head else _block_backward
        d_gain = run(kernels, problem, (upstream, output, smoothed, terms), (d_query, d_key, d_value))
    return (
        d_query.to(query.dtype),
        _to_key_heads(d_key, key),
        _to_key_heads(d_value, value),
        d_gain.view(batch, heads, -1).sum(-1),
    )


def _head_backward(kernels: Any, problem: Problem, saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """One program per head; fills the gradients, and returns the parts of dg."""
    upstream, output, smoothed, terms = saved
    blocks = problem.blocks("head_backward")
    count = problem.batch_and_heads
    d_gain = _parts_of_gain(problem, _cut(problem.tokens, blocks.rows))
    d_boosted = torch.empty_like(output) if problem.order == 2 else output
    delta = problem.new(count, problem.tokens, dtype=torch.float32)
    arguments, options = _backward_arguments(problem, upstream, blocks)
    kernels.head_backward_kernel[(count,)](
        upstream, output, smoothed, terms, *arguments[:6], d_boosted, delta, d_gain, *gradients, *arguments[6:],
        BLOCK=blocks.rows,
        **options,
    )  # fmt: skip
    return d_gain


def _block_backward(kernels: Any, problem: Problem, saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """Three kernels in parallel over blocks; fills the gradients, and returns the parts of dg."""
    upstream, output, smoothed, terms = saved
    d_query, d_key, d_value = gradients
    count, tokens = problem.batch_and_heads, problem.tokens
    is_twicing = problem.order == 2
    boosted, d_boosted = (torch.empty_like(output) if is_twicing else output for _ in range(2))
    delta = problem.new(count, tokens, dtype=torch.float32)

    def launch(kernel: Any, name: str, by_rows: bool, tensors: Callable[[Any], tuple[Any, ...]]) -> None:
        blocks = problem.blocks(name)
        arguments, options = _backward_arguments(problem, upstream, blocks)
        grid = (_cut(tokens, blocks.rows if by_rows else blocks.columns) * count,)
        kernel[grid](*tensors(arguments[:6]), *arguments[6:], ROWS=blocks.rows, COLUMNS=blocks.columns, **options)

    d_gain = _parts_of_gain(problem, _cut(tokens, problem.blocks("boosted_gradient").columns))
    launch(
        kernels.boosted_gradient_kernel,
        "boosted_gradient",
        False,
        lambda inputs: (upstream, output, smoothed, terms, *inputs, boosted, d_boosted, delta, d_gain),
    )
    launch(
        kernels.key_gradients_kernel,
        "key_gradients",
        False,
        lambda inputs: (upstream, terms, *inputs, boosted, d_boosted, delta, d_key, d_value),
    )
    launch(
        kernels.query_gradients_kernel,
        "query_gradients",
        True,
        lambda inputs: (upstream, terms, *inputs, boosted, d_boosted, delta, d_query),
    )
    return d_gain


def _backward_arguments(problem: Problem, upstream: Tensor, blocks: Blocks) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs (six), then strides; and what is given by name."""
    query, key, value = problem.query, problem.key, problem.value
    mask, mask_strides = problem.mask_and_strides()
    seed = problem.gain if problem.seed is None else problem.seed
    strides = (upstream.stride(), query.stride(), key.stride(), value.stride(), mask_strides)
    options = problem.options(blocks) | {
        "ORDER": problem.order,
        "IS_CAUSAL": problem.is_causal,
        "HAS_MASK": problem.key_mask is not None,
    }
    return (query, key, value, mask, problem.gain, seed, *strides, _gain_stride(problem.gain)), options


def _parts_of_gain(problem: Problem, parts: int) -> Tensor:
    """Room for the parts of dg, which only order 2 fills."""
    make = torch.empty if problem.order == 2 else torch.zeros
    return make((problem.batch_and_heads, parts), device=problem.query.device, dtype=torch.float32)


def _to_key_heads(per_head: Tensor, like: Tensor) -> Tensor:
    """Gradients [B, H, N, D] summed over the heads that share a key head, in its dtype."""
    if per_head.shape == like.shape:
        return per_head
    return per_head.view(*like.shape[:2], -1, *like.shape[2:]).sum(2).to(like.dtype)


def _gain_stride(gain: Tensor) -> int:
    return 0 if len(gain) == 1 else gain.stride(0)


def _padded(width: int) -> int:
    """The least power of two that holds it, and that a product takes."""
    return max(LEAST_SIDE, 1 << (width - 1).bit_length())


def _cut(length: int, block: int) -> int:
    return math.ceil(length / block)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """The tensor's GPU as the current one, where kernels are started."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
