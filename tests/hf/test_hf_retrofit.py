"""scripts/retrofit.py at the smallest size: every arm and seed, the same batches, equal seconds, and what it says."""

import json
import re
import shlex
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import llama2c
import retrofit

ROOT = Path(__file__).parents[2]
HEADER = (16, 24, 2, 4, 2, 300, 64)


def write_tokenizer(path):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    words = [b" ", b"a", b"b", b"c", b" a", b"ab", b" ab", "é".encode()]
    pieces += words + [b"unused %d" % number for number in range(300 - len(pieces) - len(words))]
    scores = [0.0] * 259 + [-10.0, -10.0, -10.0, -10.0, -2.0, -1.0, -3.0, -10.0] + [-99.0] * 33
    with path.open("wb") as file:
        file.write(struct.pack("i", 10))
        for piece, score in zip(pieces, scores, strict=True):
            file.write(struct.pack("fi", score, len(piece)) + piece)


def write_model(path, header=HEADER, seed=0):
    width, hidden, layers, heads, kv_heads, vocabulary, context = header
    kv_width = width // heads * kv_heads
    block = 2 * width + 2 * width * width + 2 * kv_width * width + 3 * hidden * width
    tables = context * width // heads
    count = abs(vocabulary) * width * (2 if vocabulary < 0 else 1) + layers * block + width + tables
    numbers = np.random.default_rng(seed).normal(0, 0.2, count).astype("<f4")
    path.write_bytes(struct.pack("7i", *header) + numbers.tobytes())
    return numbers


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "tiny.bin")
    write_tokenizer(tmp_path / "tok.bin")
    return tmp_path


def test_weights_are_where_the_format_has_them(tmp_path):
    numbers = torch.from_numpy(write_model(tmp_path / "m.bin", (16, 24, 2, 4, 2, -300, 64)).copy())
    model = llama2c.read_model(tmp_path / "m.bin")
    assert torch.equal(model.model.embed_tokens.weight, numbers[:4800].view(300, 16))
    assert torch.equal(model.lm_head.weight, numbers[-4800:].view(300, 16))
    assert torch.equal(model.model.layers[1].input_layernorm.weight, numbers[4816:4832])
    # Row 1 of a head of 4 is the second of its first pair there, and the first of its second half here.
    wq = numbers[4832 : 4832 + 256].view(16, 16)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight[2], wq[1])
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight[1], wq[2])


def test_a_file_that_is_too_short(tmp_path):
    (tmp_path / "m.bin").write_bytes(struct.pack("7i", *HEADER) + b"\0" * 40)
    with pytest.raises(ValueError, match=r"must hold \d+ weights, as its header says: it holds 10"):
        llama2c.read_model(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match="must start with a header of 28 bytes: it has 5"):
        llama2c.read_model(tmp_path / "m.bin")
    # More than there is memory for, had the model been made first.
    (tmp_path / "m.bin").write_bytes(struct.pack("7i", 2**22, 2**22, 2, 4, 2, 300, 64))
    with pytest.raises(ValueError, match=r"must hold \d+ weights, as its header says: it holds 0"):
        llama2c.read_model(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(struct.pack("7i", 16, 24, 2, 0, 2, 300, 64))
    with pytest.raises(ValueError, match=r"is no model in llama2\.c's format: its header says \(16, 24, 2, 0,"):
        llama2c.read_model(tmp_path / "m.bin")
    write_tokenizer(tmp_path / "tok.bin")
    whole = (tmp_path / "tok.bin").read_bytes()
    for cut in (len(whole) - 1, 6):
        (tmp_path / "tok.bin").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"tok\.bin must hold whole tokens.*: it breaks off at byte \d+"):
            llama2c.Tokenizer(tmp_path / "tok.bin")


