"""One device's memory, which all pipelines of this process share: one of them runs at a time, the others make
room for it."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from .errors import TightfitError

# Libraries change their own globals while they build a module, and the planner pauses Python's search for
# cycles: whoever plans or loads, on whatever device, does so alone.
BUILDING = threading.RLock()


class Tenant(Protocol):
    """What a pipeline has loaded on a device."""

    room_bytes: int
    """Bytes that were free for tensors when its machine was detected."""

    def held(self) -> int:
        """Bytes that it holds now."""
        ...

    def free(self) -> None:
        """Free all that is loaded. It is loaded again when it is needed."""
        ...


class Turn:
    """The right to run on a device, from `DeviceBudget.claim` until `release`."""

    def __init__(self, budget: DeviceBudget, tenant: Tenant) -> None:
        self._budget, self.tenant = budget, tenant
        self.thread = threading.get_ident()

    def resumed(self) -> None:
        """The run goes on in the thread that calls this: a generator may be advanced by any."""
        self.thread = threading.get_ident()

    def release(self) -> None:
        self._budget.release(self)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class DeviceBudget:
    """One for each device of the process: `DeviceBudget.of`.

    Plans reckon with the whole free memory, and torch's allocator has one cap for the process. So runs on a
    device follow one another: a second thread waits. Within one thread that would be for ever, so a second
    run there is refused.
    """

    _devices: dict[str, DeviceBudget] = {}  # noqa: RUF012  # of the process, as what they guard is
    _lock = threading.RLock()  # an abandoned run may end while this thread has it

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._turn: Turn | None = None
        # The last that ran is the last.
        self._tenants: weakref.WeakKeyDictionary[Tenant, None] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, device: str) -> DeviceBudget:
        with cls._lock:
            return cls._devices.setdefault(device, cls())

    def claim(self, tenant: Tenant) -> Turn:
        """Wait until no other run is under way here. Raises TightfitError where this thread would wait for
        itself."""
        turn = self._turn
        if turn and turn.thread == threading.get_ident():
            whose = "this pipeline" if turn.tenant is tenant else "another pipeline of this thread"
            raise TightfitError(f"{whose} is painting already: finish or close that run first")
        self._running.acquire()
        self._turn = Turn(self, tenant)
        return self._turn

    def release(self, turn: Turn) -> None:
        """End `turn`, if it has not ended yet."""
        with self._lock:
            if self._turn is turn:
                self._turn = None
                self._running.release()

    def busy(self, tenant: Tenant) -> bool:
        """Whether another tenant than this is running."""
        turn = self._turn
        return turn is not None and turn.tenant is not tenant

    def share(self, tenant: Tenant, wanted_bytes: int, peak_bytes: int) -> int:
        """Bytes that `tenant`, whose turn it is, may hold: `wanted_bytes`, or what idle tenants leave of the
        device.

        Where `peak_bytes` do not fit beside them they are freed, the longest idle first, and `tenant` starts
        from nothing: what others hold is told from what is its own before it loads anything.
        """
        self._tenants.pop(tenant, None)
        idle = [other for other in self._tenants if other.held() > 0]
        total_bytes = max(other.room_bytes for other in (tenant, *idle))
        self._tenants[tenant] = None
        held_bytes = sum(other.held() for other in idle)
        if idle and total_bytes - held_bytes < peak_bytes:
            tenant.free()
            while idle and total_bytes - held_bytes < peak_bytes:
                held_bytes -= idle[0].held()
                idle.pop(0).free()
        return min(wanted_bytes, total_bytes - held_bytes) if idle else wanted_bytes
