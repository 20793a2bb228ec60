"""The torch engine: modules of diffusers and transformers, filled from safetensors files, all at once or as they run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import OutOfMemoryError, TightfitError, first_line
from ..hardware import Hardware
from ..memory import Footprint
from ..plan import DYNAMIC, QUANTISED, Placement
from ..process import release
from ..spec import Component, ModelSpec
from . import dryrun, networks, quantised, weights
from .meter import Meter, meter


class TorchBackend:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.meter = meter(self.device)
        if device == "cuda" and "GTX 16" in torch.cuda.get_device_name():
            # Without it cuDNN's fp16 convolutions answer NaN on these cards, as AUTOMATIC1111's modules/devices.py found. The
            # workspaces that it tries come on top of what is predicted.
            torch.backends.cudnn.benchmark = True

    @staticmethod
    def refuses(
        spec: ModelSpec,  # noqa: ARG004
        component: Component,
        placement: Placement,
        hardware: Hardware,
        size: tuple[int, int, int],  # noqa: ARG004
    ) -> str | None:
        """Why this engine cannot run a component so on that hardware, or None if it can."""
        if not component.tensors:
            return f"the {component.name} is here as ONNX only: use --backend onnx, or the model that it was exported from"
        if placement.precision == DYNAMIC and "int8" not in hardware.rates:
            return "this device has no fast products of 8-bit whole numbers that tightfit can use: choose int8"
        if placement.precision == DYNAMIC and hardware.device == "cpu" and placement.compute not in hardware.precisions:
            return f"oneDNN makes no {placement.compute} of sums of whole numbers here but by a slow loop: choose int8"
        if placement.precision == DYNAMIC and placement.residency == "streamed":
            return "its weights, which are prepared once, must stay loaded: choose int8"
        if placement.precision == DYNAMIC and component.name != "unet":
            return f"int8-dynamic is for U-Nets: choose int8 for the {component.name}"
        if placement.residency == "streamed" and placement.precision in QUANTISED and component.formats is None:
            return "weights that are quantised while they load cannot stream: export the model first"
        if placement.residency == "streamed" and component.name == "vae_decoder" and placement.tiling == "tiled":
            return "strips read a convolution's weights many times: they must stay loaded"
        if placement.residency == "streamed" and hardware.unified and hardware.device == "cuda":
            return "GPU and host share one memory: the weights would be in it twice"
        if hardware.device == "cpu" and placement.compute == "fp16" and placement.attention == "sliced":
            return "torch multiplies fp16 matrices 30 times slower than fp32 ones on a CPU"
        return None

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """What a module needs is checked when it is built."""

    @staticmethod
    def footprint(
        spec: ModelSpec, component: Component, placement: Placement, hardware: Hardware, size: tuple[int, int, int]
    ) -> Footprint:
        return dryrun.footprint(spec, component, placement, hardware, size)

    def load(self, spec: ModelSpec, component: Component, placement: Placement) -> TorchSession:
        """Build the module without memory, then fill it, or have it filled as it runs."""
        dtype = weights.DTYPES[placement.compute]
        module = networks.build(component, placement, self.device.type)
        stored = weights.match(component, module)
        session = TorchSession(module, networks.forward(spec, component, placement), dtype, self.device, self.meter)
        with _memory_errors_explained():
            session.load(stored, placement.residency == "streamed")
        return session


class TorchSession:
    """A module, called with arrays by way of `forward`, which knows their names."""

    notices: tuple[str, ...] = ()

    def __init__(
        self, module: torch.nn.Module, forward: networks.Forward, dtype: torch.dtype, device: torch.device, meter: Meter
    ) -> None:
        self.module: torch.nn.Module | None = module
        self.forward, self.dtype, self.device, self.meter = forward, dtype, device, meter
        self.streamer: weights.Streamer | None = None
        self._held = 0
        self._calls: dict[Any, int] = {}

    def load(self, stored, streamed: bool) -> None:
        """Bring the weights in, or prepare to stream them; OutOfMemoryError leaves nothing behind."""
        assert self.module is not None
        here = 0  # a GPU's weights are read by way of the host's memory
        if self.device.type == "cpu":
            here = weights.loading_bytes(self.module, stored, self.dtype, self.device)
        self._hold(sum(weights.beside(self.module, self.dtype)))
        try:
            if streamed:
                parts = weights.units(self.module, stored, self.dtype)
                scratch = weights.scratch_bytes(self.module, stored, self.dtype, self.device)
                self._hold(sum(weights.stream_bytes(parts, self.device)) + here)
                self.streamer = weights.Streamer(self.module, parts, scratch, self.dtype, self.device)
            else:
                self._hold(sum(weights.held(self.module, self.dtype)))
                self._hold(here)
                weights.fill(self.module, stored, self.dtype, self.device)
                self._hold(-here)
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.module is None:
            raise TightfitError("the pipeline was closed while it was painting")
        module, key = self.module, tuple((name, array.shape) for name, array in arrays.items())
        with _memory_errors_explained():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            outs = self.meter.during(self._calls, key, lambda: dryrun.run(module, self.forward, tensors, self.dtype, self.device))
            return tuple(out.cpu().numpy() for out in outs)

    def close(self) -> None:
        if self.streamer:
            self.streamer.close()
        if self.module:
            quantised.workspace(self.module).free()
        for part in self.module.modules() if self.module else ():
            part._buffers.clear()
            part._parameters.clear()  # modules of diffusers refer to themselves, so they go when Python's collector comes by
        self.module = self.streamer = None
        self._hold(-self._held)
        _empty_cache(self.device)

    def _hold(self, count: int) -> None:
        self.meter.hold(count)
        self._held += count


# CUDA, MPS and CPU; cuBLAS; Windows' CPU; cuDNN when none of its algorithms finds room for its workspace
_NO_MEMORY = "out of memory|allocate memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|not enough memory|unable to find an engine"


@contextmanager
def _memory_errors_explained() -> Iterator[None]:
    """torch has a class for CUDA's own; MPS, cuBLAS and the CPU only say so in their text."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(_NO_MEMORY, str(error)):
            raise
        raise OutOfMemoryError(first_line(error)) from error


def _empty_cache(device: torch.device) -> None:
    """Give memory that was freed back to the system."""
    if device.type == "cpu":
        release()
    else:
        getattr(torch, device.type).empty_cache()
        if device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()  # pinned memory that weights were streamed from
