"""A tar archive gives the images that its unpacked folders give; what is incomplete or could do harm is refused."""

import gzip
import io
import os
import tarfile

import pytest
import torch
from made_folders import encoded, made_files, make_archive, make_class_folders, picture, write_archive, write_files

from twicing.data.archive import class_archive
from twicing.data.decode import pixels_of
from twicing.data.folders import class_folders

PICTURE = encoded(picture((4, 4)))
KINDS = [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]


def archive_of(path, members):
    """A .tar of TarInfo objects, or of names, each of which becomes a picture."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(PICTURE)
            tar.addfile(member, io.BytesIO(PICTURE) if member.isreg() else None)
    return path


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("kind", KINDS)
def test_archive_equals_its_folders(tmp_path, kind):
    files = made_files(("dog", "cat", "a-b", "a"), per_class=3, size=(6, 5), suffix=".jpg")
    folders = class_folders(write_files(tmp_path / "folders", files))
    # In an order of its own, which must not matter.
    shuffled = {f"train/{name}": files[name] for name in sorted(files, key=lambda name: name[::-1])}
    archive = class_archive(write_archive(tmp_path / f"set{kind}", shuffled))
    assert archive.files == tuple(f"train/{file}" for file in folders.files)
    assert archive.classes == folders.classes
    assert torch.equal(archive.labels, folders.labels)
    pictures = dict(archive.pictures())
    assert sorted(pictures) == list(range(len(folders)))
    for index, found in pictures.items():
        assert torch.equal(pixels_of(found), pixels_of(folders.open(index)))


def test_pictures_come_in_the_archives_order(tmp_path):
    path = archive_of(tmp_path / "set.tar", ["b/1.png", "a/2.png", "a/1.png"])
    progress = []
    assert [index for index, _ in class_archive(path).pictures(progress.append)] == [2, 1, 0]
    assert progress == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("top", ["", "train/", "./", "./data/set/train/"])
def test_class_folders_may_lie_in_folders(tmp_path, top):
    archive = class_archive(archive_of(tmp_path / "set.tar", [f"{top}cat/1.png", f"{top}dog/1.png"]))
    assert archive.classes == ("cat", "dog")
    assert len(list(archive.pictures())) == 2


def test_archives_made_by_tar_itself_are_read(tmp_path):
    make_class_folders(tmp_path / "set" / "train", suffix=".jpg")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "set", ".")
    archive = class_archive(tmp_path / "set.tar.gz")
    assert archive.files[0] == "train/cat/0000.jpg"
    assert len(list(archive.pictures())) == 6


def test_hidden_and_other_members_are_not_seen(tmp_path):
    wanted = ["cat/1.PNG", "dog/2.jpeg"]
    others = ["cat/._1.PNG", "._cat", ".hidden/1.png", "cat/notes.txt", "readme", "checksums/sums.txt"]
    archive = class_archive(archive_of(tmp_path / "set.tar", [*others, *wanted]))
    assert archive.files == tuple(wanted)


def test_one_part_of_an_archive_is_taken(tmp_path):
    members = ["all/train/cat/1.png", "all/train/dog/1.png", "all/test/cat/9.png", "all/test/dog/9.png"]
    path = archive_of(tmp_path / "set.tar", members)
    assert class_archive(path, "train").files == tuple(members[:2])
    assert class_archive(path, "test").files == tuple(members[2:])
    with pytest.raises(ValueError, match=r"set\.tar holds no image in the folder val: pack class folders"):
        class_archive(path, "val")
    # A class named like a part is not the part.
    nested = archive_of(tmp_path / "nested.tar", ["data/train/extra/cat/1.png"])
    with pytest.raises(ValueError, match=r"class folders directly in train: got data/train/extra/cat/1\.png"):
        class_archive(nested, "train")


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        pytest.param("../cat/1.png", "climbs out of the folder", id="up"),
        pytest.param("cat/../../1.png", "climbs out of the folder", id="up from within"),
        pytest.param("/cat/1.png", "climbs out of the folder", id="absolute"),
        pytest.param("..\\cat\\1.png", "climbs out of the folder", id="up on Windows"),
        pytest.param("C:\\cat\\1.png", "climbs out of the folder", id="drive"),
        pytest.param("C:1.png", "climbs out of the folder", id="drive without a slash"),
        pytest.param(special("../out", tarfile.DIRTYPE), "climbs out of the folder", id="folder outside"),
        pytest.param("../notes.txt", "climbs out of the folder", id="other file outside"),
        pytest.param("../.hidden/x.png", "climbs out of the folder", id="hidden outside"),
        pytest.param(special("cat/1.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link", id="link"),
        pytest.param(special("cat/1.png", tarfile.LNKTYPE, "cat/0.png"), "is a link", id="hard link"),
        pytest.param(special("cat/.x", tarfile.SYMTYPE, "0.png"), "is a link", id="hidden link"),
        pytest.param(special("cat/1.png", tarfile.CHRTYPE), "is a device", id="character device"),
        pytest.param(special("cat/1.png", tarfile.BLKTYPE), "is a device", id="block device"),
        pytest.param(special("notes", tarfile.FIFOTYPE), "is a device", id="pipe"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_harmful_members_are_refused(tmp_path, member, reason, first):
    good = ["cat/0.png", "dog/0.png"]
    path = archive_of(tmp_path / "set.tar", [member, *good] if first else [*good, member])
    name = member if isinstance(member, str) else member.name
    with pytest.raises(ValueError, match=r"set\.tar is refused: its member .* " + reason) as caught:
        class_archive(path)
    assert repr(name) in str(caught.value)
    assert os.listdir(tmp_path) == ["set.tar"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["a byte", "half", "nearly all"])
def test_truncated_archive_is_refused(tmp_path, kind, cut):
    path = make_archive(tmp_path / f"set{kind}", per_class=20)
    content = path.read_bytes()
    # An uncompressed archive ends in up to 10 KiB of zeros, of which nobody needs the last byte.
    short = 11 * 1024 if kind == ".tar" else 1
    path.write_bytes(content[: {"a byte": -short, "half": len(content) // 2, "nearly all": 30}[cut]])
    with pytest.raises(ValueError, match=r"set\.t.* is truncated or damaged \(.+\): get it again"):
        class_archive(path)


def test_archive_cut_between_two_members_is_refused(tmp_path):
    """Python's reader takes the end of the file for the end of the archive, and would return fewer images."""
    path = archive_of(tmp_path / "set.tar", ["cat/1.png", "dog/1.png", "dog/2.png"])
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 2
    with pytest.raises(ValueError, match="its end mark is missing"):
        class_archive(path)


