"""A graph compiled for one shape, whose files leave memory as soon as OpenVINO has packed their weights."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from onnx import helper

from ...machine.process import cores
from ...models.graph import Graph
from ..onnx.call import Inputs

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Between two looks at what has been read of the files: at 2 GB/s, 20 MB.
_DROP_SECONDS = 0.01
_ANGLE = "angle_"  # and its number: the name of an input
_LEARNED = {"MatMul", "Convolution"}


class Compiled:
    """A graph, compiled. OpenVINO keeps what a weight was made of as long as the compiled model lives, so the
    weights are mapped here and their pages dropped: SD 1.5's U-Net would hold 3.2 GiB of fp32 beside what is
    packed of it. A page that is read after that comes from the file again."""

    def __init__(self, graph: Graph, device: str, compute: str, shapes: Inputs) -> None:
        core = openvino.Core()
        model, self._maps = _model(graph, core)
        model.reshape({name: openvino.PartialShape(list(sides)) for name, sides in shapes})
        angles = None if compute == "fp32" else _cut_angles(model)
        # No cache of compiled models: OpenVINO has none unless it is told a folder.
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[compute],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if device == "CPU":  # by its own choice hardly more than one of two cores was busy
            options["INFERENCE_NUM_THREADS"] = math.ceil(cores())
        exact = {"INFERENCE_PRECISION_HINT": HINTS["fp32"]}
        with self._dropped():
            self._angles = core.compile_model(angles, device, options | exact) if angles else None
            self._request = core.compile_model(model, device, options).create_infer_request()

    def __call__(self, feeds: dict[str, np.ndarray], outputs: list[str]) -> tuple[np.ndarray, ...]:
        if self._angles is not None:
            names = [port.get_any_name() for port in self._angles.inputs]
            angles = self._angles({name: feeds[name] for name in names}).values()
            feeds = feeds | {f"{_ANGLE}{number}": array for number, array in enumerate(angles)}
        self._request.infer(feeds, share_inputs=True)
        answers = tuple(np.array(self._request.get_tensor(name).data, np.float32) for name in outputs)
        self._drop()
        return answers

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        """Drop pages of the files while the block runs, and after it."""
        done = threading.Event()

        def drop() -> None:
            while not done.wait(_DROP_SECONDS):
                self._drop()

        thread = threading.Thread(target=drop, name="openvino-pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._drop()

    def _drop(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED)


def _cut_angles(model: Any) -> Any:
    """A model of its own for sines and cosines of what the model is called with, which are its inputs from
    then on; None without any. In bf16 a timestep of 731.5 is 732, and its product with a frequency off by
    more than a radian: what tiny Flux.1's transformer answers was 0.2 off, and is 0.01 as in torch."""
    sines, parents = [], dict[str, Any]()
    for sine in [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]:
        before = _before(sine)
        if not _LEARNED & {node.get_type_name() for node in before.values()}:
            sines.append(sine.output(0))
            parents |= before
    cut = []
    for number, sine in enumerate(sines):
        given = openvino.op.Parameter(sine.get_element_type(), sine.get_partial_shape())
        given.output(0).set_names({f"{_ANGLE}{number}"})
        for reader in list(sine.get_target_inputs()):
            reader.replace_source_output(given.output(0))
        cut.append(given)
    if not cut:
        return None
    taken = [node for node in model.get_parameters() if node.get_friendly_name() in parents]
    model.add_parameters(cut)
    model.validate_nodes_and_infer_types()
    of_its_own: Any = openvino.Model  # whose stub takes no outputs
    return of_its_own(sines, taken, "angles")


def _before(node: Any) -> dict[str, Any]:
    """All that the node is computed of, by name."""
    left, seen = [node], dict[str, Any]()
    while left:
        sources = [value.get_node() for value in left.pop().input_values()]
        left += [source for source in sources if source.get_friendly_name() not in seen]
        seen |= {source.get_friendly_name(): source for source in sources}
    return seen


def _model(graph: Graph, core: Any) -> tuple[Any, list[mmap.mmap]]:
    """The graph as OpenVINO reads it, and the mapped files that its constants are made of. OpenVINO gets no
    file: it follows no link, as the hub's cache has them. So weights are inputs until they are constants."""
    proto, maps = type(graph.model)(), dict[Path, mmap.mmap]()
    proto.CopyFrom(graph.model)
    weights = [tensor for tensor in graph.model.graph.initializer if tensor.data_location == tensor.EXTERNAL]
    inside = [tensor for tensor in graph.model.graph.initializer if tensor.data_location != tensor.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inside)
    known = {value.name for value in proto.graph.input}
    inputs = (helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights)
    proto.graph.input.extend(value for value in inputs if value.name not in known)
    model = core.read_model(proto.SerializeToString())
    parameters = {each.get_friendly_name(): each for each in model.get_parameters()}
    for weight in weights:
        tensor, parameter = graph.tensors[weight.name], parameters[weight.name]
        if tensor.file not in maps:
            with tensor.file.open("rb") as file:
                maps[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = helper.tensor_dtype_to_np_dtype(weight.data_type)
        values = np.frombuffer(maps[tensor.file], dtype, tensor.count, tensor.offset)
        constant = openvino.op.Constant(values.reshape(tensor.shape), shared_memory=True)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(constant.output(0))
        model.remove_parameter(parameter)
    return model, list(maps.values())
