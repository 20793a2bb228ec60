"""A model's files: JSON, and what the headers of safetensors files promise. Never a weight, never a pickle.

A folder is hostile until shown otherwise: what is opened is a regular file of a sane size, and what names code is on a list.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any
from uuid import uuid4

from .cures import of_pickles
from .errors import TightfitError

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
JSON_BYTES = 2**24  # at most; the largest published beside SD, CLIP's tokenizer.json, has 3.6 MB
WEIGHTS_BYTES = 2**40  # at most in one file; SDXL's U-Net in fp32 has 10 GB
_TENSORS = 10_000  # at most of one network; SDXL's U-Net has 1,680
_SIDES = 8  # of a tensor at most; a convolution's weight has 4
_SHARDS = 100  # files at most that one network's weights are in
# Bytes of a value, of types in whose tensors nothing is stored that is used, too: text encoders' positions are I64.
_VALUE_BYTES = STORED_BYTES | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: its dtype in that format's spelling, its shape, and its bytes' place there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    stored_bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def read_into(self, buffer: Any) -> None:
        """Fill a writable buffer of `stored_bytes` bytes: read, not mapped, so that it is in memory once."""
        try:
            with open_regular(self.file, WEIGHTS_BYTES) as stream:
                stream.seek(self.offset)
                if stream.readinto(buffer) != self.stored_bytes:
                    raise TightfitError(f"{self.file} was cut short while it was read: copy or download it again")
        except OSError as error:
            raise TightfitError(f"{self.file} cannot be read ({error.strerror}): copy or download it again") from None


def open_regular(path: Path, most_bytes: int) -> BufferedReader:
    """Open a regular file of at most `most_bytes` bytes to read: of a pipe, a device or a folder TightfitError says what it is.

    Not blocking, as opening a pipe to which nothing writes would wait for ever. Raises OSError as `open` does.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError:
        raise TightfitError(f"{str(path)!r} has a null character, which no file's name has: name another") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise TightfitError(f"{path} is {_kind(found.st_mode)}, not a file: put the file itself there")
        if found.st_size > most_bytes:
            raise TightfitError(f"{path} has {found.st_size} bytes, of at most {most_bytes} that such a file has: name another")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: Path, most_bytes: int = JSON_BYTES) -> bytes:
    """What is in a regular file of at most `most_bytes` bytes, also of those whose size the system does not tell, as in /proc."""
    with open_regular(path, most_bytes) as stream:
        content = stream.read(most_bytes + 1) or b""
    if len(content) > most_bytes:
        raise TightfitError(f"{path} has more than the {most_bytes} bytes that such a file has at most: name another")
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
    """JSON that can be worked with: ValueError for what is broken, for a whole number beyond 64 bits, and for half a character."""

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


