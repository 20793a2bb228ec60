"""Texts in the EXIF of a JPEG or a WebP: the user comment, as A1111 writes it, and what ComfyUI and Fooocus
write.

Formats: CIPA DC-008 (EXIF 2.32), 4.6.5; JPEG, ITU T.81, B.1; WebP, RFC 9649, 2.7.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

MOST_BYTES = 2**16 - 3
"""Of the EXIF in a JPEG, whose segments have lengths of 16 bits."""
_MOST_READ_BYTES = 4 * 2**20
_MOST_PARTS = 100_000  # segments or chunks before the EXIF: pictures have some ten
_BEGIN = b"Exif\0\0"
_EXIF_IFD, _COMMENT = 0x8769, 0x9286
_UNICODE, _ASCII, _UNDEFINED = b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8
_UNDEFINED_TYPE, _LONG = 7, 4
# Description, make and model of a camera, into which ComfyUI writes, and the comment.
_TAGS = (0x010E, 0x010F, 0x0110, _COMMENT)


def written(comment: str) -> bytes:
    """EXIF with this user comment and nothing else: in UTF-16, big-endian as the whole, as A1111 (piexif)
    writes it."""
    data = _UNICODE + comment.encode("utf-16-be")
    directory = struct.pack(">HHHIII", 1, _EXIF_IFD, _LONG, 1, 26, 0)
    inner = struct.pack(">HHHIII", 1, _COMMENT, _UNDEFINED_TYPE, len(data), 44, 0)
    return _BEGIN + struct.pack(">2sHI", b"MM", 42, 8) + directory + inner + data


def texts(stream: BinaryIO, kind: str) -> tuple[str, ...]:
    """The texts in the EXIF of a JPEG or a WEBP, its user comment first. Raises ValueError or struct.error
    for what is damaged."""
    parts = _segments(stream) if kind == "JPEG" else _chunks(stream)
    data = next((part for part in parts if part), b"")
    return _texts(data.removeprefix(_BEGIN)) if data else ()


def _segments(stream: BinaryIO) -> Iterator[bytes]:
    """The EXIF of a JPEG, in a segment APP1 before the picture's data."""
    stream.seek(2)
    for _ in range(_MOST_PARTS):
        head = stream.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            raise ValueError("it is no PNG, and as a JPEG it is damaged")
        marker, length = head[1], struct.unpack(">H", head[2:])[0]
        if marker in (0xD9, 0xDA):  # its end, or its data
            return
        data = stream.read(max(length - 2, 0))
        if marker == 0xE1 and data.startswith(_BEGIN):
            yield data


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The EXIF of a WebP, in a chunk of its own."""
    place = 12
    for _ in range(_MOST_PARTS):
        stream.seek(place)
        head = stream.read(8)
        if len(head) < 8:
            return
        kind, length = struct.unpack("<4sI", head)
        if kind == b"EXIF":
            if length > _MOST_READ_BYTES:
                raise ValueError(f"its EXIF has {length} bytes, too many")
            yield stream.read(length)
        place += 8 + length + length % 2


def _texts(data: bytes) -> tuple[str, ...]:
    """Of the first directory, and of that of EXIF."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        raise ValueError("its EXIF is damaged")
    entries = _entries(data, order, struct.unpack_from(f"{order}I", data, 4)[0])
    if len(place := entries.pop(_EXIF_IFD, b"")) == 4:
        entries |= _entries(data, order, struct.unpack(f"{order}I", place)[0])
        entries.pop(_EXIF_IFD, None)
    comment = entries.pop(_COMMENT, None)
    return (*([] if comment is None else [_comment(comment)]), *map(_plain, entries.values()))


def _entries(data: bytes, order: str, place: int) -> dict[int, bytes]:
    """The values of a directory that are of `_TAGS`, or say where another one is, by their tags."""
    (count,) = struct.unpack_from(f"{order}H", data, place)
    found: dict[int, bytes] = {}
    for entry in range(place + 2, place + 2 + 12 * min(count, 1000), 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        if kind == _LONG and tag == _EXIF_IFD:
            found[tag] = data[entry + 8 : entry + 12]
        elif tag in _TAGS and kind in (1, 2, _UNDEFINED_TYPE) and 4 < length <= len(data):
            start = struct.unpack_from(f"{order}I", data, entry + 8)[0]
            found[tag] = data[start : start + length]
    return found


def _comment(data: bytes) -> str:
    """A user comment, whose first eight bytes name its code. Some writers leave them out."""
    code, text = data[:8], data[8:]
    if code == _UNICODE:
        # Windows writes UTF-16 little-endian whatever the EXIF says. The zeros of Latin letters tell.
        return text.decode(
            "utf-16-le" if text[1::2].count(0) > text[::2].count(0) else "utf-16-be", "replace"
        )
    return _plain(text if code in (_ASCII, _UNDEFINED) else data)


def _plain(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip("\0 ")
