"""Text to numbers and back: words, words and marks, characters and BPE, built from the part to train on."""

import json
import sys

import pytest
import torch

from twicing.data.text_vocabulary import NoTextError, build_listed, load_vocabulary

TEXT = "the cat sat on the mat .\n\nthe Dog sat , too\n"


def words(vocabulary, piece):
    return vocabulary.text(vocabulary.encode(piece))


def test_words_are_numbered_by_frequency_and_then_by_the_alphabet():
    vocabulary = build_listed("words", [TEXT])
    assert vocabulary.tokens == ("<eos>", "the", "sat", ",", ".", "Dog", "cat", "mat", "on", "too")
    assert vocabulary.unit == "word"
    assert words(vocabulary, TEXT) == [
        *("the", "cat", "sat", "on", "the", "mat", ".", "<eos>", "<eos>"),
        *("the", "Dog", "sat", ",", "too", "<eos>"),
    ]


def test_only_line_feeds_end_a_line_and_all_white_space_ends_a_word():
    """As the counts of WikiText-103 have it: str.splitlines() would see lines where there are none."""
    vocabulary = build_listed("words", ["a\u2028b\u00a0c\u0085d\n"])
    assert words(vocabulary, "a\u2028b\u00a0c\u0085d\n") == ["a", "b", "c", "d", "<eos>"]


def test_the_number_of_pieces_does_not_matter():
    whole = build_listed("words", [TEXT])
    pieces = [TEXT[:4], TEXT[4:25], TEXT[25:]]
    in_pieces = build_listed("words", pieces)
    assert whole.tokens == in_pieces.tokens
    assert [n for piece in pieces for n in whole.encode(piece)] == whole.encode(TEXT).tolist()


def test_marks_are_cut_off_words_and_unk_stays_whole():
    vocabulary = build_listed("words and marks", ['He said: "don\'t_1 <unk>..."\n'])
    assert vocabulary.unit == "word or mark"
    expected = ["He", "said", ":", '"', "don", "'", "t_1", "<unk>", ".", ".", ".", '"', "<eos>"]
    assert words(vocabulary, 'He said: "don\'t_1 <unk>..."\n') == expected


def test_characters_keep_all_of_the_text():
    vocabulary = build_listed("characters", [TEXT])
    assert "".join(words(vocabulary, TEXT)) == TEXT
    assert vocabulary.text([vocabulary.line_end]) == ["\n"]
    assert vocabulary.unit == "character"


def test_rare_words_become_unknown_and_unknown_has_their_frequency():
    vocabulary = build_listed("words", [TEXT], min_count=2)
    # Eight words occur once, so that <unk> is the most frequent of all.
    assert vocabulary.tokens == ("<unk>", "<eos>", "the", "sat")
    assert words(vocabulary, "the zebra sat\n") == ["the", "<unk>", "sat", "<eos>"]


def test_a_limit_counts_all_tokens():
    for limit in range(3, 9):
        vocabulary = build_listed("words", [TEXT], vocabulary_size=limit)
        assert len(vocabulary) == limit
        assert {"<unk>", "<eos>"} <= set(vocabulary.tokens)
    assert build_listed("words", [TEXT], vocabulary_size=10).tokens == build_listed("words", [TEXT]).tokens
    assert build_listed("words", [TEXT], vocabulary_size=4).tokens == ("<unk>", "<eos>", "the", "sat")


def test_an_unknown_word_without_unk_is_an_error_that_says_what_to_do():
    vocabulary = build_listed("words", [TEXT])
    with pytest.raises(ValueError, match=r"'zebra' does not occur in the part to train on.*set min_count to 2"):
        vocabulary.encode("the zebra sat\n")


@pytest.mark.parametrize("kind", ["words", "words and marks", "characters"])
def test_a_text_without_an_end_of_line_gets_one(kind):
    vocabulary = build_listed(kind, ["a b ", "a"])
    assert vocabulary.text([vocabulary.line_end]) == ["\n" if kind == "characters" else "<eos>"]


@pytest.mark.parametrize("kind", ["words", "words and marks", "characters"])
@pytest.mark.parametrize("pieces", [[], [""], ["\n"], [" \n\n "]])
def test_there_must_be_words(kind, pieces):
    with pytest.raises(NoTextError, match="no text to build a vocabulary from"):
        build_listed(kind, pieces)


