"""Readers of text: every part found, every byte read once, and a sentence for what is wrong."""

import json
import lzma

import pytest

from twicing.data import text_sources
from twicing.data.text_sources import imdb, plain_text, python_documentation


def read(part):
    return "".join(part.pieces())


def write_parts(folder, names=("train.txt", "valid.txt", "test.txt"), text="one two\n"):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("train.tokens", "valid.txt", "wiki.test.tokens"),
    ],
)
def test_the_files_of_a_folder_are_its_parts(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    source = plain_text(tmp_path)
    assert source.name == tmp_path.name
    assert [read(source.parts[part]) for part in ("train", "valid", "test")] == [f"{name}\n" for name in names]


def test_a_missing_part_is_named_with_the_names_that_it_may_have(tmp_path):
    write_parts(tmp_path, ("valid.txt", "test.txt"))
    with pytest.raises(ValueError, match=r"holds no train part: it must have one of train.txt, .*wiki.train.tokens"):
        plain_text(tmp_path)
    write_parts(tmp_path, ("train.txt", "train.tokens"))
    with pytest.raises(ValueError, match=r"train part more than once \(train.txt, train.tokens\)"):
        plain_text(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        plain_text(tmp_path / "nowhere")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
def test_pieces_are_the_text_whatever_the_size_of_a_block(block, tmp_path, monkeypatch):
    """Cut after white space only, also where a letter of several bytes lies across the end of a block."""
    monkeypatch.setattr(text_sources, "BLOCK", block)
    text = "Größe — 東京 \n\n  naïve\u2028sé\u00a0parated\u0085 words\n" * 3 + "no end"
    write_parts(tmp_path, text=text)
    pieces = list(plain_text(tmp_path).parts["train"].pieces())
    assert "".join(pieces) == text
    assert all(piece[-1] in " \n" for piece in pieces[:-1])


@pytest.mark.parametrize("block", [1, 4, 5, 1 << 16])
def test_line_ends_of_windows_and_a_mark_of_byte_order_go(block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "BLOCK", block)
    write_parts(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo three\r\n")
    assert read(plain_text(tmp_path).parts["train"]) == "one\ntwo three\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Größe".encode("latin-1"), r"is not UTF-8 text \(byte 0xf6 near place 2\): save it as UTF-8"),
        (b"good words \xe2\x82", "is not UTF-8 text"),
        ("ascii only\n".encode("utf-16-le"), r"holds zero bytes.*not UTF-16"),
    ],
    ids=["latin-1", "cut off within a letter", "utf-16"],
)
def test_another_encoding_is_told(content, message, tmp_path):
    write_parts(tmp_path)
    (tmp_path / "valid.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"valid.txt.*{message}"):
        read(plain_text(tmp_path).parts["valid"])


def test_a_single_file_is_cut_at_line_ends(tmp_path):
    file = tmp_path / "all.txt"
    file.write_text("".join(f"line {number:03}, ü\n" for number in range(200)), encoding="utf-8")
    parts = plain_text(file).parts
    texts = [read(parts[part]) for part in ("train", "valid", "test")]
    assert "".join(texts) == file.read_text(encoding="utf-8")
    assert [text.count("\n") for text in texts] == [181, 10, 9]
    assert len({json.dumps(part.stamp()) for part in parts.values()}) == 3


def test_stamps_tell_texts_apart(tmp_path):
    first = plain_text(write_parts(tmp_path / "a", text="one two\n")).parts["train"]
    same = plain_text(write_parts(tmp_path / "b", text="one two\n")).parts["train"]
    other = plain_text(write_parts(tmp_path / "c", text="one owt\n")).parts["train"]
    assert first.stamp() == same.stamp() != other.stamp()


def test_reviews_are_one_line_each_and_every_twentieth_is_held_out(tmp_path):
    for part, count in (("train", 45), ("test", 3)):
        with lzma.open(tmp_path / f"{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for number in range(count):
                file.write(json.dumps({"id": number, "text": f"{part} {number}<br /><br />Ünd\nmore  "}) + "\n")
    parts = imdb(tmp_path).parts
    lines = {name: read(part).splitlines() for name, part in parts.items()}
    assert lines["valid"] == ["train 19 Ünd more", "train 39 Ünd more"]
    assert lines["test"] == [f"test {number} Ünd more" for number in range(3)]
    assert len(lines["train"]) == 43
    assert not set(lines["train"]) & set(lines["valid"])


def test_a_damaged_review_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl.xz does not exist: give the folder"):
        imdb(tmp_path)
    whole = lzma.compress(b'{"text": "one"}\n' * 100)
    (tmp_path / "train.jsonl.xz").write_bytes(whole)
    for content in (whole[:-8], lzma.compress(b"no json\n"), lzma.compress(b'{"words": 1}\n'), b"no xz"):
        (tmp_path / "test.jsonl.xz").write_bytes(content)
        with pytest.raises(ValueError, match=r"test.jsonl.xz is damaged, or its lines"):
            read(imdb(tmp_path).parts["test"])


def test_pythons_documentation_holds_nothing_out_that_it_trains_on():
    parts = python_documentation().parts
    paragraphs = {name: {" ".join(piece.split()) for piece in part.pieces()} for name, part in parts.items()}
    assert min(len(found) for found in paragraphs.values()) > 100
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["valid"]
    assert not paragraphs["valid"] & paragraphs["test"]
    sizes = {name: sum(map(len, found)) for name, found in paragraphs.items()}
    assert 0.7 < sizes["train"] / sum(sizes.values()) < 0.9
    assert all(piece.endswith("\n") and piece.strip() for part in parts.values() for piece in part.pieces())
    assert parts["train"].stamp() != parts["test"].stamp()


def test_a_paragraph_that_comes_twice_is_taken_once_at_its_first_place(monkeypatch):
    from pydoc_data import topics

    made = {"b": "  two\n\n  four  words\n\nsix", "a": "one\n\ntwo\n \nthree"}
    monkeypatch.setattr(topics, "topics", made)
    assert read(python_documentation().parts["train"]).split("\n") == [
        "one",
        "two",
        "three",
        "  four  words",
        "six",
        "",
    ]


def test_a_python_without_help_texts_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match=r"help texts .* are not installed"):
        python_documentation()
