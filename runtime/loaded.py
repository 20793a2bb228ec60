"""What a pipeline keeps from one request to the next: its engines, and the sessions that stay loaded."""

from __future__ import annotations

from collections.abc import Collection

from .backends import backend
from .backends.protocol import Backend, Session
from .budget import BUILDING, DeviceBudget
from .errors import OutOfMemoryError
from .machine.hardware import Hardware
from .models.spec import Component, ModelSpec
from .placement import Placement
from .planner.plan import Plan


class Loaded:
    """Sessions of one model by component, each with what it is of and its placement. A tenant of its device's
    budget."""

    def __init__(self, hardware: Hardware, room_bytes: int | None = None) -> None:
        """`room_bytes` are for all tenants of the device: by default what was free."""
        self.budget = DeviceBudget.of(hardware.device)
        self.room_bytes = hardware.free_bytes - hardware.context_bytes if room_bytes is None else room_bytes
        self.backends: dict[str, Backend] = {}
        self.sessions: dict[str, tuple[Component, Placement, Session]] = {}
        self._allowed_bytes = 0
        self._limits: dict[str, int] = {}

    def take(self, plan: Plan, spec: ModelSpec, beside_bytes: int = 0) -> None:
        """Make way for `plan` of `spec`: what is placed otherwise, or of other tensors, is freed, and each
        engine is held to what it may take, beside what another model of the same run holds."""
        for engine in {placement.backend for placement in plan.loaded.values()} - self.backends.keys():
            self.backends[engine] = backend(engine, plan.device)
        for name, (component, placement, _) in list(self.sessions.items()):
            new = spec.components.get(name)
            if placement != plan.loaded.get(name) or not new or not new.adapts(component):
                self.drop(name)
        for engine in self.backends.values():
            engine.keep(plan.loaded)
            for name in engine.trim(plan.predicted.peak_bytes):
                self.drop(name)
        wanted_bytes = plan.budget_bytes - plan.predicted.context_bytes - beside_bytes
        allowed_bytes = self.budget.share(self, wanted_bytes, plan.predicted.peak_bytes)
        self._limits.clear()  # another pipeline may have set the process's cap since
        # The plan loads each network in its turn; adapting it beside all others may take no more than that.
        self._allow(min(allowed_bytes, plan.predicted.peak_bytes))
        for name, (component, placement, session) in list(self.sessions.items()):
            if name in self.sessions and component is not spec.components[name]:
                self._adapt(session, spec.components[name], placement)
        self._allow(allowed_bytes)

    def _adapt(self, session: Session, component: Component, placement: Placement) -> None:
        """Keep the session of a component that adapters change otherwise now, if its engine can."""
        try:
            with BUILDING:
                kept = self.backends[placement.backend].adapt(session, component, placement)
        except OutOfMemoryError:
            kept = False
        except BaseException:  # half changed, so it is closed
            self.drop(component.name)
            raise
        if kept:
            self.sessions[component.name] = component, placement, session
        else:  # all are loaded anew, in the order that is planned
            self.free()

    def session(self, component: Component, placement: Placement) -> Session:
        """Its session, loaded if it is not there."""
        if len(self.backends) > 1:
            self._limit()
        if component.name not in self.sessions:
            with BUILDING:
                session = self.backends[placement.backend].load(component, placement)
            self.sessions[component.name] = component, placement, session
        return self.sessions[component.name][-1]

    def drop(self, name: str) -> None:
        if entry := self.sessions.pop(name, None):
            entry[-1].close()

    def drop_staged(self, but: Collection[str] = ()) -> None:
        """Free what is loaded for one stage alone, but for what the next needs too."""
        for name, (_, placement, _) in list(self.sessions.items()):
            if placement.residency != "resident" and name not in but:
                self.drop(name)

    def held(self) -> int:
        return sum(engine.meter.held() for engine in self.backends.values())

    def free(self) -> None:
        for name in list(self.sessions):
            self.drop(name)

    def close(self) -> None:
        """Free everything, the host's memory too, and lift the limits; but not the process's cap while
        another pipeline runs."""
        self.free()
        for engine in self.backends.values():
            engine.keep({})
            if not self.budget.busy(self):
                engine.meter.limit(None)
        self._limits.clear()

    def reset_peak(self) -> None:
        for engine in self.backends.values():
            engine.meter.reset()

    def peak_bytes(self) -> int:
        """The most that any engine has held since `reset_peak`."""
        return max((engine.meter.bytes() for engine in self.backends.values()), default=0)

    def _allow(self, allowed_bytes: int) -> None:
        self._allowed_bytes = allowed_bytes
        self._limit()

    def _limit(self) -> None:
        """Let each engine take of what is allowed what the others leave."""
        held_bytes = {name: engine.meter.held() for name, engine in self.backends.items()}
        for name, engine in self.backends.items():
            limit_bytes = self._allowed_bytes - (sum(held_bytes.values()) - held_bytes[name])
            if self._limits.get(name) != limit_bytes:
                self._limits[name] = limit_bytes
                engine.meter.limit(limit_bytes)
