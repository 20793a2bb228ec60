"""The engines. Each package in this folder is the only importer of its engine."""

from __future__ import annotations

from ..errors import TightfitError, explained
from ..placement import BACKENDS, GRAPHS
from .protocol import Backend, Engine, GraphEngine


def engine(name: str) -> type[Engine]:
    """The engine called `name`, imported on the first call. Raises TightfitError for an unknown name."""
    if name == "torch":
        from .torch.engine import TorchEngine

        return TorchEngine
    if name in GRAPHS:
        return graph_engine(name)
    if name == "bitsandbytes":
        from .bitsandbytes.backend import BitsAndBytesBackend

        return BitsAndBytesBackend
    raise TightfitError(f"unknown backend '{name}': choose {', '.join(BACKENDS)}")


def graph_engine(name: str) -> type[GraphEngine]:
    """The one of GRAPHS called `name`, imported on the first call."""
    if name == "openvino":
        with explained("OpenVINO cannot be used", "pip install 'tightfit[openvino]'"):
            from .openvino.backend import OpenVinoBackend

            return OpenVinoBackend
    with explained("ONNX Runtime cannot be used", "pip install 'tightfit[cpu]', or [gpu]"):
        from .onnx.backend import OnnxBackend

        return OnnxBackend


def backend(name: str, device: str) -> Backend:
    """The engine called `name` on a device of this machine."""
    make: type = engine(name)
    if name == "torch":
        from .torch.backend import TorchBackend

        make = TorchBackend
    return make(device)
