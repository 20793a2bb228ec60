"""A dry run of one call on `meta` tensors: every storage's lifetime, every attention, every operation."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ....kernels import attention, onednn
from ...costs.footprint import ATTENTION, END, MOMENT, Arrival, Footprint, Operation, Shape, Trace, peak
from ...costs.latency import converted_values, patching_seconds, read_bytes
from ...errors import explained
from ...lean import have_meta_kernels
from ...machine.hardware import Hardware
from ...models.families.family import KEPT, RESIDUAL, Extent, Role
from ...models.spec import Component, ModelSpec
from ...models.tensors import Tensor
from ...placement import Placement
from ...recent import Recent
from . import loading as weights
from . import networks, streaming
from .compiled import COMPILER_BYTES, kinds_counted
from .cpu_kernels import CONVOLUTION, GROUP_NORM, SDPA, channels_last
from .engine import module_key
from .meter import LiveBytes, tensors_in
from .packed import packed_layers
from .quantised import CONV2D_INT8, DEQUANTISE, LINEAR_INT8, LINEAR_NF4, quantised_layers, workspace
from .repeated import alike, followed_once, like, signature, whole

T = TypeVar("T")
# At one size a model of three components has 20 to 30 candidate calls, and 12 modules on `meta`.
_modules: Recent[tuple[torch.nn.Module, Mapping[str, Tensor], str]] = Recent(16)
_sizes_of: Recent[Any] = Recent(256)
_traces: Recent[Trace] = Recent(64)
# An operator's output layout and cost, by its arguments' shapes. A network makes the same calls again and
# again, and torch's meta kernels are Python: planning SD 1.5 meets 700 signatures in 28,000 calls.
_answers: dict[Any, tuple[Any, Operation]] = {}
_MOST_ANSWERS = 4096
# Attention that a library calls torch's for, as transformers' encoders do.
_LIBRARYS = "library's"


class Recorder(LiveBytes):
    """A LiveBytes that keeps the events it counts. Attention is not run: its output is allocated and its
    shape noted."""

    def __init__(self, device: str, channels_last: bool) -> None:
        """`channels_last`: convolutions get inputs with channels last, as quantised and packed ones on a CPU
        do."""
        super().__init__(device)
        self.events: list[tuple[int, int]] = []
        self.attentions: list[Shape] = []
        self.operations: list[Operation] = []
        self.names: dict[int, int] = {}
        self._channels_last = channels_last

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is DEQUANTISE:  # writes into the workspace
            moved, kind = sum(tensor.nbytes for tensor in tensors_in(args)), args[5]
            unpacks = "unpack" if kind == "int8" else "unpack4"
            self.operations.append(Operation(float(args[0].numel()), moved, unpacks))
            return None
        if func is SDPA:
            batch, heads, n, d = args[0].shape
            return args[0].new_empty(batch, n, heads, d).transpose(1, 2)
        new = not (func.is_view or func._schema.is_mutable)
        how = func, self.device, self._channels_last
        key = (*how, *signature((*args, *kwargs.items()))) if new else None
        if key in _answers:
            outs, operation = _answers[key]
            self.operations.append(operation)
            return tuple(map(like, outs)) if isinstance(outs, list) else like(outs)
        # torch's meta kernels of what changes its first argument in place are Python too
        out = args[0] if func._schema.name.endswith("_") else _plainly(func, args)
        out = _on_meta(func, args, kwargs) if out is None else out
        # The CPU's kernels keep this layout, or take that of the weight; meta's do not.
        if (self._channels_last and func in (CONVOLUTION, GROUP_NORM) and channels_last(args[0])) or (
            func is CONVOLUTION and args[1].shape[2:].numel() > 1 and channels_last(args[1])
        ):
            out = out.contiguous(memory_format=torch.channels_last)
        sources = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
        made = [tensor for tensor in tensors_in((out,)) if tensor.untyped_storage()._cdata not in sources]
        if made or func._schema.is_mutable:
            moved = sum(tensor.nbytes for tensor in (*tensors_in(args), *made))
            flops = _flops(func, args, out)
            packed = args[1].nbytes if func is CONVOLUTION and self.device == "cpu" else 0
            kind = _KINDS.get(func, "product" if flops else "")
            self.operations.append(Operation(flops, moved, kind, packed))
            if key and all(map(whole, made)):
                self._learn(key, out, made)
        return out

    def _learn(self, key: Any, out: Any, made: list[torch.Tensor]) -> None:
        outs = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
        if isinstance(out, torch.Tensor) or (isinstance(out, tuple) and len(out) == len(made)):
            if len(_answers) >= _MOST_ANSWERS:
                _answers.clear()
            _answers[key] = outs if isinstance(out, tuple) else outs[0], self.operations[-1]

    def scratch_bytes(self, func: Any, args: Any, out: Any) -> int:
        if func is SDPA:
            batch, heads, n, d = out.shape
            self.events.append((len(self.attentions), ATTENTION))
            self.attentions.append((batch, heads, n, args[1].shape[2], d))
        elif scratch_bytes := super().scratch_bytes(func, args, out):
            self.events.append((scratch_bytes, MOMENT))
        return 0

    def _made(self, key: int, count: int, tensor: torch.Tensor) -> None:
        if count:
            self.names[key] = len(self.names) + len(self.events) + 1
            self.events.append((self.names[key], count))
        super()._made(key, count, tensor)

    def adopt(self, tensor: torch.Tensor, name: int) -> None:
        """Count a storage whose allocation is among the events already."""
        storage = tensor.untyped_storage()
        super()._made(storage._cdata, storage.nbytes(), tensor)
        self.names[storage._cdata] = name

    def _freed(self, key: int) -> None:
        if key in self.names:
            self.events.append((self.names.pop(key), END))
        super()._freed(key)


# torch's meta kernels of these are Python and take 0.6 to 1.3 ms, and 0.65 s and 50 MiB to be imported, with
# sympy.
_NORMS = {GROUP_NORM, torch.ops.aten.layer_norm.default}
_EMBEDDING, _GELU = torch.ops.aten.embedding.default, torch.ops.aten.gelu.default
_LINEAR = torch.ops.aten.linear.default


def _plainly(func: Any, args: Any) -> torch.Tensor | None:
    """What some operators make of tensors of one type, as torch's meta kernels would; None for all else."""
    tensors = tensors_in(args)
    if func is _EMBEDDING:
        return args[0].new_empty(*args[1].shape, args[0].shape[1])
    if any(one.dtype is not tensors[0].dtype for one in tensors):
        return None
    if func in _NORMS:
        return tensors[0].new_empty(tensors[0].shape)
    if func is CONVOLUTION:
        return _convolved(*args)
    if func is onednn.CONVOLUTION:
        x, weight, bias, padding, stride, dilation, groups = args[:7]
        out = _convolved(x, weight, bias, stride, padding, dilation, groups)
        return None if out is None else out.to(memory_format=torch.channels_last)
    if func is onednn.LINEAR:
        return tensors[0].new_empty(*tensors[0].shape[:-1], len(tensors[1]))
    if not all(one.is_contiguous() for one in tensors):
        return None
    if func is _GELU:
        return torch.empty_like(tensors[0])
    return tensors[0].new_empty(*tensors[0].shape[:-1], len(tensors[1])) if func is _LINEAR else None


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    _: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor | None:
    """The shape of a convolution's answer; None for what is none, which torch says."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    sides = [
        (side + 2 * beside - apart * (width - 1) - 1) // by + 1 for side, width, by, beside, apart in sizes
    ]
    fits = x.dim() == 4 and len(sides) == 2 and x.shape[1] == groups * weight.shape[1] and min(sides) > 0
    return x.new_empty(len(x), len(weight), *sides) if fits else None


def _on_meta(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """By torch's own kernel, which may have to be imported first."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        if not have_meta_kernels():
            raise
        return func(*args, **kwargs)


