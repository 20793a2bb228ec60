"""Picture files: what is written is read by Pillow and by bytes, what others write is read here, and no pixel
moves."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image
from tightfit import save
from tightfit.runtime import exif, infotext, pictures
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request

PROMPT = "ein rötes Hérz 心, 🍕\nNegative prompt: x"
TEXT = infotext.write(Request(PROMPT, "blue", 64, 48, 20, 7.5, 7, "euler_a"), "emoji", "fp32")
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def painted(text: str = TEXT) -> Image.Image:
    image = Image.fromarray(PIXELS)
    image.info["parameters"] = text
    return image


def comment_of(image: Image.Image) -> bytes:
    """Its EXIF UserComment, by Pillow."""
    return image.getexif().get_ifd(0x8769)[0x9286]


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp"])
def test_exif_as_a1111_writes_it(tmp_path, name):
    """A1111: piexif.helper.UserComment.dump(text, "unicode"), in its modules/images.py."""
    path = save(painted(), tmp_path / name)
    with Image.open(path) as image:
        assert comment_of(image) == b"UNICODE\0" + TEXT.encode("utf-16-be")
        assert image.getexif().endian == ">"
    assert pictures.texts(path) == {"parameters": TEXT}
    assert Request(**infotext.read(path).request).prompt == PROMPT


def test_exif_by_bytes():
    """Tag by tag, as CIPA DC-008 has them."""
    data = exif.written("aé心")
    assert data[:6] == b"Exif\0\0"
    tiff = data[6:]
    order, magic, first = struct.unpack_from(">2sHI", tiff)
    assert (order, magic) == (b"MM", 42)
    assert struct.unpack_from(">HHHII", tiff, first) == (1, 0x8769, 4, 1, first + 18)
    assert struct.unpack_from(">I", tiff, first + 14) == (0,)
    count, tag, kind, length, place = struct.unpack_from(">HHHII", tiff, first + 18)
    assert (count, tag, kind) == (1, 0x9286, 7)
    assert tiff[place:] == b"UNICODE\0" + "aé心".encode("utf-16-be")
    assert len(tiff) == place + length


@pytest.mark.skipif(not shutil.which("exiftool"), reason="no exiftool")
def test_exiftool_reads_it(tmp_path):
    for name in ("x.jpg", "x.webp"):
        path = save(painted(), tmp_path / name)
        done = subprocess.run(["exiftool", "-b", "-UserComment", path], capture_output=True, check=True)
        assert done.stdout.decode() == TEXT


def test_a_webp_of_100_has_every_pixel(tmp_path):
    save(painted(), tmp_path / "x.webp", quality=100)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.webp")), PIXELS)
    sizes = [save(painted(), tmp_path / f"{q}.jpg", quality=q).stat().st_size for q in (10, 50, 90)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_metadata(tmp_path, name):
    written = {
        metadata: pictures.texts(save(painted(), tmp_path / name, metadata=metadata)).get("parameters")
        for metadata in pictures.METADATA
    }
    assert written["full"] == TEXT
    assert written["none"] is None
    assert b"Exif" not in (tmp_path / name).read_bytes()
    plain = written["a1111"]
    assert TEXT.startswith(plain + ", tightfit: ")
    assert plain.endswith("Version: tightfit 0.1.0")


def test_only_the_last_field_is_left_out():
    """Whatever the prompt and the model say."""
    for prompt in (', tightfit: "a"', ', tightfit: "a', '"\\", tightfit: "', "Steps: 1, tightfit: x"):
        text = infotext.write(Request(prompt, prompt, 64, 48, 20, 7.5, 7, "euler"), prompt, "fp32")
        plain = pictures.kept(text, "a1111", ".png")
        assert plain
        assert plain.count("\n") == 2
        assert plain.endswith("Precision: fp32, Version: tightfit 0.1.0")


def test_what_does_not_fit_in_a_jpeg(tmp_path):
    """Its EXIF is one segment of 65,533 bytes: without our JSON, or with nothing."""
    for letters, kept in ((9_000, "full"), (20_000, "a1111"), (40_000, "none")):
        text = infotext.write(Request("a" * letters, None, 64, 48, 20, 7.5, 7, "euler"), "emoji", "fp32")
        path = save(painted(text), tmp_path / "x.jpg")
        assert pictures.texts(path).get("parameters") == pictures.kept(text, kept, ".png")
        assert pictures.texts(save(painted(text), tmp_path / "x.webp"))["parameters"] == text


def jpeg(exif_bytes: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG", exif=exif_bytes)
    return stream.getvalue()


def with_comment(comment: bytes, order: str = "<") -> bytes:
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    first = struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    return b"Exif\0\0" + head + first + second + comment


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a héart".encode("utf-16-be"),
        b"UNICODE\0" + "a héart".encode("utf-16-le"),
        b"\0" * 8 + "a héart".encode(),
        "a héart and more".encode(),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_comments_of_other_writers(tmp_path, comment, order):
    (tmp_path / "x.jpg").write_bytes(jpeg(with_comment(comment, order)))
    assert pictures.texts(tmp_path / "x.jpg")["parameters"].startswith("a héart")


def test_ascii_and_pillows_own(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg(with_comment(b"ASCII\0\0\0a heart")))
    assert pictures.texts(tmp_path / "x.jpg") == {"parameters": "a heart"}
    tags = Image.Exif()
    tags[0x010F], tags[0x0110] = "workflow:{}", 'prompt:{"1": {}}'  # ComfyUI, SaveAnimatedWEBP
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=tags)
    assert pictures.texts(tmp_path / "x.webp") == {"prompt": '{"1": {}}'}
    tags = Image.Exif()
    tags[0x9286] = '{"prompt": "a"}'  # Fooocus, in the first directory
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=tags)
    assert pictures.texts(tmp_path / "x.jpg") == {"parameters": '{"prompt": "a"}'}


BLOCK = with_comment(b"UNICODE\0" + "a heart".encode("utf-16-be"))
WEBP = struct.pack("<4sI4s", b"RIFF", 100, b"WEBP")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\xff\xd8\xff\xe1", "damaged"),
        (b"\xff\xd8\xff\xe1\0\0" * 3, "damaged"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * 200_000, "damaged"),
        (jpeg(b"Exif\0\0II"), "EXIF is damaged"),
        (jpeg(b"Exif\0\0XX*\0\0\0\0\0"), "EXIF is damaged"),
        (jpeg(b"Exif\0\0MM\0*\xff\xff\xff\xff"), "not a picture"),
        (jpeg(BLOCK.replace(struct.pack("<I", 26), struct.pack("<I", 2**31))), "not a picture"),
        (jpeg(BLOCK.replace(struct.pack("<I", 26), struct.pack("<I", 8))), "carries no"),
        (jpeg(BLOCK.replace(struct.pack("<I", 22), struct.pack("<I", 2**31))), "carries no"),
        (WEBP + struct.pack("<4sI", b"EXIF", 2**31), "too many"),
        (WEBP + struct.pack("<4sI", b"EXIF", 100) + b"Exif", "damaged"),
        (WEBP + struct.pack("<4sI", b"VP8 ", 2**31), "carries no"),
        (WEBP, "carries no"),
        (b"GIF89a", "no PNG, JPEG or WebP"),
    ],
)
def test_damaged_files(tmp_path, data, word):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(TightfitError, match=word) as caught:
        infotext.read(tmp_path / "x.png")
    assert "x.png" in str(caught.value)


def test_an_exif_of_many_entries_is_cheap(tmp_path):
    """65,535 tags that each name the same 4 MB."""
    import tracemalloc

    entries = struct.pack("<HHII", 0x010E, 2, 3 * 2**20, 100) * 65_535
    data = b"II*\0" + struct.pack("<IH", 8, 65_535) + entries + bytes(2**22)
    data = data[: 2**22]
    (tmp_path / "x.webp").write_bytes(WEBP + struct.pack("<4sI", b"EXIF", len(data)) + data)
    tracemalloc.start()
    pictures.texts(tmp_path / "x.webp")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_bad_ways_to_write(tmp_path):
    for wrong in (0, 101, True, 5.5, "90"):
        with pytest.raises(TightfitError, match="quality"):
            save(painted(), tmp_path / "x.jpg", quality=wrong)
    with pytest.raises(TightfitError, match="metadata"):
        save(painted(), tmp_path / "x.jpg", metadata="some")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "size"), [(2, (2, 1)), (3, (2, 2)), (4, (2, 2)), (5, (3, 2)), (9, (3, 3))])
def test_a_sheet(count, size):
    """A1111's: rows are the rounded root, columns what is needed, black where nothing is."""
    images = [Image.new("RGB", (4, 3), (number + 1, 0, 0)) for number in range(count)]
    images[0].info["parameters"] = "of the first"
    whole = pictures.sheet(images, ".png")
    assert whole is not None
    assert whole.info["parameters"] == "of the first"
    assert whole.size == (4 * size[0], 3 * size[1])
    places = [(4 * column + 2, 3 * row + 1) for row in range(size[1]) for column in range(size[0])]
    numbers = [whole.getpixel(place)[0] for place in places]  # pyright: ignore
    assert numbers == [*range(1, count + 1), *[0] * (size[0] * size[1] - count)]
    assert pictures.sheet([Image.new("RGB", (9000, 1))] * 4, ".webp") is None
