"""Tokenizers: CLIP's, out of the package, or those in a model's folder, of which only regular files are read,
and no code is run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..budget import BUILDING
from ..errors import TightfitError, explained
from ..files import JSON_BYTES, open_regular, plain_name, read_json, readable
from . import vocabulary
from .layouts import pieces

if TYPE_CHECKING:
    from .spec import Component, ModelSpec

NAMES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    pieces.OF_SENTENCEPIECE,
)
_ARGUMENTS = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}


def folder_of(spec: ModelSpec, encoder: Component) -> Path:
    """Where a text encoder's tokenizer is, if it has one of its own."""
    return encoder.tokenizer or spec.folder / encoder.network.tokenizer


def tokenizer_of(spec: ModelSpec, encoder: Component) -> Any:
    """The text encoder's: the model's own, or CLIP's where the model brings none."""
    if encoder.pad is None:
        reading = encoder.network.reading
        folder = folder_of(spec, encoder)
        if reading and reading.in_pieces and (file := pieces.place(folder)):
            with TemporaryDirectory(prefix="tightfit-") as made:
                vocabulary.write_t5(Path(made), *pieces.read(file))
                return read_tokenizer(Path(made), reading.open_tokenizer)
        return read_tokenizer(folder, reading.open_tokenizer) if reading else read_tokenizer(folder)
    return copy.deepcopy(_clip(encoder.pad))  # words may be added to it


@functools.cache
def _clip(pad: str) -> Any:
    with TemporaryDirectory(prefix="tightfit-") as folder:  # every transformers reads one from files
        vocabulary.write(Path(folder), vocabulary.clip_merges(), vocabulary.LENGTH, pad)
        return read_tokenizer(Path(folder))


def _open_clip(folder: Path, **arguments: Any) -> Any:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, **arguments)


def read_tokenizer(folder: Path, opened: Callable[..., Any] = _open_clip) -> Any:
    """The tokenizer in `folder`, CLIP's unless it is `opened` as another. Raises TightfitError if files are
    missing, broken or not regular."""
    with readable(folder):
        for place in (folder, folder / "additional_chat_templates"):
            for entry in place.iterdir() if place.is_dir() else ():
                if entry.exists() and not entry.is_dir():
                    # transformers opens whatever is there, and would wait for ever on a pipe.
                    open_regular(entry, JSON_BYTES).close()
        if not (folder / "tokenizer.json").exists() and not (
            (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
        ):
            raise TightfitError(f"{folder} lacks vocab.json and merges.txt: copy or download the model again")
        files = _own_files(folder)
    # As nothing else of the libraries is imported meanwhile.
    with BUILDING, explained(f"the tokenizer in {folder} cannot be read", "copy or download it again"):
        return opened(folder, local_files_only=True, trust_remote_code=False, **files)


def _own_files(folder: Path) -> dict[str, Any]:
    """The folder's own files in place of those that tokenizer_config.json names, which older transformers
    open anywhere on disk."""
    named: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = read_json(folder / name) if (folder / name).exists() else {}
        fast_files = config.get("fast_tokenizer_files") or []
        if not isinstance(fast_files, list) or not all(
            isinstance(file_name, str) and plain_name(file_name) for file_name in fast_files
        ):
            raise TightfitError(
                f"{folder / name} names files outside its folder as fast_tokenizer_files: delete these lines"
            )
        named |= {key: folder / file for key, file in _ARGUMENTS.items() if key in config}
    return {key: str(file) if file.exists() else None for key, file in named.items()}
