"""`<lora:name:0.8>` in a prompt, as A1111 has it: a file in a folder by its name, and its weight."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from ..errors import TightfitError
from ..files import readable, shortened
from . import Adapter, read_adapter

FOLDER = "TIGHTFIT_LORAS"  # of the environment
_WORD = re.compile(r"\s*<lora:([^:<>]{1,200})((?::[^:<>]{0,40}){0,2})>")
_MOST_FILES = 100_000


def from_words(prompt: str) -> tuple[str, tuple[Adapter, ...]]:
    """A prompt without these words, and what they name in the folder of the environment. Without that folder
    they stay words.

    Raises TightfitError for a name that no file has, or two have, and for a weight that is no number.
    """
    folder, words = os.environ.get(FOLDER), _WORD.findall(prompt)
    if not folder or not words:
        return prompt, ()
    files = _files(Path(folder).expanduser())
    return _WORD.sub("", prompt).strip(), tuple(_adapter(files, name, weights) for name, weights in words)


def _adapter(files: dict[str, list[Path]], name: str, weights: str) -> Adapter:
    found = files.get(name, [])
    if len(found) > 1:
        raise TightfitError(
            f"{found[0]} and {found[1]} have one name: rename one of them, or name one by --lora"
        )
    if not found:
        close = get_close_matches(name, files, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise TightfitError(f"no file in {os.environ[FOLDER]} is called {shortened(name)}{meant}")
    try:
        numbers = [float(weight) for weight in weights.split(":")[1:]]
    except ValueError:
        raise TightfitError(
            f"<lora:{name}{weights}> has a weight that is no number: say <lora:{name}:0.8>"
        ) from None
    numbers = numbers or [1.0]  # the text encoders' comes first
    return read_adapter(found[0], numbers[-1], numbers[0])


def _files(folder: Path) -> dict[str, list[Path]]:
    """The safetensors files of a folder, and of those in it, by their names."""
    files: dict[str, list[Path]] = {}
    with readable(folder):
        if not folder.is_dir():
            raise TightfitError(f"{FOLDER} names {folder}, which is no folder: name the one with your LoRAs")
        for path in sorted(islice(folder.rglob("*.safetensors"), _MOST_FILES)):
            files.setdefault(path.stem, []).append(path)
    return files
