"""fp32 products in full fp32. From Ampere on, torch lets cuDNN round inputs to TF32's 10-bit mantissa by
default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def tf32_off(device: torch.device) -> Iterator[None]:
    """Context manager: convolutions and matrix products on a CUDA device use full fp32. Restores the
    settings."""
    with ExitStack() as after:
        if device.type == "cuda":
            _convolutions_off(after)
            _products_off(after)
        yield


def _convolutions_off(after: ExitStack) -> None:
    cudnn = torch.backends.cudnn
    convolution = getattr(cudnn, "conv", None)
    if convolution is None:  # torch 2.8; later versions warn about the older interface, or raise
        after.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        cudnn.allow_tf32 = False
    elif convolution.fp32_precision == "tf32":
        after.callback(setattr, convolution, "fp32_precision", "tf32")
        convolution.fp32_precision = "ieee"


def _products_off(after: ExitStack) -> None:
    """Off unless the user has switched TF32 on. torch's getters raise when its two interfaces disagree, so
    both are switched off, and the one the user used is restored."""
    matmul, older = torch.backends.cuda.matmul, None
    if getattr(matmul, "fp32_precision", "tf32") != "tf32":
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer interface was used
        after.callback(setattr, matmul, "fp32_precision", "tf32")
    if older == "medium":
        after.callback(torch.set_float32_matmul_precision, older)
    elif older:
        after.callback(setattr, matmul, "allow_tf32", older == "high")
    matmul.allow_tf32 = False
