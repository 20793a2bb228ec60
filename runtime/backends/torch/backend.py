"""The torch engine: modules from diffusers and transformers, filled from safetensors files at once or while
they run."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import psutil
import torch

from ....kernels.dequantise import triton_problem
from ...errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from ...machine.detect import pinnable
from ...machine.process import release
from ...models.families.family import FULL
from ...models.spec import Component
from ...models.tensors import Tensor
from ...placement import QUANTISED, Placement
from ...units import shown
from ..sent import Sent
from . import compiled, dryrun, networks, quantised, streaming
from . import loading as weights
from .captured import Captured
from .engine import TorchEngine, call_order
from .meter import Meter, meter
from .packed import packing_bytes
from .tf32 import tf32_off


class TorchBackend(TorchEngine):
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.meter = meter(self.device)
        self._stores: dict[str, tuple[Component, Placement, streaming.HostStore]] = {}
        self._captured: weakref.WeakSet[Captured] = weakref.WeakSet()
        self._planned_bytes = 0

    def load(self, component: Component, placement: Placement) -> TorchSession:
        """Build the module on meta, then fill it at once or stream its weights as it runs."""
        dtype = weights.DTYPES[placement.compute]
        with _memory_errors_explained(self.device):
            problem = self._trouble(component, placement)
            module = networks.build(component, placement, self.device.type)
            stored = weights.match(component, module)
            weights.check_adapted(module)
        session = TorchSession(module, networks.forward(component, placement), dtype, self.device, self.meter)
        session.stays = dryrun.staying(component)
        session.cached = component.network.call_cached, dryrun.staying(component, FULL)
        with _memory_errors_explained(self.device):
            if placement.residency == "streamed":
                lane = functools.partial(self._lane, session, component, placement)
                session.stream(
                    stored,
                    placement.kept_bytes,
                    lane,
                    call_order(component, placement, self.device.type),
                )
            else:
                session.load(stored)
        if placement.compiled:
            session.compile()
        if placement.captured:
            session.captured = Captured()
            self._captured.add(session.captured)
        if problem:
            session.notices += (
                f"Triton does not run here ({problem}): "
                "torch dequantises 8- and 4-bit weights instead, which is slower",
            )
        return session

    def _trouble(self, component: Component, placement: Placement) -> str | None:
        """Why a component with 8- or 4-bit weights cannot use Triton's kernels on a GPU."""
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
        """How the weights of `parts` reach the device. The host memory that a GPU copies from is filled once
        and cached until `keep` drops it."""
        dtype = weights.DTYPES[placement.compute]
        if self.device.type != "cuda":
            return streaming.FileLane(dtype, scratch)
        if self._stores.get(component.name, (None,))[0] is not component:
            self._stores.pop(component.name, None)
            most = pinnable(psutil.virtual_memory().total) - sum(
                kept.pinned_bytes for *_, kept in self._stores.values()
            )
            store = streaming.HostStore(parts, dtype, scratch, most)
            self._stores[component.name] = component, placement, store
        *_, store = self._stores[component.name]
        if store.pageable_bytes:
            session.notices += (
                f"{shown(store.pageable_bytes)} of the {component.name}'s weights stream from memory that is "
                "not pinned, which is slower: choose --precision int8 or int4 to shrink them",
            )
        return streaming.CudaLane(store)

    def adapt(self, session: TorchSession, component: Component, placement: Placement) -> bool:
        """Of a module that stays loaded: the tensors that patches change otherwise now are read again, and
        those that quantised layers have of adapters."""
        with _memory_errors_explained(self.device):
            like = networks.build(component, placement, self.device.type)
            return session.adapt(like, weights.match(component, like))

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Free the host memory of every component whose placement is not in `placements`. A backend serves
        one model."""
        for name in [
            name for name, (_, placement, _) in self._stores.items() if placements.get(name) != placement
        ]:
            del self._stores[name]
            _empty_cache(self.device)

    def trim(self, peak_bytes: int) -> tuple[str, ...]:
        """Closes nothing: torch's cache is emptied at the start of each stage. CUDA graphs of another plan
        go, as they keep what that one's calls take."""
        for graphs in self._captured if peak_bytes != self._planned_bytes else ():
            graphs.clear()
        self._planned_bytes = peak_bytes
        return ()


