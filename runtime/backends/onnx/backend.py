"""The ONNX Runtime engine: runs graphs laid out as `tightfit export --to onnx` and Optimum write them, on the
provider that detection found."""

from __future__ import annotations

import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime

from ...costs.footprint import Footprint, Trace, peak
from ...errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from ...machine.hardware import Hardware
from ...machine.process import release
from ...machine.providers import CPU_PROVIDER, provider_name
from ...models.families.family import Extent, GraphNames, Role
from ...models.graph import Graph
from ...models.spec import Component, ModelSpec
from ...placement import Placement
from ...rules import Rule, first_broken
from ..protocol import Session
from ..sent import Sent
from .call import answers, check_types, feeds_of, for_runtime, input_shapes, newest_opset, taken_shapes
from .footprint import PER_NODE_BYTES, call_footprint, call_of, call_problem, loading_bytes, weight_bytes
from .meters import DeviceMeter, ProcessMeter

CUDA_PROVIDER = "CUDAExecutionProvider"
SESSION_SECONDS = 2e-4  # per operator of a graph, for ONNX Runtime to prepare it
# Operators whose provider matters. ONNX Runtime deliberately keeps pure shape arithmetic on the CPU.
_HEAVY = {
    "Conv",
    "MatMul",
    "Gemm",
    "Attention",
    "MultiHeadAttention",
    "LayerNormalization",
    "DequantizeLinear",
    "Resize",
    "Gelu",
}


