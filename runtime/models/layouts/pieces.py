"""T5's vocabulary out of SentencePiece's own file (`spiece.model`), or out of the GGUF file of its weights:
the pieces of words, with the logarithm of how likely each is, and what normalises a text.

Format: sentencepiece_model.proto of google/sentencepiece, and llama.cpp's names in GGUF.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import TightfitError
from ...files import JSON_BYTES, open_regular
from ..vocabulary import EXTRA
from . import gguf

OF_SENTENCEPIECE = "spiece.model"
_MARKS = ["<pad>", "</s>", "<unk>"]  # T5's first three; umT5 has another
_MOST = 2**18  # pieces, and fields of a message that are looked at
_EXTRAS = 100  # tokens that transformers adds, and SentencePiece's file has not
_UNIGRAM = 1  # SentencePiece's number of the kind of model
_UNUSED = 5  # of llama.cpp: what fills a vocabulary up to the rows of the table
_GGUF = "tokenizer.ggml."
_KEYS = "model", "tokens", "scores", "token_type", "precompiled_charsmap"


class Pieces(NamedTuple):
    """scores: of each piece, by their ids. charsmap: as SentencePiece compiles it; empty where nothing is
    normalised."""

    scores: list[tuple[str, float]]
    charsmap: bytes


def place(tokenizer: Path) -> Path | None:
    """The file that has the vocabulary: a GGUF, or that in a folder without a whole tokenizer; None for
    others."""
    if tokenizer.is_dir():
        file = tokenizer / OF_SENTENCEPIECE
        return file if file.is_file() and not (tokenizer / "tokenizer.json").is_file() else None
    is_gguf = tokenizer.suffix.lower() == ".gguf" and tokenizer.is_file()
    return tokenizer if is_gguf and gguf.said(tokenizer, {f"{_GGUF}tokens"}) else None


def read(file: Path) -> Pieces:
    """Raises TightfitError for a file with another vocabulary, or a broken one."""
    try:
        found = _of_gguf(file) if file.suffix.lower() == ".gguf" else _of_sentencepiece(file)
        names = [piece for piece, _ in found.scores]
        if names[:3] != _MARKS or len(names) > _MOST or not all(math.isfinite(s) for _, s in found.scores):
            raise ValueError("a vocabulary that is not T5's")
        if not isinstance(found.charsmap, bytes):
            raise TypeError
        _check_table(found.charsmap)
        extras = [(f"{EXTRA}{number}>", 0.0) for number in reversed(range(_EXTRAS))]
        return Pieces([*found.scores, *(one for one in extras if one[0] not in names)], found.charsmap)
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        said = error if type(error) is ValueError else "text or numbers of another kind"
        raise TightfitError(
            f"{file} has no T5 tokenizer that can be read ({said}): "
            "put tokenizer.json of its model into a folder called t5_tokenizer beside it"
        ) from None


def _check_table(charsmap: bytes) -> None:
    """Raise an error for what is no size of a tree in bytes, that tree of 32-bit numbers, and text: the
    tokenizers library panics at it, which ends a process."""
    if charsmap:
        size = struct.unpack_from("<I", charsmap)[0]
        if size % 4 or size > len(charsmap) - 4:
            raise ValueError("a table that is cut off")
        charsmap[4 + size :].decode()


def _of_gguf(file: Path) -> Pieces:
    said = {
        name.removeprefix(_GGUF): value
        for name, value in gguf.said(file, {f"{_GGUF}{key}" for key in _KEYS}).items()
    }
    tokens, scores, kinds = (list(said.get(name) or ()) for name in ("tokens", "scores", "token_type"))
    if said.get("model") != "t5" or not len(tokens) == len(scores) == len(kinds):
        raise ValueError("no pieces with a score each")
    while kinds and kinds[-1] == _UNUSED:
        kinds.pop()
    pieces = zip(tokens[: len(kinds)], map(float, scores), strict=False)
    return Pieces([*pieces], bytes([*(said.get("precompiled_charsmap") or ())]))


def _of_sentencepiece(file: Path) -> Pieces:
    with open_regular(file, JSON_BYTES) as stream:
        fields = [*islice(_fields(stream.read(JSON_BYTES)), _MOST)]
    scores = [_piece(value) for number, value in fields if number == 1]
    trainer, normaliser = (
        dict(islice(_fields(next((value for number, value in fields if number == wanted), b"")), _MOST))
        for wanted in (2, 3)
    )
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError("pieces that are no unigrams")
    return Pieces(scores, normaliser.get(2, b""))


def _piece(message: bytes) -> tuple[str, float]:
    said = dict(islice(_fields(message), _MOST))
    return said[1].decode() if 1 in said else "", struct.unpack("<f", said.get(2, bytes(4)))[0]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number of each field of a protobuf message, and its value: a number, or bytes."""
    place = 0
    while place < len(message):
        key, place = _number(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _number(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            count, place = _number(message, place)
        elif kind in (1, 5):
            count = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the kind {kind}")
        if place + count > len(message):
            raise ValueError("it ends in the middle")
        yield key >> 3, message[place : place + count]
        place += count


def _number(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte = message[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value, place
    raise ValueError("a number without an end")