_NAMES = {dtype: name for name, dtype in weights.DTYPES.items()}
_KINDS = {CONV2D_INT8: "int8", LINEAR_INT8: "int8"}


def _flops(func: Any, args: Any, out: Any) -> float:
    if func in (torch.ops.aten.linear.default, LINEAR_INT8, onednn.LINEAR):
        return 2.0 * out.numel() * args[1].shape[1]
    if func is LINEAR_NF4:
        return 2.0 * out.numel() * args[0].shape[-1]
    if func in (CONVOLUTION, CONV2D_INT8, onednn.CONVOLUTION):
        return 2.0 * out.numel() * args[1][0].numel()
    if func is torch.ops.aten.addmm_.default:
        return 2.0 * out.numel() * args[1].shape[1]
    if func in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default):
        return 2.0 * out.numel() * args[0].shape[-1]
    return 0.0


def footprint(
    spec: ModelSpec,
    component: Component,
    placement: Placement,
    hardware: Hardware,
    extent: Extent,
) -> Footprint:
    """Of the component called at `extent`. Weights come from the files' headers, the call from a dry run on
    `meta`."""
    dtype, device = weights.DTYPES[placement.compute], torch.device(hardware.device)
    shapes = spec.inputs(component, *extent)
    module, stored, identity = _module(component, placement, device.type)
    half = dtype.itemsize == 2  # fp16 and bf16 need the same bytes
    of_call = (placement.tiling, extent.cache, device.type, placement.compiled, tuple(shapes.items()))
    key = (component.name, identity, spec.family, half, *of_call)

    def traced() -> Trace:
        torch.nn.Module.to(module, dtype)  # past diffusers' own `to`, which warns
        workspace(module).allocate(dtype, torch.device("meta"))
        call, stays = networks.forward(component, placement, extent.cache), staying(component, extent.cache)
        inspect.signature(call).bind(module, **shapes)  # a TypeError of ours is not the file's
        problem = f"{component.config_file} describes no model that can be run"
        counted = kinds_counted(module) if placement.compiled else nullcontext(())
        with explained(problem, "copy or download it again"), counted as kinds:
            trace = _trace(module, call, shapes, dtype, device.type, stays)
        return replace(trace, kinds=len(kinds))

    trace = _traces.get(key, traced)
    own = _kept(module, dtype, device, "own", lambda: networks.has_own_attention(module))
    kind, fused = placement.attention if own else _LIBRARYS, hardware.fused_attention
    flash = (hardware.capability or (0, 0)) >= (8, 0)
    scratch = tuple(
        attention_bytes(kind, shape, dtype, device.type, fused, flash) for shape in trace.attentions
    )
    if placement.residency == "streamed" and _kept(
        module, dtype, device, "as stored", lambda: weights.as_stored(module, stored)
    ):
        return _streamed(module, stored, dtype, device, placement.kept_bytes, trace, scratch)
    held = _kept(module, dtype, device, "held", lambda: weights.held(module, dtype))
    loading = _kept(
        module, dtype, device, "loading", lambda: weights.loading_bytes(module, stored, dtype, device)
    )
    patching = _kept(module, dtype, device, "patching", lambda: patching_seconds(stored.values()))
    compiler = [COMPILER_BYTES] if placement.compiled and device.type == "cpu" else []
    held = (*held, *_beside(module, dtype, device), *compiler)
    plain = Footprint(held, loading, trace, scratch, patching_seconds=patching, modules=working(module))
    return replace(plain, kept=_captured_bytes(plain, shapes, hardware)) if placement.captured else plain


