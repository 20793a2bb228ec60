"""How a graph is called: names of its inputs and outputs, and the graph that ONNX Runtime gets."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ...errors import TightfitError
from ...machine.providers import CPU_PROVIDER
from ...models.families.family import Extent, GraphNames, Role
from ...models.graph import Graph
from ...models.spec import Component, ModelSpec
from . import dryrun

_FLOAT = onnx.TensorProto.FLOAT
_INTEGER = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
_REAL = {_FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
_ANSWERS = {"out_sample", "out_hidden_states", "sample", "last_hidden_state", "text_embeds"}
_NUMBERS = "timestep", "time_ids", "img_ids", "txt_ids", "attention_mask"


def answers(graph: Graph, names: GraphNames) -> list[str]:
    """The graph's outputs that a Session returns, in order. Raises TightfitError if one is missing."""
    outputs = [value.name for value in graph.model.graph.output]
    try:
        return names.answers(outputs)
    except ValueError as error:
        raise TightfitError(
            f"{graph.file} answers {', '.join(outputs) or 'nothing'}, not {error}: export the model again"
        ) from None


@functools.cache
def newest_opset() -> int:
    """The newest opset that the installed ONNX Runtime supports, read from its error for an impossibly new
    one."""
    value = onnx.helper.make_tensor_value_info("x", _FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [
        onnx.helper.make_tensor_value_info("y", _FLOAT, [1])])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 999)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU_PROVIDER])
    except Exception as error:  # ONNX Runtime's class is not public
        match = re.search(r"till opset (\d+)", str(error))
        return int(match[1]) if match else 999
    return 999


def _rewritten(model: Any) -> Any:
    """A copy that ONNX Runtime runs in less memory: MultiHeadAttention, which stores no scores, in place of
    Attention, which does."""
    from onnx import helper

    copy = type(model)()
    copy.CopyFrom(model)
    changed = False
    for node in copy.graph.node:
        heads = dryrun.attribute(node, "q_num_heads")
        is_grouped = heads != dryrun.attribute(node, "kv_num_heads")
        changes_scores = any(dryrun.attribute(node, name, 0) for name in ("is_causal", "softcap"))
        plain = len(node.input) == 3 and heads and not is_grouped and not changes_scores
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx") and plain:
            scale = dryrun.attribute(node, "scale")
            del node.attribute[:]
            node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
            node.attribute.append(helper.make_attribute("num_heads", heads))
            if scale is not None:
                node.attribute.append(helper.make_attribute("scale", scale))
            changed = True
    if changed and all(opset.domain != "com.microsoft" for opset in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return copy if changed else model


_KEPT = 64  # results cached per graph


def once(graph: Graph, key: Any, compute: Any) -> Any:
    """The cached value of `key`, computed on first use and dropped with the graph."""
    if key not in graph.known:
        while len(graph.known) >= _KEPT:
            del graph.known[next(iter(graph.known))]
        graph.known[key] = compute()
    return graph.known[key]


def runtime_model(graph: Graph) -> Any:
    return once(graph, ("model",), lambda: _rewritten(graph.model))


def for_runtime(graph: Graph) -> tuple[bytes, Path] | None:
    """The serialised graph and its weights' folder, or None if the file can be loaded as it is.

    Symlinked weights, as in the hub's cache, are given by their real path: ONNX Runtime follows no link out
    of its folder.
    """
    model, folder = runtime_model(graph), graph.file.parent
    linked = {
        name: tensor.file.resolve() for name, tensor in graph.tensors.items() if tensor.file.is_symlink()
    }
    linked = {name: file for name, file in linked.items() if graph.tensors[name].file != graph.file}
    if linked:
        copy = type(model)()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            for entry in tensor.external_data if tensor.name in linked else ():
                entry.value = linked[tensor.name].name if entry.key == "location" else entry.value
        model, folder = copy, next(iter(linked.values())).parent
    return None if model is graph.model else (model.SerializeToString(), folder.absolute())


def feeds_of(graph: Graph, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the graph is called with for arrays by its names, in its types."""
    feeds = {}
    for name, array in arrays.items():
        kind, sides = graph.inputs[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        feeds[name] = np.asarray(array if array.ndim else array.reshape([1] * len(sides)), dtype, "C")
    return feeds


Inputs = tuple[tuple[str, tuple[int, ...]], ...]


def check_types(graph: Graph) -> None:
    """Raise TightfitError for an input or output that is no tensor, or whose element type its name does not
    allow."""
    for name, (kind, _) in (graph.inputs | graph.outputs).items():
        allowed = {"input_ids": _INTEGER, **dict.fromkeys(_NUMBERS, _INTEGER | _REAL)}.get(name, _REAL)
        if kind not in allowed and (name in graph.inputs or name in _ANSWERS):
            words = {value: key.lower() for key, value in onnx.TensorProto.DataType.items()}
            words[0] = "no tensor"
            raise TightfitError(f"{graph.file} has {name} as {words.get(kind, kind)}: export the model again")


def even_step(spec: ModelSpec, component: Component) -> int:
    """Pixels that each side must be a multiple of, so that the latents halve evenly at every level of the
    U-Net."""
    return spec.downsampling * 2 ** max(0, len(component.config.get("block_out_channels") or ()) - 1)


def halves_evenly(spec: ModelSpec, component: Component, extent: Extent) -> bool:
    return component.role is not Role.DENOISER or not any(
        side % even_step(spec, component) for side in (extent.height, extent.width)
    )


def taken_shapes(spec: ModelSpec, component: Component, extent: Extent) -> dict[str, tuple[int, ...]]:
    """Shapes of what a graph takes of a session's arrays, by its names."""
    names = component.network.graph
    shapes = names.shapes(spec.inputs(component, *extent))
    return {names.names.get(name, name): shape for name, shape in shapes.items()}


def input_shapes(spec: ModelSpec, component: Component, extent: Extent) -> Inputs:
    """Shapes of the graph's inputs by their names in the graph. `extent`: batch, and the picture's height and
    width in pixels."""
    assert component.graph is not None
    shapes = taken_shapes(spec, component, extent)
    return tuple(  # of a scalar, and of what is not there, one number
        (name, shapes.get(name) or (1,) * len(sides)) for name, (_, sides) in component.graph.inputs.items()
    )
