"""What ONNX Runtime runs in place of a graph: operators fused and constants folded, in its own order.

Read from onnxruntime 1.32 (core/optimizer, core/graph/graph_viewer.cc), and seen in the graphs that
`SessionOptions.optimized_model_filepath` writes. Only what changes bytes is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import helper

from . import dryrun

OVER_LAST = {"Relu", "Sigmoid", "Tanh", "Softmax", "Clip", "Cast"}
"""Operators that write over an input that nothing reads afterwards."""
_MICROSOFT = "com.microsoft"
# ONNX Runtime folds none of these: they would hold what is stored smaller, or differ in each call.
_NEVER_FOLDED = {"DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}


def folded(shapes: dryrun.Shapes) -> set[str]:
    """Values that are computed once, when the graph is loaded."""
    constant = {tensor.name for tensor in shapes.graph.initializer}
    made = set[str]()
    for node in shapes.graph.node:
        if node.op_type not in _NEVER_FOLDED and constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
            made.update(node.output)
    return made


def executed(shapes: dryrun.Shapes, on_cpu: bool = True) -> list[Any]:
    """The operators of a call, in the order in which they run. Values that are made on the way are added to
    the shapes."""
    constant = folded(shapes)
    nodes = {i: node for i, node in enumerate(shapes.graph.node) if not constant.issuperset(node.output)}
    graph = _Graph(nodes, shapes, constant | {tensor.name for tensor in shapes.graph.initializer})
    for match in _FUSIONS:
        graph.fuse(match)
    blocked = _Blocked(graph) if on_cpu else None
    if blocked:
        blocked.number()
    steps = [part for i in graph.order() for part in _parts(shapes, graph.nodes[i])]
    return blocked.reordered(steps) if blocked else steps


# What ONNX defines operators by that have no kernel: (kind, inputs, answer) from `x` to `y`. `mean` and
# `shape` are a few numbers. A norm's second cast writes over nothing, as its sides are not known before it
# runs.
_DEFINED = {
    "GroupNormalization": (
        ("Cast", ("x",), "cast"), ("Sub", ("cast",), "centred"), ("Mul", ("cast",), "squared"),
        ("ReduceMean", ("squared",), "mean"), ("Div", ("centred", "mean"), "normal"),
        ("Shape", ("cast",), "shape"), ("CastLike", ("normal",), "back"), ("Mul", ("back",), "scaled"),
        ("Add", ("scaled",), "y"),
    ),
    "GELU by tanh": (
        ("Mul", ("x",), "half"), ("Pow", ("x",), "cube"), ("Mul", ("cube",), "small"),
        ("Sum", ("x", "small"), "sum"), ("Mul", ("sum",), "root"), ("Tanh", ("root",), "tanh"),
        ("Sum", ("tanh",), "share"), ("Mul", ("half", "share"), "y"),
    ),
    "GELU": (
        ("Mul", ("x",), "half"), ("Div", ("x",), "root"), ("Erf", ("root",), "erf"),
        ("Sum", ("erf",), "share"), ("Mul", ("half", "share"), "y"),
    ),
}  # fmt: skip
_FEW = "mean", "shape"


def _parts(shapes: dryrun.Shapes, node: Any) -> Sequence[Any]:
    """The operator, or those that it is defined by. A CPU has no kernel of GELU in fp16."""
    kind = node.op_type
    if kind == "Gelu" and shapes.is_widened(node.input[0]):
        kind = "GELU by tanh" if dryrun.attribute(node, "approximate", b"none") == b"tanh" else "GELU"
    if kind not in _DEFINED:
        return (node,)
    x, y = node.input[0], node.output[0]
    names = {"x": x, "y": y}
    for _, _, made in _DEFINED[kind][:-1]:
        names[made] = f"{y}/{made}"
        shapes.know_like(names[made], x, () if made in _FEW else None)
    return [
        helper.make_node(step, [names[one] for one in given], [names[made]])
        for step, given, made in _DEFINED[kind]
    ]


@dataclass(frozen=True)
class _Fused:
    """An operator, and those that it replaces."""

    node: Any
    replaced: Sequence[Any]


class _Graph:
    """Operators by ONNX Runtime's number for each. One that it makes of others has the next number."""

    def __init__(self, nodes: dict[int, Any], shapes: dryrun.Shapes, constant: set[str]) -> None:
        self.nodes, self.shapes, self.constant = nodes, shapes, constant
        self._answers, self._next = {value.name for value in shapes.graph.output}, 1 + max(nodes, default=0)
        self._makers = {name: i for i, node in nodes.items() for name in node.output if name}
        self._readers = Counter(name for node in nodes.values() for name in node.input if name)
        # ONNX Runtime makes Gemm, which takes matrices, of other products too if all sides are known.
        sides = (side for value in shapes.graph.input for side in value.type.tensor_type.shape.dim)
        self.is_fixed = all(side.HasField("dim_value") for side in sides)

    def order(self) -> list[int]:
        """Depth first from the operators whose answers none reads: each after those it reads, of these the
        one with the highest number first."""
        leaves = (i for i, node in self.nodes.items() if not any(self._readers[name] for name in node.output))
        stack, seen, found = [(i, False) for i in sorted(leaves)], set[int](), list[int]()
        while stack:
            i, is_left = stack.pop()
            if is_left:
                found.append(i)
            elif i not in seen:
                seen.add(i)
                stack.append((i, True))
                before = {self._makers[name] for name in self.nodes[i].input if name in self._makers}
                stack += [(j, False) for j in sorted(before) if j not in seen]
        return found

    def fuse(self, match: Callable[[_Graph, Any], _Fused | None]) -> None:
        for i in self.order():
            if i in self.nodes and (fused := match(self, self.nodes[i])):
                self.replace(fused.replaced, fused.node)

    def replace(self, nodes: Sequence[Any], new: Any) -> None:
        """Put a new operator in the place of others."""
        for node in nodes:
            del self.nodes[self._makers[node.output[0]]]
            self._readers.subtract(filter(None, node.input))
        self.nodes[self._next] = new
        self._readers.update(filter(None, new.input))
        self._makers[new.output[0]] = self._next
        self._next += 1

    def made(self, name: str, kind: str) -> Any:
        """What makes the value, if it is an operator of that kind, and one other reads the value; else
        None."""
        node = self.nodes.get(self._makers.get(name, -1))
        is_inner = self._readers[name] == 1 and name not in self._answers
        return node if node is not None and node.op_type == kind and is_inner else None

    def is_row(self, name: str, like: str) -> bool:
        """Whether the value is constant, a number for each of the last side of `like`."""
        return name in self.constant and self.shapes.shapes[name] == self.shapes.shapes[like][-1:]


