"""oneDNN's products as torch has them on an x86 CPU: by weights that it packs once, and with what follows a
product done to its fp32 sums before these are rounded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def _operator(name: str) -> Any:
    """None where torch was built without oneDNN."""
    return getattr(getattr(torch.ops.mkldnn, name, None), "default", None)


CONVOLUTION, LINEAR = _operator("_convolution_pointwise"), _operator("_linear_pointwise")


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has these products in `dtype`."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or not (CONVOLUTION and LINEAR):
        return False
    in_half = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and (dtype is torch.float32 or in_half)


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies matrices in tiles (AMX): bf16 and whole numbers."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


def in_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in tiles, for which libraries put them in another order
    first."""
    return dtype is torch.bfloat16 and has_tiles()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """(…, in) and (out, in), plain or packed → (…, out). `then`: "gelu", the exact one, of the sums."""
    return LINEAR(x, weight, bias, then, [], "none")
