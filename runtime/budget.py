"""One device's memory, shared by all pipelines of this process: one runs at a time, the others make room for
it."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from .errors import TightfitError

# Libraries change globals while they build a module, and the planner pauses the garbage collector. So only
# one thread plans or loads at a time, whatever the device.
BUILDING = threading.RLock()


class Tenant(Protocol):
    """What a pipeline has loaded on a device."""

    room_bytes: int
    """Bytes free for tensors when the machine was detected."""

    def held(self) -> int:
        """Bytes held now."""
        ...

    def free(self) -> None:
        """Free everything loaded. It is loaded again when needed."""
        ...


class Turn:
    """The right to run on a device, from `DeviceBudget.claim` until `release`."""

    def __init__(self, budget: DeviceBudget, tenant: Tenant) -> None:
        self._budget, self.tenant = budget, tenant
        self.thread = threading.get_ident()

    def resumed(self) -> None:
        """The run continues in the calling thread: a generator may be advanced by any thread."""
        self.thread = threading.get_ident()

    def release(self) -> None:
        self._budget.release(self)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class DeviceBudget:
    """One per device of the process: `DeviceBudget.of`.

    Plans assume all of the free memory, and torch's allocator has one cap per process, so runs on a device
    follow one another. A second thread waits. A second run within one thread would wait for ever, so it is
    refused.
    """

    _devices: dict[str, DeviceBudget] = {}  # noqa: RUF012  # per process, like the memory it guards
    _lock = threading.RLock()  # an abandoned run may end while this thread has it

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._turn: Turn | None = None
        # Ordered by last run, the most recent at the end.
        self._tenants: weakref.WeakKeyDictionary[Tenant, None] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, device: str) -> DeviceBudget:
        with cls._lock:
            return cls._devices.setdefault(device, cls())

    def claim(self, tenant: Tenant) -> Turn:
        """Wait until no other run is under way on this device. Raises TightfitError where this thread would
        wait for itself."""
        turn = self._turn
        if turn and turn.thread == threading.get_ident():
            whose = "this pipeline" if turn.tenant is tenant else "another pipeline of this thread"
            raise TightfitError(f"{whose} is painting already: finish or close that run first")
        self._running.acquire()
        self._turn = Turn(self, tenant)
        return self._turn

    def release(self, turn: Turn) -> None:
        """End `turn` if it has not ended yet."""
        with self._lock:
            if self._turn is turn:
                self._turn = None
                self._running.release()

    def busy(self, tenant: Tenant) -> bool:
        """Whether a tenant other than this one is running."""
        turn = self._turn
        return turn is not None and turn.tenant is not tenant

    def share(self, tenant: Tenant, wanted_bytes: int, peak_bytes: int) -> int:
        """Bytes that `tenant`, whose turn it is, may hold: `wanted_bytes`, or what idle tenants leave of the
        device.

        If `peak_bytes` do not fit beside them, tenants are freed, the longest idle first. `tenant` is freed
        too, so that what others hold is measured before it loads anything.
        """
        self._tenants.pop(tenant, None)
        idle = [resident for resident in self._tenants if resident.held() > 0]
        total_bytes = max(resident.room_bytes for resident in (tenant, *idle))
        self._tenants[tenant] = None
        held_bytes = sum(resident.held() for resident in idle)
        if idle and total_bytes - held_bytes < peak_bytes:
            tenant.free()
            while idle and total_bytes - held_bytes < peak_bytes:
                held_bytes -= idle[0].held()
                idle.pop(0).free()
        return min(wanted_bytes, total_bytes - held_bytes) if idle else wanted_bytes
