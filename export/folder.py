"""A model's folder, whole or not there; and in it one network in diffusers' layout: its config and its
safetensors file."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from ..runtime.errors import TightfitError
from ..runtime.files import inside, read_bytes, read_json
from ..runtime.models.tokenizer import NAMES

# What is copied of a model beside its weights, by folder; nothing else of it is looked at.
_COPIED = {"tokenizer": NAMES, "tokenizer_2": NAMES, "scheduler": ("scheduler_config.json",)}
_OF_A_NETWORK = ("config.json",)
_PARTIAL = re.compile(r"\.tightfit-[0-9a-f]{32}\.partial")


def write_component(folder: Path, module: Any, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Write the config of a diffusers or transformers `module` and its `weights`; returns its entry in
    model_index.json."""
    kind = type(module).__name__
    folder.mkdir(parents=True)
    if not kind.startswith("CLIPText"):
        module.save_config(folder)
        save_file(dict(weights), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return ["diffusers", kind]
    module.config.architectures = [kind]
    module.config.save_pretrained(folder)
    # the names that published models have, whatever today's transformers calls them
    prefixed = {n if n.startswith("text_") else f"text_model.{n}": w for n, w in weights.items()}
    save_file(prefixed, folder / "model.safetensors", {"format": "pt"})
    return ["transformers", kind]


def copy_the_rest(
    source: Path, folder: Path, components: Collection[str], become: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Configs, tokenizers, scheduler. Parts that tightfit does not run, such as a safety checker, are left
    out of the index.

    `become` names the folders that a component's files go to, if not to one of its own name. Raises
    TightfitError for a link that leaves the model, as what it leads to would be copied.
    """
    index = read_json(source / "model_index.json")
    parts = {name: files for name, files in _COPIED.items() if index.get(name)} | dict.fromkeys(
        components, _OF_A_NETWORK
    )
    for name, value in index.items():
        if isinstance(value, list) and name not in parts:
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, files in parts.items():
        _check_inside(source / name, source)
        there = {
            file: _content(source / name / file, source)
            for file in files
            if os.path.lexists(source / name / file)
        }
        for target in (become or {}).get(name, [name]):
            (folder / target).mkdir(exist_ok=True)
            for file, content in there.items():
                (folder / target / file).write_bytes(content)


def _content(file: Path, model: Path) -> bytes:
    _check_inside(file, model)
    return read_bytes(file)


def _check_inside(place: Path, model: Path) -> None:
    if not inside(place, model):
        raise TightfitError(
            f"{place} is a link out of the model's folder, or to nothing: put what it leads to there itself"
        )


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` at the end, or is gone; those that killed processes left
    there go first."""
    place = target.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(".tightfit-*.partial"):
        if _PARTIAL.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            _remove_unowned(left)
    partial, owned = _new_partial(place)
    try:
        yield partial
        if sys.platform == "win32":  # where an open file's folder cannot be renamed
            owned = _disowned(owned)
            (partial / _OWNED).unlink()
        partial.rename(target)
    finally:
        _disowned(owned)
        shutil.rmtree(partial, ignore_errors=True)


# A folder is owned as long as its process has a lock on it, which the kernel keeps, also for processes in
# other containers, and lets go when the process ends, however it does. Where a file system has no locks
# nothing is removed.
_OWNED = ".owned"  # on Windows, which locks no folders: a file that cannot be removed as long as it is open


def _new_partial(place: Path) -> tuple[Path, int]:
    """A new folder and what it is owned by: a descriptor, or -1."""
    while True:
        partial = place / f".tightfit-{uuid4().hex}.partial"
        partial.mkdir()
        owned = -1
        try:
            owned = _owned(partial)
            if partial.exists():
                return partial, owned
        except (BlockingIOError, FileNotFoundError):
            pass  # another process took it for a leftover between the lines, and removes it
        except OSError:
            return partial, owned
        _disowned(owned)


def _owned(partial: Path) -> int:
    """Own the folder. BlockingIOError if another process does, OSError where that cannot be told."""
    if sys.platform == "win32":
        return os.open(partial / _OWNED, os.O_CREAT | os.O_RDWR)
    import fcntl

    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _disowned(descriptor: int) -> int:
    if descriptor >= 0:
        os.close(descriptor)
    return -1


def _remove_unowned(left: Path) -> None:
    try:
        if sys.platform == "win32":
            (left / _OWNED).unlink(missing_ok=True)
            owned = -1
        else:
            owned = _owned(left)
    except OSError:
        return  # it is a living process's, or nobody can tell
    shutil.rmtree(left, ignore_errors=True)
    _disowned(owned)
