"""Changes of a traced graph: attention on whole rows, linear weights stored as they are multiplied, quantised
weights dequantised where they are used.

A quantised weight W of a layer with input x becomes, in operators of ONNX (opset 21 and newer),

    W = DequantizeLinear(codes, s)                                     s = scale x one
    W = DequantizeLinear(codes, s) - DequantizeLinear(zero, s / 16)    where there are zeros, in sixteenths
                                                                       (kernels/formats.py)

`one` is computed from the shape of x. Without it W would be constant, and ONNX Runtime would dequantise every
weight in advance and keep it: 1576 MB instead of 238 for twelve layers of 8 MB in 4 bits
(probes/int4_convolution_in_onnx.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ..kernels.formats import Format, from_rows, unpack

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


class GraphError(Exception):
    """The graph cannot be changed, as torch's exporter makes no such graph."""


def _constant(
    graph: ir.Graph, name: str, values: Sequence[int] | np.ndarray, kind: type = np.int64
) -> ir.Value:
    """An initializer with these values. There is one of each name."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, kind), name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(np.shape(values)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def _only(value: ir.Value | None) -> ir.Node:
    uses = list(value.uses()) if value is not None else []
    if len(uses) != 1:
        raise GraphError(f"{value} is used {len(uses)} times")
    return uses[0].node


def _turns(node: ir.Node) -> bool:
    """Whether it transposes a matrix."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and tuple(perm.as_ints()) == (1, 0)


def _made_by(value: ir.Value | None, kind: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != kind:
        raise GraphError(f"{value} is not made by {kind}")
    return node


def _replace(
    graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], out: ir.Value, by: ir.Value
) -> None:
    graph.insert_before(old[-1], new)
    ir.convenience.replace_all_uses_with(out, by)
    by.name, by.shape, by.type = out.name, out.shape, out.type
    graph.remove(reversed(old), safe=True)


def cast_concatenated(graph: ir.Graph) -> None:
    """Cast what Concat joins to one type, as ONNX demands. torch promotes by itself; its exporter (2.13) does
    not."""
    for node in [node for node in graph if node.op_type == "Concat"]:
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype != node.outputs[0].dtype and value.dtype is not None:
                cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", node.outputs[0].dtype or FLOAT)])
                graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])


def merge_heads(graph: ir.Graph) -> None:
    """Attention on (batch, n, heads x d), as opset 23 allows. Operands are no longer transposed to
    (batch, heads, n, d), nor reshaped before if nothing else is done to heads, nor the answer back. Qwen3's,
    whose heads are turned after they are transposed, stays as it is."""
    for node in [node for node in graph if node.op_type == "Attention"]:
        unused = [x.producer() for x in node.inputs[:3] if x is not None]
        if not all(made is not None and made.op_type == "Transpose" for made in unused):
            continue
        in_heads = [made.inputs[0] for made in unused if made is not None]
        operands = [_in_rows(graph, node, value) for value in in_heads]
        after = [_only(node.outputs[0])]
        while len(after) < 4 and (after[-1].op_type, len(after[-1].outputs[0].shape or ())) != ("Reshape", 3):
            after.append(_only(after[-1].outputs[0]))
        kinds = [follower.op_type for follower in after]  # before these two may be one to the same shape
        if kinds[-2:] != ["Transpose", "Reshape"]:
            raise GraphError(f"attention is followed by {', '.join(kinds)}")
        query, key = (value.shape if value is not None else None for value in in_heads[:2])
        if query is None or key is None:
            raise GraphError("the shapes of attention's operands are not known")
        heads = {"q_num_heads": query[2], "kv_num_heads": key[2]}
        if not all(isinstance(count, int) for count in heads.values()):
            raise GraphError("the number of heads is not known")
        kept = {
            name: attribute for name, attribute in node.attributes.items() if name in ("is_causal", "scale")
        }
        kept |= {name: ir.AttrInt64(name, count) for name, count in heads.items() if isinstance(count, int)}
        whole = ir.Node("", "Attention", [*operands, *node.inputs[3:]], list(kept.values()))
        _replace(graph, [node, *after], [whole], after[-1].outputs[0], whole.outputs[0])
        for gone in (*unused, *(value.producer() for value in in_heads if value is not None)):
            if (
                gone is not None
                and not any(list(out.uses()) for out in gone.outputs)
                and gone.graph is not None
            ):
                graph.remove(gone, safe=True)


