"""What an ONNX file promises: its graph, and where each weight's bytes are. Never a weight.

Format: onnx.proto3 of the ONNX repository, in protobuf's wire format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import TightfitError
from .files import Tensor

if TYPE_CHECKING:
    import onnx

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto
_BYTES = 2  # the wire type of what has a length
_SMALL = 1024  # bytes of an initializer that stays in the graph: shapes and the like
# TensorProto.DataType, as safetensors spells it, and bits of each value
_TYPES = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 6: ("I32", 32), 7: ("I64", 64), 9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64),
    16: ("BF16", 16), 21: ("U4", 4), 22: ("I4", 4),
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """An ONNX model whose large initializers are references to bytes in files, also where the file has them inside.

    `inputs` has the type and shape of each input as (TensorProto.DataType, sides), a side that varies as its name or "". A value
    whose shape is left open has no sides.
    """

    file: Path
    model: onnx.ModelProto
    tensors: Mapping[str, Tensor]

    @cached_property
    def inputs(self) -> dict[str, tuple[int, tuple[int | str, ...]]]:
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return {value.name: _type(value) for value in self.model.graph.input if value.name not in weights}

    @cached_property
    def outputs(self) -> dict[str, tuple[int, tuple[int | str, ...]]]:
        return {value.name: _type(value) for value in self.model.graph.output}

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @property
    def compute(self) -> str:
        """What it computes in: fp16 if its answers are, else fp32."""
        return "fp16" if any(value.type.tensor_type.elem_type == 10 for value in self.model.graph.output) else "fp32"

    @cached_property
    def precision(self) -> str:
        """What most of its weights are held in: int4, int8, or what it computes in."""
        pairs = {node.input[1] for node in self.model.graph.node if node.op_type == "MatMulNBits" and _bits(node) == 4}
        counts = {self.compute: 0, "int8": 0, "int4": 0}
        for name, tensor in self.tensors.items():
            kind = {"U4": "int4", "I4": "int4", "U8": "int8", "I8": "int8"}.get(tensor.dtype, self.compute)
            counts["int4" if name in pairs else kind] += tensor.count * (2 if name in pairs else 1)
        return max(counts, key=lambda kind: counts[kind])

    @property
    def opset(self) -> int:
        return max((each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")), default=0)


def _bits(node: Any) -> int:
    return next((each.i for each in node.attribute if each.name == "bits"), 4)


def _type(value: Any) -> tuple[int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    fixed = ((side, side.HasField("dim_value") and side.dim_value >= 0) for side in tensor.shape.dim)  # some write -1
    sides = (side.dim_value if known else side.dim_param for side, known in fixed)
    return tensor.elem_type, tuple(sides)


def read_graph(file: Path) -> Graph:
    """Raises TightfitError for a file that is broken, or whose weights are not where it says."""
    again = "copy or download it again"
    try:
        import onnx
    except ImportError:
        raise TightfitError(f"{file} needs onnx and onnxruntime: pip install 'tightfit[cpu]', or [gpu]") from None
    try:
        with file.open("rb") as stream:
            kept, inside = _without_weights(stream, file.stat().st_size)
        model = onnx.load_from_string(kept)
    except OSError as error:
        raise TightfitError(f"{file} cannot be read ({error.strerror}): {again}") from None
    except Exception as error:  # protobuf has classes of its own
        raise TightfitError(f"{file} is truncated, or no ONNX file ({type(error).__name__}): {again}") from None
    named = {each.name: each for each in model.graph.initializer}
    for name, (start, length) in inside.items():
        tensor = named[name]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        if node.attribute and node.attribute[0].t.data_location == onnx.TensorProto.EXTERNAL:  # as torch's older exporter has them
            model.graph.initializer.append(node.attribute[0].t)
            model.graph.initializer[-1].name = node.output[0]
            model.graph.node.remove(node)
    external = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    tensors = {each.name: _checked(file, each) for each in external}
    for each in external:
        if tensors[each.name].stored_bytes <= _SMALL:
            _bring(each, tensors.pop(each.name))
    for each in model.graph.initializer:
        numbers = each.float_data or each.int32_data or each.int64_data or each.double_data
        if each.name not in tensors and numbers and each.data_type in _TYPES:
            kind, bits = _TYPES[each.data_type]  # values that are no bytes stay in the graph, and count
            tensors[each.name] = Tensor(kind, tuple(each.dims), file, 0, math.ceil(len(numbers) * bits / 8))
    return Graph(file, model, tensors)


def _bring(tensor: Any, place: Tensor) -> None:
    """Read a small one into the graph: shapes are computed with it."""
    values = bytearray(place.stored_bytes)
    place.read_into(values)
    tensor.ClearField("external_data")
    tensor.data_location, tensor.raw_data = 0, bytes(values)


def _checked(file: Path, tensor: Any) -> Tensor:
    """Where an initializer's bytes are. A path that leaves the model's folder is refused, as it could name any file; but links of
    both files to one place, as in the hub's cache, are followed."""
    place = {each.key: each.value for each in tensor.external_data}
    location = place.get("location", "")
    windows = PureWindowsPath(location)
    if not location or windows.is_absolute() or windows.drive or PurePosixPath(location).is_absolute() or ".." in windows.parts:
        raise TightfitError(f"{file} has its weights in {location!r}, outside of its folder: they are not read, use another copy")
    if tensor.data_type not in _TYPES:
        raise TightfitError(f"{file} has {tensor.name} in a type (TensorProto {tensor.data_type}) that tightfit does not know")
    kind, bits = _TYPES[tensor.data_type]
    data = file.parent / location
    if not any(data.resolve().is_relative_to(folder) for folder in (file.parent.resolve(), file.resolve().parent)):
        raise TightfitError(f"{data} is a link to another place than {file.name} is in: it is not read, use another copy")
    count = math.ceil(math.prod(tensor.dims) * bits / 8)
    again = "copy or export the model again"
    try:
        offset, length = int(place.get("offset") or 0), int(place.get("length") or count)
        size = data.stat().st_size
    except ValueError:
        raise TightfitError(f"{file} has no place for {tensor.name}: {again}") from None
    except OSError:
        others = (each.name for each in data.parent.iterdir() if each.is_file() and each.suffix not in (".onnx", ".json"))
        renamed = next((f"rename {each}, which is there, or " for each in others), "")
        raise TightfitError(f"{data} is missing, which has the weights of {file.name}: {renamed}{again}") from None
    if length != count or offset < 0 or any(side < 0 for side in tensor.dims):
        raise TightfitError(f"{file} promises {tensor.name} as {length} bytes, its shape needs {count}: {again}")
    if offset + length > size:
        raise TightfitError(f"{data} is truncated: it has {size} bytes of at least {offset + length}; {again}")
    return Tensor(kind, tuple(tensor.dims), data, offset, length)