def _captured_bytes(footprint: Footprint, shapes: Mapping[str, tuple[int, ...]], hardware: Hardware) -> int:
    """Bytes that a CUDA graph of the call keeps: its inputs, at most in fp32, and a pool of its own, in which
    a library's workspace is there once more."""
    inputs = [4 * math.prod(shape) for shape in shapes.values()]
    return peak(hardware.device, [*hardware.workspaces, *inputs], replace(footprint, held=()))


def _streamed(
    module: torch.nn.Module,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    kept_bytes: int,
    trace: Trace,
    scratch: tuple[int, ...],
) -> Footprint:
    """Footprint of a module that keeps `kept_bytes` of its units loaded and streams the others through a
    buffer."""
    parts = _kept(module, dtype, device, "units", lambda: streaming.units(module, stored, dtype))
    kept, streamed = streaming.split(parts, kept_bytes)
    held = [count for part in kept for count in weights.held(part, dtype)]
    paths = {unit.path: unit.bytes for unit in streamed.values()}
    arrivals = tuple(Arrival(path, paths[path], *place) for path, *place in trace.calls if path in paths)
    called = {arrival.unit for arrival in arrivals}  # a shallow call has no use for most
    units = [unit for unit in streamed.values() if unit.path in called]
    flowing, staying = (
        [tensor for unit in some for _, _, tensor, _ in unit.weights] for some in (units, kept.values())
    )
    reading = _kept(
        module, dtype, device, "scratch", lambda: weights.scratch_bytes(module, stored, dtype, device)
    )
    reading_bytes = [reading, weights.patching_bytes(stored)] if device.type == "cpu" else []
    ring, host = (
        streaming.ring_bytes(streamed, device),
        streaming.host_bytes(streamed) if device.type == "cuda" else 0,
    )
    held += [*_beside(module, dtype, device), ring, *reading_bytes]
    sizes = tuple(sorted((unit.bytes for unit in streamed.values()), reverse=True))
    streams = {"arrivals": arrivals, "units": sizes, "ring": ring, "stored": read_bytes(flowing)}
    return Footprint(
        tuple(held), 0, trace, scratch, host, **streams, flowing=len(flowing),
        converted=converted_values(flowing, _NAMES[dtype]),
        patching_seconds=patching_seconds(flowing), kept_patching_seconds=patching_seconds(staying),
        modules=working(module),
    )  # fmt: skip


