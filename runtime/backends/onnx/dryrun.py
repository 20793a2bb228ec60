"""A dry run of an ONNX graph: the shapes, lifetimes and operators of one call, without any tensor.

Shapes come from onnx's inference, node by node. The small integers that shapes depend on are computed
alongside, by the few operators in VALUES. Nothing else is executed, because a graph may be hostile. Buffers
live as in ONNX Runtime's sequential executor with its reuse switched off (see backend.py): an output is
allocated when its operator runs, and freed after its last use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from ...costs.footprint import END, Operation, Trace
from ...errors import TightfitError
from ...models.graph import MOST_SIDES

Shape = tuple[int, ...]
_MOST = 4096  # elements of one array that is computed
_MOST_OF_ALL = 2**20  # elements of all of them; SD 1.5's U-Net has 2,000
# Elements of a constant that the graph makes when it runs; a text mask has 77 x 77.
_MOST_CONSTANT = 2**26
_NUMBERS = "biuf"  # numpy's kinds: bool, signed and unsigned integer, floating point
_BRANCHES = {"If", "Loop", "Scan", "SequenceMap"}
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
# Output has the shape of the first input; onnx 1.23 does not infer it.
_SAME = {
    "GroupNormalization",
    "MultiHeadAttention",
}


class Shapes:
    """Types, shapes and small values of everything in a graph, given the shapes of its inputs."""

    def __init__(self, model: Any, inputs: Mapping[str, Shape], wide: bool = False) -> None:
        """`wide`: fp16 is counted as fp32, as on a provider without fp16 kernels."""
        self.graph, self.wide = model.graph, wide
        self.kinds: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.values: dict[str, np.ndarray] = {}
        self._constant, self._room = set[str](), _MOST_OF_ALL
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.opsets = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
        self._versions, self._ir = opsets, model.ir_version
        for tensor in self.graph.initializer:
            self._know(tensor.name, tensor.data_type, tuple(tensor.dims))
            if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MOST:
                self._keep(tensor.name, _array(tensor))
            self._constant.add(tensor.name)
        for value in self.graph.input:
            if value.name not in self.shapes:
                self._know(value.name, value.type.tensor_type.elem_type, inputs[value.name])
        for node in self.graph.node:
            self._infer(node)

    def bytes(self, name: str) -> int:
        kind = self.kinds[name]
        bits = 4 if kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4) else 8 * _itemsize(kind)
        if self.is_widened(name):
            bits = 32
        return math.ceil(math.prod(self.shapes[name]) * bits / 8)

    def count(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def is_bool(self, name: str) -> bool:
        return self.kinds[name] == onnx.TensorProto.BOOL

    def is_widened(self, name: str) -> bool:
        """Whether it is fp16 and counted as fp32."""
        return self.wide and self.kinds[name] == onnx.TensorProto.FLOAT16

    def know_like(self, name: str, other: str, shape: Shape | None = None) -> None:
        """Add a value that an engine makes on its way, of another's type, and of its shape or this one."""
        self._know(name, self.kinds[other], self.shapes[other] if shape is None else shape)

    def _know(self, name: str, kind: int, shape: Shape) -> None:
        if len(shape) > MOST_SIDES or any(side < 0 for side in shape):
            raise TightfitError(f"{name} would have {len(shape)} sides, or a negative one")
        self.kinds[name], self.shapes[name] = kind, shape

    def _keep(self, name: str, value: np.ndarray) -> bool:
        """Keep a value to compute with if its numbers have a fixed size. numpy holds text as Python objects,
        whose integers grow without bound."""
        if kept := value.dtype.kind in _NUMBERS:
            self.values[name] = value
        return kept

    def _infer(self, node: Any) -> None:
        ins = [name for name in node.input if name]
        if node.op_type in _SAME:
            self._know(node.output[0], self.kinds[ins[0]], self.shapes[ins[0]])
            return
        if node.op_type == "Constant":
            value = _constant(node.attribute[0])
            self._know(node.output[0], helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            self._keep(node.output[0], value)
            self._constant.add(node.output[0])
            return
        if node.op_type == "Shape":
            self._shape(node)
            return
        if node.op_type in _BRANCHES:
            raise TightfitError(f"it has {node.op_type}, whose graphs are not followed")
        if node.op_type == "Split" and attribute(node, "num_outputs", len(node.output)) != len(node.output):
            # onnx would allocate a list of num_outputs, however large.
            raise TightfitError(f"Split has {len(node.output)} answers, not num_outputs")
        if all(name in self.values for name in ins) and self._compute(node):
            self._constant.update(node.output if self._constant.issuperset(ins) else ())
            return
        schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
        types = {name: helper.make_tensor_type_proto(self.kinds[name], self.shapes[name]) for name in ins}
        data = {name: numpy_helper.from_array(self.values[name]) for name in ins if name in self.values}
        inferred = shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=self.opsets, ir_version=self._ir
        )
        for name, kind in inferred.items():
            sides = kind.tensor_type.shape.dim
            if not kind.tensor_type.HasField("shape") or not all(
                side.HasField("dim_value") for side in sides
            ):
                raise TightfitError(f"the shape of {name}, made by {node.op_type}, is unknown before it runs")
            self._know(name, kind.tensor_type.elem_type, tuple(side.dim_value for side in sides))
        if self._constant.issuperset(ins):
            self._constant.update(inferred)
            if large := next((name for name in inferred if self.count(name) > _MOST_CONSTANT), None):
                raise TightfitError(f"{node.op_type} would make {self.count(large)} values of constants")

    def _shape(self, node: Any) -> None:
        value = np.array(self.shapes[node.input[0]], np.int64)[
            attribute(node, "start", 0) : attribute(node, "end")
        ]
        self._know(node.output[0], onnx.TensorProto.INT64, value.shape)
        self.values[node.output[0]] = value

    def _compute(self, node: Any) -> bool:
        """Compute the node if VALUES has its operator and its values are few enough; False otherwise."""
        operands = [self.values[name] if name else None for name in node.input]
        compute, size = VALUES.get(node.op_type), sum(value.size for value in operands if value is not None)
        if (
            node.domain not in ("", "ai.onnx")
            or compute is None
            or size > min(_MOST, self._room)
            or len(node.output) != 1
        ):
            return False
        with np.errstate(all="raise"):  # division by zero, and overflow
            out = compute(node, *operands)
        if out is None or not self._keep(node.output[0], out):
            return False
        self._room -= out.size
        self._know(node.output[0], helper.np_dtype_to_tensor_dtype(out.dtype), out.shape)
        return True