class Residual:
    """What a session answers another of the same device: a tensor that stays there, as the meter knows."""

    def __init__(self, tensor: torch.Tensor, meter: Meter) -> None:
        self.tensor, self.shape, self.ndim = tensor, tuple(tensor.shape), tensor.ndim
        meter.hold(tensor.nbytes)
        weakref.finalize(self, meter.hold, -tensor.nbytes).atexit = False

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.tensor.float().cpu().numpy()


class TorchSession:
    """A module, called with named arrays through `forward`, which maps the names to its arguments. What it
    answers is on the host, or `stays` on the device."""

    notices: tuple[str, ...] = ()
    captured: Captured | None = None
    stays: int | None = None  # answers from that number on
    cached: tuple[networks.Forward | None, int | None] = None, None  # forward and stays, where steps are

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
        self._stored: Mapping[str, Tensor] = {}
        self._held = self._compiler_bytes = 0
        self._is_compiled = False
        self._calls: dict[Any, int] = {}
        self._sent = None if device.type == "cpu" else Sent()

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Load all weights. OutOfMemoryError leaves nothing behind."""
        module = self._module()
        with self._nothing_behind():
            self._hold(sum(weights.beside(module, self.dtype)) + sum(weights.held(module, self.dtype)))
            with self._holding(weights.loading_bytes(module, stored, self.dtype, self.device)):
                weights.fill(module, stored, self.dtype, self.device)
            self._stored = stored

    def compile(self) -> None:
        """Compile its blocks as they are called. The compiler's own memory is a CPU's."""
        self._compiler_bytes = compiled.COMPILER_BYTES if self.device.type == "cpu" else 0
        with self._nothing_behind():
            self._hold(self._compiler_bytes)
            compiled.compile_blocks(self._module())
        self._is_compiled = True

    def adapt(self, like: torch.nn.Module, stored: Mapping[str, Tensor]) -> bool:
        """Take the adapters' parts of `like`, a module on `meta`, and read what is `stored` otherwise than
        it was loaded. False, with nothing changed, if more differs than that."""
        module = self._module()
        changed = weights.changed(module, like, self._stored, stored)
        if changed is None:
            return False
        if self.captured:
            self.captured.clear()
        with self._holding(weights.checking_bytes(like)):
            weights.check_adapted(like)
        with self._nothing_behind():
            scratch_bytes = weights.scratch_bytes(like, changed, self.dtype, self.device)
            reading_bytes = scratch_bytes + weights.patching_bytes(changed) + packing_bytes(like, self.dtype)
            weights.exchange_adapted(module, like)
            held_bytes = sum(weights.beside(module, self.dtype)) + sum(weights.held(module, self.dtype))
            self._hold(held_bytes + self._compiler_bytes - self._held)
            with self._holding(reading_bytes):
                weights.refill(module, changed, self.dtype, self.device, scratch_bytes)
        self._stored = stored
        self._calls.clear()  # a call may take more or less now
        return True

    def stream(
        self,
        stored: Mapping[str, Tensor],
        kept_bytes: int,
        lane: Callable[..., streaming.Lane],
        order: Sequence[str],
    ) -> None:
        """Load `kept_bytes` of weights and stream the others through a lane, which is made from the streamed
        units and a read buffer. `order` lists the module's parts in call order. OutOfMemoryError leaves
        nothing behind."""
        module = self._module()
        with self._nothing_behind():
            kept, streamed = streaming.split(streaming.units(module, stored, self.dtype), kept_bytes)
            room = weights.scratch_bytes(module, stored, self.dtype, self.device)
            reading = room + weights.patching_bytes(stored) if self.device.type == "cpu" else 0
            held = sum(sum(weights.held(part, self.dtype)) for part in kept) + streaming.ring_bytes(
                streamed, self.device
            )
            self._hold(sum(weights.beside(module, self.dtype)) + held + reading)
            scratch = torch.empty(room, dtype=torch.uint8)
            under = tuple(f"{unit.path}." if unit.path else "" for unit in kept.values())
            loaded = {name: tensor for name, tensor in stored.items() if name.startswith(under)}
            weights.fill(module, loaded, self.dtype, self.device, scratch)
            if streamed:
                buffer = torch.empty(
                    streaming.ring_bytes(streamed, self.device), dtype=torch.uint8, device=self.device
                )
                self.streamer = streaming.Streamer(
                    streamed, lane(streamed, scratch), self.dtype, buffer, order
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
    def __call__(
        self, *, caching: bool = False, without: tuple[int, ...] = (), **arrays: Any
    ) -> tuple[Any, ...]:
        module, way = self._module(), (caching, without)
        key = (*way, *((name, array.shape) for name, array in arrays.items()))
        forward, stays = self.cached if caching else (self.forward, self.stays)
        assert forward
        forward = functools.partial(forward, skipped=without) if without else forward
        # The first call of a size is counted operator by operator where there is no allocator to ask.
        counts = self._is_compiled and self.device.type in ("cpu", "mps") and key not in self._calls
        plainly = compiled.as_they_are(module) if counts else nullcontext()
        if self._is_compiled:
            compiled.allow_kinds()
        with tf32_off(self.device), _memory_errors_explained(self.device), plainly:
            tensors = {name: self._input(name, array) for name, array in arrays.items()}
            if self.streamer:
                self.streamer.begin((*way, *arrays))

            def run(given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
                return dryrun.run(module, forward, given, self.dtype, self.device, stays)

            graphs = self.captured
            outs = self.meter.during(
                self._calls,
                key,
                lambda: graphs.call(tensors, run, stays, way) if graphs else run(tensors),
            )
            if graphs and graphs.notice:
                self.notices = (*dict.fromkeys((*self.notices, graphs.notice)),)
            count = len(outs) if stays is None else stays
            stayed = [Residual(out, self.meter) for out in outs[count:]]
            return (*(out.cpu().numpy() for out in outs[:count]), *stayed)

    def _input(self, name: str, array: Any) -> torch.Tensor:
        """What the module reads for `array`; on a CPU that is the array."""
        if isinstance(array, Residual):
            return array.tensor
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
        if self.captured:
            self.captured.clear()
        if self.module:
            quantised.workspace(self.module).free()
        for part in self.module.modules() if self.module else ():
            part._buffers.clear()
            # diffusers' modules hold reference cycles, so Python frees them only at its next collection.
            part._parameters.clear()
        self.module = self.streamer = None
        if self._sent:
            self._sent.clear()
        self._hold(-self._held)
        _empty_cache(self.device)

    def _hold(self, count: int) -> None:
        self.meter.hold(count)
        self._held += count

    @contextmanager
    def _holding(self, host_bytes: int) -> Iterator[None]:
        """For a while, on top; a GPU's weights are read through host memory, which is not measured."""
        count = host_bytes if self.device.type == "cpu" else 0
        self._hold(count)
        try:
            yield
        finally:
            self._hold(-count)


# cuBLAS: no room for its handle or workspace, or the wrong driver. cuDNN: no algorithm whose workspace fits,
# or none for this precision on this card.
_MAYBE_NO_MEMORY = "ALLOC_FAILED|STATUS_NOT_INITIALIZED|unable to find an engine"
# Below this a card is full: the allocator's segment for more than 1 MiB takes 20 MiB.
_FULL = 64 * 2**20


@contextmanager
def _memory_errors_explained(device: torch.device) -> Iterator[None]:
    """torch has an exception class for CUDA's own errors only. The others are told by their text, which some
    share with other faults."""
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
    """How often torch's allocator has run out of memory on a GPU."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return getattr(torch, device.type).memory_stats().get("num_ooms", 0)


def _is_full(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu") and getattr(torch, device.type).mem_get_info()[0] < _FULL


def _empty_cache(device: torch.device) -> None:
    """Return freed memory to the system."""
    if device.type == "cpu":
        release()
    else:
        getattr(torch, device.type).empty_cache()
        if device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()  # pinned buffers of streamed weights
