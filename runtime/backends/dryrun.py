"""One call of a component on `meta` tensors: every storage that comes and goes, every attention, every operation."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...kernels import attention
from ..files import Tensor
from ..hardware import Hardware
from ..memory import ATTENTION, END, MOMENT, Footprint, Operation, Shape, Trace
from ..plan import QUANTISED, Placement
from ..spec import Component, ModelSpec
from . import networks, weights
from .cpu_kernels import CONVOLUTION, GROUP_NORM, SDPA, channels_last
from .meter import LiveBytes, tensors_in
from .quantised import CONV2D_INT8, LINEAR_INT8, quantised_layers, workspace

_KEPT = 32
# By the component's id; it is kept too, so that its id stays its own.
_modules: dict[Any, tuple[Component, torch.nn.Module, Mapping[str, Tensor], str]] = {}
_sizes_of: dict[Any, tuple[list[int], list[int], int, tuple[list[int], int]]] = {}
_traces: dict[Any, Trace] = {}


class Recorder(LiveBytes):
    """A LiveBytes that keeps what it sees. Attention is not looked into: its answer is made, its shape is noted."""

    def __init__(self, device: str, channels_last: bool) -> None:
        """`channels_last`: convolutions are given maps whose channels are last in memory, as quantised ones on a CPU."""
        super().__init__(device)
        self.events: list[tuple[int, int]] = []
        self.attentions: list[Shape] = []
        self.operations: list[Operation] = []
        self._names: dict[int, int] = {}
        self._channels_last = channels_last

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is SDPA:
            batch, heads, n, d = args[0].shape
            return args[0].new_empty(batch, n, heads, d).transpose(1, 2)
        out = func(*args, **kwargs)
        if self._channels_last and func in (CONVOLUTION, GROUP_NORM) and channels_last(args[0]):  # on a CPU, but not on meta
            out = out.contiguous(memory_format=torch.channels_last)
        sources = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
        made = [tensor for tensor in tensors_in((out,)) if tensor.untyped_storage()._cdata not in sources]
        if made or func._schema.is_mutable:
            moved = sum(tensor.nbytes for tensor in (*tensors_in(args), *made))
            flops = _flops(func, args, out)
            self.operations.append(Operation(flops, moved, _KINDS.get(func, "product" if flops else "")))
        return out

    def own(self, func: Any, args: Any, out: Any) -> int:
        if func is SDPA:
            batch, heads, n, d = out.shape
            self.events.append((len(self.attentions), ATTENTION))
            self.attentions.append((batch, heads, n, args[1].shape[2], d))
        elif own := super().own(func, args, out):
            self.events.append((own, MOMENT))
        return 0

    def _made(self, key: int, count: int, tensor: torch.Tensor) -> None:
        if count:
            self._names[key] = len(self._names) + len(self.events) + 1
            self.events.append((self._names[key], count))
        super()._made(key, count, tensor)

    def _freed(self, key: int) -> None:
        if key in self._names:
            self.events.append((self._names.pop(key), END))
        super()._freed(key)


_KINDS = {CONV2D_INT8: "int8", LINEAR_INT8: "int8", torch.ops.tightfit.dequantise.default: "unpack"}


def _flops(func: Any, args: Any, out: Any) -> float:
    if func in (torch.ops.aten.linear.default, LINEAR_INT8):
        return 2.0 * out.numel() * args[1].shape[1]
    if func in (CONVOLUTION, CONV2D_INT8):
        return 2.0 * out.numel() * args[1][0].numel()
    if func in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default):
        return 2.0 * out.numel() * args[0].shape[-1]
    return 0.0


def footprint(
    spec: ModelSpec, component: Component, placement: Placement, hardware: Hardware, size: tuple[int, int, int]
) -> Footprint:
    """What the component takes when called for `size`: a batch of it, and the picture's height and width in pixels.

    Weights from headers, the call from a dry run on `meta`, which is kept for the next time.
    """
    dtype, device = weights.DTYPES[placement.compute], torch.device(hardware.device)
    shapes = spec.inputs(component, *size)
    module, stored, what = _module(component, placement, device.type)
    half = dtype.itemsize == 2  # fp16 and bf16 take the same
    key = (component.name, what, spec.family, half, placement.tiling, device.type, tuple(shapes.items()))
    if key not in _traces:
        if len(_traces) >= 8 * _KEPT:
            _traces.clear()
        torch.nn.Module.to(module, dtype)  # past diffusers' own `to`, which warns
        workspace(module).allocate(dtype, torch.device("meta"))
        _traces[key] = _trace(module, networks.forward(spec, component, placement), shapes, dtype, device.type)
    trace = _traces[key]
    kind, fused = placement.attention, hardware.fused_attention
    scratch = tuple(attention_bytes(kind, shape, dtype, device.type, fused) for shape in trace.attentions)
    sizes, beside, loading, (streams, pinned) = _sizes(module, stored, dtype, device)
    if placement.residency == "streamed" and streams:
        own = [loading] if device.type == "cpu" else []
        # from pinned memory as it is used, else from the files as it is stored
        flow = sum(sizes) if device.type == "cuda" else sum(tensor.stored_bytes for tensor in stored.values())
        return Footprint((*streams, *own, *beside), 0, trace, scratch, flow, pinned)
    return Footprint((*sizes, *beside), loading, trace, scratch, 0)


def _sizes(
    module: torch.nn.Module, stored: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[list[int], list[int], int, tuple[list[int], int]]:
    """Bytes of each weight, of what is allocated beside them, of loading them, and of streaming them."""
    key = (id(module), dtype, device.type)
    if key not in _sizes_of:
        loading = weights.loading_bytes(module, stored, dtype, device)
        streams = _streams(module, stored, dtype, device)
        _sizes_of[key] = weights.held(module, dtype), weights.beside(module, dtype), loading, streams
    return _sizes_of[key]


def _streams(
    module: torch.nn.Module, stored: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[list[int], int]:
    """Bytes of the buffers through which the weights would stream, and of pinned memory that they would wait in; none of
    weights that are quantised while they load, as they do not stream."""
    if not weights.as_stored(module, stored):
        return [], 0
    parts = weights.units(module, stored, dtype)
    # torch's allocator of pinned memory rounds up to a power of two
    pinned = sum(1 << (unit.bytes - 1).bit_length() for unit in parts.values()) if device.type == "cuda" else 0
    return weights.stream_bytes(parts, device), pinned


def _module(component: Component, placement: Placement, device: str) -> tuple[torch.nn.Module, Mapping[str, Tensor], str]:
    """The component's module on `meta`, its tensors in the files, checked, and what it is, in words; kept, as every candidate
    asks."""
    precision = placement.precision if placement.precision in QUANTISED else ""
    key = (id(component), precision, device)
    if key not in _modules:
        if len(_modules) >= _KEPT:
            _modules.clear()
            _sizes_of.clear()
        module = networks.build(component, replace(placement, attention="sdpa"), device)  # which a Recorder notes, not runs
        layers = {path: (type(part).__name__, part.form) for path, part in quantised_layers(module).items()}
        what = json.dumps([dict(component.config), layers], sort_keys=True, default=str)
        _modules[key] = component, module, weights.match(component, module), what
    return _modules[key][1:]


def _trace(
    module: torch.nn.Module, call: networks.Forward, inputs: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> Trace:
    kinds = {"tokens": torch.int64}
    tensors = {name: torch.empty(shape, dtype=kinds.get(name, torch.float32), device="meta") for name, shape in inputs.items()}
    with torch.inference_mode(), Recorder(device, device == "cpu" and bool(workspace(module).layers)) as recorder:
        run(module, call, tensors, dtype, torch.device("meta"))
    return Trace(tuple(recorder.events), tuple(recorder.attentions), tuple(recorder.operations))


def run(
    module: Any, call: networks.Forward, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Call the module with fp32 or int64 tensors and have fp32 ones back, all on `device`.

    Floating-point ones go in in the session's precision; the timestep, a scalar, and token ids as they are.
    """
    there = {
        name: tensor.to(device, dtype if tensor.ndim and tensor.is_floating_point() else None) for name, tensor in tensors.items()
    }
    return [out.float() for out in call(module, **there)]


