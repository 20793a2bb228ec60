"""Group norm, then SiLU, as a ResNet block has it before each of its convolutions.

torch's two operators read and write a map twice, and make one more than the answer. Here the answer of the
norm is overwritten, and on a GPU one Triton kernel does both (triton_norms.py), where it was tried and right.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from .dequantise import triton_runs

Norm = tuple[int, Tensor, Tensor, float]
"""Groups, weight and bias of each channel, epsilon."""
# Of what the trial's values, up to 4, may be off by: a rounding of the norm and one of SiLU.
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def group_norm_silu(x: Tensor, norm: Norm) -> Tensor:
    """silu(group_norm(x)), in the dtype and layout of `x` (batch, channels, h, w): torch's, on any device."""
    groups, weight, bias, eps = norm
    return functional.silu(functional.group_norm(x, groups, weight, bias, eps), inplace=True)


@functools.cache
def fused_runs(device: torch.device) -> bool:
    """Whether the kernel of triton_norms.py runs on a GPU and answers as torch does there, in each dtype and
    layout; tried once. Raises torch.OutOfMemoryError if there is no memory to try."""
    if not triton_runs(device):
        return False
    try:
        return all(
            _right(device, dtype, layout)
            for dtype in _TOLERANCES
            for layout in (torch.contiguous_format, torch.channels_last)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a compiler's, the driver's, triton's own: torch's two operators do it then
        return False


def _right(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> bool:
    """Of 3 groups of 10 channels, around a mean of 2 as deep maps have."""
    from .triton_norms import group_norm_silu_triton

    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((2, 30, 19, 23), (30,), (30,)))
    x = (x + 2).to(device, dtype).contiguous(memory_format=layout)
    norm = 3, weight.to(device, dtype), bias.to(device, dtype), 1e-5
    made, right = group_norm_silu_triton(x, norm), group_norm_silu(x, norm)
    return made.stride() == x.stride() and torch.allclose(
        made.float(), right.float(), rtol=0, atol=_TOLERANCES[dtype]
    )
