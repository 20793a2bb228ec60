"""Layers whose weights stay in 8 or 4 bits: each time one is called its weight is unpacked into a buffer that
all share, or is multiplied as it is, by inputs quantised to 8 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....kernels import int8
from ....kernels.dequantise import dequantise, triton_runs
from ....kernels.formats import FORMATS, Format, from_rows
from ....kernels.quantise import quantise
from ...errors import TightfitError
from .autotune import fastest

# Weights unpacked at a time on a CPU, which takes less of its memory, and no more of its time
# (docs/decisions.md). A GPU would have to start several kernels for one.
AT_ONCE = 2**22
FEW_ROWS = (
    256  # of a linear's inputs, up to which a GPU may be faster to multiply while it unpacks: it is tried
)
# Of layers that multiply whole numbers on a CPU outputs times taps are WIDE times the inputs: quantising an
# input is paid once for all that it is multiplied by, and the U-Net's other linears and 1x1 convolutions were
# slower for it (docs/decisions.md).
WIDE = 4
# Output pixels, output channels and inputs that a program of Triton's convolution multiplies at a time, and
# its warps and stages.
TILES = (
    ((128, 128, 64), 8, 3), ((128, 64, 64), 4, 3), ((64, 128, 64), 4, 3), ((64, 64, 64), 4, 4),
    ((128, 256, 64), 8, 3), ((64, 64, 128), 4, 3), ((32, 64, 128), 4, 4),
)  # fmt: skip


@torch.library.custom_op("tightfit::dequantise", mutates_args=("out", "codes"))
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
    """One operator to whoever counts operators, as it is one kernel on a GPU."""
    dequantise(out, packed, scale, zero, codes, Format(kind, group), taps, taps_last)


@_dequantise.register_fake
def _(*_) -> None:
    """It makes nothing."""


@torch.library.custom_op("tightfit::linear_int8", mutates_args=())
def _linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return int8.linear_int8_onednn(x, packed, scale, bias)
    from ....kernels.triton_int8 import linear_int8_triton

    run = functools.partial(linear_int8_triton, x, packed, scale, bias)
    return fastest(f"linear_int8 {list(x.shape)} x {list(packed.shape)} {x.dtype}", x.device, _tiles(run))


@_linear_int8.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(scale))


@torch.library.custom_op("tightfit::conv2d_int8", mutates_args=())
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
    what = f"conv2d_int8 {list(x.shape)} x {list(packed.shape)} {kernel} {stride} {padding} {x.dtype}"
    return fastest(what, x.device, _tiles(run))


@_conv2d_int8.register_fake
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


def gpu_bytes(func: Any, args: Any, out: Any) -> int:
    """Bytes that our operators take on a GPU beside their answer: codes of the inputs, for a moment twice if
    these are not channels_last; codes of a weight of 4 bits, which are made where Triton does not run."""
    if func is DEQUANTISE:
        return _unpacking(*args[:6])
    if func not in (LINEAR_INT8, CONV2D_INT8):
        return 0
    codes = args[0].numel()
    return max(codes, 2 * codes - out.nbytes) if func is CONV2D_INT8 and args[0].is_contiguous() else codes


def _unpacking(
    out: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor | None, kind: str
) -> int:
    """Bytes that dequantise_torch takes for 4 bits: the codes, and beside them scales, and zeros twice, in
    the weight's own dtype. nf4, which no recipe of ours uses, takes more."""
    if kind == "int8":
        return 0
    return (packed.numel() if codes is None else 0) + scale.numel() * out.element_size() * (
        1 if zero is None else 3
    )


