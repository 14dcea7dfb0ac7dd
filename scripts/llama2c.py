"""Read a small trained Llama in the format of llama2.c, weights and tokenizer, into transformers.

A .bin of weights is a header of seven int32 (width, feed-forward width, layers, heads, key-value heads, vocabulary,
context; a negative vocabulary means an output layer of its own), then fp32 weights. A tok*.bin is an int32, then for
each token a float32 score, an int32 length and the bytes.
"""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

HEADER = struct.Struct("7i")
TOKEN = struct.Struct("fi")
UNKNOWN, BEGIN, END = 0, 1, 2
# Tokens 3 to 258 are the single bytes.
FIRST_BYTE = 3


def read_model(path: Path) -> LlamaForCausalLM:
    """The model in a file of weights. Raises ValueError where the file is too short for its header."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise ValueError(f"{path} must start with a header of {HEADER.size} bytes: it has {len(data)}.")
    width, hidden, layers, heads, kv_heads, vocabulary, context = HEADER.unpack_from(data)
    if min(width, hidden, layers, heads, kv_heads, abs(vocabulary), context) < 1 or width % heads:
        raise ValueError(f"{path} is no model in llama2.c's format: its header says {HEADER.unpack_from(data)}.")
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=UNKNOWN,
    )
    # First, as a header that is none may ask for more memory than there is.
    weights = _weights(data, config, path)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for target, source in zip(_places(model), weights, strict=False):
            target.copy_(source)
    return model


class Tokenizer:
    """The tokens of a tok*.bin: pairs are merged by the highest score, within words, as SentencePiece does it.

    Raises ValueError where the file breaks off.
    """

    def __init__(self, path: Path) -> None:
        data, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(data):
            start = at + TOKEN.size
            score, length = TOKEN.unpack_from(data, at) if start <= len(data) else (0.0, -1)
            if not 0 <= length <= len(data) - start:
                raise ValueError(f"{path} must hold whole tokens, as llama2.c writes them: it breaks off at byte {at}.")
            self.pieces.append(data[start : start + length])
            self.scores.append(score)
            at = start + length
        self.numbers = {piece: number for number, piece in reversed(list(enumerate(self.pieces)))}
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The numbers of the tokens of a text, BEGIN before them."""
        tokens = [BEGIN]
        for line in f" {text}".splitlines(keepends=True):
            for number, word in enumerate(line.split(" ")):
                tokens += self._word(word if number == 0 else f" {word}")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of the numbers; what begins and ends a text gives nothing."""
        parts = []
        for token in tokens:
            if FIRST_BYTE <= token < FIRST_BYTE + 256:
                parts.append(bytes([token - FIRST_BYTE]))
            elif token not in (UNKNOWN, BEGIN, END):
                parts.append(self.pieces[token])
        return b"".join(parts).decode("utf-8", "replace").removeprefix(" ")

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            tokens = [token for character in word for token in self._character(character)]
            while True:
                pairs = [self.numbers.get(self.pieces[a] + self.pieces[b]) for a, b in pairwise(tokens)]
                known = [(self.scores[number], -place) for place, number in enumerate(pairs) if number is not None]
                if not known:
                    break
                place = -max(known)[1]
                merged = pairs[place]
                tokens[place : place + 2] = [merged] if merged is not None else []
            self._words[word] = tokens
        return self._words[word]

    def _character(self, character: str) -> list[int]:
        encoded = character.encode()
        number = self.numbers.get(encoded)
        return [number] if number is not None else [FIRST_BYTE + byte for byte in encoded]


def _places(model: LlamaForCausalLM) -> list[Tensor]:
    """The model's weights in the order of the file."""
    blocks = model.model.layers
    return [
        model.model.embed_tokens.weight,
        *(block.input_layernorm.weight for block in blocks),
        *(block.self_attn.q_proj.weight for block in blocks),
        *(block.self_attn.k_proj.weight for block in blocks),
        *(block.self_attn.v_proj.weight for block in blocks),
        *(block.self_attn.o_proj.weight for block in blocks),
        *(block.post_attention_layernorm.weight for block in blocks),
        *(block.mlp.gate_proj.weight for block in blocks),
        *(block.mlp.down_proj.weight for block in blocks),
        *(block.mlp.up_proj.weight for block in blocks),
        model.model.norm.weight,
        *([] if model.config.tie_word_embeddings else [model.lm_head.weight]),
    ]


def _weights(data: bytes, config: LlamaConfig, path: Path) -> list[Tensor]:
    """The weights in the order of the file, as transformers has them."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = width // config.num_attention_heads
    kv_width = head * config.num_key_value_heads
    groups = [
        (1, (config.vocab_size, width)),
        (layers, (width,)),
        (layers, (width, width)),
        (layers, (kv_width, width)),
        (layers, (kv_width, width)),
        (layers, (width, width)),
        (layers, (width,)),
        (layers, (hidden, width)),
        (layers, (width, hidden)),
        (layers, (hidden, width)),
        (1, (width,)),
        # Two tables of rotations, which transformers computes itself, stand before an output layer.
        *(
            []
            if config.tie_word_embeddings
            else [(1, (config.max_position_embeddings * head,)), (1, (config.vocab_size, width))]
        ),
    ]
    shapes = [shape for count, shape in groups for _ in range(count)]
    numbers = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=HEADER.size).copy())
    sizes = [int(np.prod(shape)) for shape in shapes]
    if len(numbers) < sum(sizes):
        raise ValueError(f"{path} must hold {sum(sizes)} weights, as its header says: it holds {len(numbers)}.")
    weights = [
        part.reshape(shape)
        for part, shape in zip(numbers.split([*sizes, len(numbers) - sum(sizes)]), shapes, strict=False)
    ]
    # The query's and key's rows are rotated in neighbouring pairs there, and in halves of a head in transformers.
    for index in range(1 + layers, 1 + 3 * layers):
        weights[index] = weights[index].reshape(-1, head // 2, 2, width).transpose(1, 2).reshape(-1, width)
    if not config.tie_word_embeddings:
        del weights[-2]
    return weights
