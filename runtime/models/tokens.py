"""Words to tokens, and which words did not fit."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TightfitError, explained
from .prompt_syntax import Piece, sections
from .spec import Component, ModelSpec
from .tokenizer import folder_of, tokenizer_of

if TYPE_CHECKING:
    import numpy as np

    from .families.family import Reading


@dataclass(frozen=True)
class Tokens:
    """`ids` are int64 (length,), of each text. `cut` maps a text's name to the end that did not fit."""

    ids: Sequence[np.ndarray]
    cut: Mapping[str, str]


class Reader:
    """One text encoder's tokenizer, with the words that adapters taught it. Raises TightfitError where it
    cannot be read."""

    def __init__(self, spec: ModelSpec, encoder: Component) -> None:
        self.folder, self._encoder = folder_of(spec, encoder), encoder
        self._turn = threading.Lock()  # transformers changes its tokenizers while they read
        self.tokenizer = tokenizer_of(spec, encoder)
        with self.explained():
            self.taught = _teach(self.tokenizer, encoder)
            reading = encoder.network.reading
            most = reading.most if reading else spec.length_of(encoder)
            self.length = min(self.tokenizer.model_max_length, most)
            self.pad = int(self.tokenizer.pad_token_id)

    def explained(self) -> AbstractContextManager[None]:
        return explained(f"the tokenizer in {self.folder} cannot be read", "copy or download it again")

    def ids(self, texts: Sequence[str], ends: bool = True) -> list[list[int]]:
        """The tokens of each text, with the marks of its ends."""
        with self.explained(), self._turn:
            rows = self.tokenizer(list(texts), verbose=False, add_special_tokens=ends).input_ids
        known = self._encoder.setting("vocab_size")
        if max([self.pad, *(token for row in rows for token in row if token not in self.taught)]) >= known:
            raise TightfitError(
                f"{self.folder} has more tokens than {self._encoder.folder}: they belong to different models"
            )
        return rows

    @functools.cached_property
    def comma(self) -> int | None:
        """The token of a comma that ends a word."""
        return self.tokenizer.get_vocab().get(COMMA)

    def vectors(self, token: int) -> list[int]:
        """The rows of the encoder's table that a token stands for."""
        return self.taught.get(token, [token])


def _reader(spec: ModelSpec, encoder: Component) -> Reader:
    """Kept: a tokenizer takes 2 ms to copy and to list its words, as long as a small picture's text takes to
    encode, and a language model's is read for longer."""
    return encoder.once(("reader", spec.folder), lambda: Reader(spec, encoder))


def tokenize(spec: ModelSpec, encoder: Component, texts: Mapping[str, str]) -> Tokens:
    """Tokens of the named `texts` for one text encoder, padded or cut as it reads them."""
    import numpy as np

    reader = _reader(spec, encoder)
    if reading := encoder.network.reading:
        return _told(reader, reading, texts)
    whole, length = reader.ids([*texts.values()]), reader.length
    vectors = [[vector for token in row for vector in reader.vectors(token)] for row in whole]
    rows = np.full((len(whole), length), reader.pad, np.int64)
    for row, ids in zip(rows, vectors, strict=True):
        row[: len(ids)] = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
    cut = {
        name: _end(reader.tokenizer, row, reader.taught, length - 1)
        for name, row, ids in zip(texts, whole, vectors, strict=True)
        if len(ids) > length
    }
    return Tokens([*rows], cut)


