"""The torch engine: modules of diffusers and transformers, filled from safetensors files, all at once or as
they run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from ....kernels.dequantise import triton_problem
from ...costs.footprint import Footprint
from ...errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from ...machine.detect import pinnable
from ...machine.hardware import Hardware
from ...machine.process import release
from ...models.families.family import Role
from ...models.spec import Component, ModelSpec
from ...models.tensors import Tensor
from ...placement import DYNAMIC, QUANTISED, Placement
from ...rules import Rule, first_broken
from ...units import shown
from ..sent import Sent
from . import dryrun, networks, quantised, streaming
from . import loading as weights
from .meter import Meter, meter
from .tf32 import tf32_off


@dataclass(frozen=True)
class _Case:
    """One component, placed so on that hardware, as the rules below look at it."""

    component: Component
    placement: Placement
    hardware: Hardware

    @property
    def dynamic(self) -> bool:
        return self.placement.precision == DYNAMIC

    @property
    def streamed(self) -> bool:
        return self.placement.residency == "streamed"

    @property
    def compute(self) -> str:
        return self.placement.compute

    @functools.cached_property
    def triton_problem(self) -> str | None:
        return _triton_problem(self.hardware)


_REFUSALS: tuple[Rule[_Case], ...] = (
    Rule(
        lambda case: not case.component.tensors,
        lambda case: (
            f"the {case.component.name} is here as ONNX only: "
            "use --backend onnx, or the model that it was exported from"
        ),
    ),
    Rule(
        lambda case: case.dynamic and "int8" not in case.hardware.rates,
        "this device has no fast products of 8-bit whole numbers that tightfit can use: choose int8",
    ),
    Rule(
        lambda case: case.dynamic and case.triton_problem,
        lambda case: (
            f"int8-dynamic needs Triton, which does not run here ({case.triton_problem}): choose int8"
        ),
    ),
    Rule(
        lambda case: (
            case.dynamic and case.hardware.device == "cpu" and case.compute not in case.hardware.precisions
        ),
        lambda case: (
            f"oneDNN makes no {case.compute} of sums of whole numbers here but by a slow loop: choose int8"
        ),
    ),
    Rule(
        lambda case: case.dynamic and case.streamed,
        "its weights, which are prepared once, must stay loaded: choose int8",
    ),
    Rule(
        lambda case: case.dynamic and case.component.role is not Role.DENOISER,
        lambda case: f"int8-dynamic is for U-Nets: choose int8 for the {case.component.name}",
    ),
    Rule(
        lambda case: (
            case.streamed and case.placement.precision in QUANTISED and case.component.formats is None
        ),
        "weights that are quantised while they load cannot stream: export the model first",
    ),
    Rule(
        lambda case: case.streamed and case.component.role is Role.DECODER,
        "a VAE's weights, a hundredth of a U-Net's, must stay loaded: its strips read them many times",
    ),
    Rule(
        lambda case: (
            case.compute == "bf16" and case.hardware.capability and case.hardware.capability < (8, 0)
        ),
        lambda case: (
            f"cuDNN has no bf16 convolutions below compute capability 8.0: choose {_instead(case.hardware)}"
        ),
    ),
    Rule(
        lambda case: case.compute == "fp16" and case.hardware.half_is_broken,
        lambda case: (
            f"fp16 convolutions answer NaN on {case.hardware.name}: choose {_instead(case.hardware)}"
        ),
    ),
    Rule(
        lambda case: case.streamed and case.hardware.unified and case.hardware.device == "cuda",
        "GPU and host share one memory: the weights would be in it twice",
    ),
    Rule(
        lambda case: (
            case.hardware.device == "cpu" and case.compute == "fp16" and case.placement.attention == "sliced"
        ),
        "torch multiplies fp16 matrices 30 times slower than fp32 ones on a CPU",
    ),
)


class TorchBackend:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.meter = meter(self.device)
        self._stores: dict[str, tuple[Component, Placement, streaming.HostStore]] = {}

    @staticmethod
    def refuses(
        spec: ModelSpec,  # noqa: ARG004
        component: Component,
        placement: Placement,
        hardware: Hardware,
        size: tuple[int, int, int],  # noqa: ARG004
    ) -> str | None:
        """Why this engine cannot run a component so on that hardware, or None if it can."""
        return first_broken(_REFUSALS, _Case(component, placement, hardware))

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """What a module needs is checked when it is built."""

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        size: tuple[int, int, int],
    ) -> Footprint:
        return dryrun.footprint(spec, component, placement, hardware, size)

    def load(self, component: Component, placement: Placement) -> TorchSession:
        """Build the module without memory, then fill it, or have it filled as it runs."""
        dtype = weights.DTYPES[placement.compute]
        with _memory_errors_explained(self.device):
            problem = self._trouble(component, placement)
            module = networks.build(component, placement, self.device.type)
            stored = weights.match(component, module)
        session = TorchSession(module, networks.forward(component, placement), dtype, self.device, self.meter)
        with _memory_errors_explained(self.device):
            if placement.residency == "streamed":
                lane = functools.partial(self._lane, session, component, placement)
                session.stream(
                    stored,
                    placement.kept_bytes,
                    lane,
                    dryrun.call_order(component, placement, self.device.type),
                )
            else:
                session.load(stored)
        if problem:
            session.notices += (
                f"Triton does not run here ({problem}): "
                "weights in 8 and 4 bits are unpacked by torch, which is slower",
            )
        return session

    def _trouble(self, component: Component, placement: Placement) -> str | None:
        """Why a component with weights in 8 or 4 bits cannot have Triton's kernels on a GPU."""
        stored = placement.precision in QUANTISED or component.formats is not None
        return triton_problem(self.device) if stored and self.device.type == "cuda" else None

    def _lane(
        self,
        session: TorchSession,
        component: Component,
        placement: Placement,
        parts: streaming.Parts,
        scratch: torch.Tensor,
    ) -> streaming.Lane:
        """How the weights of `parts` come to the device. What a GPU copies from is filled once and kept until
        `keep` says else."""
        dtype = weights.DTYPES[placement.compute]
        if self.device.type != "cuda":
            return streaming.FileLane(dtype, scratch)
        if self._stores.get(component.name, (None,))[0] is not component:
            self._stores.pop(component.name, None)
            most = pinnable(psutil.virtual_memory().total) - sum(
                other.pinned_bytes for *_, other in self._stores.values()
            )
            store = streaming.HostStore(parts, dtype, scratch, most)
            self._stores[component.name] = component, placement, store
        *_, store = self._stores[component.name]
        if store.pageable_bytes:
            session.notices += (
                f"{shown(store.pageable_bytes)} of the {component.name}'s weights stream from memory that is "
                "not pinned, which is slower: choose --precision int8 or int4 for less of them",
            )
        return streaming.CudaLane(store)

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Let go of the host's memory that weights of components placed otherwise stream from. A backend is
        of one model."""
        for name in [
            name for name, (_, placement, _) in self._stores.items() if placements.get(name) != placement
        ]:
            del self._stores[name]
            _empty_cache(self.device)

    def trim(self, peak_bytes: int) -> tuple[str, ...]:  # noqa: ARG002
        """None is closed: what torch caches is given back as each stage begins."""
        return ()


def _triton_problem(hardware: Hardware) -> str | None:
    """Of the GPU that is here; None of one that is planned for."""
    here = hardware.device == "cuda" and hardware.providers is None and torch.cuda.is_available()
    return triton_problem(torch.device("cuda")) if here else None


def _instead(hardware: Hardware) -> str:
    """A precision that works, for where another was asked for."""
    best = hardware.precisions[0]
    return f"{best}, or int8 or int4, which compute in {best} here"


class TorchSession:
    """A module, called with arrays by way of `forward`, which knows their names."""

    notices: tuple[str, ...] = ()

    def __init__(
        self,
        module: torch.nn.Module,
        forward: networks.Forward,
        dtype: torch.dtype,
        device: torch.device,
        meter: Meter,
    ) -> None:
        self.module: torch.nn.Module | None = module
        self.forward, self.dtype, self.device, self.meter = forward, dtype, device, meter
        self.streamer: streaming.Streamer | None = None
        self._held = 0
        self._calls: dict[Any, int] = {}
        self._sent = None if device.type == "cpu" else Sent()

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Bring the weights in; OutOfMemoryError leaves nothing behind."""
        module = self._module()
        with self._nothing_behind():
            # a GPU's weights are read by way of the host's memory
            here = (
                weights.loading_bytes(module, stored, self.dtype, self.device)
                if self.device.type == "cpu"
                else 0
            )
            self._hold(sum(weights.beside(module, self.dtype)) + sum(weights.held(module, self.dtype)))
            self._hold(here)
            weights.fill(module, stored, self.dtype, self.device)
            self._hold(-here)

    def stream(
        self,
        stored: Mapping[str, Tensor],
        kept_bytes: int,
        lane: Callable[..., streaming.Lane],
        order: Sequence[str],
    ) -> None:
        """Bring in what may stay, and have the rest come by way of a lane, made of its units and a buffer to
        read them by. `order` are the module's parts as they are called. OutOfMemoryError leaves nothing
        behind."""
        module = self._module()
        with self._nothing_behind():
            kept, rest = streaming.split(streaming.units(module, stored, self.dtype), kept_bytes)
            room = weights.scratch_bytes(module, stored, self.dtype, self.device)
            here = room + weights.patching_bytes(stored) if self.device.type == "cpu" else 0
            held = sum(sum(weights.held(part, self.dtype)) for part in kept) + streaming.ring_bytes(
                rest, self.device
            )
            self._hold(sum(weights.beside(module, self.dtype)) + held + here)
            scratch = torch.empty(room, dtype=torch.uint8)
            under = tuple(f"{unit.path}." if unit.path else "" for unit in kept.values())
            loaded = {name: tensor for name, tensor in stored.items() if name.startswith(under)}
            weights.fill(module, loaded, self.dtype, self.device, scratch)
            if rest:
                buffer = torch.empty(
                    streaming.ring_bytes(rest, self.device), dtype=torch.uint8, device=self.device
                )
                self.streamer = streaming.Streamer(
                    module, rest, lane(rest, scratch), self.dtype, buffer, order
                )

    def _module(self) -> torch.nn.Module:
        if self.module is None:
            raise TightfitError("the pipeline was closed while it was painting")
        return self.module

    @contextmanager
    def _nothing_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        module, key = self._module(), tuple((name, array.shape) for name, array in arrays.items())
        with tf32_off(self.device), _memory_errors_explained(self.device):
            tensors = {name: self._input(name, array) for name, array in arrays.items()}
            outs = self.meter.during(
                self._calls, key, lambda: dryrun.run(module, self.forward, tensors, self.dtype, self.device)
            )
            return tuple(out.cpu().numpy() for out in outs)

    def _input(self, name: str, array: np.ndarray) -> torch.Tensor:
        """What the module reads for `array`; on a CPU that is the array."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._sent is None:
            return tensor
        return self._sent.get(name, array, lambda: dryrun.on_device(tensor, self.dtype, self.device))

    def close(self) -> None:
        try:
            if self.streamer:
                self.streamer.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self.module:
            quantised.workspace(self.module).free()
        for part in self.module.modules() if self.module else ():
            part._buffers.clear()
            # Modules of diffusers refer to themselves, so they go when Python's collector comes by.
            part._parameters.clear()
        self.module = self.streamer = None
        if self._sent:
            self._sent.clear()
        self._hold(-self._held)
        _empty_cache(self.device)

    def _hold(self, count: int) -> None:
        self.meter.hold(count)
        self._held += count


# cuBLAS when there is no room for its handle or workspace, or the driver is not the one it needs; cuDNN when
# none of its algorithms finds room for its workspace, or it has none for this precision on this card
_MAYBE_NO_MEMORY = "ALLOC_FAILED|STATUS_NOT_INITIALIZED|unable to find an engine"
# Of a card with less than this free nothing can be had: a segment for what is above 1 MiB takes 20.
_FULL = 64 * 2**20


@contextmanager
def _memory_errors_explained(device: torch.device) -> Iterator[None]:
    """torch has a class for CUDA's own; others only say so in their text, which some say for other reasons
    too."""
    before = _times_full(device)
    try:
        yield
    except (RuntimeError, MemoryError, ImportError, OSError) as error:
        if out_of_memory(error):
            raise OutOfMemoryError(first_line(error)) from error
        if not isinstance(error, RuntimeError) or not re.search(_MAYBE_NO_MEMORY, str(error)):
            raise
        if _times_full(device) > before or _is_full(device):
            raise OutOfMemoryError(first_line(error)) from error
        cure = (
            "choose another --precision, or fp32; if that fails too, install a build of torch for this driver"
        )
        raise TightfitError(
            f"{device.type} has no kernel for this, with memory left ({first_line(error)}): {cure}"
        ) from error


def _times_full(device: torch.device) -> int:
    """How often torch's allocator has found no room on a GPU."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return getattr(torch, device.type).memory_stats().get("num_ooms", 0)


def _is_full(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu") and getattr(torch, device.type).mem_get_info()[0] < _FULL


def _empty_cache(device: torch.device) -> None:
    """Give memory that was freed back to the system."""
    if device.type == "cpu":
        release()
    else:
        getattr(torch, device.type).empty_cache()
        if device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()  # pinned memory that weights were streamed from
