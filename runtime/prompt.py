"""From words to tokens, and which words did not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import TightfitError, explained
from .spec import Component, ModelSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tokens:
    """`ids` are int64 (texts, length); `cut` has, by name, the ends of those texts that did not fit."""

    ids: np.ndarray
    cut: Mapping[str, str]


def tokenize(spec: ModelSpec, encoder: Component, texts: Mapping[str, str]) -> Tokens:
    """Tokens of the named `texts` for one text encoder, padded or cut to what it reads."""
    import numpy as np
    from transformers import CLIPTokenizer

    folder = spec.folder / encoder.name.replace("text_encoder", "tokenizer")
    if not (folder / "tokenizer.json").exists() and not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise TightfitError(f"{folder} lacks vocab.json and merges.txt: copy or download the model again")
    with explained(f"the tokenizer in {folder} cannot be read", "copy or download it again"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        length = min(tokenizer.model_max_length, encoder.setting("max_position_embeddings"))
        rows = np.array(
            tokenizer(list(texts.values()), padding="max_length", max_length=length, truncation=True).input_ids, np.int64
        )
        whole = tokenizer(list(texts.values()), verbose=False).input_ids
    if rows.max() >= encoder.setting("vocab_size"):
        raise TightfitError(f"{folder} has more tokens than {encoder.folder} knows: they belong to different models")
    cut = {name: tokenizer.decode(row[length - 1 : -1]) for name, row in zip(texts, whole, strict=True) if len(row) > length}
    return Tokens(rows, cut)