class Workspace:
    """The buffer that a network's quantised layers share: room for the weights unpacked at a time, and on a
    CPU for their codes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.layers: list[Quantised] = []
        self.dtype = torch.float32
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def bytes(self, dtype: torch.dtype) -> int:
        """What the buffer takes when layers compute in `dtype`."""
        return max((layer.workspace_bytes(dtype.itemsize) for layer in self.layers), default=0)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.buffer = torch.empty(self.bytes(dtype), dtype=torch.uint8, device=device)

    def free(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


class Quantised(nn.Module):
    """A layer's weight in parts, named as in the files: `packed`, `scale` and, for int4, `zero`.

    `at_once` output channels are unpacked at a time, on a CPU as many as AT_ONCE weights unless it is to be
    `whole`.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: Any, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__()
        self.form, self.shape, self.workspace = form, tuple(layer.weight.shape), workspace
        self.taps, self.row = math.prod(self.shape[2:]), math.prod(self.shape[1:])
        self.on_cpu = workspace.device == "cpu"
        self.at_once = (
            self.shape[0] if whole or not self.on_cpu else min(self.shape[0], max(1, AT_ONCE // self.row))
        )
        for name, (dtype, shape) in form.parts(self.shape).items():
            part = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter("bias", getattr(layer, "bias", None))
        workspace.layers.append(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantised:  # noqa: ARG002
        """`Module.to` passes the parts by: they have types of their own."""
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias), requires_grad=False)
        return self

    def prepare(self) -> None:
        """Called once the parts are there."""

    def packed_bytes(self) -> int:
        """What `packed` takes after `prepare`."""
        return self.packed.numel() * self.packed.element_size()

    def packing_bytes(self) -> int:
        """What `prepare` makes in place of `packed`."""
        return 0

    def workspace_bytes(self, itemsize: int) -> int:
        return self.at_once * (self.row * itemsize + self._codes())

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """Output channels `start` to `end` of the weight, in the workspace until that is used again."""
        rows, buffer, dtype = slice(start, end), self.workspace.buffer, self.workspace.dtype
        count = len(self.packed[rows])
        end_of_out = count * self.row * dtype.itemsize
        out = buffer[:end_of_out].view(dtype).view(count, self.row)
        self._unpack(
            out, rows, buffer[end_of_out : end_of_out + count * self._codes()] if self.on_cpu else None
        )
        if self.on_cpu:
            return from_rows(out, (count, *self.shape[1:]))
        return out.view(count, *self.shape[1:])  # torch's group norms on GPUs take no channels_last

    def _codes(self) -> int:
        """Bytes of the buffer that the codes of one output channel take while they are unpacked; Triton needs
        none, so on a GPU torch makes them for a moment where it does not run."""
        return self.packed.shape[1] if self.form.bits == 4 and self.on_cpu else 0

    def _unpack(self, out: Tensor, rows: slice | Tensor, codes: Tensor | None) -> None:
        """Fill `out` with the output channels `rows`."""
        zero = self.zero[rows] if self.form.kind == "int4" else None
        how = (self.form.kind, self.form.group, self.taps, not self.on_cpu)
        torch.ops.tightfit.dequantise(out, self.packed[rows], self.scale[rows], zero, codes, *how)

    def _parts(self) -> list[slice]:
        return [
            slice(start, min(start + self.at_once, self.shape[0]))
            for start in range(0, self.shape[0], self.at_once)
        ]


class Linear(Quantised):
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1] and triton_runs(x.device):
            return self._few(x)
        if self.at_once == self.shape[0]:
            return functional.linear(x, self.dense(), self.bias)
        out = x.new_empty((*x.shape[:-1], self.shape[0]))
        for part in self._parts():
            bias = None if self.bias is None else self.bias[part]
            out[..., part] = functional.linear(x, self.dense(part.start, part.stop), bias)
        return out

    def _few(self, x: Tensor) -> Tensor:
        from ....kernels.triton_weights import linear_triton  # triton takes memory, on a CPU for nothing

        zero, kind = getattr(self, "zero", None), (self.form.kind, self.form.group)
        ways = {
            "unpacked, then multiplied": lambda: functional.linear(x, self.dense(), self.bias),
            "at once": lambda: linear_triton(x, self.packed, self.scale, zero, self.bias, self.form),
        }
        return fastest(f"linear {kind} {list(x.shape)} x {list(self.shape)} {x.dtype}", x.device, ways)


