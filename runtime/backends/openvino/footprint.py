"""Predicted bytes and operations of a graph that OpenVINO has compiled for one shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx

from ...costs.footprint import END, Footprint, Trace, peak
from ...models.graph import Graph
from ..onnx import dryrun
from ..onnx.call import Inputs, once
from ..onnx.footprint import readers_of

_REAL = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# OpenVINO itself, once in a process: its libraries' pages, and what it allocates.
_LIBRARY = 50 * 2**20
# Peak while compiling, beyond what is held afterwards: of the files, what was read between two looks.
_PAGES = 20 * 2**20
# Operators that OpenVINO runs inside the one before them, in its buffer.
_FUSED = frozenset({"Sigmoid", "Mul", "Add", "Sub", "Div", "Gelu", "Cast", "Clip", "Erf", "Tanh"})
PER_NODE_BYTES = 40_000  # of a compiled graph, by the operators of the file: 901 in SD 1.5's U-Net


class _Shapes(dryrun.Shapes):
    """With real numbers in what is computed in."""

    def __init__(self, graph: Graph, inputs: Mapping[str, dryrun.Shape], compute: str) -> None:
        super().__init__(graph.model, inputs)
        self._real_bytes = _BYTES[compute]

    def bytes(self, name: str) -> int:
        return self.count(name) * self._real_bytes if self.kinds[name] in _REAL else super().bytes(name)


def call_footprint(graph: Graph, compute: str, shapes: Inputs) -> Footprint:
    """Footprint of the graph, compiled for inputs of these shapes, by name, and called. Raises what onnx does
    for a graph that cannot be followed: `call_problem` of the ONNX engine says that before."""
    return once(graph, ("openvino", compute, shapes), lambda: _followed(graph, compute, dict(shapes)))


def _followed(graph: Graph, compute: str, inputs: Mapping[str, dryrun.Shape]) -> Footprint:
    sizes, readers = _Shapes(graph, inputs, compute), readers_of(graph)
    call = dryrun.trace_of(sizes, lambda node, shapes: _scratch(readers, node, shapes), _FUSED)
    call_bytes = peak("cpu", (), Footprint((), 0, call, ()))
    held = (*weight_bytes(graph, compute), PER_NODE_BYTES * len(graph.model.graph.node))
    trace = Trace(((1, call_bytes), (2, _LIBRARY)), (), call.operations)
    return Footprint(held, _LIBRARY + _PAGES, trace, (), kept=call_bytes)


def _scratch(readers: Mapping[str, list[Any]], node: Any, shapes: dryrun.Shapes) -> dryrun.Steps:
    """Convolutions take their input with channels last, norms with channels first: a copy in between, beside
    what else reads the input."""
    (first, *_), copy = [name for name in node.input if name], 0
    if node.op_type == "GroupNormalization":
        return dryrun.together(*[shapes.bytes(first)] * (len(readers[first]) > 1))
    if node.op_type == "Conv":
        return [(copy, shapes.bytes(first)), (copy, END), (dryrun.OUT, 0)]
    return dryrun.together()


def weight_bytes(graph: Graph, compute: str) -> Iterator[int]:
    """Bytes of each weight as it is packed. A matrix is there twice where its values are not fp32: as it was
    converted, and as it is packed. Rows of a table are read from the file."""
    readers, size = readers_of(graph), _BYTES[compute]
    for name, tensor in graph.tensors.items():
        kinds = {node.op_type for node in readers.get(name, ())}
        if kinds == {"Gather"}:
            continue
        copies = 2 if kinds & {"MatMul", "Gemm"} and compute != "fp32" else 1
        yield tensor.count * size * copies
