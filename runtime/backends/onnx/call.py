"""How a graph is called: the names of what goes in and comes out, and the graph that ONNX Runtime is
given."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from ...errors import TightfitError
from ...machine.providers import CPU_PROVIDER
from ...models.families.family import GraphNames, Role
from ...models.graph import Graph
from ...models.spec import Component, ModelSpec
from . import dryrun

_FLOAT = onnx.TensorProto.FLOAT
_WHOLE = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
_REAL = {_FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
_ANSWERS = {"out_sample", "sample", "last_hidden_state", "text_embeds"}


def answers(graph: Graph, names: GraphNames) -> list[str]:
    """Those of a graph's outputs that a Session answers with. Raises TightfitError if it has them not."""
    outputs = [value.name for value in graph.model.graph.output]
    try:
        return names.answers(outputs)
    except ValueError as error:
        raise TightfitError(
            f"{graph.file} answers {', '.join(outputs) or 'nothing'}, not {error}: export the model again"
        ) from None


@functools.cache
def newest_opset() -> int:
    """The newest opset that the installed ONNX Runtime runs, asked of it with a graph from the future."""
    value = onnx.helper.make_tensor_value_info("x", _FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [
        onnx.helper.make_tensor_value_info("y", _FLOAT, [1])])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 999)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU_PROVIDER])
    except Exception as error:  # its own class is not public
        found = re.search(r"till opset (\d+)", str(error))
        return int(found[1]) if found else 999
    return 999


def _rewritten(model: Any) -> Any:
    """A copy with what ONNX Runtime runs in less memory: attention that keeps no scores, in place of the
    operator that does."""
    from onnx import helper

    copy = type(model)()
    copy.CopyFrom(model)
    changed = False
    for node in copy.graph.node:
        heads = dryrun.attribute(node, "q_num_heads")
        plain = len(node.input) == 3 and heads and not dryrun.attribute(node, "is_causal", 0)
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx") and plain:
            scale = dryrun.attribute(node, "scale")
            del node.attribute[:]
            node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
            node.attribute.append(helper.make_attribute("num_heads", heads))
            if scale is not None:
                node.attribute.append(helper.make_attribute("scale", scale))
            changed = True
    if changed and all(each.domain != "com.microsoft" for each in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return copy if changed else model


_KEPT = 64  # calls of a graph


def once(graph: Graph, key: Any, compute: Any) -> Any:
    """Kept with the graph, and gone with it."""
    if key not in graph.known:
        while len(graph.known) >= _KEPT:
            del graph.known[next(iter(graph.known))]
        graph.known[key] = compute()
    return graph.known[key]


def runtime_model(graph: Graph) -> Any:
    return once(graph, ("model",), lambda: _rewritten(graph.model))


def for_runtime(graph: Graph) -> tuple[bytes, Path] | None:
    """The graph to be run and the folder of its weights, if they are not as the file has them. Of linked
    weights, as in the hub's cache, it is the place that they are in, as ONNX Runtime follows no links out of
    the folder it is given."""
    model, folder = runtime_model(graph), graph.file.parent
    linked = {
        name: tensor.file.resolve() for name, tensor in graph.tensors.items() if tensor.file.is_symlink()
    }
    linked = {name: file for name, file in linked.items() if graph.tensors[name].file != graph.file}
    if linked:
        copy = type(model)()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            for each in tensor.external_data if tensor.name in linked else ():
                each.value = linked[tensor.name].name if each.key == "location" else each.value
        model, folder = copy, next(iter(linked.values())).parent
    return None if model is graph.model else (model.SerializeToString(), folder.absolute())


Inputs = tuple[tuple[str, tuple[int, ...]], ...]


def check_types(graph: Graph) -> None:
    """Raise TightfitError for inputs and answers that are no tensors of numbers, or of another kind than they
    mean."""
    for name, (kind, _) in (graph.inputs | graph.outputs).items():
        known = {"input_ids": _WHOLE, "timestep": _WHOLE | _REAL, "time_ids": _WHOLE | _REAL}.get(name, _REAL)
        if kind not in known and (name in graph.inputs or name in _ANSWERS):
            kinds = {value: key.lower() for key, value in onnx.TensorProto.DataType.items()} | {
                0: "no tensor"
            }
            raise TightfitError(f"{graph.file} has {name} as {kinds.get(kind, kind)}: export the model again")


def even_step(spec: ModelSpec, component: Component) -> int:
    """Pixels of which each side of a picture is a multiple where the U-Net's latents halve evenly at each of
    its levels."""
    return spec.downsampling * 2 ** max(0, len(component.config.get("block_out_channels") or ()) - 1)


def halves_evenly(spec: ModelSpec, component: Component, size: tuple[int, int, int]) -> bool:
    return component.role is not Role.DENOISER or not any(
        side % even_step(spec, component) for side in size[1:]
    )


def input_shapes(spec: ModelSpec, component: Component, size: tuple[int, int, int]) -> Inputs:
    """Shapes of the graph's inputs, by their names there, for a batch and the picture's height and width in
    pixels."""
    assert component.graph is not None
    names = component.network.graph.names
    wanted = {names.get(name, name): shape for name, shape in spec.inputs(component, *size).items()}
    return tuple(
        (name, wanted[name] or (1,) * len(sides)) for name, (_, sides) in component.graph.inputs.items()
    )
