"""ONNX Runtime's execution providers: known, available, and why one does not run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from ..errors import first_line

CPU_PROVIDER = "CPUExecutionProvider"
# ONNX Runtime's providers for each device, the preferred one first.
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


# The onnxruntime-… packages that contain them.
PACKAGES = {"cuda": "gpu", "migraphx": "migraphx", "rocm": "rocm", "dml": "directml", "openvino": "openvino"}


def provider_name(provider: str) -> str:
    """Short name: cuda for CUDAExecutionProvider."""
    return provider.lower().removesuffix("executionprovider")


@functools.cache
def providers() -> tuple[str, ...]:
    """ONNX Runtime's execution providers that run here; none if it cannot be imported. Not part of detection,
    because it takes time."""
    return tuple(name for name, problem in provider_problems().items() if problem is None)


@functools.cache
def provider_problems() -> Mapping[str, str | None]:
    """Each provider that ONNX Runtime lists, and in one line why it does not run here, or None if it does.

    ONNX Runtime lists what it was built with, and falls back on the CPU if a provider cannot be loaded, so
    those for GPUs are tried.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    listed = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in listed and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN, from torch's folder or NVIDIA's packages
    on_gpu = {name for names in PROVIDERS.values() for name in names} - {CPU_PROVIDER}
    return {name: _provider_problem(onnxruntime, name) if name in on_gpu else None for name in listed}


# y = x for one float: opset 13, format version 8.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def _provider_problem(onnxruntime: Any, name: str) -> str | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[name], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's classes are not public
        return first_line(error)
    return None if name in session.get_providers() else "its libraries cannot be loaded"
