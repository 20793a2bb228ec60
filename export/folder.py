"""Write a model's folder whole or not at all, and a network into it as diffusers does: a config and a
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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..runtime.errors import TightfitError
from ..runtime.files import JSON_BYTES, inside, open_regular, read_bytes, read_json
from ..runtime.models import vocabulary
from ..runtime.models.families import FAMILIES
from ..runtime.models.families.family import Role
from ..runtime.models.layouts import pieces
from ..runtime.models.tokenizer import NAMES
from .safetensors_file import Promised, SafetensorsFile

if TYPE_CHECKING:
    import torch

    from ..runtime.models.spec import ModelSpec

# Files that are copied beside the weights, by folder. No other file of a model is read.
_COPIED = {"scheduler": ("scheduler_config.json",)} | {
    network.tokenizer: NAMES for family in FAMILIES for network in family.networks if network.tokenizer
}
_OF_A_NETWORK = ("config.json",)
_PARTIAL = re.compile(r"\.tightfit-[0-9a-f]{32}\.partial")


def write_component(
    folder: Path, module: Any, promised: Promised, values: Iterable[torch.Tensor]
) -> list[str]:
    """Write the config of a diffusers or transformers `module`, and the weights that are `promised`, whose
    `values` come one by one, whole or their beginning. Returns its entry for model_index.json."""
    kind, library = type(module).__name__, "diffusers" if hasattr(module, "save_config") else "transformers"
    folder.mkdir(parents=True)
    if library == "diffusers":
        module.save_config(folder)
    else:
        module.config.architectures = [kind]
        module.config.save_pretrained(folder)
    if kind.startswith("CLIPText"):
        # As published models name them; today's transformers names some otherwise.
        promised = {n if n.startswith("text_") else f"text_model.{n}": p for n, p in promised.items()}
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    with SafetensorsFile(folder / f"{stem}.safetensors", promised) as file:
        for name, value in zip(promised, values, strict=True):
            file.write(name, value)
    return [library, kind]


@contextmanager
def described(spec: ModelSpec) -> Iterator[Path]:
    """A folder that has what a diffusers folder has beside its weights: the model's own, or one that is made
    of what a checkpoint's names and shapes say."""
    if (spec.folder / "model_index.json").is_file():
        yield spec.folder
        return
    with TemporaryDirectory(prefix="tightfit-") as made:
        folder = Path(made)
        index: dict[str, Any] = {"_class_name": spec.pipeline}
        index["scheduler"] = ["diffusers", spec.scheduler["_class_name"]]
        _write_json(folder / "scheduler" / "scheduler_config.json", spec.scheduler)
        for component in spec.components.values():
            name, config = component.network.folder, dict(component.config)
            if component.tokenizer:
                _copy_tokenizer(component.tokenizer, folder / component.network.tokenizer)
                index[component.network.tokenizer] = ["transformers", component.config["tokenizer_class"]]
                index[name] = ["transformers", config["architectures"][0]]
            elif component.role is Role.TEXT:
                vocabulary.write(
                    folder / component.network.tokenizer,
                    vocabulary.clip_merges(),
                    vocabulary.LENGTH,
                    component.pad or vocabulary.END,
                )
                index[component.network.tokenizer] = ["transformers", "CLIPTokenizer"]
                index[name] = ["transformers", config["architectures"][0]]
                config["model_type"] = "clip_text_model"
            else:
                index[name] = ["diffusers", config["_class_name"]]
            _write_json(folder / name / "config.json", config)
        for network in spec.design.fuller.networks:
            if network.name not in spec.components:
                index |= {part: [None, None] for part in (network.folder, network.tokenizer)}
        _write_json(folder / "model_index.json", index | dict(spec.settings))
        yield folder


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Or write it, where it is in a file of weights. Raises TightfitError for a file that is not regular, or
    too large."""
    folder.mkdir()
    if tokenizer.is_file():
        vocabulary.write_t5(folder, *pieces.read(tokenizer))
        return
    for name in NAMES:
        if (tokenizer / name).exists():
            with open_regular(tokenizer / name, JSON_BYTES) as stream:
                (folder / name).write_bytes(stream.read())


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(value), indent=2), encoding="utf-8")


def copy_the_rest(
    source: Path, folder: Path, components: Collection[str], become: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Copy configs, tokenizers and the scheduler. Parts that tightfit does not run, such as a safety checker,
    are left out of the index.

    `become` names the folders that a component's files go to, where these are not its own. Raises
    TightfitError for a link out of the model, as its target would be copied.
    """
    index = read_json(source / "model_index.json")
    parts = {name: files for name, files in _COPIED.items() if any(index.get(name) or ())}
    parts |= dict.fromkeys(components, _OF_A_NETWORK)
    for name, value in index.items():
        if isinstance(value, list) and name not in parts:
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, files in parts.items():
        _check_inside(source / name, source)
        contents = {
            file: _content(source / name / file, source)
            for file in files
            if os.path.lexists(source / name / file)
        }
        for target in (become or {}).get(name, [name]):
            (folder / target).mkdir(exist_ok=True)
            for file, content in contents.items():
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
    """A temporary sibling that is renamed to `target` at the end, or removed. Siblings left by killed
    processes are removed first."""
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


# A process owns a folder as long as it has a lock on it. The kernel keeps the lock, across containers too,
# and releases it when the process ends, however it ends. On a file system without locks nothing is removed.
_OWNED = ".owned"  # on Windows, which locks no folders: a file that cannot be removed while it is open


def _new_partial(place: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that owns it, or -1."""
    while True:
        partial = place / f".tightfit-{uuid4().hex}.partial"
        partial.mkdir()
        owned = -1
        try:
            owned = _owned(partial)
            if partial.exists():
                return partial, owned
        except (BlockingIOError, FileNotFoundError):
            pass  # another process took it for a leftover before it was locked, and removes it
        except OSError:
            return partial, owned
        _disowned(owned)


def _owned(partial: Path) -> int:
    """Own the folder. Raises BlockingIOError if another process does, OSError where locks do not work."""
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
        return  # a live process owns it, or locks do not work
    shutil.rmtree(left, ignore_errors=True)
    _disowned(owned)
