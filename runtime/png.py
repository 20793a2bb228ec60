"""The text chunks of a PNG, wherever they are in the file. No pixel is read. Format: W3C, Portable Network
Graphics, 11.3.3."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

MAX_TEXT_BYTES = 4 * 2**20  # of one text, inflated; A1111's have a few thousand
_MAX_CHUNKS = 200_000  # image data of 8 KiB a chunk, as libpng writes it, make a file of 1.6 GB
_MAX_PIXELS = 2**28  # 16384 x 16384: no model paints so many
_KEYWORD_BYTES = 79  # as the standard has it
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def texts(stream: BinaryIO, keywords: Sequence[str], every: bool = False) -> dict[str, str]:
    """The first text of each keyword that there is. With that of the first keyword reading ends, unless
    `every` one is asked for. Raises ValueError, struct.error or zlib.error for what is no PNG, or damaged
    before that."""
    stream.seek(0)
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError("it is no PNG")
    size, found = stream.seek(0, 2), {}
    for number, (kind, start, length) in enumerate(_chunks(stream, size)):
        if number == 0:
            width, height = struct.unpack(">II", _data(stream, kind, start, 13)[:8])
            if kind != b"IHDR" or not width or not height or width * height > _MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are too large or none")
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            stream.seek(start)
            name, end, _ = stream.read(min(length, _KEYWORD_BYTES + 1)).partition(b"\0")
            keyword = name.decode("latin-1")
            if not end or keyword not in keywords or keyword in found:
                continue
            if length > MAX_TEXT_BYTES:
                raise ValueError(f"its {keyword} text has {length} bytes, too many")
            found[keyword] = _text(kind, _data(stream, kind, start, length)[len(keyword) + 1 :])
            if keyword == keywords[0] and not every:
                break
    return found


def _chunks(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and length of each chunk's data, up to the last that is whole."""
    place = len(SIGNATURE)
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
