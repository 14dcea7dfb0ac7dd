"""Pictures of all kinds become RGB as torchvision's ImageFolder has it, 16-bit greys apart; what is broken is named."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from made_folders import encoded, picture
from PIL import Image

from twicing.data.decode import open_rgb, pixels_of, to_tensor

GREYS = (np.arange(65536, dtype=np.uint32) * 40503 % 65536).astype(np.uint16).reshape(256, 256)


def decode(content, name="picture"):
    return open_rgb(io.BytesIO(content), name)


def as_array(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def png_of_16_bit_colours(colours):
    """[H, W, 3] uint16; Pillow can read such a file but not write it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_are_kept():
    image = picture((9, 7), seed=3)
    assert np.array_equal(as_array(decode(encoded(image))), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_is_repeated_over_the_colours(mode):
    image = picture((9, 7), mode=mode)
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(as_array(decode(encoded(image))), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("container", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(container):
    file = io.BytesIO()
    Image.fromarray(GREYS).save(file, container)
    found = as_array(decode(file.getvalue()))
    assert np.array_equal(found, np.stack([GREYS >> 8] * 3, axis=2))


def test_sixteen_bits_of_a_pgm_keep_their_upper_eight():
    content = b"P5\n256 256\n65535\n" + GREYS.astype(">u2").tobytes()
    assert np.array_equal(as_array(decode(content))[..., 1], GREYS >> 8)


def test_sixteen_bits_of_colour_keep_their_upper_eight():
    colours = np.stack([GREYS, GREYS[::-1], GREYS.T], axis=2)
    assert np.array_equal(as_array(decode(png_of_16_bit_colours(colours))), colours >> 8)


@pytest.mark.parametrize("transparency", [None, bytes(range(256)), 3], ids=["opaque", "alpha per colour", "one colour"])
def test_palette_becomes_its_colours(transparency):
    image = picture((9, 7)).quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", **({} if transparency is None else {"transparency": transparency}))
    colours = np.array(image.getpalette()).reshape(-1, 3)[np.asarray(image)]
    assert np.array_equal(as_array(decode(file.getvalue())), colours)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_the_colours_beneath_it_stay(mode):
    image = picture((9, 7), mode="L" if mode == "LA" else "RGB")
    expected = np.asarray(image.convert("RGB"))
    alpha = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(7, 9) * 4)
    image.putalpha(alpha)
    assert image.mode == mode
    assert np.array_equal(as_array(decode(encoded(image))), expected)


def test_cmyk_becomes_rgb():
    file = io.BytesIO()
    # Pure colours of ink, in areas of 16 x 16 that JPEG keeps: white, cyan, magenta, yellow, black.
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    pixels = np.repeat(np.repeat(np.array([inks], dtype=np.uint8), 16, axis=0), 16, axis=1)
    Image.frombytes("CMYK", (80, 16), pixels.tobytes()).save(file, "JPEG", quality=100)
    found = as_array(decode(file.getvalue()))[8, 8::16]
    expected = np.array([[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]])
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture((20, 10)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).size == (20, 10)


def test_of_an_animation_the_first_picture_is_taken():
    file = io.BytesIO()
    first, second = picture((8, 8), seed=1), picture((8, 8), seed=2)
    first.save(file, "PNG", save_all=True, append_images=[second])
    assert np.array_equal(as_array(decode(file.getvalue())), np.asarray(first))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_image_is_refused(suffix, share):
    content = encoded(picture((64, 48), seed=5), suffix)
    with pytest.raises(ValueError, match=r"^shelf/cut\.jpg cannot be read as an image \(.+\): replace the file"):
        decode(content[: int(len(content) * share)], "shelf/cut.jpg")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "not a picture in any known format", id="empty"),
        pytest.param(b"<html>404 Not Found</html>", "not a picture in any known format", id="web page"),
        pytest.param(
            encoded(picture((64, 48)))[:60] + b"\xff" * 30 + encoded(picture((64, 48)))[90:], ".", id="damaged"
        ),
    ],
)
def test_what_is_no_image_is_refused(content, reason):
    with pytest.raises(ValueError, match=rf"^it cannot be read as an image \(.*{reason}.*\): replace") as caught:
        decode(content, "it")
    # The reason stays readable for whoever looks deeper, and the sentence holds no address of an object in memory.
    assert caught.value.__cause__ is not None
    assert "0x" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(ValueError, match=r"gone\.png cannot be read as an image \(.*No such file"):
        open_rgb(path, path)


def test_pixels_of_unknown_ranges_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match=r"\(its pixels are real numbers of an unknown range\)"):
        decode(file.getvalue())
    for grey in (-1, 65536):
        file = io.BytesIO()
        Image.fromarray(np.array([[0, grey]], dtype=np.int32)).save(file, "TIFF")
        with pytest.raises(ValueError, match=rf"its pixels go from .*{grey}.*, more than 16 bits"):
            decode(file.getvalue())


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_pixels_have_their_channels_first(mode, channels):
    image = picture((9, 7), mode=mode)
    expected = torch.from_numpy(np.asarray(image).copy()).view(7, 9, channels).permute(2, 0, 1)
    assert torch.equal(pixels_of(image), expected)
    assert torch.equal(to_tensor(image), expected.float() / 255)
    assert to_tensor(image).is_contiguous()


@pytest.mark.parametrize("mode", ["1", "I", "F", "I;16"])
def test_pixels_are_of_eight_bits(mode):
    with pytest.raises(ValueError, match=f"of 8 bits: got an image of mode '{mode}'"):
        pixels_of(Image.new(mode, (9, 7)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_rgb_is_that_of_an_image_folder(tmp_path, mode):
    from twicing.torchvision_import import mend_torchvision_import

    mend_torchvision_import()
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / "picture"
    container = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    picture((20, 14), seed=9).convert(mode).save(path, container)
    assert np.array_equal(as_array(open_rgb(path, path)), np.asarray(pil_loader(str(path))))
