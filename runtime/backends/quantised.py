"""Layers whose weights stay in 8 or 4 bits: each time one is called its weight is unpacked into a buffer that all share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.dequantise import dequantise
from ...kernels.formats import FORMATS, Format, from_rows
from ..errors import TightfitError

# Weights unpacked at a time on a CPU, which takes less of its memory, and no more of its time (docs/decisions.md). A GPU would
# have to start several kernels for one.
AT_ONCE = 2**22


@torch.library.custom_op("tightfit::dequantise", mutates_args=("out", "codes"))
def _dequantise(
    out: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, kind: str, group: int, taps: int
) -> None:
    """One operator to whoever counts operators, as it is one kernel on a GPU."""
    dequantise(out, packed, scale, zero, codes, Format(kind, group), taps)


@_dequantise.register_fake
def _(*_) -> None:
    """It makes nothing."""


class Workspace:
    """The buffer that a network's quantised layers share: room for the weights unpacked at a time, and for their codes."""

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

    `at_once` output channels are unpacked at a time, on a CPU as many as AT_ONCE weights unless it is to be `whole`.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: Any, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__()
        self.form, self.shape, self.workspace = form, tuple(layer.weight.shape), workspace
        self.taps, self.row = math.prod(self.shape[2:]), math.prod(self.shape[1:])
        self.on_cpu = workspace.device == "cpu"
        self.at_once = self.shape[0] if whole or not self.on_cpu else min(self.shape[0], max(1, AT_ONCE // self.row))
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

    def workspace_bytes(self, itemsize: int) -> int:
        return self.at_once * (self.row * itemsize + self._codes())

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """Output channels `start` to `end` of the weight, in the workspace until that is used again."""
        rows, buffer, dtype = slice(start, end), self.workspace.buffer, self.workspace.dtype
        count = len(self.packed[rows])
        end_of_out = count * self.row * dtype.itemsize
        out = buffer[:end_of_out].view(dtype).view(count, self.row)
        self._unpack(out, rows, buffer[end_of_out : end_of_out + count * self._codes()])
        weight = from_rows(out, (count, *self.shape[1:]))
        return weight if self.on_cpu else weight.contiguous()  # torch's group norms on GPUs take no channels_last

    def _codes(self) -> int:
        """Bytes that the codes of one output channel take while they are unpacked."""
        return self.packed.shape[1] if self.form.bits == 4 else 0

    def _unpack(self, out: Tensor, rows: slice | Tensor, codes: Tensor) -> None:
        """Fill `out` with the output channels `rows`."""
        zero = self.zero[rows] if self.form.kind == "int4" else None
        how = (self.form.kind, self.form.group, self.taps)
        torch.ops.tightfit.dequantise(out, self.packed[rows], self.scale[rows], zero, codes, *how)

    def _parts(self) -> list[slice]:
        return [slice(start, min(start + self.at_once, self.shape[0])) for start in range(0, self.shape[0], self.at_once)]


class Linear(Quantised):
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if self.at_once == self.shape[0]:
            return functional.linear(x, self.dense(), self.bias)
        out = x.new_empty((*x.shape[:-1], self.shape[0]))
        for part in self._parts():
            bias = None if self.bias is None else self.bias[part]
            out[..., part] = functional.linear(x, self.dense(part.start, part.stop), bias)
        return out


class Conv2d(Quantised):
    def __init__(self, layer: nn.Conv2d, form: Format, workspace: Workspace, whole: bool = False) -> None:
        super().__init__(layer, form, workspace, whole or layer.groups > 1)
        self.kernel_size, self.in_channels, self.out_channels = layer.kernel_size, layer.in_channels, layer.out_channels
        self.how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, h, w) → (batch, out, h', w'); on a CPU with channels last, as the unpacked weight has them."""
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
                out = torch.empty(sides, dtype=some.dtype, device=some.device, memory_format=torch.channels_last)
            out[:, part] = some
            del some
        assert out is not None
        return out


class Embedding(Quantised):
    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, width): only the rows that are asked for are unpacked."""
        rows = ids.flatten()
        out = torch.empty(len(rows), self.row, dtype=self.workspace.dtype, device=self.packed.device)
        codes = torch.empty(len(rows) * self._codes(), dtype=torch.uint8, device=self.packed.device)
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


KINDS: dict[type[nn.Module], type[Quantised]] = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.Embedding: Embedding}


def quantise_layers(module: nn.Module, formats: Mapping[str, str], device: str, whole: bool = False) -> None:
    """Put quantised layers in place of those that `formats` names, by paths, to be computed on `device`.

    Raises TightfitError for a layer or a format that there is not.
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
        setattr(module.get_submodule(parent), leaf, kind(layer, form, shared, whole))
    if formats and device == "cpu":
        for part in module.modules():
            if type(part) is nn.Conv2d:
                part.__class__ = PlainConv2d


def quantised_layers(module: nn.Module) -> dict[str, Quantised]:
    """The quantised layers of `module` by their paths."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Quantised)}


def workspace(module: nn.Module) -> Workspace:
    """What the quantised layers of `module` share; an empty one if there are none."""
    return next((part.workspace for part in module.modules() if isinstance(part, Quantised)), Workspace("cpu"))