def test_a_word_has_numbers_or_none():
    by_word, by_character = build_listed("words", [TEXT]), build_listed("characters", [TEXT])
    assert by_word.of_word("cat") == (by_word.tokens.index("cat"),)
    assert by_word.of_word("AAA") is None
    assert by_character.text(by_character.of_word("cat")) == ["c", "a", "t"]
    assert by_character.of_word("cAt") is None


def test_where_words_begin_and_what_is_none():
    by_word = build_listed("words", [TEXT])
    assert [by_word.tokens[i] for i in by_word.separators().nonzero()] == ["<eos>"]
    assert torch.equal(by_word.word_starts(), ~by_word.separators())
    by_character = build_listed("characters", ["a b\tc\n"])
    assert {by_character.tokens[i] for i in by_character.separators().nonzero()} == {" ", "\t", "\n"}
    assert not by_character.word_starts().any()


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_saved_and_loaded(kind, tmp_path):
    vocabulary = build_listed(kind, [TEXT + "Größe 東京 \u2028\n"])
    vocabulary.save(tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert (loaded.tokens, loaded.kind, loaded.unit) == (vocabulary.tokens, kind, vocabulary.unit)
    assert loaded.encode(TEXT) == vocabulary.encode(TEXT)


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"kind": "words"}', '{"kind": "runes", "tokens": []}'])
def test_a_damaged_vocabulary_is_told(content, tmp_path):
    if content is not None:
        (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocabulary.json is missing or damaged .*: delete"):
        load_vocabulary(tmp_path)


class TestBpe:
    """What tokenizers learns from a text, kept as JSON."""

    @pytest.fixture(autouse=True)
    def _needs_tokenizers(self):
        pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers (the extra 'hf')")

    @pytest.fixture
    def vocabulary(self):
        from twicing.data.text_bpe import build_bpe

        return build_bpe([TEXT * 20, "the theatre\n" * 10], 270)

    def test_no_text_is_lost(self, vocabulary):
        piece = "the Größe of 東京 <eos> <unk>,  two  spaces\n"
        tokens = vocabulary.encode(piece)
        assert tokens[-1] == vocabulary.line_end
        assert tokens.tolist().count(vocabulary.line_end) == 1, "<eos> within a text is no end of a line"
        decoded = vocabulary._tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False)
        assert decoded == " " + piece.rstrip("\n")

    def test_size_and_unit(self, vocabulary):
        assert len(vocabulary) == 270
        assert vocabulary.unit == "BPE token"
        assert vocabulary.text(vocabulary.encode("the the\n")) == [" the", " the", "<eos>"]

    def test_where_words_begin(self, vocabulary):
        tokens = vocabulary.encode("the sat,\n\n zq")
        # "zq" is not known with its space, which then is a token of its own.
        assert vocabulary.text(tokens) == [" the", " sat", ",", "<eos>", "<eos>", " ", "z", "q"]
        assert vocabulary.word_starts()[list(tokens)].tolist() == [True, True, *[False] * 6]
        assert vocabulary.separators()[list(tokens)].tolist() == [False] * 3 + [True] * 3 + [False] * 2

    def test_saved_and_loaded(self, vocabulary, tmp_path):
        vocabulary.save(tmp_path)
        loaded = load_vocabulary(tmp_path)
        assert loaded.encode(TEXT) == vocabulary.encode(TEXT)
        assert len(loaded) == len(vocabulary)
        assert loaded.of_word("the") == tuple(vocabulary.encode("the"))

    def test_a_size_below_the_bytes_is_refused(self):
        from twicing.data.text_bpe import build_bpe

        with pytest.raises(ValueError, match=r"vocabulary_size must be 257 or more for BPE.*got 256"):
            build_bpe([TEXT], 256)

    def test_a_damaged_tokenizer_is_told(self, tmp_path):
        (tmp_path / "vocabulary.json").write_text(json.dumps({"kind": "bpe", "tokenizer": "{}"}))
        with pytest.raises(ValueError, match="missing or damaged"):
            load_vocabulary(tmp_path)


def test_without_tokenizers_the_extra_is_named(monkeypatch):
    from twicing.data.text_bpe import build_bpe

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'twicing\[hf\]'"):
        build_bpe([TEXT], 300)