def test_tokens_are_merged_by_score_within_words(folder):
    tokenizer = llama2c.Tokenizer(folder / "tok.bin")
    # "ab" scores higher than " a", and then " ab" is made of " " and "ab".
    assert tokenizer.encode("ab a") == [1, 265, 263]
    assert tokenizer.encode("cé\n日") == [1, 259, 262, 266, 3 + 10, *(3 + byte for byte in "日".encode())]
    for text in ("ab a", "a  b\n\nc", "cé\n日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def command_of(page):
    """The command that a page names, and the options that it gives."""
    (command,) = re.findall(r"^`(python scripts/retrofit\.py .*)`$", page, flags=re.MULTILINE)
    return command, tyro.cli(retrofit.Options, args=shlex.split(command)[2:])


def test_the_command_in_the_documentation_is_as_the_script_would_write_it():
    command, options = command_of((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert retrofit.typed_again(options) == command


def test_every_arm_and_seed(folder, capsys):
    text = folder / "my text.txt"
    text.write_text("ab a c b cab " * 400)
    options = retrofit.Options(folder, text, folder / "out", seeds=2, steps=3, batch=2, length=16, held_out=4)
    results = retrofit.main(options)
    assert [(r.arm, r.seed) for r in results] == [(arm, seed) for seed in range(2) for arm in retrofit.ARMS]
    for result in results:
        # Before, all arms are the trained model: the gain starts at zero.
        assert result.before == results[0].before
        assert result.after < result.before
        assert set(result.gains) == ({1, 2} if result.arm == retrofit.RETROFIT else set())
        assert result.steps >= 1 if result.arm == retrofit.SECONDS else result.steps == 3
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["after"] for row in rows] == [result.after for result in results]
    assert rows[0]["options"]["steps"] == 3
    said = capsys.readouterr().out
    assert "twicing - standard, equal steps:" in said
    assert "n = 2 seeds" in said
    assert "What was learned" in said
    page = (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert command_of(page)[1] == options
    assert "| standard, equal seconds |" in page
    assert f"{results[0].gains[1][0]:+.3f}"[:3] in page.split("| layer |")[1]


def test_an_interrupted_run_goes_on(folder, monkeypatch):
    text = folder / "text.txt"
    text.write_text("ab a c b cab " * 400)
    options = retrofit.Options(folder, text, folder / "out", seeds=2, steps=3, batch=2, length=16, held_out=4)
    whole = retrofit.main(options)
    path = folder / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    made = []
    fine_tune = retrofit.fine_tune

    def counted(model, arm, seed, training, held_out, given, seconds):
        if given.steps == 3:
            made.append((arm, seed, seconds))
        return fine_tune(model, arm, seed, training, held_out, given, seconds)

    monkeypatch.setattr(retrofit, "fine_tune", counted)
    again = retrofit.main(options)
    # The clock that equal seconds are held to is in what was kept.
    assert made == [(arm, 1, whole[3].seconds) for arm in retrofit.ARMS[1:]]
    assert again[:4] == whole[:4]
    assert [(r.arm, r.seed) for r in again] == [(r.arm, r.seed) for r in whole]
    assert again[4].after == whole[4].after
    assert len(path.read_text().splitlines()) == 6
    assert len(retrofit.main(retrofit.replace(options, seeds=1))) == 3
    with pytest.raises(ValueError, match=r"is of another experiment \(batch was 2, and is 3\): name another folder"):
        retrofit.main(retrofit.replace(options, batch=3))


def test_equal_steps_see_the_same_batches(folder):
    model, encode = retrofit.load(folder)
    tokens = torch.tensor(encode("ab a c b cab " * 100))
    options = retrofit.Options(folder, folder, folder, steps=4, batch=2, length=16, gain_rate=0.0)
    import copy

    def run(arm, seed):
        twin = copy.deepcopy(model)
        return retrofit.fine_tune(twin, arm, seed, tokens, tokens[:68].view(4, 17), options, None)

    # With gains that cannot learn, twicing is standard attention to the last digits.
    assert run(retrofit.RETROFIT, 3).after == pytest.approx(run(retrofit.STANDARD, 3).after, abs=1e-5)
    assert run(retrofit.STANDARD, 3).after != run(retrofit.STANDARD, 4).after


def test_equal_seconds_stop_the_clock(folder):
    model, encode = retrofit.load(folder)
    tokens = torch.tensor(encode("ab a c b cab " * 100))
    options = retrofit.Options(folder, folder, folder, steps=1000, batch=2, length=16)
    result = retrofit.fine_tune(model, retrofit.SECONDS, 0, tokens, tokens[:68].view(4, 17), options, 0.2)
    assert 0.2 <= result.seconds < 0.6
    assert 1 <= result.steps < 1000


def typed(folder, *more):
    return ["--model", str(folder), "--text", str(folder / "text.txt"), "--out", str(folder / "out"), *more]


def test_what_is_wrong_is_said_in_a_sentence(folder, capsys):
    text = folder / "text.txt"
    assert retrofit.command(typed(folder, "--length", "16")) == (
        f"retrofit: --text {text} is no file: give a text in UTF-8."
    )
    text.write_text("ab a")
    short = retrofit.command(typed(folder, "--length", "16"))
    assert short == f"retrofit: {text} must hold at least 170 tokens, of which a tenth is held out: it holds 3."
    text.write_bytes("Käse".encode("latin-1"))
    assert "is not UTF-8" in retrofit.command(typed(folder, "--length", "16"))
    text.write_text("ab a c b cab " * 400)
    for name in ("seeds", "steps", "batch", "length", "held-out", "threads"):
        for number in ("0", "-1"):
            assert retrofit.command(typed(folder, f"--{name}", number)) == (
                f"retrofit: --{name} is 1 or more: got {number}."
            )
    for name in ("learning-rate", "gain-rate"):
        for number in ("0", "-1", "nan", "inf"):
            assert f"--{name} is a number above 0: got" in retrofit.command(typed(folder, f"--{name}", number))
    assert "layers" in retrofit.command(typed(folder, "--length", "16", "--layers", "3"))
    too_long = retrofit.command(typed(folder, "--length", "65"))
    assert too_long == "retrofit: --length is at most 64, which the model was made for: got 65."
    (folder / "out").rmdir()
    (folder / "out").write_text("")
    assert retrofit.command(typed(folder, "--length", "16")) == (
        f"retrofit: cannot read or write {folder / 'out'} (File exists)."
    )
    missing = folder / "missing"
    assert retrofit.command([*typed(folder), "--model", str(missing)]) == (
        f"retrofit: --model {missing} is no folder: name the one of the trained model."
    )
    write_model(folder / "second.bin")
    assert "must hold one NAME.bin and one tok*.bin: it holds 2, 1." in retrofit.command(typed(folder))
    (folder / "tok.bin").unlink()
    assert "(NAME.bin and tok*.bin): it holds neither." in retrofit.command(typed(folder))
    (folder / "config.json").write_text("{")
    assert retrofit.command(typed(folder)).startswith(f"retrofit: transformers cannot load {folder}: ")


def test_it_goes_on_where_ctrl_c_stopped_it(folder, monkeypatch, capsys):
    (folder / "text.txt").write_text("ab a c b cab " * 400)
    few = ("--seeds", "1", "--steps", "2", "--batch", "2", "--length", "16", "--held-out", "4")
    fine_tune = retrofit.fine_tune

    def stopped(model, arm, *others):
        if arm == retrofit.SECONDS:
            raise KeyboardInterrupt
        return fine_tune(model, arm, *others)

    monkeypatch.setattr(retrofit, "fine_tune", stopped)
    assert retrofit.command(typed(folder, *few)) == 130
    assert "Finished fine-tunings are kept; the same command goes on from there." in capsys.readouterr().err
    path = folder / "out" / "results.jsonl"
    kept = path.read_text()
    assert len(kept.splitlines()) == 2
    monkeypatch.setattr(retrofit, "fine_tune", fine_tune)
    assert retrofit.command(typed(folder, *few)) == 0
    assert path.read_text().startswith(kept)
    page = (folder / "out" / "results.md").read_text(encoding="utf-8")
    # What makes it again, without what is so anyway.
    assert f"--out {folder / 'out'} --seeds 1 --steps 2 --batch 2 --length 16 --held-out 4`" in page
    assert "--layers" not in page


def test_a_broken_results_file_is_told(folder):
    (folder / "text.txt").write_text("ab a c b cab " * 400)
    (folder / "out").mkdir()
    path = folder / "out" / "results.jsonl"
    path.write_text('{"arm": "standard, eq')
    told = retrofit.command(typed(folder, "--length", "16"))
    assert told.startswith(f"retrofit: {path}, line 1: expected one JSON object, got a broken line")
    # As a comparison's is, for example.
    path.write_text('{"arm": "standard", "seed": 0, "value": 0.5, "versions": {}}\n')
    told = retrofit.command(typed(folder, "--length", "16"))
    assert told == f"retrofit: {path}, line 1: this is no fine-tuning of ours: name another folder with --out."


def test_differences_in_words():
    from twicing.experiments.statistics import paired_difference

    clear = paired_difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.5, 1: 0.61, 2: 0.7})
    assert retrofit.said(clear).startswith("-0.4967 [-0.5")
    assert "no difference" not in retrofit.said(clear)
    none = paired_difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 1.1, 1: 1.0, 2: 1.21})
    assert "no difference shown (smallest showable: +-" in retrofit.said(none)
    assert "no interval" in retrofit.said(paired_difference({0: 1.0}, {0: 0.5}))
    assert retrofit.said(None) == "no seed in common"
