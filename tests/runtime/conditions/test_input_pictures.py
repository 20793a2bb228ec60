"""Pictures as people have them, against Pillow's own documents and values worked out by hand."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tightfit.runtime.conditions.input_pictures import Picture, open_picture
from tightfit.runtime.errors import TightfitError

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "bmp", "tga", "ppm", "tiff", "webp", "jp2", "qoi", "avif", "jpg"])
def test_every_format_says_the_same(ending, tmp_path):
    exact = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(ending, {"quality": 100})
    exact = exact if ending in ("webp", "jp2", "avif", "jpg") else {}
    plain = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    Image.fromarray(plain).save(tmp_path / f"a.{ending}", **exact)
    picture = open_picture(tmp_path / f"a.{ending}")
    assert (picture.width, picture.height, picture.alpha) == (24, 16, None)
    assert np.abs(picture.pixels.astype(int) - plain).max() <= (4 if ending in ("avif", "jpg") else 0)


def test_what_a_camera_turned_is_turned_back(tmp_path):
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6  # the first row is on the right
    image.save(tmp_path / "a.png", exif=exif)
    assert (open_picture(tmp_path / "a.png").pixels == np.rot90(PIXELS, -1)).all()


def test_transparency_is_white_and_is_kept(tmp_path):
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png")
    exact = PIXELS * (alpha[..., None] / 255.0) + 255 * (1 - alpha[..., None] / 255.0)
    assert np.abs(picture.pixels - exact).max() <= 0.5
    assert (picture.alpha == alpha).all()


def test_palettes_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1)
    assert open_picture(tmp_path / "a.png").pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_of_16_bits_keeps_its_higher_eight(tmp_path):
    values = np.array([[0, 255, 256, 65535, 0x1234]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").pixels[..., 0].tolist() == [[0, 0, 1, 255, 0x12]]


def test_cmyk_and_grey_are_colours(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(open_picture(tmp_path / "a.jpg").pixels[0, 0].astype(int) - (0, 255, 255)).max() <= 3
    assert open_picture(Image.new("1", (2, 2), 1)).pixels.tolist() == [[[255] * 3] * 2] * 2


def test_arrays_and_images():
    floats = PIXELS / 255.0
    same = {open_picture(given) for given in (PIXELS, floats, floats[None], Image.fromarray(PIXELS))}
    assert len(same) == 1
    assert open_picture(PIXELS[..., :1]).pixels.shape == (6, 9, 3)
    assert open_picture(picture := open_picture(PIXELS)) is picture
    assert open_picture(255 - PIXELS) != picture
    for wrong in (PIXELS.astype(np.int64), PIXELS * 1.0, np.zeros((2, 2, 5), np.uint8), "a" * 3, object()):
        with pytest.raises(TightfitError):
            open_picture(wrong)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.png", png(100_000, 100_000), "pixels"),
        ("a.png", png(40_000, 2), "40000x2 pixels"),
        ("a.png", png(0, 5), "no picture|pixels"),
        ("a.png", png(9000, 9000), "pixels"),
        ("a.png", png(64, 64, b"\0" * 100), "no picture"),
        ("a.jpg", b"<html>not found</html>", "no picture that can be read"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
        ("a.png", b"", "no picture"),
        (None, b"", "does not exist"),
    ],
)
def test_what_is_no_picture_is_one_line(name, content, word, tmp_path):
    file = tmp_path / (name or "gone.png")
    if name:
        file.write_bytes(content)
    with pytest.raises(TightfitError, match=word) as caught:
        open_picture(file)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_a_picture_that_was_cut(tmp_path):
    for ending in ("jpg", "png", "webp"):
        file = tmp_path / f"a.{ending}"
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:-400])
        with pytest.raises(TightfitError, match="no picture that can be read"):
            open_picture(file)


def test_what_moves(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for ending in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
        with pytest.raises(TightfitError, match=re.escape(f"a.{ending} is animated")):
            open_picture(tmp_path / f"a.{ending}")


def test_bytes_of_all_kinds_are_one_line(tmp_path):
    whole = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(whole)
    content, draw = whole.read_bytes(), np.random.default_rng(5)
    for number in range(150):
        damaged = bytearray(content)
        for place in draw.integers(8, len(content), 3):
            damaged[place] = draw.integers(256)
        (file := tmp_path / f"{number}.png").write_bytes(damaged)
        try:
            assert isinstance(open_picture(file), Picture)
        except TightfitError as error:
            assert "\n" not in str(error)


def test_fitting():
    picture = open_picture(np.repeat(PIXELS[:, :1], 12, 1))  # 12 wide, 6 high, all columns alike
    assert picture.fitted(12, 6).size == (12, 6)
    crop = np.asarray(picture.fitted(6, 6, "crop"))
    assert (crop == picture.pixels[:, 3:9]).all()
    fill = np.asarray(picture.fitted(12, 10, "fill"))
    assert (fill[2:8] == picture.pixels).all()
    assert (fill[:2] == picture.pixels[0]).all()
    assert (fill[8:] == picture.pixels[-1]).all()
    expected = Image.fromarray(PIXELS).resize((4, 8), Image.Resampling.LANCZOS)
    assert (np.asarray(open_picture(PIXELS).fitted(4, 8)) == np.asarray(expected)).all()
