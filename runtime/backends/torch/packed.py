"""Plain layers whose weights lie as oneDNN multiplies by them, for networks that a CPU calls many times.

torch would put a convolution's weight in that order in every call, and free it again: up to half of the
deepest layers' time, and their scratch.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ....kernels import onednn
from .quantised import PlainConv2d

# oneDNN's blocks: outputs and inputs that fill them take no byte more than plain weights do.
_OUTPUTS, _INPUTS = 64, 32
# oneDNN orders weights for a size of input. This one's order suits all sizes of most layers, and a few small
# maps take half a millisecond to pack again. With no size given 1x1 convolutions took up to 13 times as long.
_MAP = 64, 64


class Packed(nn.Module):
    """A layer whose `weight` is opaque once it is packed; on `meta` it is plain, of `plain_shape`."""

    weight: Tensor
    plain_shape: torch.Size

    def take(self, weight: Tensor) -> None:
        """Pack a plain weight in place of the one that there is, which goes first."""
        self._parameters["weight"] = None
        self.weight = nn.Parameter(self.ordered(weight), requires_grad=False)

    def ordered(self, weight: Tensor) -> Tensor:
        raise NotImplementedError


class PackedConv2d(nn.Conv2d, Packed):
    """Answers with channels last."""

    def ordered(self, weight: Tensor) -> Tensor:
        how = self.padding, self.stride, self.dilation, self.groups
        size = 2, self.in_channels, *_MAP
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, size)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        how = self.padding, self.stride, self.dilation, self.groups
        return onednn.CONVOLUTION(input, self.weight, self.bias, *how, "none", [], None)


class PackedPointwise(nn.Conv2d, Packed):
    """1x1, as the product of matrices that it is with channels last.

    Of fewer than 64 pixels, oneDNN's convolution wants another order than it was packed in, and then
    multiplies value by value: 120 ms for 2560 to 1280 channels at 4x4, a third of a step at 256x256.
    """

    def ordered(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        weight = self.weight.flatten(1) if self.weight.is_meta else self.weight
        pixels = input.permute(0, 2, 3, 1).contiguous()
        return onednn.linear(pixels, weight, self.bias).permute(0, 3, 1, 2)


class PackedLinear(nn.Linear, Packed):
    def ordered(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return onednn.linear(input, self.weight, self.bias)


class PackedGate(PackedLinear):
    """All of a GEGLU: half of the outputs times GELU of the other half, which is taken of sums in fp32."""

    gate: Tensor

    def take(self, weight: Tensor) -> None:
        self._parameters["weight"] = self._parameters["gate"] = None
        values, gate = weight.chunk(2)
        self.gate = nn.Parameter(self.ordered(gate), requires_grad=False)
        self.weight = nn.Parameter(self.ordered(values), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        plain = self.weight.is_meta
        values, gate = self.weight.chunk(2) if plain else (self.weight, self.gate)
        of_values, of_gate = (None, None) if self.bias is None else self.bias.chunk(2)
        opened = onednn.linear(input, gate, of_gate, then="gelu")
        return onednn.linear(input, values, of_values).mul_(opened)


_KINDS = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}


def pack_layers(module: nn.Module) -> None:
    """Make the layers that fill oneDNN's blocks packed ones. If there are any, the other convolutions answer
    with channels last too."""
    for part in module.modules():
        if type(part) in _KINDS and _fills(part.weight):  # pyright: ignore[reportArgumentType]
            _become(part, PackedPointwise if _is_pointwise(part) else _KINDS[type(part)])
        elif type(part).__name__ == "GEGLU" and _fills(part.proj.weight, halves=2):  # pyright: ignore
            part.forward = _become(part.proj, PackedGate).__call__
    for part in module.modules() if packed_layers(module) else ():
        if type(part) is nn.Conv2d:
            part.__class__ = PlainConv2d


def pack(module: nn.Module) -> None:
    """`pack_layers` of a module whose weights are loaded."""
    pack_layers(module)
    for layer in packed_layers(module):
        layer.take(layer.weight)


def _is_pointwise(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def _become(layer: Any, kind: type[nn.Module]) -> Any:
    layer.plain_shape = layer.weight.shape
    layer.__class__ = kind
    return layer


def _fills(weight: Tensor, halves: int = 1) -> bool:
    return weight.shape[0] % (_OUTPUTS * halves) == 0 and weight.shape[1] % _INPUTS == 0


def is_packed(owner: nn.Module, leaf: str) -> TypeGuard[Packed]:
    """Whether the parameter `leaf` of a layer is packed."""
    return isinstance(owner, Packed) and leaf == "weight"


def packed_layers(module: nn.Module) -> list[Packed]:
    return [part for part in module.modules() if isinstance(part, Packed)]


def packing_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that packing takes at most beside what the module holds."""
    return max((part.plain_shape.numel() * dtype.itemsize for part in packed_layers(module)), default=0)
