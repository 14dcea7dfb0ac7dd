"""Do the tokens become alike from layer to layer? Measured per input, at the outputs of attention and of blocks.

Four measures of tokens and the entropy of attention, each kept per input and layer, so that bands over inputs can be
drawn. arXiv 2103.03404 and 2503.00687 measure the first two; a mean that tokens share raises the cosine by itself, so
that the rank of what is left without it has to be seen beside it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twicing.analysis.attention_inputs import record_attention
from twicing.analysis.capture import BLOCK_OUTPUT, PLACES, capture
from twicing.analysis.entropy import attention_entropy
from twicing.analysis.similarity import distance_to_mean, effective_rank, mean_pairwise_cosine


def rms_distance_to_mean(tokens: Tensor) -> Tensor:
    """sqrt(mean_i ||x_i - mean(X)||^2): how far a token is from the mean token, in the unit of the activations.

    tokens: [B, N, C], N >= 2. Returns [B], float64. The share ||X - mean|| / ||X|| falls where the mean grows as well
    as where tokens come closer to it; this tells the two apart.
    """
    precise = tokens.float() if tokens.device.type == "mps" else tokens.double()
    centred = precise - precise.mean(1, keepdim=True)
    return centred.square().sum(2).mean(1).sqrt()


COSINE = "mean pairwise cosine"
SHARE = "||X - mean|| / ||X||"
RANK = "effective rank of centred tokens"
DISTANCE = "rms distance to the mean token"
TOKEN_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    COSINE: mean_pairwise_cosine,
    SHARE: distance_to_mean,
    RANK: effective_rank,
    DISTANCE: rms_distance_to_mean,
}
ATTENTION = "attention"
ENTROPY = "entropy of attention [nats]"
ENTROPY_SHARE = "entropy of attention [share of the largest]"
ATTENTION_METRICS = (ENTROPY, ENTROPY_SHARE)
# Every curve there is, (where, metric), in the order of the page.
CURVES = (
    *((where, metric) for where in reversed(PLACES) for metric in TOKEN_METRICS),
    *((ATTENTION, metric) for metric in ATTENTION_METRICS),
)

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Collapse:
    """What was measured in one model. values: (where, metric) -> [inputs, layers], float64, on the CPU.

    where: "block output", "attention output", or "attention" (for the entropies). tokens, width: N and C of the block
    outputs, as the largest rank there can be is min(N - 1, C).
    """

    values: dict[Key, Tensor]
    tokens: int
    width: int

    @property
    def inputs(self) -> int:
        """How many inputs it is over."""
        return len(next(iter(self.values.values())))

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return next(iter(self.values.values())).shape[1]

    @property
    def largest_rank(self) -> int:
        """What the effective rank of centred tokens cannot exceed."""
        return min(self.tokens - 1, self.width)


def measure_collapse(
    model: nn.Module, batches: Iterable[Tensor], *, progress: Callable[[int], object] | None = None
) -> Collapse:
    """Measure every layer's tokens and attention on every input, one batch at a time.

    batches: [b, ...] each, what the model takes, all inputs with the same number of tokens; the model in eval mode.
    progress: told after each batch how many inputs it held.
    Holds the tokens of one layer and one batch at a time; of an input, ten numbers a layer are kept.
    Changes no output bit. Raises ValueError for a model in training mode, for no batches, or inputs with different
    numbers of tokens, and what capture() and record_attention() raise.
    """
    if model.training:
        raise ValueError("the model must be in eval mode, as dropout would change the tokens: call model.eval() first.")
    seen = 0
    with (
        capture(model, reduce=_of_tokens) as tokens,
        record_attention(model, reduce=lambda inputs: attention_entropy(inputs).cpu()) as attention,
        torch.no_grad(),
    ):
        for batch in batches:
            model(batch)
            seen += len(batch)
            if progress is not None:
                progress(len(batch))
        if seen == 0:
            raise ValueError("there is nothing to measure on: give one input or more.")
    values: dict[Key, Tensor] = {}
    for where in PLACES:
        by_layer = torch.stack([tokens.tensor(where, layer) for layer in tokens.layers], dim=1)
        values |= {(where, metric): by_layer[..., place] for place, metric in enumerate(TOKEN_METRICS)}
    sizes = torch.cat([tokens.tensor(BLOCK_OUTPUT, layer)[:, -2:] for layer in tokens.layers]).unique(dim=0)
    by_layer = torch.stack([attention.tensor(layer) for layer in attention.layers], dim=1)
    values |= {(ATTENTION, metric): by_layer[..., place] for place, metric in enumerate(ATTENTION_METRICS)}
    if len(sizes) > 1 or any(len(one) != seen for one in values.values()):
        found = ", ".join(f"{int(n)} tokens of width {int(width)}" for n, width in sizes)
        counts = ", ".join(str(count) for count in sorted({len(one) for one in values.values()}))
        raise ValueError(
            f"every layer must see the same {seen} inputs, with the same number of tokens: found {found}, and {counts} "
            "inputs in a layer. Give inputs of one length; a model that merges tokens, or folds them into the batch, "
            "cannot be diagnosed."
        )
    return Collapse(values, tokens=int(sizes[0, 0]), width=int(sizes[0, 1]))


def _of_tokens(tokens: Tensor) -> Tensor:
    """Return [B, metrics + 2] on the CPU: [B, N, C] measured in every way, and N and C."""
    measured = [metric(tokens) for metric in TOKEN_METRICS.values()]
    sizes = [torch.full_like(measured[0], size) for size in tokens.shape[1:]]
    return torch.stack([*measured, *sizes], dim=1).double().cpu()
