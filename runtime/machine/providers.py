"""ONNX Runtime's execution providers: which there are, which are here, and why one does not run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from ..errors import first_line

CPU_PROVIDER = "CPUExecutionProvider"
# ONNX Runtime's providers for each device, the one to prefer first.
PROVIDERS = {
    "cuda": (
        "CUDAExecutionProvider",
        "MIGraphXExecutionProvider",
        "ROCMExecutionProvider",
        "DmlExecutionProvider",
    ),
    "xpu": ("OpenVINOExecutionProvider", "DmlExecutionProvider"),
    "mps": ("CoreMLExecutionProvider",),
    "cpu": (CPU_PROVIDER,),
}


# The packages onnxruntime-… that have them.
PACKAGES = {"cuda": "gpu", "migraphx": "migraphx", "rocm": "rocm", "dml": "directml", "openvino": "openvino"}


def provider_name(provider: str) -> str:
    """As it is called for short: cuda for CUDAExecutionProvider."""
    return provider.lower().removesuffix("executionprovider")


@functools.cache
def providers() -> tuple[str, ...]:
    """ONNX Runtime's execution providers that run here; none if it is not installed or cannot be imported.
    Asked apart, as that takes time."""
    return tuple(name for name, problem in provider_problems().items() if problem is None)


@functools.cache
def provider_problems() -> Mapping[str, str | None]:
    """Each provider that ONNX Runtime lists, and in one line why it does not run here, or None if it does.

    It lists those that it was built with, and computes on the CPU where it cannot load one: those for GPUs
    are tried.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    there = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in there and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):  # where it says what it does not find
            onnxruntime.preload_dlls()  # of CUDA and cuDNN, from torch's folder or NVIDIA's packages
    on_gpu = {name for names in PROVIDERS.values() for name in names} - {CPU_PROVIDER}
    return {name: _provider_problem(onnxruntime, name) if name in on_gpu else None for name in there}


# y = x, of one float: opset 13, version 8 of the format.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def _provider_problem(onnxruntime: Any, name: str) -> str | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[name], enable_fallback=0)
    except Exception as error:  # its classes are not public
        return first_line(error)
    return None if name in session.get_providers() else "its libraries cannot be loaded"
