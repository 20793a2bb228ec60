"""Where the file of an adapter is, and what its header says."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from ..errors import TightfitError
from ..files import PICKLES, WEIGHTS_BYTES, open_regular
from ..models.hub import BESIDE
from ..models.layouts.safetensors import read_file
from ..models.tensors import Tensor

# Files of these names in a folder, which is what diffusers and PEFT write.
IN_FOLDERS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
Stamp = tuple[int, int]
"""A file's size and time: one that was written again is another."""


def shipped(path: Path) -> Path:
    """`path`, or what ships by that name where nothing is called so."""
    full = path.expanduser().absolute()
    return full if full.exists() else BESIDE.get(str(path), full)


def located(path: Path) -> Path:
    """The file that is meant by `path`. Raises TightfitError for a pickle, and for a folder without one."""
    path = shipped(path)
    if path.is_dir():
        files = [path / name for name in IN_FOLDERS if (path / name).exists()]
        if not files:
            raise TightfitError(f"{path} is a folder without {' or '.join(IN_FOLDERS)}: name the file")
        return files[0]
    if path.suffix.lower() in {pattern[1:] for pattern in PICKLES}:
        raise TightfitError(
            f"{path} is a pickle, which can run code, and is never opened: take its .safetensors copy"
        )
    return path


def stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise TightfitError(f"{file} cannot be read ({error.strerror}): name a .safetensors file") from None
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=32)
def contents(file: Path, stamp: Stamp) -> tuple[dict[str, Tensor], dict[str, str]]:  # noqa: ARG001
    """Its tensors, and what is said of them."""
    return read_file(file)


def keys_of(file: Path) -> frozenset[str]:
    return frozenset(contents(file, stamp(file))[0])


@functools.lru_cache(maxsize=256)
def a1111_hash(file: Path, stamp: Stamp) -> str:
    """A1111's of a LoRA: of all that comes after the header, 12 digits of it."""
    begin = min((tensor.offset for tensor in contents(file, stamp)[0].values()), default=0)
    digest = hashlib.sha256()
    with open_regular(file, WEIGHTS_BYTES) as stream:
        stream.seek(begin)
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:12]
