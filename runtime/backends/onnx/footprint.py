"""Predicted bytes and operations of one call of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ...costs.allocator import OnnxArena
from ...costs.footprint import Footprint, Trace, replay
from ...errors import TightfitError, first_line
from ...models.families.family import Extent, Role
from ...models.graph import Graph
from ...models.spec import Component, ModelSpec
from . import dryrun
from .call import Inputs, answers, even_step, halves_evenly, input_shapes, once, runtime_model
from .optimised import OVER_LAST, executed, folded

_PACKED = {"Conv", "MatMul", "Gemm"}
# Bytes on a CPU, measured on SD 1.5: ONNX Runtime itself, and each operator of a session's graph.
_SESSION, PER_NODE_BYTES = 20 * 2**20, 10_000


@dataclass(frozen=True)
class _Call:
    """The footprint of one call of a graph, and the shapes of its outputs."""

    footprint: Footprint
    answers: Mapping[str, tuple[int, ...]]


def call_footprint(graph: Graph, on_cpu: bool, shapes: Inputs) -> Footprint:
    """Footprint of a call with inputs of these shapes, by name. Raises TightfitError if the graph cannot be
    followed."""
    call = call_of(graph, on_cpu, shapes)
    if isinstance(call, str):
        raise TightfitError(f"{graph.file} is no graph that can be followed ({call}): export the model again")
    return call.footprint


def call_of(graph: Graph, on_cpu: bool, shapes: Inputs) -> _Call | str:
    """A call with inputs of these shapes, or the reason why there can be none."""

    def follow() -> _Call | str:
        try:
            return _followed(graph, on_cpu, dict(shapes))
        except Exception as error:  # onnx documents no exception class
            return first_line(error)

    return once(graph, ("call", on_cpu, shapes), follow)


def _followed(graph: Graph, on_cpu: bool, inputs: Mapping[str, tuple[int, ...]]) -> _Call:
    scratch = functools.partial(_scratch, on_cpu)
    shapes = dryrun.Shapes(runtime_model(graph), inputs, wide=on_cpu)
    nodes = executed(shapes, on_cpu)
    call = dryrun.trace_of(shapes, scratch, nodes=nodes, over_last=OVER_LAST)
    arena, held = OnnxArena(exact=not on_cpu), [PER_NODE_BYTES * len(graph.model.graph.node)]
    constant = [shapes.bytes(name) for name in _computed_once(graph, shapes, nodes)]
    for i, count in enumerate((*weight_bytes(graph, on_cpu), *constant)):
        if on_cpu:
            held.append(count)
        else:  # a GPU's arena holds the weights too
            arena.allocate(-1 - i, count)
    held.append(arena.peak)
    replay(arena, call.events, ())
    call_bytes = arena.peak - held[-1]
    # _SESSION counts once in a process, however many sessions it has.
    trace = Trace(((1, call_bytes), (2, _SESSION)), (), call.operations)
    footprint = Footprint(
        tuple(held), _SESSION + loading_bytes(graph) if on_cpu else 0, trace, (), kept=call_bytes
    )
    return _Call(footprint, {value.name: shapes.shapes[value.name] for value in graph.model.graph.output})


def _computed_once(graph: Graph, shapes: dryrun.Shapes, nodes: Iterable[Any]) -> set[str]:
    """Values that a call reads, which are computed when the graph is loaded. Those of weights that are cast
    count as weights."""
    read = {name for node in nodes for name in node.input}
    casts = (node for node in shapes.graph.node if node.op_type == "Cast" and node.input[0] in graph.tensors)
    return (folded(shapes) & read).difference(node.output[0] for node in casts)


def call_problem(spec: ModelSpec, component: Component, on_cpu: bool, extent: Extent) -> str | None:
    """Why the graph cannot be called at `extent`, or None if it can."""
    graph, inputs = component.graph, input_shapes(spec, component, extent)
    assert graph is not None
    call = call_of(graph, on_cpu, inputs)
    if isinstance(call, str):
        if halves_evenly(spec, component, extent):
            return f"{graph.file} is no graph that can be followed ({call}): export the model again"
        step = even_step(spec, component)
        near = "x".join(str(max(step, round(side / step) * step)) for side in (extent.width, extent.height))
        return (
            f"{graph.file} can do multiples of {step} pixels only, as it was exported for these: "
            f"ask for {near}, or export the model again, with --to onnx"
        )
    name, *_ = answers(graph, component.network.graph)
    wanted = _wanted(spec, component, dict(inputs))
    sides = call.answers[name]
    if len(sides) != len(wanted) or any(
        need not in (None, side) for need, side in zip(wanted, sides, strict=True)
    ):
        shown_wanted = [side or "any" for side in wanted]
        return f"{graph.file} answers {name} of {list(sides)}, not of {shown_wanted}: export the model again"
    return None


def _wanted(
    spec: ModelSpec, component: Component, inputs: Mapping[str, tuple[int, ...]]
) -> tuple[int | None, ...]:
    if component.role is Role.DENOISER:  # whose latents may be called otherwise
        return inputs[component.network.graph.names.get("sample", "sample")]
    return _ANSWER_SHAPES[component.role](spec, inputs)


def _picture_shape(spec: ModelSpec, inputs: Mapping[str, tuple[int, ...]]) -> tuple[int | None, ...]:
    batch, _, height, width = inputs["latent_sample"]
    return batch, None, height * spec.downsampling, width * spec.downsampling


def _latent_shape(spec: ModelSpec, inputs: Mapping[str, tuple[int, ...]]) -> tuple[int | None, ...]:
    batch, _, height, width = inputs["sample"]
    return batch, None, height // spec.downsampling, width // spec.downsampling


# Shape of the first output, from the inputs' shapes; None is any length.
_ANSWER_SHAPES: Mapping[
    Role, Callable[[ModelSpec, Mapping[str, tuple[int, ...]]], tuple[int | None, ...]]
] = {
    Role.TEXT: lambda _, inputs: (*inputs["input_ids"], None),
    Role.ENCODER: _latent_shape,
    Role.CONTROL: lambda _, inputs: (inputs["sample"][0], None, *inputs["sample"][2:]),
    Role.DECODER: _picture_shape,
}


def _scratch(on_cpu: bool, node: Any, shapes: dryrun.Shapes) -> dryrun.Steps:
    """Scratch that ONNX Runtime's kernels allocate beside their outputs, measured kernel by kernel
    (docs/decisions.md)."""
    ins, together = [name for name in node.input if name], dryrun.together
    if not on_cpu:
        return together()
    if node.op_type == "MultiHeadAttention":  # a copy of each operand, split into heads
        return together(*(shapes.bytes(name) for name in ins[:3]))
    if node.op_type == "Attention":  # the scores, and a mask in floating point
        q, k = (shapes.shapes[name] for name in ins[:2])
        heads = dryrun.attribute(node, "q_num_heads") or q[1]
        mask = shapes.count(ins[3]) if len(ins) > 3 and shapes.is_bool(ins[3]) else 0
        if dryrun.attribute(node, "is_causal", 0):
            mask = max(mask, q[-2] * k[-2])
        return together(4 * q[0] * heads * q[-2] * k[-2], 4 * mask)
    if node.op_type == "Where":  # what is taken of either
        return together(*[shapes.bytes(node.output[0])] * 2)
    if node.op_type == "BiasGelu":
        return together(shapes.bytes(node.output[0]))
    if node.op_type == "ScatterElements":
        return together(8 * shapes.count(ins[1]))  # indices
    if node.op_type == "Conv":
        filters, *patch = shapes.shapes[ins[1]]
        spatial = int(np.prod(shapes.shapes[node.output[0]][2:]))
        if filters > spatial and int(np.prod(patch[1:])) > 1:  # im2col of one picture
            return together(4 * int(np.prod(patch)) * spatial)
    return together()


def weight_bytes(graph: Graph, on_cpu: bool) -> Iterator[int]:
    """Bytes of each weight as the provider holds it.

    A weight that is only cast is cast at load. On a CPU every fp16 weight becomes fp32; the others are
    packed, or mapped from the file, so that only the rows of a table that are looked up are read.
    """
    users = readers_of(graph)
    for name, tensor in graph.tensors.items():
        kinds = {node.op_type for node in users.get(name, ())}
        casts = [dryrun.attribute(node, "to") for node in users.get(name, ()) if node.op_type == "Cast"]
        wide = on_cpu and tensor.dtype == "F16"
        if kinds == {"Cast"}:
            yield tensor.count * onnx.helper.tensor_dtype_to_np_dtype(casts[0]).itemsize
        elif kinds != {"Gather"} or not on_cpu or wide:
            yield tensor.stored_bytes * (2 if wide else 1)


def readers_of(graph: Graph) -> dict[str, list[Any]]:
    """The operators that read each value, by its name."""

    def compute() -> dict[str, list[Any]]:
        readers: dict[str, list[Any]] = {}
        for node in graph.model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    return once(graph, ("users",), compute)


def loading_bytes(graph: Graph) -> int:
    """Peak bytes on a CPU while loading, beyond what is held afterwards: a second copy of the largest packed
    weight. Convolution weights cast from fp16 are packed together, so they count as one."""
    users = readers_of(graph)
    packed = {name: {node.op_type for node in users.get(name, ())} & _PACKED for name in graph.tensors}
    cast = (
        2 * t.stored_bytes for name, t in graph.tensors.items() if t.dtype == "F16" and "Conv" in packed[name]
    )
    return max(
        sum(cast), max((t.stored_bytes for name, t in graph.tensors.items() if packed[name]), default=0)
    )
