"""Which engines there are. Each package beside this one is the only importer of its engine."""

from __future__ import annotations

from ..errors import TightfitError, explained
from ..placement import BACKENDS
from .protocol import Backend, Engine


def engine(name: str) -> type[Engine]:
    """The engine called `name`, imported now. Raises TightfitError for an unknown one."""
    if name == "torch":
        from .torch.backend import TorchBackend

        return TorchBackend
    if name == "onnx":
        with explained("ONNX Runtime cannot be used", "pip install 'tightfit[cpu]', or [gpu]"):
            from .onnx.backend import OnnxBackend

            return OnnxBackend
    raise TightfitError(f"unknown backend '{name}': choose {', '.join(BACKENDS)}")


def backend(name: str, device: str) -> Backend:
    """The engine called `name` on a device that is here."""
    make: type = engine(name)
    return make(device)