def _without_weights(stream: BinaryIO, size: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file without the bytes of its large initializers, and where these are, by name."""
    inside: dict[str, tuple[int, int]] = {}
    kept = []
    for number, wire, start, end in _fields(stream, 0, size):
        if (number, wire) == (_GRAPH, _BYTES):
            graph = b"".join(_graph(stream, start, end, inside))
            kept.append(_header(_GRAPH) + _varint(len(graph)) + graph)
        else:
            kept.append(_copy(stream, number, wire, start, end))
    return b"".join(kept), inside


def _graph(stream: BinaryIO, start: int, end: int, inside: dict[str, tuple[int, int]]) -> Iterator[bytes]:
    for number, wire, first, last in _fields(stream, start, end):
        if (number, wire) == (_INITIALIZER, _BYTES) and last - first > _SMALL:
            fields = list(_fields(stream, first, last))
            raw = [(a, b) for n, w, a, b in fields if (n, w) == (_RAW_DATA, _BYTES) and b - a > _SMALL]
            body = b"".join(_copy(stream, *each) for each in fields if (each[2], each[3]) not in raw)
            for a, b in raw:
                inside[_name(stream, fields)] = a, b - a
            yield _header(_INITIALIZER) + _varint(len(body)) + body
        else:
            yield _copy(stream, number, wire, first, last)


def _name(stream: BinaryIO, fields: list[tuple[int, int, int, int]]) -> str:
    start, end = next((a, b) for n, w, a, b in fields if (n, w) == (8, _BYTES))
    stream.seek(start)
    return stream.read(end - start).decode()


def _fields(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where the content begins and ends, of each field of a message."""
    while start < end:
        stream.seek(start)
        tag, start = _read_varint(stream, start)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, start = _read_varint(stream, start)
        elif wire == 0:
            length = _read_varint(stream, start)[1] - start
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("no such wire type")
        if start + length > end:
            raise ValueError("a field ends beyond its message")
        yield number, wire, start, start + length
        start += length


def _read_varint(stream: BinaryIO, place: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        byte = stream.read(1)
        if not byte:
            raise ValueError("the file ends early")
        value |= (byte[0] & 127) << (7 * i)
        if byte[0] < 128:
            return value, place + i + 1
    raise ValueError("a number that does not end")


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _header(number: int, wire: int = _BYTES) -> bytes:
    return _varint(number << 3 | wire)


def _copy(stream: BinaryIO, number: int, wire: int, start: int, end: int) -> bytes:
    stream.seek(start)
    return _header(number, wire) + (_varint(end - start) if wire == _BYTES else b"") + stream.read(end - start)
