"""One call of an ONNX graph without a tensor: shapes resolved for given inputs, every value that comes and goes, every operator.

Shapes come from onnx's own inference, a node at a time, with the small whole numbers that they depend on computed beside it.
Buffers come and go as in ONNX Runtime's sequential executor without its reuse (see onnx.py): an answer is allocated when its
operator runs, and freed after its last use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from ..errors import TightfitError
from ..memory import END, Operation, Trace

Shape = tuple[int, ...]
_MOST = 4096  # values of a constant that is computed with
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
_SAME = {"GroupNormalization", "MultiHeadAttention"}  # answer in their first input's shape; onnx 1.23 does not infer it


class Shapes:
    """Types, shapes and small values of everything in a graph, for inputs of given shapes."""

    def __init__(self, model: Any, inputs: Mapping[str, Shape], wide: bool = False) -> None:
        """`wide`: fp16 is computed in fp32, as where there are no kernels for it."""
        self.graph, self.wide = model.graph, wide
        self.kinds: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.values: dict[str, np.ndarray] = {}
        opsets = {each.domain: each.version for each in model.opset_import}
        self.opsets = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
        self._versions, self._ir = opsets, model.ir_version
        for tensor in self.graph.initializer:
            self._know(tensor.name, tensor.data_type, tuple(tensor.dims))
            if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MOST:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
        for value in self.graph.input:
            if value.name not in self.shapes:
                self._know(value.name, value.type.tensor_type.elem_type, inputs[value.name])
        for node in self.graph.node:
            self._infer(node)

    def bytes(self, name: str) -> int:
        kind = self.kinds[name]
        bits = 4 if kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4) else 8 * _itemsize(kind)
        if self.wide and kind == onnx.TensorProto.FLOAT16:
            bits = 32
        return math.ceil(math.prod(self.shapes[name]) * bits / 8)

    def count(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def _know(self, name: str, kind: int, shape: Shape) -> None:
        self.kinds[name], self.shapes[name] = kind, shape

    def _infer(self, node: Any) -> None:
        ins = [name for name in node.input if name]
        if node.op_type in _SAME:
            self._know(node.output[0], self.kinds[ins[0]], self.shapes[ins[0]])
            return
        if node.op_type == "Constant":
            value = _constant(node.attribute[0])
            self._know(node.output[0], helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            self.values[node.output[0]] = value
            return
        if node.op_type == "Shape":
            self._shape(node)
            return
        if all(name in self.values for name in ins) and self._compute(node, ins):
            return
        schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
        types = {name: helper.make_tensor_type_proto(self.kinds[name], self.shapes[name]) for name in ins}
        data = {name: numpy_helper.from_array(self.values[name]) for name in ins if name in self.values}
        found = shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=self.opsets, ir_version=self._ir)
        for name, kind in found.items():
            sides = kind.tensor_type.shape.dim
            if not kind.tensor_type.HasField("shape") or not all(side.HasField("dim_value") for side in sides):
                raise TightfitError(f"the shape of {name}, made by {node.op_type}, cannot be told before it runs")
            self._know(name, kind.tensor_type.elem_type, tuple(side.dim_value for side in sides))

    def _shape(self, node: Any) -> None:
        value = np.array(self.shapes[node.input[0]], np.int64)[attribute(node, "start", 0) : attribute(node, "end")]
        self._know(node.output[0], onnx.TensorProto.INT64, value.shape)
        self.values[node.output[0]] = value

    def _compute(self, node: Any, ins: Sequence[str]) -> bool:
        """Of small values; False if they are none."""
        if sum(self.values[name].size for name in ins) > _MOST:
            return False
        if compute := _VALUES.get(node.op_type):
            out = compute(node, *(self.values.get(name) if name else None for name in node.input))
        else:
            from onnx.reference import ReferenceEvaluator

            feeds = {name: self.values[name] for name in ins}
            (out, *_) = ReferenceEvaluator(node).run(None, feeds)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        self.values[node.output[0]] = out = np.asarray(out)
        self._know(node.output[0], helper.np_dtype_to_tensor_dtype(out.dtype), out.shape)
        return True


def _constant(given: Any) -> np.ndarray:
    if given.name == "value":
        return numpy_helper.to_array(given.t)
    return np.array(helper.get_attribute_value(given), {"value_int": np.int64, "value_ints": np.int64}.get(given.name, np.float32))


def _itemsize(kind: int) -> int:
    return helper.tensor_dtype_to_np_dtype(kind).itemsize


def attribute(node: Any, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _gather(node: Any, x: np.ndarray, i: np.ndarray) -> np.ndarray:
    return np.take(x, i, attribute(node, "axis", 0))


def _axes(node: Any, axes: np.ndarray | None) -> tuple[int, ...]:
    found = attribute(node, "axes", ()) if axes is None else axes.tolist()
    return tuple(found)


# Of those that shapes are computed with; what is missing is asked of onnx.reference, whose import takes half a second.
_VALUES: dict[str, Callable[..., Any]] = {
    "Gather": _gather,
    "Concat": lambda node, *xs: np.concatenate(xs, attribute(node, "axis", 0)),
    "Cast": lambda node, x: x.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to"))),
    "Unsqueeze": lambda node, x, axes=None: np.expand_dims(x, _axes(node, axes)),
    "Squeeze": lambda node, x, axes=None: np.squeeze(x, _axes(node, axes) or None),
    "Reshape": lambda _, x, shape: x.reshape([int(n) for n in shape]),
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a // b if a.dtype.kind == "i" else a / b,
    "Identity": lambda _, x: x,
}


OUT = -1  # the slot of an operator's answers
Steps = Sequence[tuple[int, int]]


def together(*counts: int) -> Steps:
    """Buffers that an operator has of its own while its answers are there."""
    return [(OUT, 0), *enumerate(counts), *((i, END) for i in range(len(counts)))]


def trace(
    model: Any,
    inputs: Mapping[str, Shape],
    own: Callable[[Any, Shapes], Steps] = lambda _, __: together(),
    wide: bool = False,
) -> Trace:
    """One call. `own` says which buffers an operator makes (slot, bytes) and gives back (slot, END), and when its answers are made
    (OUT, 0); `wide` as in Shapes."""
    shapes = Shapes(model, inputs, wide)
    weights = {tensor.name for tensor in model.graph.initializer}
    live = _Live(shapes, {value.name for value in model.graph.output})
    operations = []
    last = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    for i, node in enumerate(model.graph.node):
        if all(name in shapes.values for name in node.output):
            continue  # whole numbers that shapes are made of
        ends = {name for name in node.input if name and last[name] == i and name not in weights}
        live.run(node, ends, own(node, shapes))
        operations.append(_operation(node, shapes))
    return Trace(tuple(live.events), (), tuple(each for each in operations if each))


class _Live:
    def __init__(self, shapes: Shapes, kept: set[str]) -> None:
        self.shapes, self.events = shapes, list[tuple[int, int]]()
        self._storage: dict[str, int] = {}  # of each value
        self._users: dict[int, int] = {}  # values of a storage that are alive
        self._kept, self._made = kept, 0
        self._used = {name for node in shapes.graph.node for name in node.input}

    def run(self, node: Any, ends: set[str], own: Steps) -> None:
        outs = [name for name in node.output if name]
        slots: dict[int, int] = {}
        for slot, count in own:
            if slot == OUT and node.op_type in _VIEWS and node.input[0] in self._storage:
                self._share(outs[0], node.input[0])
            elif slot == OUT:
                for name in outs:
                    self._storage[name] = self._make(self.shapes.bytes(name))
                    self._users[self._storage[name]] = 1
            elif count == END:
                self.events.append((slots.pop(slot), END))
            else:
                slots[slot] = self._make(count)
        for name in {*ends, *(name for name in outs if name not in self._used)} - self._kept:
            if name in self._storage:
                self._leave(name)

    def _make(self, count: int) -> int:
        self._made += 1
        self.events.append((self._made, count))
        return self._made

    def _share(self, name: str, other: str) -> None:
        storage = self._storage[other]
        self._storage[name] = storage
        self._users[storage] += 1

    def _leave(self, name: str) -> None:
        storage = self._storage[name]
        self._users[storage] -= 1
        if not self._users[storage]:
            self.events.append((storage, END))


def _operation(node: Any, shapes: Shapes) -> Operation | None:
    if node.op_type in _VIEWS:
        return None
    moved = sum(shapes.bytes(name) for name in (*node.input, *node.output) if name)
    return Operation(_flops(node, shapes), moved)


def _flops(node: Any, shapes: Shapes) -> float:
    out = shapes.count(node.output[0])
    if node.op_type == "Conv":
        return 2.0 * out * math.prod(shapes.shapes[node.input[1]][1:])
    if node.op_type in ("MatMul", "Gemm"):
        return 2.0 * out * shapes.shapes[node.input[0]][0 if attribute(node, "transA") else -1]
    if node.op_type in ("Attention", "MultiHeadAttention"):
        return 4.0 * out * shapes.shapes[node.input[1]][-2]
    return 0.0
