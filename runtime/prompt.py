"""From words to tokens, and which words did not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import TightfitError
from .spec import Component, ModelSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tokens:
    """`ids` are int64 (texts, length); `cut` holds for each text the end that was left out, empty if none."""

    ids: np.ndarray
    cut: tuple[str, ...]


def tokenize(spec: ModelSpec, encoder: Component, texts: list[str]) -> Tokens:
    """Tokens of `texts` for one text encoder, padded or cut to what it reads."""
    import numpy as np
    from transformers import CLIPTokenizer

    folder = spec.folder / encoder.name.replace("text_encoder", "tokenizer")
    if not (folder / "tokenizer.json").exists() and not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise TightfitError(f"{folder} lacks vocab.json and merges.txt: copy or download the model again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TightfitError(f"the tokenizer in {folder} cannot be read ({reason}): copy or download it again") from None
    length = min(tokenizer.model_max_length, encoder.config.get("max_position_embeddings", 77))
    rows = tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids
    whole = tokenizer(texts).input_ids
    cut = tuple(tokenizer.decode(row[length - 1 : -1]) if len(row) > length else "" for row in whole)
    return Tokens(np.array(rows, np.int64), cut)
