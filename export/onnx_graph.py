"""What is changed in a traced graph: attention on whole rows, linear weights stored as they are multiplied, and quantised weights
that are dequantised right where they are used.

A quantised weight W of a layer with input x becomes, in operators of ONNX (opset 21 and newer),

    W = DequantizeLinear(codes, s)                                     s = scale x one
    W = DequantizeLinear(codes, s) - DequantizeLinear(zero, s / 16)    where there are zeros, in sixteenths (kernels/formats.py)

`one` is computed from the shape of x. Without it nothing in W would depend on anything, and ONNX Runtime would dequantise every
weight first and hold them all: 1576 MB instead of 238 for twelve layers of 8 MB in 4 bits (probes/int4_convolution_in_onnx.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from ..kernels.formats import Format, from_rows, unpack

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


class GraphError(Exception):
    """The graph is not as torch's exporter makes them, so it cannot be changed."""


def _constant(graph: ir.Graph, name: str, values: Sequence[int] | np.ndarray, kind: type = np.int64) -> ir.Value:
    """An initializer with these values, made once."""
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


def _made_by(value: ir.Value | None, kind: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != kind:
        raise GraphError(f"{value} is not made by {kind}")
    return node


def _replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], out: ir.Value, by: ir.Value) -> None:
    graph.insert_before(old[-1], new)
    ir.convenience.replace_all_uses_with(out, by)
    by.name, by.shape, by.type = out.name, out.shape, out.type
    graph.remove(reversed(old), safe=True)


def cast_concatenated(graph: ir.Graph) -> None:
    """What is concatenated must be of one type in ONNX; torch promotes by itself, and its exporter (2.13) forgets to."""
    for node in [node for node in graph if node.op_type == "Concat"]:
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype != node.outputs[0].dtype and value.dtype is not None:
                cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", node.outputs[0].dtype or FLOAT)])
                graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])


def merge_heads(graph: ir.Graph) -> None:
    """Attention on (batch, n, heads x d) as opset 23 allows, without the reshaping and transposing of each operand to
    (batch, heads, n, d) and back."""
    for node in [node for node in graph if node.op_type == "Attention"]:
        operands = [_made_by(_made_by(x, "Transpose").inputs[0], "Reshape") for x in node.inputs[:3]]
        after = [_only(node.outputs[0])]
        while len(after) < 4 and (after[-1].op_type, len(after[-1].outputs[0].shape or ())) != ("Reshape", 3):
            after.append(_only(after[-1].outputs[0]))
        if [each.op_type for each in after][-2:] != ["Transpose", "Reshape"]:  # before them may be one to the same shape
            raise GraphError(f"attention is followed by {', '.join(each.op_type for each in after)}")
        heads = {name: operands[i].outputs[0].shape[2] for name, i in (("q_num_heads", 0), ("kv_num_heads", 1))}  # pyright: ignore
        if not all(isinstance(count, int) for count in heads.values()):
            raise GraphError("the number of heads is not known")
        kept = {name: attribute for name, attribute in node.attributes.items() if name in ("is_causal", "scale")}
        kept |= {name: ir.AttrInt64(name, count) for name, count in heads.items() if isinstance(count, int)}
        inputs = [operand.inputs[0] for operand in operands] + list(node.inputs[3:])
        whole = ir.Node("", "Attention", inputs, list(kept.values()))
        unused = [_made_by(x, "Transpose") for x in node.inputs[:3]]
        _replace(graph, [node, *after], [whole], after[-1].outputs[0], whole.outputs[0])
        for gone in (*unused, *operands):
            if not any(list(out.uses()) for out in gone.outputs) and gone.graph is not None:
                graph.remove(gone, safe=True)


def transposed_weights(graph: ir.Graph) -> set[str]:
    """The names of weights that are only transposed and multiplied by. The transpositions go; from now on the graph means the
    weights as (in, out)."""
    found = set()
    for name, value in graph.initializers.items():
        users = [use.node for use in value.uses()]
        if value.const_value is None and users and all(node.op_type == "Transpose" for node in users):
            for node in users:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                graph.remove(node, safe=True)
            assert value.shape is not None
            value.shape = ir.Shape(reversed(list(value.shape)))
            found.add(name)
    return found


def quantise_weight(graph: ir.Graph, name: str, form: Format, shape: Sequence[int], dtype: ir.DataType) -> None:
    """Have the weight `name` (of `shape`, computed in `dtype`) made of initializers `name`_codes, _scale and _zero, which
    `stored` fills."""
    value = graph.initializers[name]
    parts = {
        part: ir.Value(name=f"{name}_{part}", shape=ir.Shape(sides), type=ir.TensorType(kind))
        for part, (kind, sides) in _kinds(form, shape).items()
    }
    users = [use.node for use in value.uses()]
    graph.initializers.pop(name)
    graph.initializers.update({part.name: part for part in parts.values()})  # pyright: ignore[reportArgumentType, reportCallIssue]
    for user in users:
        if user.op_type == "Gather":
            _gathered(graph, user, parts, dtype)
        else:
            where = _only(user.outputs[0]) if user.op_type == "Transpose" else user  # the layer that has another input
            weight = _dequantised(graph, user, where.inputs[0], parts, form, shape, dtype)
            weight.name = f"{name}_of_{user.name}" if len(users) > 1 else name
            user.replace_input_with(list(user.inputs).index(value), weight)