@dataclass(frozen=True)
class Case:
    """What the rules below look at: a component, its placement, the hardware and the size."""

    spec: ModelSpec
    component: Component
    placement: Placement
    hardware: Hardware
    extent: Extent

    @property
    def graph(self) -> Graph:
        assert self.component.graph is not None  # the first rule
        return self.component.graph

    @property
    def engine(self) -> str:
        return {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[self.placement.backend]

    @property
    def providers(self) -> str:
        return ", ".join(self.hardware.onnx_providers()) or "nothing, as it is not installed"

    @functools.cached_property
    def other_shape(self) -> str | None:
        """The first input whose fixed shape in the graph differs from the one this size needs, in words."""
        shapes = input_shapes(self.spec, self.component, self.extent)
        for (name, shape), (_, sides) in zip(shapes, self.graph.inputs.values(), strict=True):
            if any(
                isinstance(side, int) and side != wanted for side, wanted in zip(sides, shape, strict=False)
            ):
                return f"{name} of {list(sides)} only, not of {list(shape)}"
        return None

    @functools.cached_property
    def call_problem(self) -> str | None:
        return call_problem(self.spec, self.component, self.placement.provider == CPU_PROVIDER, self.extent)


# What no engine can do with a graph: before an engine's own rules, and after them.
FIRST: tuple[Rule[Case], ...] = (
    Rule(
        lambda case: case.component.graph is None,
        lambda case: f"the {case.component.name} is not here as ONNX: export the model with --to onnx",
    ),
    Rule(
        lambda case: bool(case.extent.cache),
        lambda case: (
            f"{case.engine} runs all of a graph in each step: leave out --step-cache, or use --backend torch"
        ),
    ),
    Rule(
        lambda case: bool(case.component.patches),
        lambda case: (
            f"an ONNX graph has its weights fixed, and adapters change those of the {case.component.name}: "
            f"leave out --backend {case.placement.backend}, or the adapters"
        ),
    ),
)
AS_MADE: tuple[Rule[Case], ...] = (
    Rule(
        lambda case: case.placement.residency == "streamed",
        lambda case: f"{case.engine} cannot stream weights: leave out --residency streamed",
    ),
    Rule(
        lambda case: case.placement.attention != "sdpa",
        lambda case: f"an ONNX graph has its own attention: leave out --attention {case.placement.attention}",
    ),
    Rule(
        lambda case: case.placement.tiling != "whole",
        lambda case: f"an ONNX graph runs whole: leave out --tiling {case.placement.tiling}",
    ),
)
FOLLOWED: tuple[Rule[Case], ...] = (
    Rule(
        lambda case: case.other_shape,
        lambda case: (
            f"{case.graph.file} takes {case.other_shape}: "
            f"ask for what it was made for{', a shorter prompt' if case.extent.chunks > 1 else ''}, "
            "or export the model again"
        ),
    ),
    Rule(lambda case: case.call_problem, lambda case: case.call_problem or ""),
)

_REFUSALS: tuple[Rule[Case], ...] = (
    *FIRST,
    Rule(
        lambda case: case.placement.provider not in case.hardware.onnx_providers(),
        lambda case: f"ONNX Runtime has no {case.placement.provider} here, but {case.providers}",
    ),
    Rule(
        lambda case: (
            case.placement.provider == CUDA_PROVIDER
            and case.placement.compute == "fp16"
            and case.hardware.half_is_broken
        ),
        lambda case: (
            f"fp16 convolutions return NaN on {case.hardware.name}: "
            "export the model in fp32, or choose --provider cpu"
        ),
    ),
    *AS_MADE,
    Rule(
        lambda case: case.graph.opset > newest_opset(),
        lambda case: (
            f"{case.graph.file} is of opset {case.graph.opset}, ONNX Runtime {onnxruntime.__version__} knows "
            f"opset {newest_opset()}: install a newer one, or export the model again"
        ),
    ),
    *FOLLOWED,
)


class OnnxBackend:
    title: ClassVar[str] = "ONNX Runtime"
    has_providers: ClassVar[bool] = True
    converts: ClassVar[bool] = False
    for_one_shape: ClassVar[bool] = False

    def __init__(self, device: str) -> None:
        self.meter = ProcessMeter() if device == "cpu" else DeviceMeter(device)
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        # For components placed on the CPU beside a GPU: the host has a meter of its own, without a limit.
        self._host = self.meter if device == "cpu" else ProcessMeter()

    rules: ClassVar = _REFUSALS

    @classmethod
    def refuses(
        cls,
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> str | None:
        """Why the component cannot run with this placement on that hardware at that size, or None if it
        can."""
        return first_broken(cls.rules, Case(spec, component, placement, hardware, extent))

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """Raise TightfitError for a graph that belongs to another component, or that cannot be followed."""
        assert component.graph is not None
        file, given = component.graph.file, component.graph.inputs.keys()
        names = component.network.graph
        wanted = taken_shapes(spec, component, Extent(1, *spec.some_size)).keys()
        if given - names.zeros != wanted - names.zeros or not wanted <= given:
            raise TightfitError(
                f"{file} has the inputs {', '.join(sorted(given))}, "
                f"its config wants {', '.join(sorted(wanted))}: "
                "files of different models were mixed; copy or export the model again"
            )
        check_types(component.graph)
        answers(component.graph, names)
        if problem := call_problem(spec, component, True, Extent(1, *spec.some_size)):
            raise TightfitError(problem)

    @staticmethod
    def arithmetics(graph: Graph, hardware: Hardware) -> tuple[tuple[str, str], ...]:  # noqa: ARG004
        """As it is stored."""
        return ((graph.precision, graph.compute),)

    @staticmethod
    def preparing_seconds(graph: Graph) -> float:
        return SESSION_SECONDS * len(graph.model.graph.node)

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> Footprint:
        """Weights as the provider holds them, and one call of the graph (dryrun.py) in ONNX Runtime's arena.
        Zero bytes for a graph that is refused."""
        assert component.graph is not None
        on_cpu = placement.provider == CPU_PROVIDER
        call = call_of(component.graph, on_cpu, input_shapes(spec, component, extent))
        usage = Footprint((), 0, Trace((), (), ()), ()) if isinstance(call, str) else call.footprint
        if on_cpu and hardware.device != "cpu":  # no GPU memory
            nothing = Trace((), (), usage.trace.operations)
            return Footprint((), 0, nothing, (), host=peak("cpu", (), usage))
        return usage

    def load(self, component: Component, placement: Placement) -> OnnxSession:
        """Raises OutOfMemoryError if there is no room, and TightfitError for a graph that cannot run."""
        assert component.graph is not None
        meter = self._host if placement.provider == CPU_PROVIDER else self.meter
        session = OnnxSession(component.graph, placement.provider, meter, component.network.graph)
        session.stays = component.role is Role.CONTROL
        self._sessions[component.name] = session
        return session

    def adapt(self, session: OnnxSession, component: Component, placement: Placement) -> bool:  # noqa: ARG002
        return False

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Nothing is cached between requests."""

    def trim(self, peak_bytes: int) -> tuple[str, ...]:
        """Close every session if together they hold more than `peak_bytes`: an arena that grew for a larger
        picture never shrinks."""
        if self.meter.held() <= peak_bytes:
            return ()
        crowded = dict(self._sessions)
        self._sessions.clear()
        for session in crowded.values():
            session.close()
        return tuple(crowded)


class Residual:
    """What a session answers another: a value that stays on the GPU, in its session's arena."""

    def __init__(self, value: Any) -> None:
        self.value, self.shape = value, tuple(value.shape())
        self.ndim = len(self.shape)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.value.numpy()


class OnnxSession:
    """A graph, called with arrays by the names that Session uses. What it answers is on the host, or `stays`
    on the device."""

    stays = False

    def __init__(self, graph: Graph, provider: str, meter: ProcessMeter, names: GraphNames) -> None:
        self.graph, self.provider, self.meter, self._names = graph, provider, meter, names
        self._zeros = {
            name: np.zeros((1,) * len(sides), onnx.helper.tensor_dtype_to_np_dtype(kind))
            for name, (kind, sides) in graph.inputs.items()
            if name in names.zeros
        }
        on_cpu = provider == CPU_PROVIDER
        self._arena = 0
        self._held = sum(weight_bytes(graph, on_cpu)) + PER_NODE_BYTES * len(graph.model.graph.node)
        meter.reach(self._held + (loading_bytes(graph) if on_cpu else 0))
        self.session: Any = None
        options = session_options()
        source: Any = str(graph.file)
        if rewritten := for_runtime(graph):
            source, folder = rewritten
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
        chosen: list[Any] = [(provider, provider_options(provider, meter.room()))]
        if provider != CPU_PROVIDER:
            chosen.append(CPU_PROVIDER)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with errors_explained(graph):
            # No fallback: ONNX Runtime would silently use the CPU when a provider has no memory.
            self.session = onnxruntime.InferenceSession(source, options, providers=chosen, enable_fallback=0)
        if provider not in self.session.get_providers():
            self.session = None
            raise TightfitError(
                f"ONNX Runtime cannot load {provider} here: {_cure(provider)}, or choose another provider"
            )
        self.notices = (
            elsewhere(self.session.get_provider_graph_assignment_info(), provider, graph)
            if len(chosen) > 1
            else ()
        )
        self.outputs = answers(graph, names)
        self._sent = Sent()
        meter.hold(self._held)
        release()  # heap that packing has freed

    def __call__(self, **arrays: Any) -> tuple[Any, ...]:
        if self.session is None:
            raise TightfitError("the pipeline was closed while it was painting")
        given = {**self._zeros, **self._names.named(arrays)}
        sent = {name: one for name, one in given.items() if not (self._on_cuda and isinstance(one, Residual))}
        feeds = given | feeds_of(self.graph, sent)
        shapes = {name: feeds[name].shape for name in self.graph.inputs if name in feeds}
        call_bytes = call_footprint(self.graph, self.provider == CPU_PROVIDER, tuple(shapes.items())).kept
        if call_bytes > self._arena:
            self.meter.reach(call_bytes - self._arena)
            self.meter.hold(call_bytes - self._arena)  # an arena never shrinks
            self._arena = call_bytes
        with errors_explained(self.graph):
            # On a CPU answers are arrays over ONNX Runtime's own memory, which another session reads there.
            outs = self._on_device(given, feeds) if self._on_cuda else self.session.run(self.outputs, feeds)
        if self.stays:
            return tuple(outs)
        first, *others = (np.asarray(out, np.float32) for out in outs)
        return self._names.gives(first, arrays), *others

    @property
    def _on_cuda(self) -> bool:
        return self.provider == CUDA_PROVIDER

    def _on_device(self, given: Mapping[str, Any], feeds: Mapping[str, Any]) -> Any:
        """Run on CUDA. An input stays on the device while the caller passes the same array; outputs are
        allocated there."""
        binding = self.session.io_binding()
        for name, feed in feeds.items():
            if isinstance(feed, Residual):
                binding.bind_ortvalue_input(name, feed.value)
                continue
            send = functools.partial(onnxruntime.OrtValue.ortvalue_from_numpy, feed, "cuda", 0)
            binding.bind_ortvalue_input(name, self._sent.get(name, given[name], send))
        for name in self.outputs:
            binding.bind_output(name, "cuda", 0)
        self.session.run_with_iobinding(binding)
        self.meter.look()
        if self.stays:
            return [Residual(value) for value in binding.get_outputs()]
        return binding.copy_outputs_to_cpu()

    def close(self) -> None:
        if self.session is not None:
            self.session = None
            self._sent.clear()
            self.meter.hold(-self._held - self._arena)
            self._arena = 0
            release()


def _cure(provider: str) -> str:
    """What to install when a provider's libraries are not found."""
    if provider == CUDA_PROVIDER:
        return "pip install 'onnxruntime-gpu[cuda,cudnn]', of the CUDA version that torch and the driver have"
    return f"install what {provider_name(provider)} needs"


def elsewhere(assigned: Iterable[Any], provider: str, graph: Graph) -> tuple[str, ...]:
    """One line that names the operators that run on the CPU because the provider has no kernels for them."""
    nodes = (node for part in assigned if part.ep_name != provider for node in part.get_nodes())
    kinds = Counter(node.op_type for node in nodes if node.op_type.removeprefix("Fused") in _HEAVY)
    if not kinds:
        return ()
    most = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
    return (
        f"{kinds.total()} operators of the {graph.file.parent.name} run on the CPU, "
        f"as {provider} has none for them: {most}",
    )


def session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised and explained, not logged
    # Each output gets a buffer that is freed after its last use. ONNX Runtime's own reuse keeps a buffer of a
    # weight's shape from the first layer of that shape to the last: 800 MB instead of 303 for SD 1.5's U-Net
    # in int4 at 512.
    options.enable_mem_reuse = options.enable_mem_pattern = False
    # Spinning threads would take the cores from other engines between calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def provider_options(provider: str, room: int | None) -> dict[str, str]:
    """Options that keep a provider's arena within `room` bytes; None sets no limit."""
    if provider != CUDA_PROVIDER:
        return {}
    options = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    options |= {"cudnn_conv_use_max_workspace": "0", "use_tf32": "0"}  # exact fp32
    return options if room is None else options | {"gpu_mem_limit": str(room)}


_NO_MEMORY = (
    "out of ?memory|OutOfMemory|Failed to allocate memory|smaller than requested bytes|bad_alloc|ALLOC_FAILED"
)


@contextmanager
def errors_explained(graph: Graph, other: str = "provider") -> Iterator[None]:
    """ONNX Runtime has an exception class for every status but none for memory, so the text decides."""
    try:
        yield
    except Exception as error:
        if re.search(_NO_MEMORY, str(error)) or out_of_memory(error):
            raise OutOfMemoryError(first_line(error)) from error
        raise TightfitError(
            f"{graph.file} cannot be run ({first_line(error)}): export it again, or use another {other}"
        ) from error