class Conv2d(Quantised):
    def __init__(self, layer: nn.Conv2d, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__(layer, form, workspace, whole or layer.groups > 1)
        self.kernel_size, self.in_channels, self.out_channels = (
            layer.kernel_size,
            layer.in_channels,
            layer.out_channels,
        )
        self.how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, h, w) → (batch, out, h', w'); on a CPU with channels last, as the unpacked weight has
        them."""
        if self.on_cpu:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.at_once == self.shape[0]:
            return functional.conv2d(x, self.dense(), self.bias, *self.how)
        out = None
        for part in self._parts():
            bias = None if self.bias is None else self.bias[part]
            some = functional.conv2d(x, self.dense(part.start, part.stop), bias, *self.how)
            if out is None:
                sides = (len(some), self.shape[0], *some.shape[2:])
                out = torch.empty(
                    sides, dtype=some.dtype, device=some.device, memory_format=torch.channels_last
                )
            out[:, part] = some
            del some
        assert out is not None
        return out


class LinearInt8(Quantised):
    """In whole numbers. On a CPU its weight is oneDNN's once it is there."""

    def prepare(self) -> None:
        if self.on_cpu:
            self.packed = nn.Parameter(int8.pack_linear(self.packed), requires_grad=False)

    def packed_bytes(self) -> int:
        """oneDNN's outputs come in blocks of 64."""
        return -(-self.shape[0] // 64) * 64 * self.row if self.on_cpu else super().packed_bytes()

    def packing_bytes(self) -> int:
        return self.packed_bytes() if self.on_cpu else 0

    def workspace_bytes(self, itemsize: int) -> int:  # noqa: ARG002
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return torch.ops.tightfit.linear_int8(x, self.packed, self.scale, self.bias)


class Conv2dInt8(LinearInt8):
    """In whole numbers; on a CPU with channels last."""

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

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, h, w) → (batch, out, h', w')."""
        if self.on_cpu:
            x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.tightfit.conv2d_int8(x, self.packed, self.scale, self.sums, self.bias, *self.how)


class Embedding(Quantised):
    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, width): only the rows that are asked for are unpacked."""
        rows = ids.flatten()
        out = torch.empty(len(rows), self.row, dtype=self.workspace.dtype, device=self.packed.device)
        codes = (
            torch.empty(len(rows) * self._codes(), dtype=torch.uint8, device=self.packed.device)
            if self.on_cpu
            else None
        )
        self._unpack(out, rows, codes)
        return out.view(*ids.shape, self.row)

    @property
    def weight(self) -> Tensor:
        """Without values: transformers asks it for its shape."""
        return torch.empty(self.shape, device="meta")

    def workspace_bytes(self, itemsize: int) -> int:  # noqa: ARG002
        return 0


class PlainConv2d(nn.Conv2d):
    """A convolution too small to be quantised, among others whose answers have their channels last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (input, self.weight))
        return self._conv_forward(x, weight, self.bias)


KINDS: dict[type[nn.Module], type[Quantised]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.Embedding: Embedding,
}


def quantise_layers(
    module: nn.Module, formats: Mapping[str, str], device: str, whole: bool = False, dynamic: bool = False
) -> None:
    """Put quantised layers in place of those that `formats` names, by paths, to be computed on `device`.

    `dynamic`: inputs of the layers that can are quantised too. Raises TightfitError for a layer or a format
    that there is not.
    """
    shared = Workspace(device)
    for path, name in formats.items():
        parent, _, leaf = path.rpartition(".")
        try:
            layer = module.get_submodule(path)
            kind, form = KINDS[type(layer)], FORMATS[name]
        except (AttributeError, KeyError):
            raise TightfitError(
                f"the manifest has the layer {path} as {name}, which there is not: export the model again"
            ) from None
        if dynamic and name == "int8":
            kind = _in_whole_numbers(layer, device) or kind
        setattr(module.get_submodule(parent), leaf, kind(layer, form, shared, whole))
    if formats and device == "cpu":
        for part in module.modules():
            if type(part) is nn.Conv2d:
                part.__class__ = PlainConv2d


def filled(layer: nn.Module, weight: Tensor, form: str, device: str, dynamic: bool) -> Any:
    """The quantised layer in place of a plain one, whose bias it takes."""
    network = nn.ModuleDict({"layer": layer})
    quantise_layers(network, {"layer": form}, device, dynamic=dynamic)
    made: Any = network["layer"]
    for part, value in quantise(weight, FORMATS[form]).items():
        setattr(made, part, nn.Parameter(value.to(device), requires_grad=False))
    made.prepare()
    made.workspace.allocate(made.bias.dtype, torch.device(device))
    return made


def _in_whole_numbers(layer: nn.Module, device: str) -> type[Quantised] | None:
    """The kind of layer that multiplies so, if there is one and it is worth it."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    outputs, inputs, *sides = layer.weight.shape
    if device == "cpu" and outputs * math.prod(sides) < WIDE * inputs:
        return None
    if isinstance(layer, nn.Linear):
        return LinearInt8
    plain = layer.groups == 1 and layer.dilation == (1, 1) and not isinstance(layer.padding, str)
    return Conv2dInt8 if plain else None


def quantised_layers(module: nn.Module) -> dict[str, Quantised]:
    """The quantised layers of `module` by their paths."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Quantised)}


def workspace(module: nn.Module) -> Workspace:
    """What the quantised layers of `module` share; an empty one if there are none."""
    return next(
        (part.workspace for part in module.modules() if isinstance(part, Quantised)), Workspace("cpu")
    )