def _in_rows(graph: ir.Graph, before: ir.Node, heads: ir.Value | None) -> ir.Value | None:
    """(batch, n, heads x d) of (batch, n, heads, d): what that was made of, where it was reshaped alone."""
    node = heads.producer() if heads is not None else None
    flat = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    if flat is not None and flat.shape is not None and len(flat.shape) == 3:
        return flat
    rows = ir.Node("", "Reshape", [heads, _constant(graph, "in_rows", [0, 0, -1])])
    graph.insert_before(before, [rows])
    return rows.outputs[0]


def transposed_weights(graph: ir.Graph) -> set[str]:
    """Names of the weights that are only transposed and multiplied by. The transpositions are removed, so
    that the graph reads these weights as (in, out)."""
    names = set()
    for name, value in graph.initializers.items():
        users = [use.node for use in value.uses()]
        if value.const_value is None and users and all(map(_turns, users)):
            for node in users:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                graph.remove(node, safe=True)
            assert value.shape is not None
            value.shape = ir.Shape(reversed(list(value.shape)))
            names.add(name)
    return names


@dataclass(frozen=True)
class Layout:
    """How a quantised weight of `shape` is stored: as it is, or `turned` to (in, out), as it is multiplied
    by."""

    form: Format
    shape: tuple[int, ...]
    turned: bool

    @property
    def sides(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.turned else self.shape

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of its scales and zeros."""
        if not self.form.group:
            return self.shape[:1]
        grouped = (self.shape[0], -(-self.shape[1] // self.form.group), *self.shape[2:])
        return grouped[::-1] if self.turned else grouped

    @property
    def group(self) -> int:
        return min(self.form.group, self.shape[1])

    @property
    def axis(self) -> int:
        """The axis of the groups. Without groups that of the scales."""
        return int(bool(self.group) != self.turned)

    def kinds(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        """dtype and shape of its initializers."""
        codes = ir.DataType.INT8 if self.form.bits == 8 else ir.DataType.UINT4
        kinds = {"codes": (codes, self.sides), "scale": (HALF, self.scales)}
        return kinds | ({"zero": (ir.DataType.UINT8, self.scales)} if self.form.kind == "int4" else {})

    def stored(self, parts: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """The values of those initializers, from parts as kernels/formats.py describes them. ONNX packs two
        4-bit codes in a byte, the first in the low half."""
        row = math.prod(self.shape[1:])
        codes = unpack(parts["packed"], row) if self.form.bits == 4 else parts["packed"]
        codes = from_rows(codes, self.shape)
        codes = (codes.T if self.turned else codes).contiguous().flatten().numpy()
        if self.form.bits == 4:
            codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
            codes = codes[0::2] | (codes[1::2] << 4)
        made = {"codes": codes}
        for part in (name for name in ("scale", "zero") if name in parts):  # in the same order every time
            rows = parts[part]
            grouped = (
                rows.view(self.shape[0], *self.shape[2:], -1).movedim(-1, 1)
                if self.form.group
                else rows[:, 0]
            )
            made[part] = (grouped.T if self.turned and self.form.group else grouped).contiguous().numpy()
        return made


def quantise_weight(
    graph: ir.Graph, name: str, form: Format, shape: Sequence[int], dtype: ir.DataType
) -> Layout:
    """Replace the weight `name` (of `shape`, computed in `dtype`) by initializers `name`_codes, _scale and
    _zero, and dequantise these. Returns their layout.

    A linear weight is stored turned. ONNX Runtime 1.31 quantises DequantizeLinear and Transpose together once
    more, in every call: an int8 step of SD 1.5 took 10.7 s instead of 5.
    """
    value = graph.initializers[name]
    users = [use.node for use in value.uses()]
    layout = Layout(form, tuple(shape), len(shape) == 2 and all(map(_turns, users)))
    parts = {
        part: ir.Value(name=f"{name}_{part}", shape=ir.Shape(sides), type=ir.TensorType(kind))
        for part, (kind, sides) in layout.kinds().items()
    }
    graph.initializers.pop(name)
    graph.initializers.update({part.name: part for part in parts.values()})  # pyright: ignore[reportArgumentType, reportCallIssue]
    for user in users:
        if user.op_type == "Gather":
            _gathered(graph, user, parts, dtype)
            continue
        layer = _only(user.outputs[0]) if layout.turned else user
        weight = _dequantised(graph, layer, parts, layout, dtype)
        weight.name = f"{name}_of_{user.name}" if len(users) > 1 else name
        layer.replace_input_with(1, weight)
        if layout.turned:
            graph.remove(user, safe=True)
    return layout


def _dequantised(
    graph: ir.Graph, layer: ir.Node, parts: Mapping[str, ir.Value], layout: Layout, dtype: ir.DataType
) -> ir.Value:
    """The weight in `dtype`, computed before the node `layer` and after that node's other input."""
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        nodes.append(
            ir.Node("", kind, inputs, [ir.AttrInt64(key, number) for key, number in attributes.items()])
        )
        return nodes[-1].outputs[0]

    batch = add("Cast", add("Shape", layer.inputs[0], start=0, end=1), to=FLOAT)
    one, scale = add("Div", batch, batch), parts["scale"]
    if dtype == FLOAT:
        scale = add("Cast", scale, to=FLOAT)
    else:
        one = add("Cast", one, to=dtype)
    scale = add("Mul", scale, one)
    block = {"block_size": layout.group} if layout.group else {}
    weight = add("DequantizeLinear", parts["codes"], scale, axis=layout.axis, **block)
    if "zero" in parts:
        sixteenth = _constant(
            graph, "sixteenth", np.array(1 / 16), np.float32 if dtype == FLOAT else np.float16
        )
        # a Cast would be folded, and the zeros kept as fp32
        zero = add(
            "DequantizeLinear", parts["zero"], add("Mul", scale, sixteenth), axis=layout.axis, block_size=1
        )
        weight = _less_zero(graph, add, weight, zero, layout)
    graph.insert_before(layer, nodes)
    return weight


def _less_zero(
    graph: ir.Graph, add: Callable[..., ir.Value], weight: ir.Value, zero: ir.Value, layout: Layout
) -> ir.Value:
    """The weight less its groups' zeros."""
    axis, group, channels, sides = layout.axis, layout.group, layout.shape[1], layout.sides
    if channels % group:  # the last group is smaller
        index = _constant(graph, f"groups_{channels}_{group}", np.arange(channels) // group)
        return add("Sub", weight, add("Gather", zero, index, axis=axis))
    split = (*sides[:axis], channels // group, group, *sides[axis + 1 :])
    zeros = add("Unsqueeze", zero, _constant(graph, f"axis_{axis + 1}", [axis + 1]))
    less = add(
        "Sub", add("Reshape", weight, _constant(graph, "x".join(map(str, ("sides", *split))), split)), zeros
    )
    return add("Reshape", less, _constant(graph, "x".join(map(str, ("sides", *sides))), sides))


def _gathered(graph: ir.Graph, node: ir.Node, parts: Mapping[str, ir.Value], dtype: ir.DataType) -> None:
    """Dequantise the rows of a table that are looked up. Each row has one scale."""
    index = node.inputs[1]
    codes = ir.Node("", "Gather", [parts["codes"], index])
    scale = ir.Node("", "Gather", [parts["scale"], index])
    wide = ir.Node("", "Unsqueeze", [scale.outputs[0], _constant(graph, "last", [-1])])
    real = [ir.Node("", "Cast", [part.outputs[0]], [ir.AttrInt64("to", dtype)]) for part in (codes, wide)]
    product = ir.Node("", "Mul", [part.outputs[0] for part in real])
    _replace(graph, [node], [codes, scale, wide, *real, product], node.outputs[0], product.outputs[0])
