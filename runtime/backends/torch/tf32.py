"""Products of fp32 in fp32. From Ampere on torch lets cuDNN round their inputs to TF32's 10 bits of mantissa,
unless it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def tf32_off(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products on a CUDA device are of whole fp32; what was set before is set again
    after."""
    with ExitStack() as after:
        if device.type == "cuda":
            _convolutions_off(after)
            _products_off(after)
        yield


def _convolutions_off(after: ExitStack) -> None:
    cudnn = torch.backends.cudnn
    convolution = getattr(cudnn, "conv", None)
    if convolution is None:  # torch 2.8; later ones warn of the older interface, or raise
        after.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        cudnn.allow_tf32 = False
    elif convolution.fp32_precision == "tf32":
        after.callback(setattr, convolution, "fp32_precision", "tf32")
        convolution.fp32_precision = "ieee"


def _products_off(after: ExitStack) -> None:
    """They are off unless the user has switched them on. torch's readers raise where its two interfaces
    disagree, so both are switched off, and what was used to switch on is used again."""
    matmul, older = torch.backends.cuda.matmul, None
    if getattr(matmul, "fp32_precision", "tf32") != "tf32":
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was switched on by the newer one alone
        after.callback(setattr, matmul, "fp32_precision", "tf32")
    if older == "medium":
        after.callback(torch.set_float32_matmul_precision, older)
    elif older:
        after.callback(setattr, matmul, "allow_tf32", older == "high")
    matmul.allow_tf32 = False