def _array(tensor: Any) -> np.ndarray:
    """Raises ValueError if the data do not match the shape."""
    return numpy_helper.to_array(tensor)


def _constant(constant: Any) -> np.ndarray:
    if constant.name == "value":
        return _array(constant.t)
    return np.array(
        helper.get_attribute_value(constant),
        {"value_int": np.int64, "value_ints": np.int64}.get(constant.name, np.float32),
    )


def _itemsize(kind: int) -> int:
    return helper.tensor_dtype_to_np_dtype(kind).itemsize


def attribute(node: Any, name: str, default: Any = None) -> Any:
    return next(
        (helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default
    )


def _axes(node: Any, axes: np.ndarray | None) -> tuple[int, ...]:
    chosen = attribute(node, "axes", ()) if axes is None else axes.tolist()
    return tuple(chosen)


def _gather(node: Any, x: np.ndarray, i: np.ndarray) -> np.ndarray | None:
    axis = attribute(node, "axis", 0)
    return np.take(x, i, axis) if i.size * x.size // max(1, x.shape[axis]) <= _MOST else None


def _slice(node: Any, x: np.ndarray, *operands: np.ndarray | None) -> np.ndarray:
    """The bounds are inputs since opset 10, attributes before."""
    if operands:
        bounds: list[Any] = [None if part is None else part.tolist() for part in (*operands, None, None)[:4]]
    else:
        bounds = [*(attribute(node, name) for name in ("starts", "ends", "axes")), None]
    starts, ends, axes, steps = bounds
    chosen = [slice(None)] * x.ndim
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        to_the_first = step < 0 and end < -x.shape[axis]  # backwards, up to and including the first
        chosen[axis] = slice(start, None if to_the_first else end, step)
    return x[tuple(chosen)]


def _range(_: Any, start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> np.ndarray | None:
    count = np.ceil((float(limit.item()) - float(start.item())) / float(step.item()))
    return (
        start.item() + np.arange(max(0, int(count)), dtype=start.dtype) * step.astype(start.dtype)
        if count <= _MOST
        else None
    )


def _filled(node: Any, shape: np.ndarray) -> np.ndarray | None:
    value = attribute(node, "value")
    value = np.zeros(1, np.float32) if value is None else _array(value)
    return np.full(shape.tolist(), value.item(), value.dtype) if _fits(shape.tolist()) else None


def _expand(_: Any, x: np.ndarray, shape: np.ndarray) -> np.ndarray | None:
    sides = np.broadcast_shapes(x.shape, tuple(shape.tolist())) if _fits(shape.tolist()) else (_MOST + 1,)
    return np.broadcast_to(x, sides).copy() if _fits(sides) else None


def _fits(sides: Sequence[int]) -> bool:
    return len(sides) <= MOST_SIDES and math.prod(sides) <= _MOST


def _each(compute: Callable[..., Any]) -> Callable[..., np.ndarray | None]:
    """An elementwise operator with broadcast inputs."""

    def broadcast(_: Any, *xs: np.ndarray) -> np.ndarray | None:
        return np.asarray(compute(*xs)) if _fits(np.broadcast_shapes(*(x.shape for x in xs))) else None

    return broadcast


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers round towards zero, as ONNX defines it."""
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b)) if a.dtype.kind == "i" else a / b


def _modulo(node: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    return _each(np.fmod if attribute(node, "fmod", 0) else np.mod)(node, a, b)


# The only operators that are executed: those that compute shapes. Each returns None for more than _MOST
# elements.
VALUES: dict[str, Callable[..., np.ndarray | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda node, *xs: np.concatenate(xs, attribute(node, "axis", 0)),
    "Cast": lambda node, x: x.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to"))),
    "Unsqueeze": lambda node, x, axes=None: np.expand_dims(x, _axes(node, axes)),
    "Squeeze": lambda node, x, axes=None: np.squeeze(x, _axes(node, axes) or None),
    "Reshape": lambda _, x, shape: x.reshape([side or x.shape[i] for i, side in enumerate(shape.tolist())]),
    "Transpose": lambda node, x: np.transpose(x, attribute(node, "perm")),
    "ReduceProd": lambda node, x, axes=None: np.asarray(
        np.prod(x, _axes(node, axes) or None, x.dtype, keepdims=bool(attribute(node, "keepdims", 1)))
    ),
    "Size": lambda _, x: np.asarray(x.size),
    "Range": _range,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Add": _each(np.add),
    "Sub": _each(np.subtract),
    "Mul": _each(np.multiply),
    "Div": _each(_divided),
    "Mod": _modulo,
    "Max": _each(lambda *xs: functools.reduce(np.maximum, xs)),
    "Min": _each(lambda *xs: functools.reduce(np.minimum, xs)),
    "Neg": _each(np.negative),
    "Abs": _each(np.abs),
    "Floor": _each(np.floor),
    "Ceil": _each(np.ceil),
    "Sqrt": _each(np.sqrt),
    "Reciprocal": _each(np.reciprocal),
    "Equal": _each(np.equal),
    "Greater": _each(np.greater),
    "Less": _each(np.less),
    "Not": _each(np.logical_not),
    "And": _each(np.logical_and),
    "Or": _each(np.logical_or),
    "Where": _each(np.where),
    "Identity": lambda _, x: x,
}


OUT = -1  # the slot of an operator's outputs
Steps = Sequence[tuple[int, int]]


def together(*counts: int) -> Steps:
    """Scratch buffers of `counts` bytes that all live beside the operator's outputs."""
    return [(OUT, 0), *enumerate(counts), *((i, END) for i in range(len(counts)))]


def trace(
    model: Any,
    inputs: Mapping[str, Shape],
    scratch: Callable[[Any, Shapes], Steps] = lambda _, __: together(),
    wide: bool = False,
) -> Trace:
    """One call. `scratch` gives an operator's buffers in order: (slot, bytes) allocates, (slot, END) frees,
    and (OUT, 0) allocates the outputs. `wide` as in Shapes."""
    return trace_of(Shapes(model, inputs, wide), scratch)


def trace_of(
    shapes: Shapes,
    scratch: Callable[[Any, Shapes], Steps],
    in_place: Container[str] = (),
    nodes: Sequence[Any] | None = None,
    over_last: Container[str] = (),
) -> Trace:
    """One call, with the shapes already inferred. Operators `in_place` write over an input of their answer's
    size, those `over_last` over one that nothing reads afterwards. `nodes`: what an engine runs in place of
    the graph's operators, whose arithmetic counts all the same."""
    run = shapes.graph.node if nodes is None else nodes
    live = _Live(shapes, run, in_place, over_last)
    last = {name: i for i, node in enumerate(run) for name in node.input}
    for i, node in enumerate(run):
        if all(name in shapes.values for name in node.output):
            continue  # computed with the shapes
        ends = {name for name in node.input if name and last[name] == i}
        live.run(node, ends, scratch(node, shapes))
    counted = (node for node in shapes.graph.node if any(name not in shapes.values for name in node.output))
    operations = (_operation(node, shapes) for node in counted)
    return Trace(tuple(live.events), (), tuple(operation for operation in operations if operation))


class _Live:
    def __init__(
        self, shapes: Shapes, nodes: Sequence[Any], in_place: Container[str], over_last: Container[str]
    ) -> None:
        self.shapes, self.events = shapes, list[tuple[int, int]]()
        self._in_place, self._over_last = in_place, over_last
        self._storage: dict[str, int] = {}  # of each value
        self._users: dict[int, int] = {}  # values of a storage that are alive
        self._kept, self._made = {value.name for value in shapes.graph.output}, 0
        self._used = {name for node in nodes for name in node.input}

    def run(self, node: Any, ends: set[str], steps: Steps) -> None:
        outs = [name for name in node.output if name]
        slots: dict[int, int] = {}
        for slot, count in steps:
            if slot == OUT and (source := self._source(node, ends)):
                self._share(outs[0], source)
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

    def _source(self, node: Any, ends: set[str]) -> str | None:
        """The input whose storage is the answer's, too."""
        inputs = [name for name in node.input if name in self._storage]
        if node.op_type in _VIEWS:
            is_view = node.input[0] in inputs and node.output[0] not in self._kept  # an answer is a copy
            return node.input[0] if is_view else None
        if node.op_type in self._over_last and not self._kept.issuperset(node.output):
            inputs = [name for name in inputs if name in ends and self._users[self._storage[name]] == 1]
        elif node.op_type not in self._in_place:
            return None
        count = self.shapes.bytes(node.output[0])
        return next((name for name in inputs if self.shapes.bytes(name) == count), None)

    def _make(self, count: int) -> int:
        self._made += 1
        self.events.append((self._made, count))
        return self._made

    def _share(self, name: str, source: str) -> None:
        storage = self._storage[source]
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
