"""Layers whose weights stay in 8 or 4 bits. Each call dequantises the weight into a shared buffer, or
multiplies it directly with inputs quantised to 8 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....kernels import int8, nf4
from ....kernels.dequantise import dequantise, triton_runs
from ....kernels.formats import FORMATS, Format, from_rows
from ....kernels.quantise import quantise
from ...errors import TightfitError
from .adapted import Adapted
from .autotune import fastest

# Weights dequantised at a time on a CPU: less memory for no more time (docs/decisions.md). A GPU would have
# to start several kernels instead of one.
AT_ONCE = 2**22
# Input rows up to which a linear layer may be faster when a GPU dequantises inside the product: it is timed.
FEW_ROWS = 256
# A CPU multiplies integers where outputs times taps are at least WIDE times the inputs, or ENOUGH: quantising
# an input is amortised over them. The U-Net's other linears and 1x1 convolutions got slower
# (docs/decisions.md).
WIDE, ENOUGH = 4, 2560
# A tile of Triton's convolution: output pixels, output channels and inputs per program; then warps, stages.
TILES = (
    ((128, 128, 64), 8, 3), ((128, 64, 64), 4, 3), ((64, 128, 64), 4, 3), ((64, 64, 64), 4, 4),
    ((128, 256, 64), 8, 3), ((64, 64, 128), 4, 3), ((32, 64, 128), 4, 4),
)  # fmt: skip


_LIBRARY = torch.library.Library("tightfit", "DEF")


def _operator(name: str, *changes: str) -> Callable[[Any], Any]:
    """Makes a function an operator of torch, which `changes` these arguments. A call takes 4 us; one by
    `torch.library.custom_op`, which also watches over gradients, takes 43 to 60."""

    def make(function: Any) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=changes)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return make


@_operator("dequantise", "out", "codes")
def _dequantise(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor | None,
    kind: str,
    group: int,
    taps: int,
    taps_last: bool,
) -> None:
    """A single operator for whoever counts operators, as it is a single kernel on a GPU."""
    form = Format(kind, group, wide=scale.dtype == torch.float32)
    dequantise(out, packed, scale, zero, codes, form, taps, taps_last)


@torch.library.register_fake("tightfit::dequantise")
def _(*_) -> None:
    """It makes nothing."""


@_operator("linear_int8")
def _linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return int8.linear_int8_onednn(x, packed, scale, bias)
    from ....kernels.triton_int8 import linear_int8_triton

    run = functools.partial(linear_int8_triton, x, packed, scale, bias)
    return fastest(f"linear_int8 {list(x.shape)} x {list(packed.shape)} {x.dtype}", x.device, _tiles(run))


@torch.library.register_fake("tightfit::linear_int8")
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(scale))


@_operator("conv2d_int8")
def _conv2d_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`packed` is oneDNN's on a CPU."""
    kernel, stride, padding = ((a, b) for a, b in (kernel, stride, padding))
    if not x.is_cuda:
        return int8.conv2d_int8_onednn(x, packed, scale, bias, stride, padding)
    from ....kernels.triton_int8 import conv2d_int8_triton

    run = functools.partial(conv2d_int8_triton, x, packed, scale, bias, kernel, stride, padding, sums)
    operation = f"conv2d_int8 {list(x.shape)} x {list(packed.shape)} {kernel} {stride} {padding} {x.dtype}"
    return fastest(operation, x.device, _tiles(run))


@torch.library.register_fake("tightfit::conv2d_int8")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    sums: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    kernel,
    stride,
    padding,
) -> Tensor:
    return int8.empty_answer(x, packed, scale, kernel, stride, padding)


@_operator("linear_nf4")
def _linear_nf4(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return nf4.linear_nf4(x, packed, scale, bias)


@torch.library.register_fake("tightfit::linear_nf4")
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(packed))


def _tiles(run: Callable[..., Tensor]) -> dict[str, Callable[[], Tensor]]:
    return {
        f"{tile} in {warps} warps and {stages} stages": functools.partial(
            run, tile=tile, num_warps=warps, num_stages=stages
        )
        for tile, warps, stages in TILES
    }


DEQUANTISE = torch.ops.tightfit.dequantise.default
LINEAR_INT8 = torch.ops.tightfit.linear_int8.default
CONV2D_INT8 = torch.ops.tightfit.conv2d_int8.default
LINEAR_NF4 = torch.ops.tightfit.linear_nf4.default


def gpu_bytes(func: Any, args: Any, out: Any) -> int:
    """Scratch bytes of our operators on a GPU: the inputs' codes, for a moment twice if the inputs are not
    channels_last; and the codes of a 4-bit weight where Triton does not run."""
    if func is DEQUANTISE:
        return _unpacking(*args[:6])
    if func is LINEAR_NF4:
        return dequantised_bytes(args, out)
    if func not in (LINEAR_INT8, CONV2D_INT8):
        return 0
    codes = args[0].numel()
    return max(codes, 2 * codes - out.nbytes) if func is CONV2D_INT8 and args[0].is_contiguous() else codes


