"""CLIP's tokenizer, read from a model's folder by its class: only regular files of that folder, and no code
of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import TightfitError, explained
from ..files import JSON_BYTES, open_regular, plain_name, read_json, readable

NAMES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_ARGUMENTS = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}


def read_tokenizer(folder: Path) -> Any:
    """The CLIPTokenizer in `folder`. Raises TightfitError if files are missing, broken, or no files."""
    with readable(folder):
        for place in (folder, folder / "additional_chat_templates"):
            for each in place.iterdir() if place.is_dir() else ():
                if each.exists() and not each.is_dir():
                    # Transformers opens what it finds, and a pipe would keep it for ever.
                    open_regular(each, JSON_BYTES).close()
        if not (folder / "tokenizer.json").exists() and not (
            (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
        ):
            raise TightfitError(f"{folder} lacks vocab.json and merges.txt: copy or download the model again")
        own = _own_files(folder)
    from transformers import CLIPTokenizer

    with explained(f"the tokenizer in {folder} cannot be read", "copy or download it again"):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **own)


def _own_files(folder: Path) -> dict[str, Any]:
    """The folder's own files for those that its tokenizer_config.json names: older transformers open them
    anywhere."""
    named: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        told = read_json(folder / name) if (folder / name).exists() else {}
        others = told.get("fast_tokenizer_files") or []
        if not isinstance(others, list) or not all(
            isinstance(each, str) and plain_name(each) for each in others
        ):
            raise TightfitError(
                f"{folder / name} names files outside of its folder as fast_tokenizer_files: "
                "delete these lines"
            )
        named |= {key: folder / file for key, file in _ARGUMENTS.items() if key in told}
    return {key: str(file) if file.exists() else None for key, file in named.items()}