def _kinds(form: Format, shape: Sequence[int]) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    """dtype and shape of the initializers that a weight is stored in."""
    scales = (shape[0],) if not form.group else (shape[0], -(-shape[1] // form.group), *shape[2:])
    codes = ir.DataType.INT8 if form.bits == 8 else ir.DataType.UINT4
    kinds = {"codes": (codes, tuple(shape)), "scale": (HALF, scales)}
    return kinds | ({"zero": (ir.DataType.UINT8, scales)} if form.kind == "int4" else {})


def stored(parts: Mapping[str, torch.Tensor], form: Format, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """The values of those initializers, from parts as kernels/formats.py describes them; two 4-bit codes in a byte, as ONNX
    packs them: the first in the low half, over the weight's rows as they are in memory."""
    row = int(np.prod(shape[1:]))
    codes = unpack(parts["packed"], row) if form.bits == 4 else parts["packed"]
    codes = from_rows(codes, shape).contiguous().flatten().numpy()
    if form.bits == 4:
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        codes = codes[0::2] | (codes[1::2] << 4)
    made = {"codes": codes}
    for part in ("scale", "zero"):
        if part in parts:
            grouped = parts[part][:, 0] if not form.group else parts[part].view(shape[0], *shape[2:], -1).movedim(-1, 1)
            made[part] = grouped.contiguous().numpy()
    return made


def _dequantised(
    graph: ir.Graph,
    before: ir.Node,
    x: ir.Value | None,
    parts: Mapping[str, ir.Value],
    form: Format,
    shape: Sequence[int],
    dtype: ir.DataType,
) -> ir.Value:
    """The weight in `dtype`, made before the node `before`, and not before x is there."""
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        nodes.append(ir.Node("", kind, inputs, [ir.AttrInt64(key, each) for key, each in attributes.items()]))
        return nodes[-1].outputs[0]

    batch = add("Cast", add("Shape", x, start=0, end=1), to=FLOAT)
    one, scale = add("Div", batch, batch), parts["scale"]
    if dtype == FLOAT:
        scale = add("Cast", scale, to=FLOAT)
    else:
        one = add("Cast", one, to=dtype)
    scale = add("Mul", scale, one)
    group = min(form.group, shape[1])
    block = {"axis": 1, "block_size": group} if form.group else {"axis": 0}
    weight = add("DequantizeLinear", parts["codes"], scale, **block)
    if "zero" in parts:
        sixteenth = _constant(graph, "sixteenth", np.array(1 / 16), np.float32 if dtype == FLOAT else np.float16)
        # a Cast would be folded, and the zeros be held as fp32
        zero = add("DequantizeLinear", parts["zero"], add("Mul", scale, sixteenth), axis=1, block_size=1)
        weight = _less_zero(graph, add, weight, zero, shape, group)
    graph.insert_before(before, nodes)
    return weight


def _less_zero(graph, add, weight, zero, shape: Sequence[int], group: int) -> ir.Value:
    """The weight less its groups' zeros."""
    if shape[1] % group:  # the last group is smaller
        index = np.arange(shape[1]) // group
        return add("Sub", weight, add("Gather", zero, _constant(graph, f"groups_{shape[1]}_{group}", index), axis=1))
    sides = (shape[0], shape[1] // group)
    split = add("Reshape", weight, _constant(graph, "x".join(map(str, ("split", *shape, group))), (*sides, group, *shape[2:])))
    each = add("Unsqueeze", zero, _constant(graph, "second", [2]))
    return add("Reshape", add("Sub", split, each), _constant(graph, "x".join(map(str, ("whole", *shape))), tuple(shape)))


def _gathered(graph: ir.Graph, node: ir.Node, parts: Mapping[str, ir.Value], dtype: ir.DataType) -> None:
    """Rows of a table that has one scale for each: only those that are looked up are dequantised."""
    index = node.inputs[1]
    codes = ir.Node("", "Gather", [parts["codes"], index])
    scale = ir.Node("", "Gather", [parts["scale"], index])
    wide = ir.Node("", "Unsqueeze", [scale.outputs[0], _constant(graph, "last", [-1])])
    real = [ir.Node("", "Cast", [each.outputs[0]], [ir.AttrInt64("to", dtype)]) for each in (codes, wide)]
    product = ir.Node("", "Mul", [each.outputs[0] for each in real])
    _replace(graph, [node], [codes, scale, wide, *real, product], node.outputs[0], product.outputs[0])
