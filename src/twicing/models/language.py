"""The papers' language model: a causal transformer with tied adaptive input and softmax, as in their WikiText-103 runs.

Vaswani et al., arXiv 1706.03762; Baevski and Auli, arXiv 1809.10853. Options cover what published protocols differ in:
post- or pre-LayerNorm, sinusoidal or learned positions, ReLU or GELU, biases.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from twicing.adapters.site import AttentionSite
from twicing.models.adaptive import TiedSoftmax
from twicing.models.language_attention import (
    CausalSelfAttention,
    ConvertedCausalSelfAttention,
    values_of,
)

NORMS = ("post", "pre")
POSITIONS = ("sinusoidal", "learned")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
INITIAL_DEVIATION = 0.02


class LanguageModel(nn.Module):
    """Tokens to features, [B, N] to [B, N, C]; losses() and log_probabilities() read words off them.

    Position i sees the tokens 0 to i. Sinusoidal positions are counted from the end of the window, as the released
    code does: its last token is at 0, so that features depend on how long the window is, and a cache would be wrong.
    After the blocks comes a last norm with pre-LayerNorm, and a last dropout with post-LayerNorm.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        depth: int,
        width: int,
        heads: int,
        inner: int,
        cutoffs: Sequence[int] = (),
        norm: str = "post",
        positions: str = "sinusoidal",
        activation: str = "relu",
        attention_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention_passes: int = 1,
    ):
        super().__init__()
        _check(norm=norm, positions=positions, activation=activation, width=width, heads=heads)
        self.length, self.width, self.positions = length, width, positions
        self.embedding = nn.Embedding(vocabulary, width)
        if positions == "learned":
            self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        block = partial(
            DecoderBlock,
            width=width,
            heads=heads,
            inner=inner,
            norm=norm,
            activation=activation,
            attention_bias=attention_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            attention_passes=attention_passes,
        )
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.last = nn.LayerNorm(width) if norm == "pre" else nn.Dropout(dropout)
        self.softmax = TiedSoftmax(vocabulary, width, cutoffs)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, N], whole numbers, N up to the length the model was made for. Returns features, [B, N, C].

        Raises ValueError for a longer window where positions are learned.
        """
        words, positions = self.words_and_positions(tokens)
        x = self.dropout(words + positions)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.last(x)
        return features

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """-log p(target at i | tokens up to i) in nats: [B, N] and [B, N] to [B, N]."""
        return self.word_losses(self(tokens), targets)

    def word_losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) in nats, read off features: [..., C] and [...] to [...]."""
        return self.softmax.losses(features, targets, self.embedding.weight)

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """log p(next word | tokens up to i) of every word: [B, N] to [B, N, V]. For small vocabularies."""
        return self.softmax.log_probabilities(self(tokens), self.embedding.weight)

    def attention_sites(self) -> Iterator[AttentionSite]:
        """The attention of every block, for convert() and the analysis; none where blocks attend twice.

        Raises ValueError where a block holds attention of another class, whose forward() is not known.
        """
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, DecoderBlock)
            path, attention = f"blocks.{number - 1}.attention", block.attention
            if block.attention_passes > 1:
                continue
            if type(attention) not in (CausalSelfAttention, ConvertedCausalSelfAttention):
                raise ValueError(
                    f"{path} is a {type(attention).__name__}: in this model the library knows CausalSelfAttention only."
                )
            yield AttentionSite(
                layer=number,
                path=path,
                stack="blocks",
                block=block,
                attention=attention,
                merge=attention.proj,
                num_heads=attention.num_heads,
                head_dim=attention.head_dim,
                converted_class=ConvertedCausalSelfAttention,
                value_source="qkv",
                read_values=partial(values_of, heads=attention.num_heads),
            )

    def words_and_positions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens enter the first block as: the sum of words, [B, N, C], and positions, [N, C].

        Raises ValueError for a longer window where positions are learned.
        """
        if self.positions == "sinusoidal":
            words: Tensor = self.embedding(tokens) * self.width**0.5
            return words, reversed_sinusoids(tokens.shape[1], self.width, like=words)
        if tokens.shape[1] > self.length:
            raise ValueError(
                f"a model with {self.length} learned positions takes windows up to that length: got {tokens.shape[1]}."
            )
        return self.embedding(tokens), self.position.weight[: tokens.shape[1]]


class DecoderBlock(nn.Module):
    """Post-norm: x <- LN(x + attention(x)), x <- LN(x + feed(x)). Pre-norm: x <- x + attention(LN(x)), and so on.

    attention_passes: 2 is the control `two-attentions`: the attention sub-layer runs twice with the same weights.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner: int,
        norm: str,
        activation: str,
        attention_bias: bool,
        dropout: float,
        attention_dropout: float,
        attention_passes: int,
    ):
        super().__init__()
        self.norm_first, self.attention_passes = norm == "pre", attention_passes
        self.attention = CausalSelfAttention(width, heads, bias=attention_bias, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, inner), ACTIVATIONS[activation](), nn.Dropout(dropout), nn.Linear(inner, width)
        )
        self.feed_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, C]. Returns [B, N, C]."""
        for _ in range(self.attention_passes):
            x = self._residual(x, self.attention, self.attention_norm)
        return self._residual(x, self.feed, self.feed_norm)

    def _residual(self, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        if self.norm_first:
            return x + self.dropout(layer(norm(x)))
        normed: Tensor = norm(x + self.dropout(layer(x)))
        return normed


def language_model(*, seed: int, **sizes: object) -> LanguageModel:
    """A LanguageModel with weights N(0, 0.02), biases 0 and norms 1, drawn from the seed and nothing else.

    The global random state is left as it was. Arguments as those of LanguageModel.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(**sizes)  # type: ignore[arg-type]
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=INITIAL_DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
    return model


def reversed_sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Positions N - 1 down to 0 as [sin(p w_j), cos(p w_j)], w_j = 10000^(-2j / C): [N, C] on the device of `like`.

    All sines come before all cosines. Computed in fp32 at least, in the dtype of `like`.
    Source: arXiv 1706.03762, section 3.5; the order is that of the released code.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=dtype, device=like.device) / width)
    angles = torch.arange(length - 1, -1, -1, dtype=dtype, device=like.device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


def _check(*, norm: str, positions: str, activation: str, width: int, heads: int) -> None:
    for name, value, known in (
        ("norm", norm, NORMS),
        ("positions", positions, POSITIONS),
        ("activation", activation, tuple(ACTIVATIONS)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}: got {value!r}.")
    if width % heads or width % 2:
        raise ValueError(f"width must be even and a multiple of heads: got {width} and {heads}.")
