"""An ONNX file's structure: its graph, and where each weight's bytes are. Never a weight.

Format: onnx.proto3 of the ONNX repository, in protobuf's wire format.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import TightfitError
from ..files import WEIGHTS_BYTES, open_regular, plain_name
from .tensors import Tensor

if TYPE_CHECKING:
    import onnx

# Fields of ModelProto, GraphProto, NodeProto, AttributeProto and TensorProto.
_GRAPH, _FUNCTION, _OF_MODEL = 7, 25, {1, 8}  # ir_version, opset_import
_NODE, _INITIALIZER, _OF_GRAPH = 1, 5, {2, 11, 12}  # name, input, output
_ATTRIBUTE, _OF_NODE = 5, {1, 2, 3, 4, 5, 7, 8}  # all but documentation and metadata
_TENSOR, _SUBGRAPH, _SUBGRAPHS = 5, 6, 11
_TENSOR_NAME, _RAW_DATA, _VALUES = 8, 9, {4, 9, 10}  # float_data, raw_data, double_data
_BYTES = 2  # the wire type of length-delimited fields
# Limits checked before parsing. The largest graph of these families, SDXL's U-Net by Optimum, has 7.3 MB
# beside its weights, about 12,000 operators, and 100,000 fields down to its operators'.
MOST_NODES, MOST_FIELDS, MOST_STRUCTURE, _VALUE_BYTES = 50_000, 300_000, 16 * 2**20, 4096
MOST_SIDES = 16
_TENSOR_FIELDS = 1000  # without packing, each side is a field
_LONGEST = 80  # letters of a name in a message
_AGAIN = "copy or download it again"
_SMALL = 1024  # bytes up to which an initializer stays in the graph, such as a shape
# TensorProto.DataType → safetensors' name, and bits per value
_TYPES = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 6: ("I32", 32), 7: ("I64", 64), 9: ("BOOL", 8),
    10: ("F16", 16), 11: ("F64", 64), 16: ("BF16", 16), 21: ("U4", 4), 22: ("I4", 4),
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """An ONNX model whose large initializers are references to bytes in files, even if they are stored inside
    the .onnx file.

    `inputs` maps each input to (TensorProto.DataType, sides); a side that varies is its name or "". A value
    without a shape has no sides.
    """

    file: Path
    model: onnx.ModelProto
    tensors: Mapping[str, Tensor]

    @cached_property
    def known(self) -> dict[Any, Any]:
        """Results computed from the graph by anyone, kept as long as the graph is."""
        return {}

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
        """Arithmetic precision: fp16 if an output is, else fp32."""
        return (
            "fp16"
            if any(value.type.tensor_type.elem_type == 10 for value in self.model.graph.output)
            else "fp32"
        )

    @cached_property
    def precision(self) -> str:
        """Precision of most of its weights: int4, int8, or the arithmetic's."""
        quantised = [
            node for node in self.model.graph.node if node.op_type == "MatMulNBits" and len(node.input) > 1
        ]
        pairs = {node.input[1] for node in quantised if _bits(node) == 4}
        counts = {self.compute: 0, "int8": 0, "int4": 0}
        for name, tensor in self.tensors.items():
            kind = {"U4": "int4", "I4": "int4", "U8": "int8", "I8": "int8"}.get(tensor.dtype, self.compute)
            counts["int4" if name in pairs else kind] += tensor.count * (2 if name in pairs else 1)
        return max(counts, key=lambda kind: counts[kind])

    @property
    def opset(self) -> int:
        return max(
            (opset.version for opset in self.model.opset_import if opset.domain in ("", "ai.onnx")), default=0
        )


def _bits(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)


