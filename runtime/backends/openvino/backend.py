"""The OpenVINO engine: runs the graphs that ONNX Runtime runs, compiled for one shape, on a CPU or an Intel
GPU."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
import openvino

from ...costs.footprint import Footprint, Trace
from ...errors import TightfitError
from ...machine.hardware import Hardware
from ...machine.process import release
from ...models.families.family import Extent, GraphNames, Role
from ...models.graph import Graph
from ...models.spec import Component, ModelSpec
from ...placement import STORED, Placement
from ...rules import Rule
from ..onnx.backend import AS_MADE, FIRST, FOLLOWED, Case, OnnxBackend, errors_explained
from ..onnx.call import Inputs, answers, feeds_of, input_shapes
from ..onnx.meters import ProcessMeter
from .compiled import Compiled
from .footprint import call_footprint

DEVICES = {"cpu": "CPU", "xpu": "GPU"}  # OpenVINO's names
_HALVES = {"cpu": ("bf16",), "xpu": ("fp16",)}  # what it computes graphs of fp32 in, where these pay
COMPILE_SECONDS = 6e-9  # per weight, to convert and pack it
_ANOTHER = "leave out --backend openvino"


@functools.cache
def _sees_gpu() -> bool:
    """Asking loads the libraries for all devices. Several GPUs are numbered: GPU.0."""
    return any(name.startswith("GPU") for name in openvino.Core().available_devices)


_REFUSALS: tuple[Rule[Case], ...] = (
    *FIRST,
    Rule(
        lambda case: case.hardware.device not in DEVICES,
        lambda case: (
            f"OpenVINO runs on CPUs and on Intel's GPUs, not on {case.hardware.name}: "
            f"{_ANOTHER}, or choose --device cpu"
        ),
    ),
    Rule(
        lambda case: case.hardware.device == "xpu" and case.hardware.providers is None and not _sees_gpu(),
        lambda case: (
            f"OpenVINO does not see {case.hardware.name}: install its driver, or choose --device cpu"
        ),
    ),
    Rule(
        lambda case: case.graph.precision in STORED,
        lambda case: (
            f"OpenVINO unpacks the {case.graph.precision} weights of {case.graph.file} when it compiles, "
            f"to more memory than fp32's: {_ANOTHER}, or export the model with --precision fp32"
        ),
    ),
    Rule(
        lambda case: case.graph.compute == "fp16",
        lambda case: (
            f"what OpenVINO takes for {case.graph.file}, a graph of fp16, has not been measured: "
            f"{_ANOTHER}, or export the model with --precision fp32"
        ),
    ),
    Rule(
        lambda case: case.component.role is Role.CONTROL or bool(case.component.network.graph.zeros),
        f"ControlNets run by ONNX Runtime, not by OpenVINO: {_ANOTHER}",
    ),
    *AS_MADE,
    *FOLLOWED,
)


class OpenVinoBackend(OnnxBackend):
    title: ClassVar[str] = "OpenVINO"
    has_providers: ClassVar[bool] = False
    converts: ClassVar[bool] = True
    for_one_shape: ClassVar[bool] = True
    rules: ClassVar = _REFUSALS

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._device = DEVICES[device]

    @staticmethod
    def arithmetics(graph: Graph, hardware: Hardware) -> tuple[tuple[str, str], ...]:
        """Of plain weights, what it computes in here; those in 8 or 4 bits as they are stored."""
        if graph.precision in STORED:
            return ((graph.precision, graph.compute),)
        halves = (half for half in _HALVES.get(hardware.device, ()) if half in hardware.precisions)
        return tuple((kind, kind) for kind in (*halves, "fp32"))

    @staticmethod
    def preparing_seconds(graph: Graph) -> float:
        weights = sum(tensor.count for tensor in graph.tensors.values())
        return OnnxBackend.preparing_seconds(graph) + COMPILE_SECONDS * weights

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,  # noqa: ARG004
        extent: Extent,
    ) -> Footprint:
        """Weights as they are packed, and one call's buffers. Zero bytes for a graph that is refused."""
        assert component.graph is not None
        try:
            return call_footprint(component.graph, placement.compute, input_shapes(spec, component, extent))
        except Exception:  # onnx documents no exception class; `refuses` says why
            return Footprint((), 0, Trace((), (), ()), ())

    def load(self, component: Component, placement: Placement) -> Any:
        """Raises OutOfMemoryError if there is no room for the weights. They are read at the first call."""
        assert component.graph is not None
        graph, names = component.graph, component.network.graph
        session = OpenVinoSession(graph, self._device, placement.compute, self.meter, names)
        self._sessions[component.name] = session
        return session


class OpenVinoSession:
    """A graph, called with arrays by the names that Session uses. It is compiled for the shape of the last
    call, and again where the shape changes."""

    def __init__(
        self, graph: Graph, device: str, compute: str, meter: ProcessMeter, names: GraphNames
    ) -> None:
        self.graph, self.meter, self._device, self._compute = graph, meter, device, compute
        self._names, self.notices = names, ()
        self.outputs = answers(graph, names)
        self._compiled: Compiled | None = None
        self._shapes: Inputs = ()
        self._held, self._open = 0, True

    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if not self._open:
            raise TightfitError("the pipeline was closed while it was painting")
        feeds = feeds_of(self.graph, self._names.named(arrays))
        shapes = tuple((name, array.shape) for name, array in feeds.items())
        with errors_explained(self.graph, "engine"):
            if self._compiled is None or shapes != self._shapes:
                self._compiled = self._compile(shapes)
            first, *others = self._compiled(feeds, self.outputs)
        return self._names.gives(first, arrays), *others

    def _compile(self, shapes: Inputs) -> Compiled:
        self._let_go()
        usage = call_footprint(self.graph, self._compute, shapes)
        self.meter.reach(usage.held_bytes + max(usage.loading, usage.kept))
        compiled = Compiled(self.graph, self._device, self._compute, shapes)
        self._shapes, self._held = shapes, usage.held_bytes + usage.kept
        self.meter.hold(self._held)
        release()  # heap that packing has freed
        return compiled

    def _let_go(self) -> None:
        self._compiled = None
        self.meter.hold(-self._held)
        self._held = 0
        release()

    def close(self) -> None:
        if self._open:
            self._let_go()
            self._open = False