def test_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = archive_of(tmp_path / "set.tar", ["cat/1.png", "dog/1.png", "dog/2.png"])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        content[tar.getmembers()[1].offset + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        class_archive(path)


@pytest.mark.parametrize("where", [-5, -2], ids=["checksum", "length"])
def test_checksum_of_the_compression_is_looked_at(tmp_path, where):
    path = make_archive(tmp_path / "set.tar.gz")
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated or damaged \(.*\): get it again"):
        class_archive(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param([], "holds no image: pack class folders, as train/cat/0001.jpg", id="nothing"),
        pytest.param(["notes.txt", "cat/notes.txt"], "holds no image", id="no picture"),
        pytest.param(["1.png", "2.png"], r"one folder per class, side by side: got 1\.png", id="no folder"),
        pytest.param(["cat/1.png", "2.png"], r"side by side: got 2\.png", id="one without a folder"),
        pytest.param(["cat/1.png", "more/dog/2.png"], r"got cat/1\.png, more/dog/2\.png\. Pack each", id="depths"),
        pytest.param(["train/cat/1.png", "test/cat/1.png"], r"got test/cat/1\.png, train/cat/1\.png", id="two sets"),
        pytest.param(["cat/1.png", "dog/1.png", "cat/1.png"], r"holds cat/1\.png twice: pack it again", id="twice"),
        pytest.param(["cat/1.png", "./cat/1.png"], r"holds cat/1\.png twice", id="twice in two spellings"),
        pytest.param(
            ["train/cat/1.png", special("train/dog", tarfile.DIRTYPE)],
            "the class folder train/dog holds no image: add its images or remove it",
            id="empty class folder",
        ),
    ],
)
def test_archives_of_another_form_are_refused(tmp_path, members, message):
    path = archive_of(tmp_path / "set.tar", members)
    with pytest.raises(ValueError, match=rf"set\.tar.*{message}"):
        class_archive(path)


@pytest.mark.parametrize("content", [b"", b"hello", gzip.compress(b"hello"), bytes(100)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "set.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.tar\.gz is truncated or damaged"):
        class_archive(tmp_path / "set.tar.gz")


def test_missing_archive_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.tar does not exist: give a tar archive of class folders"):
        class_archive(tmp_path / "gone.tar")


def test_broken_image_is_named_with_its_archive(tmp_path):
    files = {"train/cat/1.png": PICTURE, "train/dog/7.png": PICTURE[:40]}
    archive = class_archive(write_archive(tmp_path / "set.tar.gz", files))
    with pytest.raises(ValueError, match=r"set\.tar\.gz: train/dog/7\.png cannot be read as an image"):
        list(archive.pictures())


def test_an_archive_that_changes_meanwhile_is_named(tmp_path):
    path = archive_of(tmp_path / "set.tar", ["cat/1.png", "dog/1.png"])
    archive = class_archive(path)
    archive_of(path, ["cat/1.png", "cow/1.png"])
    with pytest.raises(ValueError, match=r"set\.tar has changed: 1 of the 2 images listed before are left\. Start"):
        list(archive.pictures())