class _Blocked:
    """Convolutions of constant weights, which a CPU computes in blocks of channels (NCHWc). What else reads
    their answers waits for a copy in rows (NCHW), but for sums of two."""

    _CHANNELS = 16  # of a block, with AVX-512

    def __init__(self, graph: _Graph) -> None:
        self.graph, self.shapes, self._copied = graph, graph.shapes, set[str]()

    def number(self) -> None:
        """These operators are made anew, in their order."""
        answers = set[str]()
        for i in self.graph.order():
            node = self.graph.nodes[i]
            if self._is_blocked(node) or (node.op_type == "Add" and answers.issuperset(node.input)):
                answers.add(node.output[0])
                self.graph.replace([node], node)

    def _is_blocked(self, node: Any) -> bool:
        if node.op_type != "Conv" or node.input[1] not in self.graph.constant:
            return False
        sides = self.shapes.shapes[node.input[1]]
        return len(sides) == 4 and (sides[1] < self._CHANNELS or sides[1] % 4 == 0)

    def reordered(self, nodes: Sequence[Any]) -> list[Any]:
        """The operators with copies from one order to the other."""
        blocks, copies, steps = dict[str, str](), dict[str, str](), list[Any]()
        for node in nodes:
            names, out = list(node.input), node.output[0]
            if self._is_blocked(node):
                if self.shapes.shapes[names[1]][1] >= self._CHANNELS:
                    if names[0] not in blocks and names[0] not in copies:
                        copies[names[0]] = self._in_blocks(names[0])
                        steps.append(helper.make_node("ReorderInput", names[:1], [copies[names[0]]]))
                    names[0] = blocks.get(names[0]) or copies[names[0]]
                else:
                    steps += self._in_rows(names[:1], blocks)
            elif node.op_type == "Add" and blocks.keys() >= {*names}:
                names = [blocks[name] for name in names]
            else:
                steps += [*self._in_rows(names, blocks), node]
                continue
            blocks[out] = self._in_blocks(out)
            steps.append(helper.make_node(f"Blocked{node.op_type}", names, [blocks[out]]))
        return [*steps, *self._in_rows([value.name for value in self.shapes.graph.output], blocks)]

    def _in_rows(self, names: Sequence[str], blocks: Mapping[str, str]) -> Iterator[Any]:
        """What copies values to rows, each once."""
        for name in names:
            if name in blocks and name not in self._copied:
                self._copied.add(name)
                yield helper.make_node("ReorderOutput", [blocks[name]], [name])

    def _in_blocks(self, name: str) -> str:
        batch, channels, *sides = self.shapes.shapes[name]
        padded = -(-channels // self._CHANNELS) * self._CHANNELS
        self.shapes.know_like(made := f"{name}/blocks", name, (batch, padded, *sides))
        return made


def _fused(kind: str, inputs: Sequence[str], last: Any, *others: Any, domain: str = _MICROSOFT) -> _Fused:
    return _Fused(helper.make_node(kind, inputs, [last.output[0]], domain=domain), (last, *others))


def _both_ways(node: Any, kind: str) -> Sequence[tuple[str, str]]:
    """The two inputs, either first, of an operator of that kind."""
    if node is None or node.op_type != kind or len(node.input) != 2:
        return ()
    a, b = node.input
    return (a, b), (b, a)


def _gemm(graph: _Graph, node: Any) -> _Fused | None:
    """A product and its bias, of matrices, or of sides that never vary."""
    for product, bias in _both_ways(node, "Add"):
        made = graph.made(product, "MatMul")
        is_matrix = graph.is_fixed or len(graph.shapes.shapes[product]) == 2
        if made and is_matrix and graph.is_row(bias, product):
            return _fused("Gemm", (*made.input, bias), node, made, domain="")
    return None


def _gelu_with_bias(graph: _Graph, node: Any) -> _Fused | None:
    if node.op_type != "Gelu" or graph.shapes.is_widened(node.input[0]):
        return None
    made = graph.made(node.input[0], "Add")
    for states, bias in _both_ways(made, "Add"):
        if graph.is_row(bias, states):
            return _fused("BiasGelu", (states, bias), node, made)
    return None


def _gelu_by_tanh(graph: _Graph, node: Any) -> _Fused | None:
    """x / 2 (1 + tanh(a (x + b x**3))), as it is written out."""
    for half, other in _both_ways(node, "Mul"):
        halved, one = graph.made(half, "Mul"), graph.made(other, "Add")
        tanh = _of(graph, one, "Tanh")
        scaled = graph.made(tanh.input[0], "Mul") if tanh else None
        inner = _of(graph, scaled, "Add")
        for states, cubed in _both_ways(inner, "Add"):
            factor = graph.made(cubed, "Mul")
            cube = _of(graph, factor, "Pow")
            if cube and halved and states in halved.input and cube.input[0] == states:
                return _fused("FastGelu", (states,), node, halved, one, tanh, scaled, inner, factor, cube)
    return None


def _of(graph: _Graph, node: Any, kind: str) -> Any:
    """What makes an input of the operator, if it is of that kind; else None."""
    return next((made for name in (node.input if node else ()) if (made := graph.made(name, kind))), None)


def _silu(graph: _Graph, node: Any) -> _Fused | None:
    """x sigmoid(a x), of a constant a."""
    for states, other in _both_ways(node, "Mul"):
        if (sigmoid := graph.made(other, "Sigmoid")) is None:
            continue
        if sigmoid.input[0] == states:
            return _fused("QuickGelu", (states,), node, sigmoid)
        scaled = graph.made(sigmoid.input[0], "Mul")
        for again, factor in _both_ways(scaled, "Mul"):
            if again == states and factor in graph.constant:
                return _fused("QuickGelu", (states,), node, sigmoid, scaled)
    return None


_FUSIONS = (_gemm, _gelu_with_bias, _gelu_by_tanh, _silu)  # in the order in which they are made
