"""A trained Llama with grouped queries: it writes stories as it is, converted, and with a gain that starts at zero."""

import sys
from pathlib import Path

import pytest
import torch
from dense_oracle import by_oracle

from twicing.adapters.surgery import convert, spec, undo
from twicing.testing import relative_rms

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from llama2c import Tokenizer, read_model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.fixture
def trained(real_data):
    folder = real_data / "models"
    return read_model(folder / "stories260K.bin"), Tokenizer(folder / "tok512.bin")


def nats(model, tokens):
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


def steps(model, tokens, new=40, **how):
    """The tokens that greedy generation gives, and the logits of each step."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **how}
    done = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), return_dict_in_generate=True, output_logits=True, **options
    )
    return done.sequences, torch.stack(done.logits, 1)


def test_it_reads_and_writes_stories(trained):
    model, tokenizer = trained
    tokens = torch.tensor([tokenizer.encode(STORY)])
    assert tokenizer.decode(tokens[0].tolist()) == STORY
    # Guessing among 512 tokens costs 6.2 nats; with rotations laid out otherwise it is 2.4.
    assert nats(model, tokens) < 0.4
    written, _ = steps(model, tokens[:, :10])
    assert tokenizer.decode(written[0].tolist()).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to"
    )


def test_generate_convert_generate(trained):
    model, tokenizer = trained
    tokens = torch.tensor([tokenizer.encode(STORY)])
    before, logits_before = steps(model, tokens)
    job = convert(model, "twicing", layers="3-5")
    after, logits_after = steps(model, tokens)
    with torch.no_grad():
        full = model(after[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :]
    assert relative_rms(logits_after, full) < 2e-6
    assert relative_rms(logits_after[:, 0], logits_before[:, 0]) > 1e-2
    job.undo()
    again, logits_again = steps(model, tokens)
    assert torch.equal(again, before)
    assert torch.equal(logits_again, logits_before)


def test_converted_it_is_the_dense_formula(trained):
    model, tokenizer = trained
    tokens = torch.tensor([tokenizer.encode(STORY)])
    model.double()
    expected = by_oracle(lambda: model(tokens).logits, calls=5)
    convert(model, "twicing")
    with torch.no_grad():
        assert relative_rms(model(tokens).logits, expected) < 1e-12


def test_a_retrofit_starts_at_what_was_trained_and_is_saved_and_loaded(trained, tmp_path):
    model, tokenizer = trained
    tokens = torch.tensor([tokenizer.encode(STORY)])
    with torch.no_grad():
        before = model(tokens).logits
        convert(model, "twicing", options={"gain": 0.0, "learn_gain": True})
        assert torch.equal(model(tokens).logits, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    gains = torch.stack([layer.self_attn.twicing_mechanism.gain for layer in model.model.layers])
    assert gains.shape == (5, 8)
    assert gains.abs().min() > 0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert spec(loaded) == spec(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    undo(loaded)
