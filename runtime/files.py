"""A model's files: JSON, and what the headers of safetensors files promise. Never a weight, never a pickle.

A folder is hostile until shown otherwise: what is opened is a regular file of a sane size, and what names
code is on a list.
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
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any
from uuid import uuid4

from .errors import TightfitError

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
JSON_BYTES = 2**24  # at most; the largest published beside SD, CLIP's tokenizer.json, has 3.6 MB
WEIGHTS_BYTES = 2**40  # at most in one file; SDXL's U-Net in fp32 has 10 GB


def open_regular(path: Path, most_bytes: int) -> BufferedReader:
    """Open a regular file of at most `most_bytes` bytes to read: of a pipe, a device or a folder
    TightfitError says what it is.

    Not blocking, as opening a pipe to which nothing writes would wait for ever. Raises OSError as `open`
    does.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except ValueError:
        raise TightfitError(
            f"{str(path)!r} has a null character, which no file's name has: name another"
        ) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise TightfitError(f"{path} is {_kind(found.st_mode)}, not a file: put the file itself there")
        if found.st_size > most_bytes:
            raise TightfitError(
                f"{path} has {found.st_size} bytes, of at most {most_bytes} that such a file has: "
                "name another"
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: Path, most_bytes: int = JSON_BYTES) -> bytes:
    """What is in a regular file of at most `most_bytes` bytes, also of those whose size the system does not
    tell, as in /proc."""
    with open_regular(path, most_bytes) as stream:
        content = stream.read(most_bytes + 1) or b""
    if len(content) > most_bytes:
        raise TightfitError(
            f"{path} has more than the {most_bytes} bytes that such a file has at most: name another"
        )
    return content


def sha256(path: Path) -> str:
    """In hexadecimal digits, of a regular file, a part of which is in memory at a time."""
    digest = hashlib.sha256()
    try:
        with open_regular(path, WEIGHTS_BYTES) as stream:
            while part := stream.read(2**20):
                digest.update(part)
    except OSError as error:
        raise TightfitError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def parsed(content: bytes) -> Any:
    """JSON that can be worked with: ValueError for what is broken, for a whole number beyond 64 bits, and for
    half a character."""

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_int=whole)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a character of two could not be printed
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise TightfitError for whatever in a folder may not be looked at."""
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
    """In one line, and no longer than a person reads."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, its links followed, is in the folder `root`; or, if this is a snapshot in the hub's
    cache, in its blobs.

    A snapshot there is links to the files of the folder blobs, which is beside that of the snapshots.
    """
    try:
        place, home = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a link to nothing, or to itself
        return False
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return place.is_relative_to(home) or (cached and place.is_relative_to(home.parent.parent / "blobs"))


def plain_name(name: str) -> bool:
    """Whether it is a file's name without a folder, which can be looked for: systems have names of at most
    255 bytes."""
    return Path(name).name == name and "\0" not in name and len(name.encode("utf-8", "replace")) <= 255


def reason(error: Exception) -> str:
    """Our own words, or that it is no JSON of this kind."""
    return str(error) if type(error) is ValueError else "not JSON of tensors"


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no name comes twice, and every name can be printed."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that comes twice")
    if not "".join(found).isprintable():
        raise ValueError("a name that cannot be printed")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to: it takes the place of `path` at the end, or is removed, so half a file
    is never seen."""
    partial = path.with_name(f".tightfit-{uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def adding(path: Path) -> Iterator[list[Path]]:
    """As `replacing`, but what is there stays: a file called so already, or by another process meanwhile, and
    the new one gets a number. What is written to comes first in the list, and the place that it took is added
    at the end."""
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
    """Give a whole file a name that is free, and say if it was: of two processes that try at once one
    does."""
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
    """Where this user's programs keep what they can make again: XDG_CACHE_HOME, or what the system uses for
    it.

    A user without a home (`docker run --user 1234`) gets a folder in the temporary one that nobody else can
    write to.
    """
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if given:
        return Path(given) / "tightfit"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and nothing in the list of users
        return _temporary_cache() / "tightfit"
    below = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return home / below / "tightfit"


@cache
def _temporary_cache() -> Path:
    """`tightfit-UID` in the temporary folder, if it is this user's alone; else one of this process, or none
    that can be written."""
    user = getattr(os, "getuid", lambda: 0)()
    try:
        folder = Path(gettempdir()) / f"tightfit-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077
        return folder if ours else Path(mkdtemp(prefix="tightfit-"))
    except OSError:  # what would be kept is made again each time
        return Path(os.sep) / "nonexistent"
