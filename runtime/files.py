"""A model's files: JSON, and what the headers of safetensors files promise. Never a weight, never a pickle."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from .errors import TightfitError

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
CONVERT = (
    "a pickle can run any code when it is opened, so tightfit never does; convert it once, in a place you trust: "
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_single_file('model.ckpt').save_pretrained('folder')\""
)
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers too


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
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                if stream.readinto(buffer) != self.stored_bytes:
                    raise TightfitError(f"{self.file} was cut short while it was read: copy or download it again")
        except OSError as error:
            raise TightfitError(f"{self.file} cannot be read ({error.strerror}): copy or download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TightfitError(f"{path} is missing: copy or download the model again") from None
    except OSError as error:
        raise TightfitError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TightfitError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise TightfitError(f"{path} is not a JSON object: copy or download it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: the plain file or shards, else the fp16 variant."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                places = read_json(index).get("weight_map")
                names = set(map(str, places.values())) if isinstance(places, dict) else set()
                if not names or any(Path(shard).name != shard for shard in names):
                    raise TightfitError(f"{index} does not list plain file names: copy or download it again")
                return [folder / shard for shard in sorted(names)]
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return [single]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise TightfitError(f"{folder} has its weights only as {pickles[0]}: {CONVERT}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise TightfitError(
        f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors (there: {found}): "
        "rename it back, or copy or download the model again"
    )


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file promises, checked against its length. Format: the safetensors README."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _HEADER_LIMIT):
                raise TightfitError(f"{file} is not a whole safetensors file ({size} bytes): copy or download it again")
            header = json.loads(stream.read(length))
        tensors = {name: _tensor(entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        promised = max((tensor.offset + tensor.stored_bytes for tensor in tensors.values()), default=8 + length)
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}; copy or download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TightfitError(f"{file} has a broken safetensors header: copy or download it again") from None
    if promised != size:
        raise TightfitError(f"{file} is truncated or overwritten: it has {size} bytes of {promised}; copy or download it again")
    return tensors


def _tensor(entry: Mapping[str, Any], file: Path, data: int) -> Tensor:
    """One entry of a header whose tensors' bytes begin at `data`; ValueError if its numbers contradict each other."""
    begin, end = entry["data_offsets"]
    tensor = Tensor(entry["dtype"], tuple(entry["shape"]), file, data + begin, end - begin)
    if begin < 0 or any(side < 0 for side in tensor.shape):
        raise ValueError("a negative size")
    if tensor.dtype in STORED_BYTES and tensor.count * STORED_BYTES[tensor.dtype] != tensor.stored_bytes:
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


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again: XDG_CACHE_HOME, or what the system uses for it."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        root = Path(os.environ.get("XDG_CACHE_HOME") or default)
    return root / "tightfit"