def _unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's `_scaled_dot_product_attention_math`, which computes halves in fp32."""
    return attention.plain(q.float(), k.float(), v.float()).to(q.dtype)


@functools.lru_cache(maxsize=1000)
def attention_bytes(kind: str, shape: Shape, dtype: torch.dtype, device: str, fused: bool) -> int:
    """Bytes that an attention allocates beside its answer, at most at one time.

    Our own are run on `meta`, as far as they do not repeat themselves; torch's CPU kernel is computed by its formula, and its
    fused kernels for GPUs keep one fp32 number for each query (the log-sum, which flash attention always writes); without
    one torch stores the scores.
    """
    batch, heads, n, m, d = shape
    if kind == "sdpa" and device == "cpu":
        return attention.sdpa_cpu_bytes(batch * heads, n, m, d, dtype.itemsize, torch.get_num_threads())
    if kind == "sdpa" and fused:
        return 4 * batch * heads * n
    attend = _unfused if kind == "sdpa" else attention.VARIANTS[kind]
    if kind == "sliced":
        batch, heads, n = 1, 1, min(n, attention.slice_rows(m, dtype.itemsize))
    elif kind == "chunked":
        rows, columns = attention.block(batch * heads, m, d)
        n, m = min(n, rows), min(m, 2 * columns)
    q, k = (torch.empty(batch, length, heads, d, dtype=dtype, device="meta").transpose(1, 2) for length in (n, m))
    with torch.inference_mode(), LiveBytes(device) as live:
        attend(q, k, k)
    return max(0, live.peak - batch * heads * n * d * dtype.itemsize)
