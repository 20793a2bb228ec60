"""The text chunks of a PNG, wherever they are in the file. No pixel is read. Format: W3C, Portable Network
Graphics, 11.3.3."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import TightfitError
from .files import adding, open_regular, replacing

if TYPE_CHECKING:
    from PIL import Image

MAX_TEXT_BYTES = 4 * 2**20  # of one text, inflated; A1111's have a few thousand
_MOST_BYTES = 2**31
_MAX_CHUNKS = 200_000  # image data of 8 KiB a chunk, as libpng writes it, make a file of 1.6 GB
_MAX_PIXELS = 2**28  # 16384 x 16384: no model paints so many
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_text(picture: Path, keyword: str) -> str | None:
    """The first text of that keyword, None if there is none. Raises TightfitError for what is no PNG, or
    damaged before it."""
    try:
        with open_regular(picture, _MOST_BYTES) as stream:
            return _read(stream, keyword.encode())
    except FileNotFoundError:
        raise TightfitError(f"{picture} does not exist") from None
    except OSError as error:
        raise TightfitError(f"{picture} cannot be read: {error.strerror}") from None
    except (ValueError, struct.error, zlib.error) as error:
        raise TightfitError(
            f"{picture} is not a picture that can be read ({error}): name a PNG, or save it again"
        ) from None


def _read(stream: BinaryIO, keyword: bytes) -> str | None:
    if stream.read(len(_SIGNATURE)) != _SIGNATURE:
        raise ValueError("it is no PNG")
    size = stream.seek(0, 2)
    for number, (kind, start, length) in enumerate(_chunks(stream, size)):
        if number == 0:
            width, height = struct.unpack(">II", _data(stream, kind, start, 13)[:8])
            if kind != b"IHDR" or not width or not height or width * height > _MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are too large or none")
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            stream.seek(start)
            if stream.read(min(length, len(keyword) + 1)) != keyword + b"\0":
                continue
            if length > MAX_TEXT_BYTES:
                raise ValueError(f"its {keyword.decode()} text has {length} bytes, too many")
            return _text(kind, _data(stream, kind, start, length)[len(keyword) + 1 :])
    return None


def _chunks(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and length of each chunk's data, up to the last that is whole."""
    place = len(_SIGNATURE)
    for number in range(_MAX_CHUNKS):
        stream.seek(place)
        head = stream.read(8)
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        if len(head) < 8 or place + 12 + length > size:
            if number == 0:
                raise ValueError("it has no header")
            return  # a file that was cut: what comes before may still say all
        if kind == b"IEND":
            return
        yield kind, place + 8, length
        place += 12 + length


def _data(stream: BinaryIO, kind: bytes, start: int, length: int) -> bytes:
    stream.seek(start)
    data, checksum = stream.read(length), stream.read(4)
    if struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))) != checksum:
        raise ValueError("a checksum is wrong")
    return data


def _text(kind: bytes, data: bytes) -> str:
    """What follows the keyword of a chunk, as text."""
    if kind == b"tEXt":
        return data.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(data[:1], data[1:]).decode("latin-1")
    compressed, method, rest = data[:1], data[1:2], data[2:]
    content = rest.split(b"\0", 2)  # language, keyword in that language, text
    if len(content) < 3:
        raise ValueError("a text chunk is damaged")
    return (_inflated(method, content[2]) if compressed == b"\1" else content[2]).decode()


def _inflated(method: bytes, data: bytes) -> bytes:
    if method != b"\0":
        raise ValueError("a text is compressed in an unknown way")
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, MAX_TEXT_BYTES)
    if not inflater.eof:
        raise ValueError("a compressed text is too long or was cut")
    return text


def save(image: Image.Image, path: str | Path, overwrite: bool = True) -> Path:
    """Write `image` as a PNG with its `parameters`, through a temporary sibling, so that no half picture is
    ever seen.

    Without `overwrite` a file that is there stays: heart-2.png is written beside heart.png. Answers where the
    picture is. Raises TightfitError if `path` does not end in .png or cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    if not hasattr(image, "save"):
        raise TightfitError(f"save takes one picture, not a {type(image).__name__}: call it for each")
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise TightfitError(
            f"{path} does not end in .png: pictures are written as PNG, which carries their request"
        )
    text = PngInfo()
    if "parameters" in image.info:
        text.add_text("parameters", image.info["parameters"])
    try:
        if overwrite:
            with replacing(path) as partial:
                image.save(partial, format="PNG", pnginfo=text)
            return path
        with adding(path) as places:
            image.save(places[0], format="PNG", pnginfo=text)
        return places[-1]
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise TightfitError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