def _type(value: Any) -> tuple[int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    # Some exporters write -1 for a side that varies.
    fixed = ((side, side.HasField("dim_value") and side.dim_value >= 0) for side in tensor.shape.dim)
    sides = (side.dim_value if known else side.dim_param for side, known in fixed)
    return tensor.elem_type, tuple(sides)


def read_graph(file: Path) -> Graph:
    """Raises TightfitError for a file that is broken or too large, or whose weights are not where it says."""
    try:
        import onnx
    except ImportError:
        raise TightfitError(
            f"{file} needs onnx and onnxruntime: pip install 'tightfit[cpu]', or [gpu]"
        ) from None
    try:
        with open_regular(file, WEIGHTS_BYTES) as stream:
            walk = _Walk(stream, os.fstat(stream.fileno()).st_size)
            model = onnx.load_from_string(walk.kept())
        problem = _problem(model.graph)
    except _TooMuchError as error:
        raise TightfitError(
            f"{file} has {error}: no graph of Stable Diffusion has; use another copy"
        ) from None
    except TightfitError:
        raise
    except OSError as error:
        raise TightfitError(f"{file} cannot be read ({error.strerror}): {_AGAIN}") from None
    except Exception as error:  # protobuf has its own classes
        raise TightfitError(
            f"{file} is truncated, or no ONNX file ({type(error).__name__}): {_AGAIN}"
        ) from None
    if problem:
        raise TightfitError(f"{file} has {problem}: {_AGAIN}")
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, (start, length) in walk.inside.items():
        tensor = named[name]
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return Graph(file, model, _tensors(file, model.graph))


def _tensors(file: Path, graph: Any) -> dict[str, Tensor]:
    """Where the weights' bytes are. Small weights are read into the graph."""
    external = 1  # TensorProto.EXTERNAL
    sizes: dict[str, int] = {}
    stored = [tensor for tensor in graph.initializer if tensor.data_location == external]
    tensors = {tensor.name: _checked(file, tensor, sizes) for tensor in stored}
    for tensor in stored:
        if tensors[tensor.name].stored_bytes <= _SMALL:
            _bring(tensor, tensors.pop(tensor.name))
    for tensor in graph.initializer:
        numbers = tensor.float_data or tensor.int32_data or tensor.int64_data or tensor.double_data
        if tensor.name not in tensors and numbers and tensor.data_type in _TYPES:
            kind, bits = _TYPES[tensor.data_type]  # typed values stay in the graph, and count
            tensors[tensor.name] = Tensor(
                kind, tuple(tensor.dims), file, 0, math.ceil(len(numbers) * bits / 8)
            )
    return tensors


def _problem(graph: Any) -> str | None:
    """Why the graph cannot be followed, or None. Constants stored in files become initializers: torch's older
    exporter writes weights as constants."""
    nodes = []
    for node in graph.node:
        if (
            node.op_type == "Constant"
            and node.attribute
            and node.attribute[0].t.data_location == 1
            and len(node.output) == 1
        ):
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            nodes.append(node)
    if len(nodes) < len(graph.node):
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    made = [tensor.name for tensor in graph.initializer]
    given = [value.name for value in graph.input if value.name not in set(made)]
    made += [*given, *(name for node in graph.node for name in node.output if name)]
    if len(set(made)) < len(made):
        twice = next(name for name, count in Counter(made).items() if count > 1)
        return f"{twice[:_LONGEST]!r} twice"
    words = (word for node in graph.node for word in (node.op_type, node.domain))
    odd = (
        word
        for word in (*made, *words, *(value.name for value in graph.output))
        if not word.isprintable() or len(word) > 1000
    )
    if (word := next(odd, None)) is not None:
        return f"a name that is none, {word[:_LONGEST]!r}"
    for tensor in graph.initializer:
        if len(tensor.dims) > MOST_SIDES or any(side < 0 for side in tensor.dims):
            return f"{tensor.name} in a shape that cannot be, of {len(tensor.dims)} sides"
    return None


def _bring(tensor: Any, place: Tensor) -> None:
    """Read a small initializer into the graph, because shapes are computed from it."""
    values = bytearray(place.stored_bytes)
    place.read_into(values)
    tensor.ClearField("external_data")
    tensor.data_location, tensor.raw_data = 0, bytes(values)


def _checked(file: Path, tensor: Any, sizes: dict[str, int]) -> Tensor:
    """Where an initializer's bytes are. `sizes` caches the sizes of weight files."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    if tensor.data_type not in _TYPES:
        raise TightfitError(
            f"{file} has {tensor.name} in a type (TensorProto {tensor.data_type}) that tightfit does not know"
        )
    if location not in sizes:
        sizes[location] = _size(file, location)
    kind, bits = _TYPES[tensor.data_type]
    data, count = file.parent / location, math.ceil(math.prod(tensor.dims) * bits / 8)
    again = "copy or export the model again"
    try:
        offset, length = int(place.get("offset") or 0), int(place.get("length") or count)
    except ValueError:
        raise TightfitError(f"{file} has no place for {tensor.name}: {again}") from None
    if length != count or offset < 0:
        raise TightfitError(
            f"{file} gives {tensor.name} {length} bytes, but its shape needs {count}: {again}"
        )
    if offset + length > sizes[location]:
        raise TightfitError(
            f"{data} is truncated: it has {sizes[location]} bytes of at least {offset + length}; {again}"
        )
    return Tensor(kind, tuple(tensor.dims), data, offset, length)


def _size(file: Path, location: str) -> int:
    """Bytes of a weight file. A path that leaves the model's folder could name any file, so it is refused.
    Links of both files into one folder, as in the hub's cache, are followed."""
    windows = PureWindowsPath(location)
    outside = (
        windows.is_absolute()
        or windows.drive
        or PurePosixPath(location).is_absolute()
        or ".." in windows.parts
    )
    if not location or not location.isprintable() or outside:  # NUL is not printable
        raise TightfitError(
            f"{file} has its weights in {location[:_LONGEST]!r}, outside of its folder: use another copy"
        )
    data = file.parent / location
    try:
        inside = any(
            data.resolve().is_relative_to(folder) for folder in (file.parent.resolve(), file.resolve().parent)
        )
        status = data.stat() if inside else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle, before Python 3.13
        folder = data.parent
        plain = all(map(plain_name, PurePosixPath(location).parts))
        siblings = sorted(folder.iterdir()) if plain and folder.is_dir() else ()
        names = (path.name for path in siblings if path.is_file() and path.suffix not in (".onnx", ".json"))
        renamed = next((f"rename {name}, which is there, or " for name in names), "")
        raise TightfitError(
            f"{data} is missing, with the weights of {file.name}: {renamed}copy or export the model again"
        ) from None
    if status is None:
        raise TightfitError(f"{data} is a link to another place than {file.name}: use another copy")
    if not S_ISREG(status.st_mode):
        raise TightfitError(
            f"{data} is no file, but should hold the weights of {file.name}: copy or export the model again"
        )
    return status.st_size


class _TooMuchError(Exception):
    """More of something than any graph that can run has."""


class _Walk:
    """One pass over a file's fields before protobuf reads it: protobuf can turn two hostile bytes into 150.

    Keeps only what running the graph needs: no inferred shapes, documentation or training information.
    `inside` maps large initializers, which are not kept, to the position of their bytes.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.inside: dict[str, tuple[int, int]] = {}
        self._stream, self._size = stream, size
        self._nodes = self._initializers = self._count = self._structure = 0

    def kept(self) -> bytes:
        parts = []
        for number, wire, start, end in self._fields(0, self._size):
            if (number, wire) == (_FUNCTION, _BYTES):
                raise _TooMuchError("functions of its own")
            if (number, wire) == (_GRAPH, _BYTES):
                graph = b"".join(self._graph(start, end))
                parts.append(_header(_GRAPH) + _varint(len(graph)) + graph)
            elif number in _OF_MODEL:
                parts.append(self._copy(number, wire, start, end))
        return b"".join(parts)

    def _graph(self, start: int, end: int) -> Iterator[bytes]:
        for number, wire, first, last in self._fields(start, end):
            if (number, wire) == (_NODE, _BYTES):
                self._nodes += 1
                yield self._message(number, self._node(first, last))
            elif (number, wire) == (_INITIALIZER, _BYTES):
                self._initializers += 1
                yield self._message(number, self._initializer(first, last))
            elif number in _OF_GRAPH:
                if last - first > _VALUE_BYTES:
                    raise _TooMuchError(f"an input or output described in {last - first} bytes")
                yield self._copy(number, wire, first, last)
            if max(self._nodes, self._initializers) > MOST_NODES:
                raise _TooMuchError(f"more than {MOST_NODES} operators or weights")

    @staticmethod
    def _message(number: int, body: bytes) -> bytes:
        return _header(number) + _varint(len(body)) + body

    def _node(self, start: int, end: int) -> bytes:
        parts = []
        for number, wire, first, last in self._fields(start, end):
            if number == _ATTRIBUTE and last - first > _SMALL:
                parts.append(self._message(number, self._attribute(first, last)))
            elif number in _OF_NODE:
                parts.append(self._copy(number, wire, first, last))
        return b"".join(parts)

    def _attribute(self, start: int, end: int) -> bytes:
        """A long attribute: a constant, or a subgraph, which is not followed."""
        parts = []
        for number, wire, first, last in self._fields(start, end):
            if number == _TENSOR:
                parts.append(self._message(number, self._tensor(self._few(first, last))))
            elif number not in (_SUBGRAPH, _SUBGRAPHS):
                parts.append(self._copy(number, wire, first, last))
        return b"".join(parts)

    def _initializer(self, start: int, end: int) -> bytes:
        if end - start <= _SMALL:
            return self._read(start, end)
        fields = self._few(start, end)
        raw = [(first, last) for number, wire, first, last in fields if (number, wire) == (_RAW_DATA, _BYTES)]
        if raw and raw[-1][1] - raw[-1][0] > _SMALL:  # the last one wins, as in protobuf
            first, last = raw[-1]
            name = self._read(
                *next(field[2:] for field in reversed(fields) if field[:2] == (_TENSOR_NAME, _BYTES))
            ).decode()
            if name in self.inside:
                raise _TooMuchError(f"{name[:_LONGEST]!r} twice")
            self.inside[name] = first, last - first
            fields = [field for field in fields if field[0] != _RAW_DATA]
        return self._tensor(fields)

    def _tensor(self, fields: list[tuple[int, int, int, int]]) -> bytes:
        """A tensor whose values are kept. Bytes, floats and doubles take no more memory than in the file, so
        they do not count as structure."""
        parts = []
        for number, wire, start, end in fields:
            if number in _VALUES and wire == _BYTES:
                self._structure -= end - start
            parts.append(self._copy(number, wire, start, end))
        return b"".join(parts)

    def _few(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        fields = list(islice(self._fields(start, end), _TENSOR_FIELDS + 1))
        if len(fields) > _TENSOR_FIELDS:
            raise _TooMuchError(f"a tensor of more than {_TENSOR_FIELDS} parts")
        return fields

    def _copy(self, number: int, wire: int, start: int, end: int) -> bytes:
        body = self._read(start, end)
        return _header(number, wire) + (_varint(len(body)) if wire == _BYTES else b"") + body

    def _read(self, start: int, end: int) -> bytes:
        self._structure += end - start
        if self._structure > MOST_STRUCTURE:
            raise _TooMuchError(f"more than {MOST_STRUCTURE >> 20} MiB that are no weights")
        self._stream.seek(start)
        return self._stream.read(end - start)

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, start and end of each field's content in a message."""
        stream = self._stream
        while start < end:
            self._count += 1
            if self._count > MOST_FIELDS:
                raise _TooMuchError(f"more than {MOST_FIELDS} parts")
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
