"""Variants in prompts: `{a|b}` and `__file__` of a folder, by the dynamicprompts package."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import TightfitError, explained
from .files import shortened
from .request import Request, drawn, numbers_of

MOST_BYTES = 10_000  # of a prompt with variants: their parser takes seconds for as many
MOST_FOLDER_BYTES = 2**24
_VARIANT = re.compile(r"\{[^{}]*\|[^{}]*\}|\{\d[^{}]*\$\$")
_NAMED = re.compile(r"__([\w\-/*.]+?)__")
_SUFFIXES = (".txt", ".yaml", ".yml", ".json")


def variants(request: Request, folder: Path | None = None) -> tuple[Request, ...]:
    """A request for each picture, where the prompts have variants: which one is drawn by the picture's seed.
    Without any the request itself.

    folder: of the files that __names__ mean; without one these are words. Raises TightfitError for a file
    that is not there.
    """
    if folder is not None and not folder.is_dir():
        raise TightfitError(f"{folder} is no folder of wildcards: give one by --wildcards")
    texts = {name: text for name in ("prompt", "negative_prompt") if (text := getattr(request, name))}
    if request.prompt_syntax == "plain" or not any(_varies(text, folder) for text in texts.values()):
        return (request,)
    generator, seed = _generator(folder), drawn(request.seed)
    whole = replace(
        request, seed=seed, **({"subseed": drawn(request.subseed)} if request.subseed_strength else {})
    )
    return tuple(
        replace(
            whole,
            num_images=1,
            **numbers_of(whole, number),
            **{name: _resolved(generator, text, seed + number, folder) for name, text in texts.items()},
        )
        for number in range(request.num_images)
    )


def _varies(text: str, folder: Path | None) -> bool:
    varies = bool(_VARIANT.search(text) or (folder and _NAMED.search(text)))
    if varies and len(text.encode()) > MOST_BYTES:
        raise TightfitError(
            f"a prompt with variants may have {MOST_BYTES} bytes at most: shorten it, "
            "or say --prompt-syntax plain"
        )
    return varies


def _generator(folder: Path | None) -> Any:
    try:
        from dynamicprompts.generators import RandomPromptGenerator  # pyright: ignore
        from dynamicprompts.wildcards import WildcardManager  # pyright: ignore
    except ImportError:
        raise TightfitError(
            "variants such as {a|b} in a prompt need dynamicprompts: pip install dynamicprompts, "
            "or say --prompt-syntax plain"
        ) from None
    if folder is not None and sum(file.stat().st_size for file in _files(folder)) > MOST_FOLDER_BYTES:
        raise TightfitError(
            f"{folder} has more than {MOST_FOLDER_BYTES} bytes of wildcards: choose a smaller one"
        )
    logging.getLogger("dynamicprompts").setLevel(logging.CRITICAL)  # what it tells of files, we say in a line
    return RandomPromptGenerator(WildcardManager(folder))


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file()]


def _resolved(generator: Any, text: str, seed: int, folder: Path | None) -> str:
    with explained(f"the variants of {shortened(text)} cannot be read", "close each { and each __name__"):
        try:
            (resolved,) = generator.generate(text, num_images=1, seeds=[seed])
        except RecursionError:
            raise TightfitError(
                f"the variants of {shortened(text)} are in one another without end: take one out"
            ) from None
    resolved = str(resolved)
    if folder and (missing := _NAMED.search(resolved)):
        known = [file.relative_to(folder).with_suffix("").as_posix() for file in _files(folder)]
        close = get_close_matches(missing[1], known, 1)
        meant = f": did you mean __{close[0]}__?" if close else f", which has {', '.join(sorted(known)[:5])}"
        raise TightfitError(f"no wildcard __{missing[1]}__ is in {folder}{meant}")
    return resolved
