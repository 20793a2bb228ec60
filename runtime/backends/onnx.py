"""The ONNX Runtime engine: graphs as `tightfit export --to onnx` and Optimum write them, on the provider that detection found."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ..allocator import OnnxArena
from ..errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from ..hardware import CPU_PROVIDER, Hardware, provider_name
from ..memory import END, Footprint, Trace, peak, replay, shown
from ..onnx_file import Graph
from ..plan import Placement
from ..process import ProcessPeak, release, resident
from ..spec import Component, ModelSpec
from . import onnx_trace

CUDA_PROVIDER = "CUDAExecutionProvider"
_FLOAT = onnx.TensorProto.FLOAT
_WHOLE = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
_REAL = {_FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
_ANSWERS = {"out_sample", "sample", "last_hidden_state", "text_embeds"}
# What a Session's arrays are called in the graphs.
NAMES = {
    "tokens": "input_ids",
    "hidden": "encoder_hidden_states",
    "time_condition": "timestep_cond",
    "latents": "latent_sample",
}  # fmt: skip
_PACKED = {"Conv", "MatMul", "Gemm"}
# Bytes that ONNX Runtime takes on a CPU for itself, and a session for an operator of its graph, as measured on SD 1.5.
_SESSION, _PER_NODE = 20 * 2**20, 10_000
# Operators whose place matters; ONNX Runtime keeps what only computes shapes on the CPU, and means to.
_HEAVY = {"Conv", "MatMul", "Gemm", "Attention", "MultiHeadAttention", "LayerNormalization", "DequantizeLinear", "Resize", "Gelu"}


class OnnxBackend:
    def __init__(self, device: str) -> None:
        self.meter = ProcessMeter() if device == "cpu" else DeviceMeter(device)
        self._host = self.meter if device == "cpu" else ProcessMeter()  # of what runs beside the GPU, which has no limit of its own

    @staticmethod
    def refuses(
        spec: ModelSpec, component: Component, placement: Placement, hardware: Hardware, size: tuple[int, int, int]
    ) -> str | None:
        """Why this engine cannot run a component so on that hardware for that size, or None if it can."""
        there = hardware.onnx_providers()
        if component.graph is None:
            return f"the {component.name} is not here as ONNX: export the model with --to onnx"
        if placement.provider not in there:
            return f"ONNX Runtime has no {placement.provider} here, but {', '.join(there) or 'nothing, as it is not installed'}"
        if placement.provider == CUDA_PROVIDER and placement.compute == "fp16" and hardware.half_is_broken:
            return f"fp16 convolutions answer NaN on {hardware.name}: export the model in fp32, or choose --provider cpu"
        if placement.residency == "streamed":
            return "ONNX Runtime cannot stream weights: leave out --residency streamed"
        if placement.attention != "sdpa":
            return f"an ONNX graph has its own attention: leave out --attention {placement.attention}"
        if placement.tiling != "whole":
            return f"an ONNX graph runs whole: leave out --tiling {placement.tiling}"
        newest = newest_opset()
        if component.graph.opset > newest:
            return (
                f"{component.graph.file} is of opset {component.graph.opset}, ONNX Runtime {onnxruntime.__version__} knows opset "
                f"{newest}: install a newer one, or export the model again"
            )
        for (name, shape), (_, sides) in zip(_shapes(spec, component, size), component.graph.inputs.values(), strict=True):
            if any(isinstance(side, int) and side != wanted for side, wanted in zip(sides, shape, strict=False)):
                return (
                    f"{component.graph.file} takes {name} of {list(sides)} only, not of {list(shape)}: ask for what it was made "
                    "for, or export the model again"
                )
        return _problem(spec, component, placement.provider == CPU_PROVIDER, size)

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """Raise TightfitError for a graph that is not of this component, or that cannot be followed."""
        assert component.graph is not None
        file, given = component.graph.file, component.graph.inputs.keys()
        wanted = {NAMES.get(name, name) for name in spec.inputs(component, 1, *spec.some_size)}
        if given != wanted:
            raise TightfitError(
                f"{file} has the inputs {', '.join(sorted(given))}, its config wants {', '.join(sorted(wanted))}: "
                "files of different models were mixed; copy or export the model again"
            )
        _check_types(component.graph)
        answers(component.graph, spec.family == "sdxl")
        if problem := _problem(spec, component, True, (1, *spec.some_size)):
            raise TightfitError(problem)

    @staticmethod
    def footprint(
        spec: ModelSpec, component: Component, placement: Placement, hardware: Hardware, size: tuple[int, int, int]
    ) -> Footprint:
        """Weights as the provider holds them, and one call of the graph by onnx_trace.py, in ONNX Runtime's arena. Nothing, of
        what is refused."""
        assert component.graph is not None
        on_cpu = placement.provider == CPU_PROVIDER
        call = _call(component.graph, on_cpu, _shapes(spec, component, size))
        whole = Footprint((), 0, Trace((), (), ()), ()) if isinstance(call, str) else call.footprint
        if on_cpu and hardware.device != "cpu":  # it takes nothing of the GPU's memory
            nothing = Trace((), (), whole.trace.operations)
            return Footprint((), 0, nothing, (), host=peak("cpu", (), whole))
        return whole

    def load(self, spec: ModelSpec, component: Component, placement: Placement) -> OnnxSession:
        """Raises OutOfMemoryError if there is no room for it, TightfitError for a graph that cannot be run."""
        assert component.graph is not None
        meter = self._host if placement.provider == CPU_PROVIDER else self.meter
        return OnnxSession(component.graph, placement.provider, meter, spec.family == "sdxl")

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Nothing is kept."""


