"""`<lora:name:0.8>` in a prompt, or <lyco:…>, as A1111 has it: a file in a folder by its name, and its
weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import TightfitError
from ..models.layouts import library
from . import Adapter, read_adapter

# With the spaces before it, from the first of them: tried at each, a long row would take its square.
WORD = re.compile(r"(?<!\s)\s*+<(?:lora|lyco):([^:<>]{1,200})((?::[^:<>]{0,40}){0,2})>")


def from_words(
    prompt: str, models_dirs: Sequence[str | Path] = (), find: Callable[[str], str] | None = None
) -> tuple[str, tuple[Adapter, ...]]:
    """A prompt without these words, and what they name in folders of models, or as `find` says. Without such
    folders they stay words.

    Raises TightfitError for a name that no file has, or two have, and for a weight that is no number.
    """
    words = WORD.findall(prompt)
    roots = library.folders(models_dirs, library.Kind.LORA) if words and not find else ()
    if not words or not (roots or find):
        return prompt, ()
    located = find or (lambda name: _located(roots, name))
    return WORD.sub("", prompt).strip(), tuple(_adapter(located(name), name, text) for name, text in words)


def _located(roots: Sequence[Path], name: str) -> Path:
    if file := library.find(name, library.Kind.LORA, roots):
        return file
    raise library.missing(name, library.Kind.LORA, roots)


def _adapter(file: str | Path, name: str, weights: str) -> Adapter:
    try:
        numbers = [float(weight) for weight in weights.split(":")[1:]]
    except ValueError:
        raise TightfitError(
            f"<lora:{name}{weights}> has a weight that is no number: say <lora:{name}:0.8>"
        ) from None
    numbers = numbers or [1.0]  # the text encoders' comes first
    return read_adapter(file, numbers[-1], numbers[0])
