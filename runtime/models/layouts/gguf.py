"""GGUF: a U-Net as ComfyUI-GGUF writes it, or a checkpoint as stable-diffusion.cpp does. No weight is read.

Format: ggml's docs/gguf.md. A block is some neighbouring values of a row, with what decodes them: ggml's own
package does, or a layer keeps their codes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import WEIGHTS_BYTES, open_regular, shortened
from ..tensors import Encoding, Tensor
from . import foreign
from .safetensors import MOST_TENSORS, VALUE_BYTES, check_begin
from .single_file import Checkpoint, checkpoint

_AGAIN = "copy or download it again"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)  # the first had counts of 32 bits, and no model of ours is in it
_HEADER_BYTES = 2**24  # limit; with a shape for each of SDXL's tensors it is 0.4 MB
_FIELDS = 2 * MOST_TENSORS  # of metadata: a shape for each tensor, and some words
_SIDES, _NAME_BYTES = 4, 2**10  # ggml's tensors have as many sides; its names have 64 bytes, others' 127
_MOST_ALIGNMENT = 2**16
_SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: its shape before it was made rows of 256
_ARCHITECTURES = ("sd1", "sd2", "sdxl", "pig", "cow")  # two of them are what converters write for any model
# Types of tensors by ggml's numbers: plain ones in safetensors' spelling, blocks with their values and bytes.
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_BLOCKS = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
# In kernels/formats.py: what has just the values of a type.
_FORMS = {"Q8_0": "int8-b32", "Q5_0": "int8-b32", "Q4_0": "int4-b32", "Q4_1": "int4-min-b32"}
# Types of metadata by GGUF's numbers, as struct spells them; 8 is text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
Words = Mapping[str, Any]
# Values that are decoded or repacked at a time, which takes up to 19 and 3 bytes for each: all together then
# take hardly more than what is made.
_AT_ONCE, _PACKING = 2**15, 3


class GGUFLayout:
    def claims(self, path: Path) -> bool:
        return path.suffix.lower() == ".gguf" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        tensors, metadata = read_file(path)
        foreign.check(path, tensors)
        architecture = metadata.get("general.architecture", _ARCHITECTURES[0])
        if architecture not in _ARCHITECTURES:
            raise TightfitError(f"{path} is a model of the kind {shortened(architecture)}: {foreign.OURS}")
        return checkpoint(path, tensors, metadata)


# ------------------------------------------------------------------------------------------ values of blocks


@dataclass(frozen=True)
class Blocks(Encoding):
    """Blocks of one of ggml's types."""

    kind: str
    values: int
    form: str = ""

    def decode(self, raw: Any, first: int, parts: Any) -> Any:  # noqa: ARG002
        import torch
        from gguf import GGMLQuantizationType, dequantize

        out, step, kind = torch.empty(len(raw), self.values), _AT_ONCE // self.values, GGMLQuantizationType
        for start in range(0, len(raw), step):
            some = raw[start : start + step].reshape(1, -1)  # of 16 rows or more, gguf would make parts
            decoded = dequantize(some.numpy(), kind[self.kind])
            out[start : start + step] = torch.from_numpy(decoded).view(-1, self.values)
        return out

    def packed(self, raw: Any, shape: Sequence[int], parts: Any) -> Mapping[str, Any]:  # noqa: ARG002
        import torch

        from ....kernels.formats import FORMATS

        out, row = shape[0], math.prod(shape[1:])
        blocks, step = raw.view(out, row // self.values, -1), max(1, _AT_ONCE // row)
        made = {
            name: torch.empty(sides, dtype=dtype)
            for name, (dtype, sides) in FORMATS[self.form].parts(shape).items()
        }
        for start in range(0, out, step):
            some = blocks[start : start + step]
            for name, part in _parts(self.kind, some.flatten(0, 1), len(some)).items():
                made[name][start : start + step] = part
        return made

    def packing_bytes(self, shape: Sequence[int]) -> int:
        return _PACKING * min(math.prod(shape), max(math.prod(shape[1:]), _AT_ONCE))


def _parts(kind: str, blocks: Any, rows: int) -> dict[str, Any]:
    """The parts of so many rows of a weight, from the bytes of their blocks (blocks, bytes)."""
    import torch

    from ....kernels.formats import pack

    def halves(begin: int) -> Any:
        """16 bytes' low four bits, then their high ones."""
        return torch.cat([blocks[:, begin:] & 15, blocks[:, begin:] >> 4], 1)

    def halved(begin: int) -> Any:
        """The fp16 number of each block there."""
        return blocks[:, begin : begin + 2].clone().view(torch.float16).view(rows, -1)

    scale = halved(0)
    if kind == "Q8_0":
        return {"scale": scale, "packed": blocks[:, 2:].view(torch.int8).reshape(rows, -1)}
    if kind == "Q5_0":
        bits = torch.arange(8, dtype=torch.uint8)
        high = (blocks[:, 2:6, None] >> bits & 1).flatten(1) << 4
        return {"scale": scale, "packed": (halves(6) | high).to(torch.int8).sub_(16).view(rows, -1)}
    if kind == "Q4_0":
        zero = torch.full(scale.shape, 8 * 16, dtype=torch.uint8)
        return {"scale": scale, "zero": zero, "packed": pack(halves(2).view(rows, -1))}
    return {"scale": scale, "least": halved(2), "packed": pack(halves(4).view(rows, -1))}


# ------------------------------------------------------------------------------------------ headers


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a GGUF file promises, checked against its length, and what is said of them."""
    with _explained(file):
        status, end, words, infos = _header(file)
        tensors = _placed(file, end, words, infos, status.st_mtime_ns)
    _check_places(file, tensors, status.st_size, end, _alignment(words))
    return tensors, {key: value for key, value in words.items() if isinstance(value, str)}


def said(file: Path, names: Collection[str]) -> dict[str, Any]:
    """What a GGUF file says by these names, lists of any length too."""
    with _explained(file):
        *_, words, _ = _header(file, names)
    return {name: words[name] for name in names if words.get(name) is not None}


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}; {_AGAIN}") from None
    except ValueError as error:
        said = error if type(error) is ValueError else "text that is no UTF-8"
        raise TightfitError(f"{file} has a broken GGUF header ({said}): {_AGAIN}") from None


def _header(file: Path, whole: Collection[str] = ()) -> tuple[os.stat_result, int, dict, dict]:
    """Size and time, where the header ends, what it says in all, and of each tensor."""
    with open_regular(file, WEIGHTS_BYTES) as stream:
        begin = stream.read(4)
        if begin != _MAGIC:
            check_begin(file, begin + stream.read(12))
            raise TightfitError(f"{file} is no GGUF file: {_AGAIN}")
        header = _Header(stream)
        words, infos = _contents(header, whole)
        return os.fstat(stream.fileno()), header.at, words, infos


class _Header:
    """Reads a header from its fourth byte on. ValueError where it ends too early, or is too long."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream, self.at = stream, 4

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > _HEADER_BYTES:
            raise ValueError(f"more than {_HEADER_BYTES} bytes of it")
        read = self._stream.read(count)
        if len(read) < count:
            raise ValueError("it ends in the middle")
        return read

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self, most_bytes: int = _HEADER_BYTES) -> str:
        count = self.number("Q")
        if count > most_bytes:
            raise ValueError(f"a name of {count} bytes")
        return self.take(count).decode()

    def name(self) -> str:
        name = self.text(_NAME_BYTES)
        if not name.isprintable():
            raise ValueError("a name that cannot be printed")
        return name

    def value(self, whole: bool = False) -> Any:
        """A number, a text, or a list of at most `_SIDES` numbers; None for longer lists and of other
        values, unless they are wanted `whole`."""
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.number(_scalar(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            texts = []
            for _ in range(count):  # of which each takes bytes
                text = self.take(self.number("Q"))
                texts += [text.decode()] if whole else []
            return texts if whole else None
        spelled = _scalar(kind)
        if whole:
            return struct.unpack(f"<{count}{spelled}", self.take(count * struct.calcsize(f"<{spelled}")))
        if count <= _SIDES:
            return tuple(self.number(spelled) for _ in range(count))
        self.take(count * struct.calcsize(f"<{spelled}"))
        return None


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the type {kind}")
    return _SCALARS[kind]


@dataclass(frozen=True)
class _Info:
    """What a header says of one tensor; its place is in the data, which follow it."""

    shape: tuple[int, ...]
    type: int
    place: int


def _contents(header: _Header, whole: Collection[str]) -> tuple[dict[str, Any], dict[str, _Info]]:
    """What is said in all, lists of these names `whole`, and of each tensor."""
    version = header.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, where 2 and 3 are read")
    tensor_count, field_count = header.number("Q"), header.number("Q")
    if tensor_count > MOST_TENSORS or field_count > _FIELDS:
        raise ValueError(f"{tensor_count} tensors and {field_count} words of it, as no SD model has")
    words, infos = {}, {}
    for _ in range(field_count):
        name = header.name()
        words[name] = header.value(name in whole)
    for _ in range(tensor_count):
        name = header.name()
        infos[name] = _info(header)
    if (len(words), len(infos)) != (field_count, tensor_count):
        raise ValueError("a name that comes twice")
    return words, infos


def _info(header: _Header) -> _Info:
    sides = header.number("I")
    if sides > _SIDES:
        raise ValueError(f"a tensor of {sides} sides")
    shape = tuple(header.number("Q") for _ in range(sides))
    return _Info(shape[::-1], header.number("I"), header.number("Q"))  # ggml has the last side first


def _alignment(words: Words) -> int:
    given = words.get("general.alignment", 32)
    if type(given) is not int or not 0 < given <= _MOST_ALIGNMENT or given & (given - 1):
        raise ValueError("an alignment that is no power of two")
    return given


def _placed(
    file: Path, end: int, words: Words, infos: Mapping[str, _Info], written_ns: int
) -> dict[str, Tensor]:
    """The tensors, where the header ends at `end`."""
    data = _up(end, _alignment(words))
    tensors = {}
    for name, info in infos.items():
        dtype, values, block_bytes = _stored_as(file, name, info.type)
        count = math.prod(info.shape)
        last = info.shape[-1] if info.shape else 1
        if max((*info.shape, count, info.place)) >= 2**63:
            raise ValueError("a size of more than 63 bits")
        if last % values:
            raise ValueError(f"rows of {last} values in blocks of {values}")
        shape = words.get(_SHAPE + name, info.shape)
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an original shape that is no list of sides")
        if math.prod(shape) != count:
            raise ValueError("an original shape of another size")
        blocks = Blocks(dtype, values, _form(dtype, shape)) if values > 1 else None
        size = count // values * block_bytes
        place = data + info.place
        tensors[name] = Tensor(dtype, shape, file, place, size, written_ns=written_ns, encoding=blocks)
    return tensors


def _stored_as(file: Path, name: str, number: int) -> tuple[str, int, int]:
    """A type's name, and values and bytes of its blocks."""
    if number in _PLAIN:
        return _PLAIN[number], 1, VALUE_BYTES[_PLAIN[number]]
    if number not in _BLOCKS:
        raise TightfitError(
            f"{file} has {shortened(name)} in {_called(number)}, which is not read: "
            "take a file in Q8_0, Q4_0, Q4_K or F16"
        )
    return _BLOCKS[number]


def _called(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"the type {number}"


def _form(kind: str, shape: tuple[int, ...]) -> str:
    """The format that keeps a tensor's codes: each of its rows has to be whole blocks."""
    whole = len(shape) in (2, 4) and math.prod(shape[1:]) % 32 == 0
    return _FORMS.get(kind, "") if whole else ""


def _check_places(file: Path, tensors: Mapping[str, Tensor], size: int, end: int, alignment: int) -> None:
    """Tensors follow one another, each from the next multiple of the alignment on."""
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.stored_bytes))
    ends = [end, *(tensor.offset + tensor.stored_bytes for tensor in ordered)]
    for tensor, before in zip(ordered, ends, strict=False):
        if tensor.offset != _up(before, alignment):
            raise TightfitError(f"{file} has tensors with a hole between them, or that overlap: {_AGAIN}")
    if not ends[-1] <= size <= _up(ends[-1], alignment):
        raise TightfitError(
            f"{file} is truncated or overwritten: it has {size} bytes of {ends[-1]}; {_AGAIN}"
        )


def _up(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