class OnnxSession:
    """A graph, called with arrays by the names that Session has for them."""

    def __init__(self, graph: Graph, provider: str, meter: ProcessMeter, sdxl: bool = False) -> None:
        self.graph, self.provider, self.meter = graph, provider, meter
        on_cpu = provider == CPU_PROVIDER
        self._arena = 0
        self._held = sum(_weights(graph, on_cpu)) + _PER_NODE * len(graph.model.graph.node)
        meter.reach(self._held + (_loading_bytes(graph) if on_cpu else 0))
        self.session: Any = None
        options = session_options()
        source: Any = str(graph.file)
        if rewritten := _for_runtime(graph):
            source, folder = rewritten
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        chosen: list[Any] = [(provider, provider_options(provider, meter.room()))]
        if provider != CPU_PROVIDER:
            chosen.append(CPU_PROVIDER)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with _errors_explained(graph):
            # without falling back on the CPU, which it does where there is no memory for a provider
            self.session = onnxruntime.InferenceSession(source, options, providers=chosen, enable_fallback=0)
        if provider not in self.session.get_providers():
            self.session = None
            raise TightfitError(f"ONNX Runtime cannot load {provider} here: {_cure(provider)}, or choose another provider")
        self.notices = elsewhere(self.session.get_provider_graph_assignment_info(), provider, graph) if len(chosen) > 1 else ()
        self.inputs = graph.inputs
        self.outputs = answers(graph, sdxl)
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}
        meter.hold(self._held)
        release()  # what packing left in the heap

    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.session is None:
            raise TightfitError("the pipeline was closed while it was painting")
        feeds = {}
        for name, array in arrays.items():
            name = NAMES.get(name, name)
            kind, sides = self.inputs[name]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            feeds[name] = np.asarray(array if array.ndim else array.reshape([1] * len(sides)), dtype, "C")
        shapes = {name: array.shape for name, array in feeds.items()}
        taken = call_footprint(self.graph, self.provider == CPU_PROVIDER, tuple(shapes.items())).kept
        if taken > self._arena:
            self.meter.reach(taken - self._arena)
            self.meter.hold(taken - self._arena)  # an arena gives nothing back
            self._arena = taken
        with _errors_explained(self.graph):
            on_device = self.provider == CUDA_PROVIDER
            outs = self._on_device(arrays, feeds) if on_device else self.session.run(self.outputs, feeds)
        return tuple(np.asarray(out, np.float32) for out in outs)

    def _on_device(self, given: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """On CUDA: inputs stay there as long as the caller passes the same array; answers are made there, in their own memory."""
        binding = self.session.io_binding()
        for array, (name, feed) in zip(given.values(), feeds.items(), strict=True):
            kept, there = self._sent.get(name, (None, None))
            if kept is not array:
                there = onnxruntime.OrtValue.ortvalue_from_numpy(feed, "cuda", 0)
                self._sent[name] = array, there
            binding.bind_ortvalue_input(name, there)
        for name in self.outputs:
            binding.bind_output(name, "cuda", 0)
        self.session.run_with_iobinding(binding)
        self.meter.look()
        return binding.copy_outputs_to_cpu()

    def close(self) -> None:
        if self.session is not None:
            self.session = None
            self._sent.clear()
            self.meter.hold(-self._held - self._arena)
            self._arena = 0
            release()


def _cure(provider: str) -> str:
    """What to install where a provider's libraries are not found."""
    if provider == CUDA_PROVIDER:
        return "pip install 'onnxruntime-gpu[cuda,cudnn]', of the CUDA version that torch and the driver have"
    return f"install what {provider_name(provider)} needs"


def answers(graph: Graph, sdxl: bool) -> list[str]:
    """Those of a graph's outputs that a Session answers with. Raises TightfitError if it has them not.

    SDXL wants what its text encoders' last layer was given: of states before and after each layer the last but one.
    """
    there = [value.name for value in graph.model.graph.output]
    states = [name for name in there if name.startswith("hidden_states.")]
    text = "input_ids" in graph.inputs
    if text and sdxl and len(states) > 1:
        return [f"hidden_states.{len(states) - 2}", *(["text_embeds"] if "text_embeds" in there else [])]
    wanted = "out_sample" if "timestep" in graph.inputs else "sample" if not text else "last_hidden_state"
    if wanted not in there or (text and sdxl):
        needs = "hidden_states.0 and so on" if text and sdxl else wanted
        raise TightfitError(f"{graph.file} answers {', '.join(there) or 'nothing'}, not {needs}: export the model again")
    return [wanted]


def elsewhere(assigned: Iterable[Any], provider: str, graph: Graph) -> tuple[str, ...]:
    """In one line, the operators of a graph that its provider has no kernels for, so that they run on the CPU."""
    nodes = (node for part in assigned if part.ep_name != provider for node in part.get_nodes())
    kinds = Counter(node.op_type for node in nodes if node.op_type.removeprefix("Fused") in _HEAVY)
    if not kinds:
        return ()
    most = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
    return (f"{kinds.total()} operators of the {graph.file.parent.name} run on the CPU, as {provider} has none for them: {most}",)


def session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and explained
    # Buffers are made for each answer and given back after its last use. With ONNX Runtime's own reuse one of a weight's shape is
    # kept from the first layer of that shape to the last: 800 MB instead of 303 for SD 1.5's U-Net in int4 at 512.
    options.enable_mem_reuse = options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")  # other engines' threads want the cores between calls
    return options


def provider_options(provider: str, room: int | None) -> dict[str, str]:
    """What keeps a provider to `room` bytes, or as many as it wants if that is None."""
    if provider != CUDA_PROVIDER:
        return {}
    options = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
    options |= {"cudnn_conv_use_max_workspace": "0", "use_tf32": "0"}  # fp32 is to be exact
    return options if room is None else options | {"gpu_mem_limit": str(room)}


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
    """A copy with what ONNX Runtime runs in less memory: attention that keeps no scores, in place of the operator that does."""
    from onnx import helper

    copy = type(model)()
    copy.CopyFrom(model)
    changed = False
    for node in copy.graph.node:
        heads = onnx_trace.attribute(node, "q_num_heads")
        plain = len(node.input) == 3 and heads and not onnx_trace.attribute(node, "is_causal", 0)
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx") and plain:
            scale = onnx_trace.attribute(node, "scale")
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


def _once(graph: Graph, key: Any, compute: Any) -> Any:
    """Kept with the graph, and gone with it."""
    if key not in graph.known:
        while len(graph.known) >= _KEPT:
            del graph.known[next(iter(graph.known))]
        graph.known[key] = compute()
    return graph.known[key]


def _model(graph: Graph) -> Any:
    return _once(graph, ("model",), lambda: _rewritten(graph.model))


def _for_runtime(graph: Graph) -> tuple[bytes, Path] | None:
    """The graph to be run and the folder of its weights, if they are not as the file has them. Of linked weights, as in the hub's
    cache, it is the place that they are in, as ONNX Runtime follows no links out of the folder it is given."""
    model, folder = _model(graph), graph.file.parent
    linked = {name: tensor.file.resolve() for name, tensor in graph.tensors.items() if tensor.file.is_symlink()}
    linked = {name: file for name, file in linked.items() if graph.tensors[name].file != graph.file}
    if linked:
        copy = type(model)()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            for each in tensor.external_data if tensor.name in linked else ():
                each.value = linked[tensor.name].name if each.key == "location" else each.value
        model, folder = copy, next(iter(linked.values())).parent
    return None if model is graph.model else (model.SerializeToString(), folder.absolute())


@dataclass(frozen=True)
class _Call:
    """What a call of a graph takes, and the shapes of what it answers."""

    footprint: Footprint
    answers: Mapping[str, tuple[int, ...]]


Inputs = tuple[tuple[str, tuple[int, ...]], ...]


def call_footprint(graph: Graph, on_cpu: bool, shapes: Inputs) -> Footprint:
    """What a graph takes when it is called with inputs of these shapes, by their names. Raises TightfitError if it cannot be."""
    call = _call(graph, on_cpu, shapes)
    if isinstance(call, str):
        raise TightfitError(f"{graph.file} is no graph that can be followed ({call}): export the model again")
    return call.footprint


def _call(graph: Graph, on_cpu: bool, shapes: Inputs) -> _Call | str:
    """A call with inputs of these shapes, or why there can be none."""

    def follow() -> _Call | str:
        try:
            return _followed(graph, on_cpu, dict(shapes))
        except Exception as error:  # onnx has classes of its own, and promises none
            return first_line(error)

    return _once(graph, ("call", on_cpu, shapes), follow)


def _followed(graph: Graph, on_cpu: bool, inputs: Mapping[str, tuple[int, ...]]) -> _Call:
    own = functools.partial(_own, graph.tensors.keys(), on_cpu)
    shapes = onnx_trace.Shapes(_model(graph), inputs, wide=on_cpu)
    call = onnx_trace.trace_of(shapes, own)
    arena, held = OnnxArena(exact=not on_cpu), [_PER_NODE * len(graph.model.graph.node)]
    for i, count in enumerate(_weights(graph, on_cpu)):
        if on_cpu:
            held.append(count)
        else:  # a GPU's arena has them too
            arena.allocate(-1 - i, count)
    held.append(arena.peak)
    replay(arena, call.events, ())
    taken = arena.peak - held[-1]
    trace = Trace(((1, taken), (2, _SESSION)), (), call.operations)  # the process takes the latter once, for all sessions
    footprint = Footprint(tuple(held), _SESSION + _loading_bytes(graph) if on_cpu else 0, trace, (), kept=taken)
    return _Call(footprint, {value.name: shapes.shapes[value.name] for value in graph.model.graph.output})


def _check_types(graph: Graph) -> None:
    """Raise TightfitError for inputs and answers that are no tensors of numbers, or of another kind than they mean."""
    for name, (kind, _) in (graph.inputs | graph.outputs).items():
        known = {"input_ids": _WHOLE, "timestep": _WHOLE | _REAL, "time_ids": _WHOLE | _REAL}.get(name, _REAL)
        if kind not in known and (name in graph.inputs or name in _ANSWERS):
            kinds = {value: key.lower() for key, value in onnx.TensorProto.DataType.items()} | {0: "no tensor"}
            raise TightfitError(f"{graph.file} has {name} as {kinds.get(kind, kind)}: export the model again")


def _problem(spec: ModelSpec, component: Component, on_cpu: bool, size: tuple[int, int, int]) -> str | None:
    """Why a graph cannot be called for a batch and the picture's height and width in pixels, or None if it can."""
    graph, inputs = component.graph, _shapes(spec, component, size)
    assert graph is not None
    call = _call(graph, on_cpu, inputs)
    if isinstance(call, str):
        if _halves_evenly(spec, component, size):
            return f"{graph.file} is no graph that can be followed ({call}): export the model again"
        step = _even_step(spec, component)
        near = "x".join(str(max(step, round(side / step) * step)) for side in (size[2], size[1]))
        return (
            f"{graph.file} can do multiples of {step} pixels only, as it was exported for these: ask for {near}, or export the "
            "model again, with --to onnx"
        )
    (name, *_), given = answers(graph, spec.family == "sdxl"), dict(inputs)
    wanted: tuple[int | None, ...]
    if component.name == "unet":
        wanted = given["sample"]
    elif component.name == "vae_decoder":
        batch, _, height, width = given["latent_sample"]
        wanted = (batch, None, height * spec.downsampling, width * spec.downsampling)
    else:
        wanted = (*given["input_ids"], None)
    found = call.answers[name]
    if len(found) != len(wanted) or any(need not in (None, side) for need, side in zip(wanted, found, strict=True)):
        shown_wanted = [side or "any" for side in wanted]
        return f"{graph.file} answers {name} of {list(found)}, not of {shown_wanted}: export the model again"
    return None


def _even_step(spec: ModelSpec, component: Component) -> int:
    """Pixels of which each side of a picture is a multiple where the U-Net's latents halve evenly at each of its levels."""
    return spec.downsampling * 2 ** max(0, len(component.config.get("block_out_channels") or ()) - 1)


def _halves_evenly(spec: ModelSpec, component: Component, size: tuple[int, int, int]) -> bool:
    return component.name != "unet" or not any(side % _even_step(spec, component) for side in size[1:])


def _shapes(spec: ModelSpec, component: Component, size: tuple[int, int, int]) -> Inputs:
    """Shapes of the graph's inputs, by their names there, for a batch and the picture's height and width in pixels."""
    assert component.graph is not None
    wanted = {NAMES.get(name, name): shape for name, shape in spec.inputs(component, *size).items()}
    return tuple((name, wanted[name] or (1,) * len(sides)) for name, (_, sides) in component.graph.inputs.items())


def _own(weights: Any, on_cpu: bool, node: Any, shapes: onnx_trace.Shapes) -> onnx_trace.Steps:
    """What ONNX Runtime's kernels take beside their answers, as measured one by one (docs/decisions.md)."""
    ins, together = [name for name in node.input if name], onnx_trace.together
    if node.op_type == "GroupNormalization":
        return _function(shapes.bytes(ins[0]))
    if not on_cpu:
        return together()
    if node.op_type == "MultiHeadAttention":  # each operand, its heads apart
        return together(*(shapes.bytes(name) for name in ins[:3]))
    if node.op_type == "Attention":  # the scores
        q, k = (shapes.shapes[name] for name in ins[:2])
        heads = onnx_trace.attribute(node, "q_num_heads") or q[1]
        return together(4 * q[0] * heads * q[-2] * k[-2])
    if node.op_type == "Conv" and ins[1] in weights:  # in blocks of channels (NCHWc)
        return together(shapes.bytes(ins[0]))
    if node.op_type == "Conv":
        filters, *patch = shapes.shapes[ins[1]]
        spatial = int(np.prod(shapes.shapes[node.output[0]][2:]))
        if filters > spatial and int(np.prod(patch[1:])) > 1:  # every patch of a picture
            return together(4 * int(np.prod(patch)) * spatial)
    return together()


def _function(count: int) -> onnx_trace.Steps:
    """GroupNormalization is run as the operators that ONNX defines it by: cast, squared, less its mean, divided, cast, scaled, and
    moved, each in a buffer of its own."""
    cast, squared, centred, normal, back, scaled = range(6)
    steps = [(cast, count), (squared, count), (squared, END), (centred, count), (cast, END), (normal, count), (centred, END)]
    steps += [(back, count), (normal, END), (scaled, count), (back, END), (onnx_trace.OUT, 0), (scaled, END)]
    return steps


def _weights(graph: Graph, on_cpu: bool) -> Iterator[int]:
    """Bytes of each weight as the provider holds it.

    What is only cast is cast when it is loaded; on a CPU all fp16 is. There the rest is packed, or mapped from the file, so that
    of a table only the rows that are looked up are read.
    """
    users = _users(graph)
    for name, tensor in graph.tensors.items():
        kinds = {node.op_type for node in users.get(name, ())}
        casts = [onnx_trace.attribute(node, "to") for node in users.get(name, ()) if node.op_type == "Cast"]
        wide = on_cpu and tensor.dtype == "F16"
        if kinds == {"Cast"}:
            yield tensor.count * onnx.helper.tensor_dtype_to_np_dtype(casts[0]).itemsize
        elif kinds != {"Gather"} or not on_cpu or wide:
            yield tensor.stored_bytes * (2 if wide else 1)


def _users(graph: Graph) -> dict[str, list[Any]]:
    """The operators that read each value."""

    def compute() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for node in graph.model.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    return _once(graph, ("users",), compute)


def _loading_bytes(graph: Graph) -> int:
    """Most that loading takes on a CPU beyond what is held then: the largest weight that is packed, once more; but those of
    convolutions that are cast from fp16 are packed together."""
    users = _users(graph)
    packed = {name: {node.op_type for node in users.get(name, ())} & _PACKED for name in graph.tensors}
    cast = (2 * t.stored_bytes for name, t in graph.tensors.items() if t.dtype == "F16" and "Conv" in packed[name])
    return max(sum(cast), max((t.stored_bytes for name, t in graph.tensors.items() if packed[name]), default=0))


class ProcessMeter:
    """For the CPU provider, whose allocator cannot be asked: by how much this process has grown since nothing was loaded."""

    def __init__(self) -> None:
        self._process, self._limit, self._held = ProcessPeak(), None, 0
        self._start, self._used = resident(), False

    def limit(self, count: int | None) -> None:
        self._limit = count

    def reset(self) -> None:
        if not self._held:
            self._start = resident()
        self._process.reset()
        self._used = self._held > 0

    def look(self) -> None:
        """A device whose peak nobody keeps is looked at after each call."""

    def bytes(self) -> int:
        return max(0, self._process.bytes() - self._start) if self._used else 0

    def held(self) -> int:
        return self._held

    def hold(self, count: int) -> None:
        self._held += count
        self._used = True

    def room(self) -> int | None:
        """Bytes that are left of the limit, if there is one."""
        return None if self._limit is None else max(0, self._limit - self._held)

    def reach(self, count: int) -> None:
        """Raise OutOfMemoryError if there is no room for `count` bytes beside what is held."""
        room = self.room()
        if room is not None and count > room:
            raise OutOfMemoryError(f"{shown(self._held + count)} are needed where {shown(self._held + room)} are allowed")


class DeviceMeter(ProcessMeter):
    """For a GPU's provider: what the driver says is taken of its memory since nothing was loaded, looked at after each call."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self._peak = device, 0
        self._free = self._now()

    def reset(self) -> None:
        if not self._held:
            self._free = self._now()
        self._peak = 0
        self.look()

    def bytes(self) -> int:
        self.look()
        return self._peak

    def look(self) -> None:
        self._peak = max(self._peak, self._free - self._now())

    def _now(self) -> int:
        """Bytes that are free on the device; 0 where nobody tells."""
        import torch

        module: Any = getattr(torch, self._device, None)
        return int(module.mem_get_info()[0]) if hasattr(module, "mem_get_info") and module.is_available() else 0


_NO_MEMORY = "out of ?memory|OutOfMemory|Failed to allocate memory|smaller than requested bytes|bad_alloc|ALLOC_FAILED"


@contextmanager
def _errors_explained(graph: Graph) -> Iterator[None]:
    """ONNX Runtime has a class of its own for every status, and none for memory."""
    try:
        yield
    except Exception as error:
        if re.search(_NO_MEMORY, str(error)) or out_of_memory(error):
            raise OutOfMemoryError(first_line(error)) from error
        raise TightfitError(
            f"{graph.file} cannot be run ({first_line(error)}): export it again, or use another provider"
        ) from error