# What model_index.json may say that a part is made by; never imported by that name. Pipelines themselves are told by their parts.
_CLASSES = {
    "unet": r"diffusers (UNet2DConditionModel|OnnxRuntimeModel)|optimum\S* ORT\w+",
    "vae": r"diffusers (AutoencoderKL|OnnxRuntimeModel)|optimum\S* ORT\w+",
    "text_encoder": r"transformers CLIPTextModel(WithProjection)?|diffusers OnnxRuntimeModel|optimum\S* ORT\w+",
    "tokenizer": r"transformers CLIPTokenizer(Fast)?",
    "scheduler": r"diffusers \w+Scheduler",
} | dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "image_processor"), r"\S+ \w+")  # never loaded
_ALIKE = {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer", "vae_encoder": "vae", "vae_decoder": "vae"}


def check_classes(file: Path, index: Mapping[str, Any]) -> None:
    """Each part that `index`, read from a model_index.json, lists is of a class that is known.

    diffusers before 0.38 ran Python code from the folder for a class that it did not know.
    """
    pipeline = index.get("_class_name", "")
    if not isinstance(pipeline, str) or not re.fullmatch(r"\w{0,100}", pipeline):
        raise TightfitError(
            f"{file} wants code of its own to run (_class_name {_short(pipeline)}): tightfit runs none from a model"
        )
    for name, value in index.items():
        known = _CLASSES.get(_ALIKE.get(name, name))
        if name.startswith("_") or not isinstance(value, list | dict) or (isinstance(value, list) and not any(value)):
            continue
        if known is None:
            raise TightfitError(f"{file} lists a part {_short(name)}, which no SD model has: tightfit runs SD 1.x, SD 2.x and SDXL")
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        if not pair or not re.fullmatch(known, " ".join(value)):
            raise TightfitError(
                f"{file} has its {name} made by {_short(value)}, which is not known: tightfit runs no code of a model"
            )


def _short(value: Any) -> str:
    """In one line, and no longer than a person reads."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, its links followed, is in the folder `root`; or, if this is a snapshot in the hub's cache, in its blobs.

    A snapshot there is links to the files of the folder blobs, which is beside that of the snapshots.
    """
    try:
        place, home = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a link to nothing, or to itself
        return False
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return place.is_relative_to(home) or (cached and place.is_relative_to(home.parent.parent / "blobs"))


def plain_name(name: str) -> bool:
    """Whether it is a file's name without a folder, which can be looked for: systems have names of at most 255 bytes."""
    return Path(name).name == name and "\0" not in name and len(name.encode("utf-8", "replace")) <= 255


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: the plain file or shards, else the fp16 variant."""
    promised: list[Path] = []
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                places = read_json(index).get("weight_map")
                names = set(map(str, places.values())) if isinstance(places, dict) else set()
                if not 0 < len(names) <= _SHARDS or not all(map(plain_name, names)):
                    raise TightfitError(f"{index} does not list plain file names: copy or download it again")
                shards = [folder / shard for shard in sorted(names)]
                if all(shard.exists() for shard in shards):
                    return shards
                promised = promised or shards  # another variant may be whole
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return [single]
    if promised:
        return promised  # to read one that is missing says so
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise TightfitError(f"{folder} has its weights only as {pickles[0]}: {of_pickles(folder.parent)}")
    names = sorted(path.name[:80] for path in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise TightfitError(
        f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors (there: {found}): "
        "rename it back, or copy or download the model again"
    )


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """What the safetensors files of one component's folder hold, by name."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        more = read_header(file)
        if twice := next((name for name in more if name in found), None):
            raise TightfitError(f"{file} holds {twice}, which {found[twice].file.name} holds too: copy or download both again")
        found |= more
        if len(found) > _TENSORS:
            raise TightfitError(f"{folder} promises more than {_TENSORS} tensors, as no SD model has: copy or download it again")
    return found


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file promises, checked against its length. Format: the safetensors README.

    As that demands, no name comes twice, and the tensors' bytes follow one another without a hole or an overlap.
    """
    again = "copy or download it again"
    try:
        with open_regular(file, WEIGHTS_BYTES) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > size - 8:
                raise TightfitError(f"{file} is not a whole safetensors file ({size} bytes): {again}")
            text = stream.read(length) if length <= JSON_BYTES else b""
        if length > JSON_BYTES or text.count(b"{") > _TENSORS + 2:
            raise TightfitError(
                f"{file} promises more than {_TENSORS} tensors ({length} bytes of header), as no SD model has: {again}"
            )
        header = json.loads(text, object_pairs_hook=_once)
        tensors = {name: _tensor(entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.stored_bytes)):
            if tensor.offset != end:
                raise ValueError("tensors with a hole between them, or that overlap")
            end += tensor.stored_bytes
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TightfitError(f"{file} has a broken safetensors header ({_reason(error)}): {again}") from None
    if end != size:
        raise TightfitError(f"{file} is truncated or overwritten: it has {size} bytes of {end}; {again}")
    return tensors


def _reason(error: Exception) -> str:
    """Our own words, or that it is no JSON of this kind."""
    return str(error) if type(error) is ValueError else "not JSON of tensors"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no name comes twice, and every name can be printed."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that comes twice")
    if not "".join(found).isprintable():
        raise ValueError("a name that cannot be printed")
    return found


def _tensor(entry: Mapping[str, Any], file: Path, data: int) -> Tensor:
    """One entry of a header whose tensors' bytes begin at `data`; ValueError if its numbers contradict each other."""
    if not isinstance(entry["data_offsets"], list) or len(entry["data_offsets"]) != 2:
        raise ValueError("a tensor whose place is not told")
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > _SIDES or not isinstance(dtype, str):
        raise ValueError(f"a tensor of no shape, of more than {_SIDES} sides, or of no type")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (begin, end, *shape)) or end < begin:
        raise ValueError("a size that is no whole number from 0 up")
    tensor = Tensor(dtype, tuple(shape), file, data + begin, end - begin)
    if dtype in _VALUE_BYTES and tensor.count * _VALUE_BYTES[dtype] != tensor.stored_bytes:
        raise ValueError("a tensor of another size than its shape")
    return tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to: it takes the place of `path` at the end, or is removed, so half a file is never seen."""
    partial = path.with_name(f".tightfit-{uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def adding(path: Path) -> Iterator[list[Path]]:
    """As `replacing`, but what is there stays: a file called so already, or by another process meanwhile, and the new one gets a
    number. What is written to comes first in the list, and the place that it took is added at the end."""
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
    """Give a whole file a name that is free, and say if it was: of two processes that try at once one does."""
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
    """Where this user's programs keep what they can make again: XDG_CACHE_HOME, or what the system uses for it.

    A user without a home (`docker run --user 1234`) gets a folder in the temporary one that nobody else can write to.
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
    """`tightfit-UID` in the temporary folder, if it is this user's alone; else one of this process, or none that can be written."""
    user = getattr(os, "getuid", lambda: 0)()
    try:
        folder = Path(gettempdir()) / f"tightfit-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077
        return folder if ours else Path(mkdtemp(prefix="tightfit-"))
    except OSError:  # what would be kept is made again each time
        return Path(os.sep) / "nonexistent"
