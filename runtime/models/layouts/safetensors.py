"""The headers of safetensors files: every tensor by its name, no weight read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import (
    JSON_BYTES,
    PICKLES,
    WEIGHTS_BYTES,
    each_once,
    open_regular,
    plain_name,
    read_json,
    reason,
)
from ..cures import of_pickle
from ..tensors import STORED_BYTES, Tensor

MOST_TENSORS = 10_000  # of one network; SDXL's U-Net has 1,680
_SIDES = 8  # of a tensor at most; a convolution's weight has 4
_SHARDS = 100  # files at most that one network's weights are in
# Bytes of a value, of types in whose tensors nothing is stored that is used, too: text encoders' positions
# are I64.
VALUE_BYTES = STORED_BYTES | {
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "BOOL": 1,
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: the plain file or shards, else the fp16 variant."""
    promised: list[Path] = []
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                shards = indexed(index)
                if all(shard.exists() for shard in shards):
                    return shards
                promised = promised or shards  # another variant may be whole
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return [single]
    if promised:
        return promised  # to read one that is missing says so
    if pickles := sorted(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise TightfitError(f"{folder} has its weights only as {pickles[0].name}: {of_pickle(pickles[0])}")
    names = sorted(path.name[:80] for path in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise TightfitError(
        f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors (there: {found}): "
        "rename it back, or copy or download the model again"
    )


def indexed(index: Path) -> list[Path]:
    """The files that it lists."""
    places = read_json(index).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not 0 < len(names) <= _SHARDS or not all(map(plain_name, names)):
        raise TightfitError(f"{index} does not list plain file names: copy or download it again")
    return [index.with_name(name) for name in sorted(names)]


def all_tensors(place: Path) -> dict[str, Tensor]:
    """What the safetensors files of one component's folder hold, or those of an index, by name."""
    found: dict[str, Tensor] = {}
    for file in indexed(place) if place.suffix == ".json" else weight_files(place):
        more = read_header(file)
        if twice := next((name for name in more if name in found), None):
            raise TightfitError(
                f"{file} holds {twice}, which {found[twice].file.name} holds too: copy or download both again"
            )
        found |= more
        if len(found) > MOST_TENSORS:
            raise TightfitError(
                f"{place} promises more than {MOST_TENSORS} tensors, as no SD model has: "
                "copy or download it again"
            )
    return found


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file promises."""
    return read_file(file)[0]


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a safetensors file promises, checked against its length, and what is said of them.
    Format: the safetensors README.

    As that demands, no name comes twice, and the tensors' bytes follow one another without a hole or an
    overlap.
    """
    again = "copy or download it again"
    if f"*{file.suffix.lower()}" in PICKLES:
        raise TightfitError(f"{file} is not opened: {of_pickle(file)}")
    try:
        with open_regular(file, WEIGHTS_BYTES) as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size
            begin = stream.read(8)
            length = struct.unpack("<Q", begin)[0] if size >= 8 else size
            if length > size - 8:
                check_begin(file, begin)
                raise TightfitError(f"{file} is not a whole safetensors file ({size} bytes): {again}")
            text = stream.read(length) if length <= JSON_BYTES else b""
        if length > JSON_BYTES or text.count(b"{") > MOST_TENSORS + 2:
            raise TightfitError(
                f"{file} promises more than {MOST_TENSORS} tensors ({length} bytes of header), "
                f"as no SD model has: {again}"
            )
        header = json.loads(text, object_pairs_hook=each_once)
        words = header.get("__metadata__")
        tensors = {
            name: replace(_tensor(entry, file, 8 + length), written_ns=status.st_mtime_ns)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.stored_bytes)):
            if tensor.offset != end:
                raise ValueError("tensors with a hole between them, or that overlap")
            end += tensor.stored_bytes
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TightfitError(f"{file} has a broken safetensors header ({reason(error)}): {again}") from None
    if end != size:
        raise TightfitError(f"{file} is truncated or overwritten: it has {size} bytes of {end}; {again}")
    said = words if isinstance(words, dict) else {}
    return tensors, {key: value for key, value in said.items() if isinstance(value, str)}


# How files begin that are given for safetensors ones, and what they are.
_BEGINS = (
    (
        b"<",
        "a web page, as a failed download leaves it: download it again, signed in where the site asks for it",
    ),
    (b"version ", "a pointer of Git LFS, not the file that it stands for: fetch it with 'git lfs pull'"),
    *(
        (start, "a pickle under another name, which is never opened: call it .ckpt, and convert it")
        for start in (b"PK\x03\x04", b"\x80")
    ),
    (b"GGUF", "a GGUF file under another name: name it so"),
)


def check_begin(file: Path, begin: bytes) -> None:
    for start, what in _BEGINS:
        if begin.lstrip().startswith(start):
            raise TightfitError(f"{file} is {what}")


def _tensor(entry: Mapping[str, Any], file: Path, data: int) -> Tensor:
    """One entry of a header whose tensors' bytes begin at `data`; ValueError if its numbers contradict each
    other."""
    if not isinstance(entry["data_offsets"], list) or len(entry["data_offsets"]) != 2:
        raise ValueError("a tensor whose place is not told")
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > _SIDES or not isinstance(dtype, str):
        raise ValueError(f"a tensor of no shape, of more than {_SIDES} sides, or of no type")
    if (
        any(type(number) is not int or not 0 <= number < 2**63 for number in (begin, end, *shape))
        or end < begin
    ):
        raise ValueError("a size that is no whole number from 0 up")
    tensor = Tensor(dtype, tuple(shape), file, data + begin, end - begin)
    if dtype in VALUE_BYTES and tensor.count * VALUE_BYTES[dtype] != tensor.stored_bytes:
        raise ValueError("a tensor of another size than its shape")
    return tensor