def _told(reader: Reader, reading: Reading, texts: Mapping[str, str]) -> Tokens:
    """Of a language model, to which each text is told as a message."""
    import numpy as np

    before, after = reading.around
    whole, most = reader.ids([f"{before}{text}{after}" for text in texts.values()]), reader.length
    (rest,) = reader.ids([after])
    room = most - len(rest) if reading.closed else most
    rows = []
    for ids in (ids if len(ids) <= most else [*ids[:room], *rest[: most - room]] for ids in whole):
        rows.append(np.full(-(-len(ids) // reading.length) * reading.length, ~reader.pad, np.int64))
        rows[-1][: len(ids)] = ids
    ends = {
        name: reader.tokenizer.decode(ids[room : len(ids) - len(rest)])
        for name, ids in zip(texts, whole, strict=True)
        if len(ids) > most
    }
    return Tokens(rows, {name: end for name, end in ends.items() if end})


@dataclass(frozen=True)
class Chunks:
    """One text as a text encoder reads it, a row after the other: `ids` are int64 (rows, length), `weights`
    float32 of that shape."""

    ids: np.ndarray
    weights: np.ndarray


BACKTRACK = 20  # tokens after the last comma that move into the next chunk with what follows, as in A1111
COMMA = ",</w>"


def chunked(spec: ModelSpec, encoder: Component, texts: Sequence[str]) -> dict[str, Chunks]:
    """Each of `texts`, in A1111's syntax, in as many chunks as it takes."""
    import numpy as np

    reader = _reader(spec, encoder)
    length = spec.text_length
    if length < 3:
        raise TightfitError(
            f"{encoder.folder} reads {length} tokens, too few for a word: copy the model again"
        )
    with reader.explained():
        begin, *_, end = reader.ids([""])[0]
    read: dict[str, Chunks] = {}
    for text in dict.fromkeys(texts):
        chunks = _filled(_weighted(reader, sections(text)), length - 2, reader.comma)
        ids = np.full((len(chunks), length), reader.pad, np.int64)
        weights = np.ones(ids.shape, np.float32)
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk) + 2] = [begin, *(vector for vector, _ in chunk), end]
            weights[row, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
        read[text] = Chunks(ids, weights)
    return read


def _weighted(reader: Reader, parts: list[list[Piece]]) -> list[list[tuple[list[int], float]]]:
    """Of each section its words: the vectors of each token, and their weight."""
    rows = iter(reader.ids([piece.text for section in parts for piece in section] or [""], ends=False))
    return [
        [(reader.vectors(token), piece.weight) for piece in section for token in next(rows)]
        for section in parts
    ]


def _filled(
    parts: list[list[tuple[list[int], float]]], room: int, comma: int | None
) -> list[list[tuple[int, float]]]:
    """Chunks of at most `room` vectors with their weights. Each section begins a new one, and so does what
    follows a comma that is near the end of a full one."""
    chunks: list[list[tuple[int, float]]] = []
    current: list[tuple[int, float]] = []
    last_comma: int | None = None

    def end(rest: Sequence[tuple[int, float]] = ()) -> None:
        nonlocal current, last_comma
        chunks.append(current)
        current, last_comma = [*rest], None

    for number, section in enumerate(parts):
        if number:
            end()
        for vectors, weight in section:
            full = len(current) == room
            if vectors == [comma]:
                last_comma = len(current)
            elif full and last_comma is not None and room - last_comma <= BACKTRACK:
                rest = current[last_comma + 1 :]
                del current[last_comma + 1 :]
                end(rest)
            if len(current) == room or len(current) + len(vectors) > room >= len(vectors):
                end()
            for vector in vectors:
                if len(current) == room:  # of a word with more vectors than a chunk has room for
                    end()
                current.append((vector, weight))
    if current or not chunks:
        end()
    return chunks


def unused_words(spec: ModelSpec, texts: Mapping[str, str]) -> tuple[str, ...]:
    """A notice for each word that the text encoders were taught and no text has."""
    words = dict.fromkeys(word for encoder in spec.text_encoders for word in encoder.words)
    unused = [word for word in words if not any(word.lower() in text.lower() for text in texts.values())]
    return tuple(f"the embedding's word {word} is in no prompt, so it does nothing" for word in unused)


def _teach(tokenizer: Any, encoder: Component) -> dict[int, list[int]]:
    """Add the words that the encoder was taught: for the id of each the rows of its vectors, which follow
    those of the vocabulary."""
    taught, first = {}, encoder.setting("vocab_size")
    for word, vectors in encoder.words.items():
        if word in tokenizer.get_vocab():
            raise TightfitError(f"{word} is a word of the model already: name another, as in FILE:word")
        tokenizer.add_tokens(word)
        taught[tokenizer.convert_tokens_to_ids(word)] = [*range(first, first + vectors.shape[0])]
        first += vectors.shape[0]
    return taught


def _end(tokenizer: Any, row: Sequence[int], taught: Mapping[int, list[int]], room: int) -> str:
    """What of a text's tokens comes after the first `room` vectors, without the mark of its end."""
    for place, token in enumerate(row):
        room -= len(taught.get(token, [token]))
        if room < 0:
            return tokenizer.decode(row[place:-1])
    return ""


# What A1111's prompt parser reads as syntax (its wiki, Features: attention, prompt editing, alternating
# words, AND, BREAK, extra networks). Single parentheses, a weight of 1.1 there, are left out: they are
# ordinary punctuation too.
_SYNTAX = re.compile(
    r"\([^()]*:\s*[+-]?[\d.]+\s*\)"  # (red:1.3)
    r"|\(\([^()]+\)\)"  # ((red))
    r"|\[[^\[\]]+\]"  # [blurry], [cat:dog:0.5], [cat|dog]
    r"|<\w{1,20}:[^<>]+>"  # <lora:x:0.8>
    r"|\\[()\[\]]"  # an escaped parenthesis
    r"|\bAND\b|\bBREAK\b"
)
_NAMED = 5, 40  # pieces of syntax in a notice, and characters of each


def painted_as_words(texts: Mapping[str, str]) -> tuple[str, ...]:
    """A notice for each of the named `texts` with A1111's syntax, which the text encoders read as ordinary
    words."""
    most, letters = _NAMED
    notices = []
    for name, text in texts.items():
        if syntax := list(dict.fromkeys(match[0] for match in _SYNTAX.finditer(text))):
            shown = [part if len(part) <= letters else f"{part[: letters - 1]}…" for part in syntax[:most]]
            more = f" and {len(syntax) - most} more" if len(syntax) > most else ""
            cure = (
                "; a LoRA is given by --lora, or by its folder in TIGHTFIT_LORAS"
                if any(part.startswith("<lora:") for part in syntax)
                else ""
            )
            notices.append(
                f"the {name} has A1111's syntax, which is painted as ordinary words: "
                f"{', '.join(shown)}{more}{cure}"
            )
    return tuple(notices)