def working(module: torch.nn.Module) -> int:
    """How many of its modules do something, which lists of others do not."""
    return sum(type(part).forward is not torch.nn.Module.forward for part in module.modules())


def _beside(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> list[int]:
    return _kept(module, dtype, device, "beside", lambda: weights.beside(module, dtype))


def _kept(
    module: torch.nn.Module, dtype: torch.dtype, device: torch.device, topic: str, compute: Callable[[], T]
) -> T:
    """A value cached per module, because every candidate asks for it; dropped with the module."""
    return _sizes_of.get((dtype, device.type, topic), compute, module)


def _module(
    component: Component, placement: Placement, device: str
) -> tuple[torch.nn.Module, Mapping[str, Tensor], str]:
    """The component's module on `meta`, its checked tensors in the files, and its identity as a string.
    Cached, because every candidate asks for it."""

    def built() -> tuple[torch.nn.Module, Mapping[str, Tensor], str]:
        # SDPA, because a Recorder notes it instead of running it.
        module = networks.build(component, replace(placement, attention="sdpa"), device)
        layers = {
            path: (type(part).__name__, part.form, part.adapted and part.adapted.kind)
            for path, part in quantised_layers(module).items()
        }
        layers |= {"packed": len(packed_layers(module))}
        words = [word.shape for word in component.words.values()]
        return (
            module,
            weights.match(component, module),
            json.dumps([dict(component.config), layers, words], sort_keys=True, default=str),
        )

    return _modules.get(module_key(component, placement, device), built, component)


def _trace(
    module: torch.nn.Module,
    call: networks.Forward,
    inputs: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: str,
    stays: int | None = None,
) -> Trace:
    kinds = {"tokens": torch.int64, "raw": torch.uint8}
    tensors = {
        name: torch.empty(shape, dtype=kinds.get(name, torch.float32), device="meta")
        for name, shape in inputs.items()
    }
    stayed = [name for name in inputs if name.startswith((RESIDUAL, KEPT))]
    calls: list[tuple[str, int, int]] = []

    def note(path: str) -> None:
        calls.append((path, len(recorder.operations), len(recorder.attentions)))

    blocks = _kept(module, dtype, torch.device(device), "blocks", lambda: alike(module))
    hooks = [
        part.register_forward_pre_hook(lambda *_, path=path: note(path))
        for path, part in module.named_modules()
    ]
    with (
        torch.inference_mode(),
        Recorder(device, device == "cpu" and networks.channels_last(module)) as recorder,
        followed_once(module, blocks, recorder, calls),
    ):
        # Alive all the time, which what the host sends is not.
        tensors |= {name: torch.empty(inputs[name], dtype=dtype, device="meta") for name in stayed}
        run(module, call, tensors, dtype, torch.device("meta"), stays)
    for hook in hooks:
        hook.remove()
    events, attentions, operations = (*recorder.events,), (*recorder.attentions,), (*recorder.operations,)
    return Trace(events, attentions, operations, (*calls,))


def run(
    module: Any,
    call: networks.Forward,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    stays: int | None = None,
) -> list[torch.Tensor]:
    """Call the module with tensors in fp32 or integers. Returns fp32 ones on `device`, or pictures in bytes;
    answers from number `stays` on as they are."""
    inputs = {name: on_device(tensor, dtype, device) for name, tensor in tensors.items()}
    outs = call(module, **inputs)
    count = len(outs) if stays is None else stays
    return [*(out if out.dtype is torch.uint8 else out.float() for out in outs[:count]), *outs[count:]]


def staying(component: Component, cache: str = "") -> int | None:
    """The number of the first answer that stays on the device; None if none does."""
    return 0 if component.role is Role.CONTROL else 1 if cache else None


def on_device(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An input as a module reads it. Floating-point values are cast to `dtype`, except the timestep, a
    scalar. Token ids stay integers."""
    return tensor.to(device, dtype if tensor.ndim and tensor.is_floating_point() else None)


def _unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's `_scaled_dot_product_attention_math`, which computes half precision in fp32."""
    return attention.plain(q.float(), k.float(), v.float()).to(q.dtype)


@functools.lru_cache(maxsize=1000)
def attention_bytes(
    kind: str, shape: Shape, dtype: torch.dtype, device: str, fused: bool, flash: bool = False
) -> int:
    """Peak scratch bytes of an attention, beside its output: of one of ours, or of a library's own call of
    torch's.

    Our own variants run on `meta`, one repetition only. torch's CPU kernel has a formula. torch's fused GPU
    kernels keep one fp32 log-sum for each query (flash attention always writes it). CUDA's memory-efficient
    kernel also keeps an fp32 output for 16-bit heads wider than its 128 registers; `flash` attention
    (capability 8.0 and newer) takes heads up to 256 (kernel_forward.h, kNeedsOutputAccumulatorBuffer;
    sdp_utils.cpp). Without a fused kernel torch stores the scores.
    """
    batch, heads, n, m, d = shape
    if kind in ("sdpa", _LIBRARYS) and device == "cpu":
        count = attention.sdpa_on_cpu_bytes if kind == "sdpa" else attention.sdpa_cpu_bytes
        return count(batch * heads, n, m, d, dtype, torch.get_num_threads())
    if kind in ("sdpa", _LIBRARYS) and fused:
        wide = device == "cuda" and dtype.itemsize == 2 and d > (256 if flash else 128)
        return 4 * batch * heads * n * (1 + d if wide else 1)
    attend = _unfused if kind in ("sdpa", _LIBRARYS) else attention.VARIANTS[kind]
    if kind == "sliced" and device == "cpu" and dtype is torch.bfloat16:
        attend, batch, heads = attention.sliced_bf16, 1, attention.slice_shape(heads, n, m)[0]
    elif kind == "sliced":
        batch, heads, n = 1, 1, min(n, attention.slice_rows(m, dtype.itemsize))
    elif kind == "chunked":
        rows, columns = attention.block(batch * heads, m, d)
        n, m = min(n, rows), min(m, 2 * columns)
    q, k = (
        torch.empty(batch, length, heads, d, dtype=dtype, device="meta").transpose(1, 2) for length in (n, m)
    )

    def peak_bytes() -> int:
        with torch.inference_mode(), LiveBytes(device) as live:
            attend(q, k, k)
        return live.peak

    return max(0, _on_meta(peak_bytes, (), {}) - batch * heads * n * d * dtype.itemsize)
