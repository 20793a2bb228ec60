"""Words to tokens, and which words did not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TightfitError, explained
from .spec import Component, ModelSpec
from .tokenizer import tokenizer_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tokens:
    """`ids` are int64 (texts, length). `cut` maps a text's name to the end that did not fit."""

    ids: np.ndarray
    cut: Mapping[str, str]


def tokenize(spec: ModelSpec, encoder: Component, texts: Mapping[str, str]) -> Tokens:
    """Tokens of the named `texts` for one text encoder, padded or cut to its length."""
    import numpy as np

    folder = spec.folder / encoder.network.tokenizer
    tokenizer = tokenizer_of(spec, encoder)
    known = encoder.setting("vocab_size")
    with explained(f"the tokenizer in {folder} cannot be read", "copy or download it again"):
        taught = _teach(tokenizer, encoder)
        length = min(tokenizer.model_max_length, encoder.setting("max_position_embeddings"))
        whole, pad = tokenizer(list(texts.values()), verbose=False).input_ids, int(tokenizer.pad_token_id)
    if max(pad, *(token for row in whole for token in row if token not in taught)) >= known:
        raise TightfitError(
            f"{folder} has more tokens than {encoder.folder}: they belong to different models"
        )
    vectors = [[vector for token in row for vector in taught.get(token, [token])] for row in whole]
    rows = np.full((len(whole), length), pad, np.int64)
    for row, ids in zip(rows, vectors, strict=True):
        row[: len(ids)] = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
    cut = {
        name: _end(tokenizer, row, taught, length - 1)
        for name, row, ids in zip(texts, whole, vectors, strict=True)
        if len(ids) > length
    }
    return Tokens(rows, cut)


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