def dequantised_bytes(args: Any, _: Any) -> int:
    """Of the weight that bitsandbytes dequantises to multiply by it; for few tokens it does without."""
    x, packed = args[:2]
    return 2 * packed.numel() * x.element_size()


def _unpacking(
    out: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor | None, kind: str
) -> int:
    """Scratch bytes of dequantise_torch for 4 bits: the codes, then `scales_bytes`. Of nf4, half a row of
    places in its table, and their values."""
    if kind == "int8":
        return 0
    if kind == "nf4":
        return (1 + 4 + out.element_size()) * packed.numel()
    return (packed.numel() if codes is None else 0) + scales_bytes(out, scale, zero, kind)


def scales_bytes(out: Tensor, scale: Tensor, zero: Tensor | None, kind: str) -> int:
    """Bytes of the scales in the weight's dtype, and of what moves the groups, which int4 has twice, as it is
    divided."""
    copies = 1 if zero is None else 3 if kind == "int4" else 2
    return scale.numel() * out.element_size() * copies


class Workspace:
    """The buffer shared by a network's quantised layers: room for the weights dequantised at a time, and on a
    CPU for their codes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.layers: list[Quantised] = []
        self.dtype = torch.float32
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the buffer when layers compute in `dtype`."""
        return max((layer.workspace_bytes(dtype.itemsize) for layer in self.layers), default=0)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.buffer = torch.empty(self.bytes(dtype), dtype=torch.uint8, device=device)

    def free(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


class Quantised(nn.Module):
    """A layer whose weight is stored in parts, named as in the files: `packed`, `scale` and, for int4,
    `zero`, or, for int4-min, `least`.

    `at_once` output channels are dequantised at a time: all if `whole` or on a GPU, else AT_ONCE weights'
    worth.
    """

    packed: Tensor
    scale: Tensor
    dequantises = True
    """Whether it multiplies by a dequantised weight."""

    def __init__(self, layer: Any, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__()
        self.form, self.shape, self.workspace = form, tuple(layer.weight.shape), workspace
        self.taps, self.row = form.taps(self.shape), math.prod(self.shape[1:])
        self.on_cpu = workspace.device == "cpu"
        self.at_once = (
            self.shape[0] if whole or not self.on_cpu else min(self.shape[0], max(1, AT_ONCE // self.row))
        )
        for name, (dtype, shape) in form.parts(self.shape).items():
            part = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter("bias", getattr(layer, "bias", None))
        self.adapted: Adapted | None = None
        workspace.layers.append(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantised:  # noqa: ARG002
        """`Module.to` leaves the parts alone: their dtypes are part of the format."""
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias), requires_grad=False)
        if self.adapted is not None:
            self.adapted._apply(fn)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.adapted is None:
            return self.product(x)
        return self.adapted.answer(x, self.product, self.thin, self.dequantises)

    def product(self, x: Tensor) -> Tensor:
        """By the quantised weight."""
        raise NotImplementedError

    def thin(self, x: Tensor, weight: Tensor) -> Tensor:
        """By another weight of fewer output channels, without a bias."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Called once the parts are loaded."""

    def packed_bytes(self) -> int:
        """Bytes of `packed` after `prepare`."""
        return self.packed.numel() * self.packed.element_size()

    def packing_bytes(self) -> int:
        """Bytes that `prepare` allocates to replace `packed`."""
        return 0

    def workspace_bytes(self, itemsize: int) -> int:
        return self.at_once * (self.row * itemsize + self._codes())

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """Output channels `start` to `end` of the weight, dequantised into the workspace and valid until its
        next use."""
        rows, buffer, dtype = slice(start, end), self.workspace.buffer, self.workspace.dtype
        count = len(self.packed[rows])
        end_of_out = count * self.row * dtype.itemsize
        out = buffer[:end_of_out].view(dtype).view(count, self.row)
        self._unpack(
            out, rows, buffer[end_of_out : end_of_out + count * self._codes()] if self.on_cpu else None
        )
        sides = count, *self.shape[1:]
        # torch's group norm on GPUs wants no channels_last
        weight = from_rows(out, sides, self.form.flat or not self.on_cpu)
        if self.adapted is not None:
            self.adapted.merge(weight, start)
        return weight

    def _codes(self) -> int:
        """Bytes of one output channel's codes in the buffer while it is dequantised. Zero on a GPU: Triton
        needs none, and without Triton torch allocates them."""
        return self.packed.shape[1] if self.form.bits == 4 and self.on_cpu else 0

    def _offset(self) -> Tensor | None:
        """The part that moves the groups' values, if the format has one."""
        return getattr(self, self.form.offset) if self.form.offset else None

    def _unpack(self, out: Tensor, rows: slice | Tensor, codes: Tensor | None) -> None:
        """Fill `out` with the output channels `rows`."""
        offset = self._offset()
        zero = None if offset is None else offset[rows]
        how = (self.form.kind, self.form.group, self.taps, not self.on_cpu)
        torch.ops.tightfit.dequantise(out, self.packed[rows], self.scale[rows], zero, codes, *how)

    def _parts(self) -> list[slice]:
        return [
            slice(start, min(start + self.at_once, self.shape[0]))
            for start in range(0, self.shape[0], self.at_once)
        ]


class Linear(Quantised):
    def thin(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    def product(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        merging = self.adapted is not None and self.adapted.merging
        few = x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1] and not merging
        if few and triton_runs(x.device):
            return self._few(x)
        if self.at_once == self.shape[0]:
            return functional.linear(x, self.dense(), self.bias)
        out = x.new_empty((*x.shape[:-1], self.shape[0]))
        for part in self._parts():
            bias = None if self.bias is None else self.bias[part]
            out[..., part] = functional.linear(x, self.dense(part.start, part.stop), bias)
        return out

    def _few(self, x: Tensor) -> Tensor:
        from ....kernels.triton_weights import linear_triton  # importing triton costs memory

        zero, kind = self._offset(), (self.form.kind, self.form.group)
        variants = {
            "unpacked, then multiplied": lambda: functional.linear(x, self.dense(), self.bias),
            "at once": lambda: linear_triton(x, self.packed, self.scale, zero, self.bias, self.form),
        }
        return fastest(f"linear {kind} {list(x.shape)} x {list(self.shape)} {x.dtype}", x.device, variants)


class Conv2d(Quantised):
    def __init__(self, layer: nn.Conv2d, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__(layer, form, workspace, whole or layer.groups > 1)
        self.kernel_size, self.in_channels, self.out_channels = (
            layer.kernel_size,
            layer.in_channels,
            layer.out_channels,
        )
        self.how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def thin(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, None, *self.how)

    def product(self, x: Tensor) -> Tensor:
        """(batch, in, h, w) → (batch, out, h', w'). On a CPU in its weight's order: a flat one and an
        input with channels last took up to twice as long."""
        flat = self.form.flat and self.kernel_size != (1, 1)
        order = torch.contiguous_format if flat else torch.channels_last
        if self.on_cpu:
            x = x.contiguous(memory_format=order)
        if self.at_once == self.shape[0]:
            return functional.conv2d(x, self.dense(), self.bias, *self.how)
        out = None
        for part in self._parts():
            bias = None if self.bias is None else self.bias[part]
            some = functional.conv2d(x, self.dense(part.start, part.stop), bias, *self.how)
            if out is None:
                sides = (len(some), self.shape[0], *some.shape[2:])
                out = torch.empty(sides, dtype=some.dtype, device=some.device, memory_format=order)
            out[:, part] = some
            del some
        assert out is not None
        return out


class LinearInt8(Quantised):
    """Multiplies integers. On a CPU its weight is repacked for oneDNN once it is loaded."""

    dequantises = False

    def prepare(self) -> None:
        if self.on_cpu:
            self.packed = nn.Parameter(int8.pack_linear(self.packed), requires_grad=False)

    def packed_bytes(self) -> int:
        """oneDNN pads outputs to blocks of 64."""
        return -(-self.shape[0] // 64) * 64 * self.row if self.on_cpu else super().packed_bytes()

    def packing_bytes(self) -> int:
        return self.packed_bytes() if self.on_cpu else 0

    def workspace_bytes(self, itemsize: int) -> int:  # noqa: ARG002
        return 0

    def thin(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    def product(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return torch.ops.tightfit.linear_int8(x, self.packed, self.scale, self.bias)


class Conv2dInt8(LinearInt8):
    """Multiplies integers; on a CPU with channels last."""

    def __init__(self, layer: nn.Conv2d, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__(layer, form, workspace, whole)
        self.how: Any = (layer.kernel_size, layer.stride, layer.padding)
        sums = (
            None if self.on_cpu else torch.empty(self.shape[0], dtype=torch.int32, device=layer.weight.device)
        )
        self.register_buffer("sums", sums, persistent=False)

    def prepare(self) -> None:
        if self.on_cpu:
            packed = int8.pack_conv2d(self.packed, self.shape[1], *self.how)
            self.packed = nn.Parameter(packed, requires_grad=False)
        else:
            self.sums = int8.weight_sums(self.packed)

    def thin(self, x: Tensor, weight: Tensor) -> Tensor:
        _, stride, padding = self.how
        return functional.conv2d(x, weight, None, stride, padding)

    def product(self, x: Tensor) -> Tensor:
        """(batch, in, h, w) → (batch, out, h', w')."""
        if self.on_cpu:
            x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.tightfit.conv2d_int8(x, self.packed, self.scale, self.sums, self.bias, *self.how)


class LinearNF4(Linear):
    """Multiplies by bitsandbytes' kernels."""

    dequantises = False

    def prepare(self) -> None:
        self.packed = nn.Parameter(nf4.reorder(self.packed), requires_grad=False)

    def packing_bytes(self) -> int:
        return self.packed_bytes()

    def workspace_bytes(self, itemsize: int) -> int:  # noqa: ARG002
        return 0

    def product(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return torch.ops.tightfit.linear_nf4(x, self.packed, self.scale, self.bias)


class Embedding(Quantised):
    def product(self, x: Tensor) -> Tensor:
        """(…) → (…, width). Only the rows looked up are dequantised."""
        rows = x.flatten()
        out = torch.empty(len(rows), self.row, dtype=self.workspace.dtype, device=self.packed.device)
        codes = (
            torch.empty(len(rows) * self._codes(), dtype=torch.uint8, device=self.packed.device)
            if self.on_cpu
            else None
        )
        self._unpack(out, rows, codes)
        return out.view(*x.shape, self.row)

    @property
    def weight(self) -> Tensor:
        """Shape only: transformers reads nothing else of it."""
        return torch.empty(self.shape, device="meta")

    def workspace_bytes(self, itemsize: int) -> int:  # noqa: ARG002
        return 0


class PlainConv2d(nn.Conv2d):
    """A convolution too small to quantise, between others that output channels last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (input, self.weight))
        return self._conv_forward(x, weight, self.bias)


KINDS: dict[type[nn.Module], type[Quantised]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.Embedding: Embedding,
}


def quantise_layers(
    module: nn.Module,
    formats: Mapping[str, str],
    device: str,
    whole: bool = False,
    dynamic: bool = False,
    kinds: Mapping[str, type[Quantised]] | None = None,
) -> None:
    """Replace the layers at the paths in `formats` by quantised ones, to be computed on `device`.

    `dynamic`: layers that can also quantise their inputs. `kinds`: of layers in some formats.
    Raises TightfitError for an unknown layer or format.
    """
    shared, parts = Workspace(device), dict(module.named_modules(remove_duplicate=False))
    for path, name in formats.items():
        parent, _, leaf = path.rpartition(".")
        try:
            layer = parts[path]
            kind, form = KINDS[type(layer)], FORMATS[name]
        except KeyError:
            raise TightfitError(
                f"the manifest has the layer {path} as {name}, which there is not: export the model again"
            ) from None
        if dynamic and name == "int8":
            kind = _integer_kind(layer, device) or kind
        kind = (kinds or {}).get(name, kind)
        made = kind(layer, form, shared, whole)
        # As a family packs latents behind its VAE's last convolution, and unpacks them before the first.
        made._forward_hooks, made._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
        setattr(parts[parent], leaf, made)
    if formats and device == "cpu":
        for part in module.modules():
            if type(part) is nn.Conv2d:
                part.__class__ = PlainConv2d


def filled(layer: nn.Module, weight: Tensor, form: str, device: str, dynamic: bool) -> Any:
    """A quantised copy of a plain layer; it shares the bias."""
    network = nn.ModuleDict({"layer": layer})
    quantise_layers(network, {"layer": form}, device, dynamic=dynamic)
    made: Any = network["layer"]
    for part, value in quantise(weight, FORMATS[form]).items():
        setattr(made, part, nn.Parameter(value.to(device), requires_grad=False))
    made.prepare()
    made.workspace.allocate(made.bias.dtype, torch.device(device))
    return made


def _integer_kind(layer: nn.Module, device: str) -> type[Quantised] | None:
    """The integer kind for this layer, if there is one and it pays."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    outputs, inputs, *sides = layer.weight.shape
    if device == "cpu" and outputs * math.prod(sides) < min(WIDE * inputs, ENOUGH):
        return None
    if isinstance(layer, nn.Linear):
        return LinearInt8
    plain = layer.groups == 1 and layer.dilation == (1, 1) and not isinstance(layer.padding, str)
    return Conv2dInt8 if plain else None


def quantised_layers(module: nn.Module) -> dict[str, Quantised]:
    """The quantised layers of `module`, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Quantised)}


def workspace(module: nn.Module) -> Workspace:
    """The workspace shared by the quantised layers of `module`; an empty one without such layers."""
    return next(
        (part.workspace for part in module.modules() if isinstance(part, Quantised)), Workspace("cpu")
    )
