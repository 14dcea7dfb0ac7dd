"""A corpus on disk: the right numbers in the right order, kept with its vocabulary, and no object for every token."""

import json
import tracemalloc

import pytest
import torch

from twicing.data import text
from twicing.data.text import load_corpus, prepare_corpus
from twicing.data.text_sources import PARTS, TextPart, TextSource, _whole, imdb, plain_text, python_documentation


@pytest.fixture
def folder(tmp_path):
    texts = {"train": "a b a\nc a <unk>\n", "valid": "a b\n\nc", "test": "c zebra\n"}
    for part, content in texts.items():
        (tmp_path / f"{part}.txt").write_text(content)
    return tmp_path


def streams(corpus):
    return [corpus.vocabulary.text(getattr(corpus, part).tolist()) for part in ("train", "valid", "test")]


def made_up(*parts):
    """A source whose parts are these pieces of text."""

    def part(pieces):
        return TextPart("made up", lambda: iter(pieces), lambda: {"pieces": pieces}, sum(map(len, pieces)))

    return TextSource("mine", {name: part(pieces) for name, pieces in zip(PARTS, parts, strict=True)})


EXPECTED = [
    ["a", "b", "a", "<eos>", "c", "a", "<unk>", "<eos>"],
    # The last line has no end in the file.
    ["a", "b", "<eos>", "<eos>", "c", "<eos>"],
    ["c", "<unk>", "<eos>"],
]


def test_streams_are_the_text_in_numbers(folder, tmp_path):
    shares = []
    corpus = prepare_corpus(plain_text(folder), tmp_path / "kept" / "text", progress=shares.append)
    assert streams(corpus) == EXPECTED
    assert corpus.train.dtype == torch.int32
    assert corpus.counts == {"train": 8, "valid": 6, "test": 3}
    assert str(corpus) == (f"{folder.name}: 8 train, 6 valid, 3 test tokens, a vocabulary of 5 (unit: word)")
    assert shares == sorted(shares)
    assert shares[-1] == 1
    again = load_corpus(tmp_path / "kept" / "text")
    assert streams(again) == EXPECTED
    assert again.vocabulary.tokens == corpus.vocabulary.tokens


def test_characters_get_no_line_end_that_is_not_there(folder, tmp_path):
    (folder / "train.txt").write_text("abc zer\n")
    (folder / "test.txt").write_text("c zebra\n")
    corpus = prepare_corpus(plain_text(folder), tmp_path / "text", "characters")
    assert "".join(streams(corpus)[1]) == "a b\n\nc"


def test_what_is_there_is_taken_as_it_is(folder, tmp_path, monkeypatch):
    prepare_corpus(plain_text(folder), tmp_path / "text")
    monkeypatch.setattr(text, "_encode", None)
    assert streams(prepare_corpus(plain_text(folder), tmp_path / "text")) == EXPECTED


