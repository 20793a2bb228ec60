"""Models that are sent to machines which have them not: read here in parts, and put together there. What
comes is taken for hostile: nothing is written outside of the folder of what is sent."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from uuid import uuid4

from ..errors import TightfitError
from ..files import PICKLES, WEIGHTS_BYTES, cache_folder, inside, open_regular, plain_name, shortened
from ..models.hub import BUILT_IN, located

PART_BYTES = 2**26
_LEFT_SECONDS = 3600.0
_FILES = 1000
_DEEP = 3  # folders, the model's own included
_DIGEST = re.compile("[0-9a-f]{32}")
_PICKLED = tuple(pattern[1:] for pattern in PICKLES)


@dataclass(frozen=True)
class Parcel:
    """A model to send: its files by their names there, each below one name, the model's own."""

    digest: str
    files: Mapping[str, Path]

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


def parcel(model: str, models_dirs: Sequence[Path] = ()) -> Parcel | None:
    """Of a model that is files here; None for one that is built in, or on the hub. Pickles stay. Raises
    TightfitError."""
    place = located(model, models_dirs)
    path = Path(place).expanduser()
    if place in BUILT_IN or not path.exists():
        return None
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    stem = PurePosixPath(path.resolve().name)
    named = {file: str(stem / file.relative_to(path).as_posix()) for file in every}
    kept = [file for file in every if file.is_file() and inside(file, path) and _is_name(named[file])]
    if len(kept) > _FILES:
        raise TightfitError(f"{path} has {len(kept)} files, and a model {_FILES} at most: name its folder")
    if not kept and any(file.is_file() and not inside(file, path) for file in every):
        raise TightfitError(
            f"{path} is links out of it, which are not sent: put what they lead to there itself"
        )
    if not kept:
        raise TightfitError(f"{path} has no file that can be sent: rename it, with letters and digits")
    files = {named[file]: file for file in kept}
    stamps = [(name, (stat := file.stat()).st_size, stat.st_mtime_ns) for name, file in files.items()]
    return Parcel(hashlib.blake2b(repr(stamps).encode(), digest_size=16).hexdigest(), files)


def _is_name(name: str) -> bool:
    """Of a model's file, on either side: plain parts, few, and no pickle."""
    path = PurePosixPath(name)
    plain = path.parts and len(path.parts) <= _DEEP and all(map(_is_plain, path.parts))
    return bool(plain) and path.suffix not in _PICKLED and str(path) == name


def parts(file: Path) -> Iterator[bytes]:
    """A file in parts of PART_BYTES, one at least. Raises TightfitError."""
    try:
        with open_regular(file, WEIGHTS_BYTES) as stream:
            yield stream.read(PART_BYTES)
            while part := stream.read(PART_BYTES):
                yield part
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}") from None


class Stage:
    """Models that were sent to this machine, in the user's cache folder, by their digests."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "staged"
        self._partial = f".{uuid4().hex}"
        self._names: dict[str, set[str]] = {}
        for left in self._folder.glob(".*"):  # by a process that was killed
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)

    def place(self, digest: str) -> Path | None:
        """Where the model is, once it is whole."""
        place = self._folder / _checked(digest)
        return next(iter(place.iterdir()), None) if place.is_dir() else None

    def add(self, digest: str, name: str, content: bytes) -> None:
        """Write the next part of a file. Raises TightfitError for a name that would lie elsewhere."""
        if not _is_name(name):
            raise TightfitError(f"{shortened(name)} is no name of a model's file: it is not written")
        names = self._names.setdefault(_checked(digest), set())
        names.add(name)
        if len(names) > _FILES or len({name.partition("/")[0] for name in names}) > 1:
            raise TightfitError(f"{shortened(name)} is no file of that model: it is not written")
        file = self._coming(digest) / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(file, flags, 0o600), "ab") as stream:
                stream.write(content)
                if stream.tell() > WEIGHTS_BYTES:
                    raise TightfitError(f"{shortened(name)} is larger than any file of a model")
        except OSError as error:
            raise TightfitError(f"{file} cannot be written ({error.strerror}): make room there") from None

    def finish(self, digest: str) -> None:
        """All of it has come."""
        coming = self._coming(digest)
        with suppress(OSError):  # another process has put it there meanwhile
            coming.rename(self._folder / digest)
        self.drop(digest)

    def drop(self, digest: str) -> None:
        """Remove what has come of it."""
        self._names.pop(digest, None)
        shutil.rmtree(self._coming(digest), ignore_errors=True)

    def _coming(self, digest: str) -> Path:
        return self._folder / f"{self._partial}-{_checked(digest)}"


def _is_left(folder: Path) -> bool:
    """Whether nothing of a model has come for an hour. A part is written in seconds, whoever writes it."""
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # another process removes it
        return False
    return time.time() - newest > _LEFT_SECONDS


def _is_plain(part: str) -> bool:
    return plain_name(part) and not part.startswith(".") and "\\" not in part and ":" not in part


def _checked(digest: str) -> str:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise TightfitError(f"{shortened(digest)} is no digest of a model")
    return digest
