"""Word swap: the stated share to the word, the same words at every larger share, and what "AAA" became."""

import pytest
import torch

from twicing.data.text_vocabulary import build_listed
from twicing.robustness.stop_words import STOP_WORDS
from twicing.robustness.word_swap import MODES, swap_words, what_becomes

LINES = [
    "the Cat sat on the mat , and slept AAA",
    "",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3",
    "of the and",
    "<unk> dog barked . <unk> dog ran",
]
TEXT = "\n".join(LINES) + "\n"


def vocabulary_of(kind="words", text=TEXT):
    return build_listed(kind, [text])


def numbers(vocabulary, text=TEXT):
    return torch.tensor(vocabulary.encode(text), dtype=torch.int32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def swapped(share, mode="inputs only", kind="words", text=TEXT, seed=0):
    vocabulary = vocabulary_of(kind, text)
    stream = numbers(vocabulary, text)
    return vocabulary, stream, swap_words(stream, vocabulary, share, mode=mode, generator=seeded(seed))


WORDS = sum(len(line.split()) for line in LINES)


@pytest.mark.parametrize("share", ["0", "0.015", "0.02", "1/25", "0.06", "0.08", "0.1", "1/2", "1"])
@pytest.mark.parametrize("mode", ["inputs only", "inputs and targets"])
def test_exactly_the_share_of_words_is_swapped(share, mode):
    text = "some words of a line\n" * 61 + "AAA\n"
    vocabulary, stream, found = swapped(share, mode, text=text)
    words = 61 * 5 + 1
    assert found.words == words
    # To the nearest word, by whole numbers.
    numerator, denominator = {"1/25": (40, 1000), "1/2": (1, 2)}.get(share) or (round(float(share) * 1000), 1000)
    assert found.swapped == (2 * words * numerator + denominator) // (2 * denominator)
    assert found.share == found.swapped / words
    (aaa,) = vocabulary.of_word("AAA")
    changed = (found.inputs != stream).sum().item()
    # The one "AAA" of the text may be among those swapped.
    assert found.swapped - 1 <= changed <= found.swapped
    assert (found.inputs[found.inputs != stream] == aaa).all()
    ends = stream == vocabulary.line_end
    assert torch.equal(found.inputs[ends], stream[ends]), "an end of a line is no word"
    assert torch.equal(found.targets, stream if mode == "inputs only" else found.inputs)
    assert found.inputs.dtype == torch.int32


@pytest.mark.parametrize(("words", "swaps"), [(1, 1), (3, 2), (5, 3)])
def test_half_a_word_counts_as_one(words, swaps):
    _, _, found = swapped("1/2", text="AAA " * words + "\n")
    assert (found.words, found.swapped) == (words, swaps)


def test_words_are_a_function_of_the_generator():
    first, again, other = (swapped("1/2", seed=seed)[2].inputs for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", MODES)
def test_words_swapped_at_a_smaller_share_are_among_those_at_a_larger(mode):
    stream = swapped("0")[1]
    before = torch.zeros(len(stream), dtype=torch.bool)
    for share in ("0", "1/10", "1/5", "1/2", "9/10"):
        found = swapped(share, mode)[2]
        changed = found.inputs != stream
        assert changed[before].all()
        before = changed
    assert before.any()


def test_every_word_has_the_same_chance():
    """Of 300 draws of half of the words each word is in about 150; six deviations are 52."""
    vocabulary = vocabulary_of()
    stream = numbers(vocabulary, LINES[2])
    times = torch.zeros(len(stream))
    for seed in range(300):
        times += swap_words(stream, vocabulary, "1/2", generator=seeded(seed)).inputs != stream
    assert times.sum() == 300 * len(stream) / 2
    assert 98 < times.min() <= times.max() < 202


def test_paper_compat_swaps_at_least_one_word_of_each_line_and_never_a_stop_word():
    for seed in range(20):
        vocabulary, _, found = swapped("1/10", "paper_compat", seed=seed)
        assert torch.equal(found.inputs, found.targets)
        lines = " ".join(vocabulary.text(found.inputs.tolist())).split("<eos>")
        per_line = [line.split() for line in lines[:-1]]
        changed = [
            [old for old, new in zip(line.split(), words, strict=True) if new == "AAA" and old != "AAA"]
            for line, words in zip(LINES, per_line, strict=True)
        ]
        assert [len(line.split()) for line in LINES] == [len(words) for words in per_line]
        # Ten words: one. Thirty: three. Only stop-words: none. Seven: one.
        assert len(changed[0]) <= 1
        assert [len(words) for words in changed[1:]] == [0, 3, 0, 1]
        assert not {word.lower() for words in changed for word in words} & {*STOP_WORDS, ",", "."}
        assert found.swapped == 1 + 3 + 1
        assert found.words == WORDS


def test_paper_compat_rounds_down_and_takes_what_there_is():
    line = "one two three four five six seven AAA the of and or but not\n"
    for share, expected in (("0", 0), ("1/100", 1), ("1/7", 2), ("3/14", 3), ("1", 7 + 1)):
        found = swapped(share, "paper_compat", text=line)[2]
        # "one" to "seven" and "AAA" itself; "the of and or but not" are not to be swapped.
        assert found.swapped == expected, share


def test_stop_words_are_known_whatever_their_case():
    text = "The THE the of Of zebra AAA\n"
    vocabulary, _, found = swapped("1", "paper_compat", text=text)
    assert vocabulary.text(found.inputs.tolist()) == ["The", "THE", "the", "of", "Of", "AAA", "AAA", "<eos>"]


def test_what_the_replacement_became():
    assert what_becomes(vocabulary_of())[1] == '"AAA" is a word of the vocabulary.'
    without = build_listed("words", ["one two <unk>\n"])
    token, sentence = what_becomes(without)
    assert without.text(token) == ["<unk>"]
    assert sentence == '"AAA" is not in the vocabulary and became <unk>.'
    neither = build_listed("words", ["one two\n"])
    with pytest.raises(ValueError, match='the vocabulary has neither "AAA" nor <unk>'):
        swap_words(numbers(neither, "one two\n"), neither, "1/2", generator=seeded())


def test_characters_keep_the_length_of_every_word():
    text = "The cat, so\tbig\n\nAsleep\n"
    vocabulary, _, found = swapped("1", kind="characters", text=text)
    assert "".join(vocabulary.text(found.inputs.tolist())) == "AAA AAAA AA\tAAA\n\nAAAAAA\n"
    assert (found.words, found.swapped) == (5, 5)
    assert found.became == ('"AAA" became the characters "A", "A", "A", repeated or cut to the length of each word.')
    one = swapped("1/5", kind="characters", text=text)[2]
    words = "".join(vocabulary.text(one.inputs.tolist())).split()
    assert sum(set(word) == {"A"} for word in words) == 1
    assert [len(word) for word in words] == [3, 4, 2, 3, 6]


def test_characters_know_stop_words_and_lines():
    text = "the A cat\nand the\nA of\n"
    vocabulary, _, found = swapped("1", "paper_compat", kind="characters", text=text)
    # "a" is a stop-word too.
    assert "".join(vocabulary.text(found.inputs.tolist())) == "the A AAA\nand the\nA of\n"


def test_pieces_of_words_are_swapped_together():
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers (the extra 'hf')")
    from twicing.data.text_bpe import build_bpe

    vocabulary = build_bpe(["the cat sat of AA mat\n" * 50], 275)
    text = "the cat sat,! zqx of AAA\nqq\n"
    stream = numbers(vocabulary, text)
    found = swap_words(stream, vocabulary, "1", mode="inputs only", generator=seeded())
    assert found.words == found.swapped == 7
    assert found.became.startswith('"AAA" became the BPE tokens " AA", "A", repeated or cut')
    # Each word has as many tokens as before; spaces of their own are no part of a word.
    assert vocabulary.text(stream.tolist()) == (
        [" the", " cat", " sat", ",", "!", " ", "z", "q", "x", " of", " AA", "A", "<eos>", " ", "q", "q", "<eos>"]
    )
    assert vocabulary.text(found.inputs.tolist()) == (
        [" AA", " AA", " AA", "A", " AA", " ", " AA", "A", " AA", " AA", " AA", "A", "<eos>", " ", " AA", "A", "<eos>"]
    )
    kept = swap_words(stream, vocabulary, "1", mode="paper_compat", generator=seeded())
    assert vocabulary.text(kept.inputs.tolist())[:2] == [" the", " AA"]
    assert vocabulary.text(kept.inputs.tolist())[9] == " of"


def test_a_bare_space_is_no_part_of_the_replacement():
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers (the extra 'hf')")
    from twicing.data.text_bpe import build_bpe

    vocabulary = build_bpe(["the cat\n" * 50], 262)
    assert vocabulary.text(vocabulary.of_word("AAA")) == [" ", "A", "A", "A"]
    assert vocabulary.text(what_becomes(vocabulary)[0]) == ["A", "A", "A"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": "1.01"}, "share must be from 0 to 1: got 1.01"),
        ({"share": "-1/9"}, "share must be from 0 to 1: got -1/9"),
        ({"share": "4 %"}, "share must read like"),
        ({"share": "0.1", "mode": "targets"}, "mode must be one of inputs only, inputs and targets, paper_compat"),
    ],
)
def test_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        swapped(**arguments)


def test_a_text_without_words_is_told():
    vocabulary = vocabulary_of()
    with pytest.raises(ValueError, match="the text holds no words to swap"):
        swap_words(numbers(vocabulary, "\n\n"), vocabulary, "1/2", generator=seeded())


def test_wikitext_103_has_the_word(real_data):
    whole = (real_data / "text" / "wikitext-103" / "wiki.valid.tokens").read_text(encoding="utf-8")
    # The part of it around its first "AAA".
    start = whole.rindex("\n", 0, whole.index(" AAA ") - 50_000) + 1
    text = whole[start : whole.index("\n", start + 150_000) + 1]
    vocabulary, stream, found = swapped("0.04", "inputs and targets", text=text)
    assert found.became == '"AAA" is a word of the vocabulary.'
    assert found.words == len(text.split())
    assert found.swapped == round(0.04 * found.words)
    compat = swap_words(stream, vocabulary, "0.015", mode="paper_compat", generator=seeded())
    # One word of every short line, such as a heading, makes it more than was asked for.
    assert 0.015 < compat.share < 0.02