def test_another_text_or_other_settings_are_refused(folder, tmp_path):
    kept = tmp_path / "text"
    prepare_corpus(plain_text(folder), kept)
    with pytest.raises(ValueError, match=r"prepared from other files or settings \(min_count: 1 there, 2 here\)"):
        prepare_corpus(plain_text(folder), kept, min_count=2)
    with pytest.raises(ValueError, match=r"\(kind: 'words' there, 'characters' here\)"):
        prepare_corpus(plain_text(folder), kept, "characters")
    (folder / "test.txt").write_text("c zebro\n")
    with pytest.raises(ValueError, match=r"\(stamps: .*name another folder, or delete that one"):
        prepare_corpus(plain_text(folder), kept)
    assert streams(load_corpus(kept)) == EXPECTED


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine is not empty and holds no prepared text"):
        prepare_corpus(plain_text(folder), tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", "\n", "  \n \n"], ids=["empty", "a line end", "white space"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_part_without_words_is_told_and_leaves_nothing(content, part, folder, tmp_path):
    (folder / f"{part}.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"{part}.txt holds no text: it is empty or white space only"):
        prepare_corpus(plain_text(folder), tmp_path / "kept" / "text")
    assert list((tmp_path / "kept").glob("*")) == []


def test_an_unknown_word_names_the_file(folder, tmp_path):
    (folder / "train.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match=r"test.txt: 'zebra' does not occur in the part to train on"):
        prepare_corpus(plain_text(folder), tmp_path / "text")


@pytest.mark.parametrize("what", ["corpus.json", "train.int32", "vocabulary.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_corpus_is_told(what, how, folder, tmp_path):
    kept = tmp_path / "text"
    prepare_corpus(plain_text(folder), kept)
    file = kept / what
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"prepare (it|the text) again"):
        load_corpus(kept)


def test_a_stream_can_be_written_into_and_the_file_stays(folder, tmp_path):
    prepare_corpus(plain_text(folder), tmp_path / "text")
    load_corpus(tmp_path / "text").train.fill_(0)
    assert streams(load_corpus(tmp_path / "text")) == EXPECTED


def test_only_the_beginning_is_trained_on(folder, tmp_path):
    corpus = prepare_corpus(plain_text(folder), tmp_path / "text", train_tokens=5)
    assert streams(corpus) == [EXPECTED[0][:5], *EXPECTED[1:]]
    assert len(corpus.vocabulary) == 5, "the vocabulary is of the whole part"
    with pytest.raises(ValueError, match="train_tokens must not exceed the 8 tokens there are: got 9"):
        prepare_corpus(plain_text(folder), tmp_path / "more", train_tokens=9)


def test_the_beginning_may_end_within_any_piece(tmp_path):
    """Also where that piece does not end a line."""
    for limit, expected in ((1, "a"), (3, "a b <eos>"), (4, "a b <eos> c"), (5, "a b <eos> c a")):
        source = made_up(["a ", "b\n", "c a b"], ["a\n"], ["b c\n"])
        corpus = prepare_corpus(source, tmp_path / str(limit), train_tokens=limit)
        assert " ".join(streams(corpus)[0]) == expected


def test_an_unknown_kind_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match=r"unknown kind of tokens 'word': did you mean 'words'"):
        prepare_corpus(plain_text(folder), tmp_path / "text", "word")


@pytest.mark.parametrize("line_end", ["\n", " "], ids=["lines", "one endless line"])
def test_memory_does_not_grow_with_the_text(line_end, tmp_path):
    """150,000 tokens more: as a list of numbers 1.2 MB more, as words 8 MB and more."""
    line = " ".join(f"word{number}" for number in range(50)) + line_end
    peaks = []
    for lines in (1000, 4000):
        folder = tmp_path / str(lines)
        folder.mkdir()
        for part in ("train", "valid", "test"):
            (folder / f"{part}.txt").write_text(line * (lines if part == "train" else 1))
        tracemalloc.start()
        corpus = prepare_corpus(plain_text(folder), folder / "text")
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        assert corpus.counts["train"] == 50 * lines + (lines if line_end == "\n" else 1)
    assert peaks[1] < peaks[0] + 0.3, f"{peaks} MB of Python objects"


def test_bpe_is_kept_with_the_corpus(folder, tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers (the extra 'hf')")
    corpus = prepare_corpus(plain_text(folder), tmp_path / "text", "bpe", vocabulary_size=260)
    assert corpus.vocabulary.unit == "BPE token"
    again = load_corpus(tmp_path / "text")
    assert "".join(streams(again)[2]).replace(" ", "") == "czebra<eos>"
    assert torch.equal(again.train, corpus.train)
    assert json.loads((tmp_path / "text" / "vocabulary.json").read_text())["kind"] == "bpe"


def test_counts_of_penn_treebank(real_data, tmp_path):
    corpus = prepare_corpus(plain_text(real_data / "text" / "ptb"), tmp_path / "text")
    assert corpus.counts == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert len(corpus.vocabulary) == 10_000
    assert corpus.vocabulary.tokens[:4] == ("the", "<unk>", "<eos>", "N")
    assert int((corpus.train == corpus.vocabulary.line_end).sum()) == 42_068


@pytest.mark.parametrize(("name", "file"), [("wikitext-103", "wiki.{}.tokens"), ("wikitext-2", "{}.txt")])
def test_counts_of_wikitext(name, file, real_data, tmp_path):
    """Without its part to train on: the valid part stands for it here."""
    folder = real_data / "text" / name
    with pytest.raises(ValueError, match="holds no train part"):
        plain_text(folder)
    parts = {part: _whole(folder / file.format(part)) for part in ("valid", "test")}
    corpus = prepare_corpus(TextSource(name, {"train": parts["valid"]} | parts), tmp_path / "text", min_count=2)
    assert corpus.counts["valid"] == 217_646
    assert corpus.counts["test"] == 245_569
    if name == "wikitext-103":
        # "AAA" is an ordinary word there.
        ((number,),) = [corpus.vocabulary.of_word("AAA")]
        assert int((corpus.valid == number).sum()) == 5
        assert int((corpus.test == number).sum()) == 2


def test_counts_of_tiny_shakespeare(real_data, tmp_path):
    corpus = prepare_corpus(plain_text(real_data / "text" / "tinyshakespeare.txt"), tmp_path / "text", "characters")
    assert sum(corpus.counts.values()) == 1_115_394
    assert len(corpus.vocabulary) == 65


def test_counts_of_imdb(real_data):
    """Reading all of them takes a minute: the held-out part and the stamp will do."""
    parts = imdb(real_data / "text" / "imdb").parts
    reviews = list(parts["valid"].pieces())
    assert len(reviews) == 24_996 // 20
    assert all(review.count("\n") == 1 and len(review) > 20 for review in reviews)


def test_pythons_documentation_makes_a_corpus(tmp_path):
    corpus = prepare_corpus(python_documentation(), tmp_path / "text", "words and marks", min_count=2)
    assert min(corpus.counts.values()) > 5000
    assert len(corpus.vocabulary) > 1000
    unknown = corpus.vocabulary.tokens.index("<unk>")
    assert float((corpus.test == unknown).double().mean()) < 0.1


def test_a_part_may_be_anything_that_yields_pieces(tmp_path):
    source = made_up(["a ", "b\n", "c"], ["a\n"], ["b c\n"])
    assert streams(prepare_corpus(source, tmp_path / "text"))[0] == ["a", "b", "<eos>", "c", "<eos>"]
