"""A model's files: JSON, and the headers of safetensors files. Never a weight, never a pickle.

A folder is hostile until shown otherwise: only regular files of a sane size are opened, and names of code
come from a list.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from itertools import islice
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any
from uuid import uuid4

from .errors import TightfitError

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
SINGLE = (".safetensors", ".gguf")  # endings of files that can each be a whole model
JSON_BYTES = 2**24  # limit; the largest that is published with a model, Qwen3's tokenizer.json, has 11.4 MB
WEIGHTS_BYTES = 2**40  # limit per file; SDXL's U-Net in fp32 has 10 GB
Stamps = tuple[tuple[Path, int, int], ...]
"""Files, each with its size and time: by these it is known whether a model has changed."""
_MOST_STAMPS = 1000  # files of a model


def open_regular(path: Path, most_bytes: int) -> BufferedReader:
    """Open a regular file of at most `most_bytes` bytes for reading. TightfitError for a pipe, a device or a
    folder says what it is.

    Non-blocking, because opening a pipe without a writer would wait for ever. Raises OSError as `open` does.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except ValueError:
        raise TightfitError(
            f"{str(path)!r} has a null character, which no file name can have: name another"
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TightfitError(f"{path} is {_kind(status.st_mode)}, not a file: put the file itself there")
        if status.st_size > most_bytes:
            raise TightfitError(
                f"{path} has {status.st_size} bytes, and such a file at most {most_bytes}: name another"
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: Path, most_bytes: int = JSON_BYTES) -> bytes:
    """Contents of a regular file of at most `most_bytes` bytes. Also works where the system reports no size,
    as in /proc."""
    with open_regular(path, most_bytes) as stream:
        content = stream.read(most_bytes + 1) or b""
    if len(content) > most_bytes:
        raise TightfitError(
            f"{path} has more than {most_bytes} bytes, the limit for such a file: name another"
        )
    return content


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a regular file, read in parts."""
    digest = hashlib.sha256()
    try:
        with open_regular(path, WEIGHTS_BYTES) as stream:
            while part := stream.read(2**20):
                digest.update(part)
    except OSError as error:
        raise TightfitError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def parsed(content: bytes) -> Any:
    """JSON from UTF-8. ValueError for broken JSON, an integer beyond 64 bits, or half of a surrogate pair."""

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_int=whole)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be printed
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Context manager: TightfitError for whatever in a folder may not be read."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise TightfitError(
            f"{where} cannot be read ({error.strerror}): allow it, or copy the model to a folder of yours"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parsed(read_bytes(path))
    except FileNotFoundError:
        raise TightfitError(f"{path} is missing: copy or download the model again") from None
    except OSError as error:
        raise TightfitError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TightfitError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise TightfitError(f"{path} is not a JSON object: copy or download it again")
    return value


def shortened(value: Any) -> str:
    """`value` in one line of at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, with links resolved, is in the folder `root`, or in the blobs of the hub's cache if
    `root` is a snapshot there.

    A snapshot in the hub's cache links to files in the sibling folder blobs.
    """
    try:
        place, home = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a link to nothing, or to itself
        return False
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return place.is_relative_to(home) or (cached and place.is_relative_to(home.parent.parent / "blobs"))


def stamps(path: Path) -> Stamps:
    """Size and time of a file, or of each in a model's folder, where a file that is written again leaves the
    folder's own time as it is. Nothing of what is not there."""
    files = [path, *islice(path.glob("*"), _MOST_STAMPS), *islice(path.glob("*/*"), _MOST_STAMPS)]
    stats = [(file, file.stat()) for file in sorted(files) if file.exists()]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def plain_name(name: str) -> bool:
    """Whether it is a file name without a folder, short enough for every system (255 bytes)."""
    return Path(name).name == name and "\0" not in name and len(name.encode("utf-8", "replace")) <= 255


def reason(error: Exception) -> str:
    """Our own wording, or that it is no such JSON."""
    return str(error) if type(error) is ValueError else "not JSON of tensors"


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with no repeated name, every name printable."""
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name that comes twice")
    if not "".join(named).isprintable():
        raise ValueError("a name that cannot be printed")
    return named


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to. It replaces `path` at the end, or is removed on an error, so nobody
    sees half a file."""
    partial = path.with_name(f".tightfit-{uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def adding(path: Path) -> Iterator[list[Path]]:
    """Like `replacing`, but never overwrites: if `path` exists, the new file gets a number. Yields a list:
    the file to write to; at the end its final path is appended."""
    partial = path.with_name(f".tightfit-{uuid4().hex}.partial")
    places = [partial]
    try:
        yield places
        place, number = path, 1
        while not _placed(partial, place):
            number += 1
            place = path.with_name(f"{path.stem}-{number}{path.suffix}")
        places.append(place)
    finally:
        partial.unlink(missing_ok=True)


def _placed(partial: Path, place: Path) -> bool:
    """Move a finished file to a free name; False if the name is taken. Of two processes that try at once, one
    succeeds."""
    try:
        os.link(partial, place)
    except FileExistsError:
        return False
    except OSError:  # this file system has no links
        try:
            place.touch(exist_ok=False)
        except FileExistsError:
            return False
        partial.replace(place)
    return True


def cache_folder() -> Path:
    """The user's cache folder: XDG_CACHE_HOME, or the system's own.

    A user without a home (`docker run --user 1234`) gets a private folder in the temporary one.
    """
    below = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return _user_folder("LOCALAPPDATA", "XDG_CACHE_HOME", below) or _temporary_cache() / "tightfit"


def config_folder() -> Path | None:
    """The folder of the user's settings: XDG_CONFIG_HOME, or the system's own. None for a user without a
    home."""
    below = {"win32": "AppData/Roaming", "darwin": "Library/Application Support"}.get(sys.platform, ".config")
    return _user_folder("APPDATA", "XDG_CONFIG_HOME", below)


def state_folder() -> Path | None:
    """The folder of what outlives a process: XDG_STATE_HOME, or the system's own. None for a user without a
    home."""
    below = {"win32": "AppData/Local", "darwin": "Library/Application Support"}
    return _user_folder("LOCALAPPDATA", "XDG_STATE_HOME", below.get(sys.platform, ".local/state"))


def _user_folder(windows: str, others: str, below: str) -> Path | None:
    """Ours in the folder that the environment names, or `below` the user's home."""
    if folder_name := os.environ.get(windows if sys.platform == "win32" else others):
        return Path(folder_name) / "tightfit"
    try:
        return Path.home() / below / "tightfit"
    except RuntimeError:  # no HOME, and no entry in the list of users
        return None


@cache
def _temporary_cache() -> Path:
    """`tightfit-UID` in the temporary folder if only this user can use it, else a new one for this process,
    or a path that cannot be written."""
    user = getattr(os, "getuid", lambda: 0)()
    try:
        folder = Path(gettempdir()) / f"tightfit-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
        return folder if ours else Path(mkdtemp(prefix="tightfit-"))
    except OSError:  # nothing is cached
        return Path(os.sep) / "nonexistent"
