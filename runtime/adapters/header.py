"""Where the file of an adapter is, and what its header says."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import TightfitError
from ..files import PICKLES, WEIGHTS_BYTES, open_regular, shortened
from ..models.cures import of_pickle
from ..models.hub import BESIDE
from ..models.layouts.weights import read_file
from ..models.tensors import Tensor

_LONGEST = 4096  # bytes of a path, as Linux has it
Stamp = tuple[int, int]
"""A file's size and time: one that was written again is another."""


@dataclass(frozen=True)
class OfFile:
    """An adapter that is a file. `written` is the file's size and time when it was named."""

    path: Path
    written: Stamp

    @property
    def name(self) -> str:
        return str(self.path)


def path_of(text: str | Path) -> Path:
    """The absolute path that a text says, or that of what ships by this name where nothing is called so.
    Raises TightfitError for a text that no file can be called."""
    try:
        path = Path(text).expanduser().absolute()
        if len(str(path).encode()) <= _LONGEST and "\0" not in str(path):
            return path if _is_there(path) else BESIDE.get(str(text), path)
    except (RuntimeError, UnicodeEncodeError):  # of an unknown user; with half of a surrogate pair
        pass
    raise TightfitError(f"{shortened(str(text))} cannot be the path of a file: name another")


def exists(text: str | Path) -> bool:
    return _is_there(path_of(text))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long, or in a folder that may not be looked at
        return False


def located(text: str | Path, in_folders: tuple[str, ...]) -> Path:
    """The file that is meant: it, or the first of these names in a folder. Raises TightfitError for a pickle,
    and for a folder without one."""
    path = path_of(text)
    try:
        files = [path / name for name in in_folders if (path / name).exists()] if path.is_dir() else [path]
    except OSError as error:
        raise _unreadable(path, error) from None
    if not files:
        raise TightfitError(f"{path} is a folder without {' or '.join(in_folders)}: name the file")
    if f"*{files[0].suffix.lower()}" in PICKLES:
        raise TightfitError(f"{path} is a pickle: {of_pickle(path)}")
    return files[0]


def stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from None
    return status.st_size, status.st_mtime_ns


def _unreadable(file: Path, error: OSError) -> TightfitError:
    by_name = ", or the folder of models that has one called so by --models-dir"
    cure = f"name a .safetensors file{by_name if isinstance(error, FileNotFoundError) else ''}"
    return TightfitError(f"{file} cannot be read ({error.strerror}): {cure}")


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
