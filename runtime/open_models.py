"""Models that stay open between jobs: found by name, read again when their files change, freed when others
need the room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .asking import Shelves
from .errors import TightfitError
from .fields import described, kinds
from .files import Stamps, shortened, stamps
from .machine.hardware import Hardware
from .models.hub import BUILT_IN, inspect, located
from .models.layouts import library
from .models.layouts.library import Kind
from .models.spec import ModelSpec
from .pipeline import Pipeline
from .planner.choose import budget_of
from .planner.wishes import Wishes
from .units import shown
from .upscale import Upscaler

MOST = 8
"""Models that stay open, loaded or not."""
ASKABLE = {name: kinds(Wishes)[name] for name, about in described(Wishes).items() if about.panel}
"""The wishes that a client may have, and their types."""
_Key = tuple[Kind, str, Wishes]


class OpenModels:
    """Pipelines and upscalers of one machine, all within one budget. The newest MOST stay open.

    `pipeline`, `upscaler` and `close` are for the thread that paints, the others for any.
    """

    def __init__(self, hardware: Hardware, shelves: Shelves | None, wishes: Wishes) -> None:
        """`wishes` are of all models."""
        self.hardware, self.shelves, self.wishes = hardware, shelves, wishes
        self._room_bytes = budget_of(hardware, wishes) - hardware.context_bytes
        self._specs: dict[str, tuple[Stamps, ModelSpec]] = {}
        self._open: dict[_Key, tuple[Stamps, Pipeline | Upscaler]] = {}
        self._planning: dict[tuple[str, Wishes, str], Pipeline] = {}
        self._lock = threading.Lock()

    def place(self, name: str, kind: Kind) -> str:
        """The path that a name means, or the name of what is built in. Raises TightfitError."""
        if self.shelves:
            return self.shelves.path(name, kind)
        return located(name) if kind is Kind.MODEL else library.located(name, kind)

    def wished(self, asked: Mapping[str, Any]) -> Wishes:
        """What is wished of all models, and of one. Raises TightfitError for a wish that there is not, and
        for a larger budget than all models have."""
        for name, value in asked.items():
            if name not in ASKABLE:
                raise TightfitError(f"unknown wish {shortened(name)}: choose {', '.join(ASKABLE)}")
            kind = ASKABLE[name]
            takes = (str, int, float) if name == "budget" else (int, float) if kind is float else kind
            if value is not None and (
                isinstance(value, bool) != (kind is bool) or not isinstance(value, takes)
            ):
                raise TightfitError(f"{name} cannot be {shortened(value)}: leave it out, or give another")
        given = {name: value for name, value in asked.items() if value is not None}
        wishes, most = replace(self.wishes, **given), self.wishes.budget
        if most is not None and wishes.budget > most:
            raise TightfitError(f"budget {asked['budget']} is more than the {shown(most)} of all models here")
        return wishes

    def spec(self, model: str) -> ModelSpec:
        """What the model is: the same object as long as its files stay as they are. Raises TightfitError."""
        return self._spec(*self._stamped(model, Kind.MODEL))

    def planning(self, model: str, wishes: Wishes, hardware: Hardware | None = None) -> Pipeline:
        """To plan with, here or on other hardware, and to run nothing: that of a job may be at a step for
        seconds. Raises TightfitError."""
        machine = hardware or self.hardware
        spec, key = self.spec(model), (model, wishes, machine.name)
        with self._lock:
            pipeline = self._planning.pop(key, None)
            if not pipeline or pipeline.spec is not spec or pipeline.hardware != machine:
                pipeline = Pipeline(spec, machine, wishes)
            self._planning[key] = pipeline
            _shorten(self._planning)
        return pipeline

    def pipeline(self, model: str, wishes: Wishes) -> Pipeline:
        """To run a job with. Raises TightfitError, and frees what was open of a model that is gone, or has
        changed."""

        def opened(place: str, stamp: Stamps) -> Pipeline:
            return Pipeline(self._spec(place, stamp), self.hardware, wishes)

        pipeline = self._opened((Kind.MODEL, model, wishes), opened)
        assert isinstance(pipeline, Pipeline)
        return pipeline

    def upscaler(self, model: str, wishes: Wishes) -> Upscaler:
        """As `pipeline`."""

        def opened(place: str, _: Stamps) -> Upscaler:
            fields = {name: getattr(wishes, name) for name in Wishes.__dataclass_fields__}
            return Upscaler(place, hardware=self.hardware, **fields)

        upscaler = self._opened((Kind.UPSCALER, model, wishes), opened)
        assert isinstance(upscaler, Upscaler)
        return upscaler

    def held(self) -> dict[str, int]:
        """Bytes that each model holds on the device now."""
        held: dict[str, int] = {}
        for (_, model, _), (_, opened) in [*self._open.items()]:
            held[model] = held.get(model, 0) + opened.loaded.held()
        return held

    def beside(self, running: Pipeline | Upscaler) -> Callable[[], list[str]]:
        """What tells, each once, which of the others were freed since."""
        others = {
            key: opened.loaded
            for key, (_, opened) in self._open.items()
            if opened is not running and opened.loaded.sessions
        }

        def freed() -> list[str]:
            gone = [key for key, loaded in others.items() if not loaded.sessions]
            for key in gone:
                del others[key]
            return [f"{model} was freed to make room" for _, model, _ in gone]

        return freed

    def free(self) -> None:
        """Free what all hold on the device. It is loaded again when it is needed."""
        for _, opened in self._open.values():
            opened.close()

    def close(self) -> None:
        """Free all."""
        self.free()
        self._open.clear()

    def _stamped(self, name: str, kind: Kind) -> tuple[str, Stamps]:
        place = self.place(name, kind)
        return place, stamps(BUILT_IN.get(place) or Path(place).expanduser())

    def _spec(self, place: str, stamp: Stamps) -> ModelSpec:
        with self._lock:
            known = self._specs.pop(place, None)
        if not known or known[0] != stamp:
            known = stamp, inspect(place, local_files_only=self.shelves is not None)
        with self._lock:
            self._specs[place] = known
            _shorten(self._specs)
        return known[1]

    def _opened(self, key: _Key, make: Callable[[str, Stamps], Pipeline | Upscaler]) -> Pipeline | Upscaler:
        """What is open, unless its files have changed; else what `make` answers."""
        kind, name, _ = key
        stamp, opened = self._open.pop(key, ((), None))
        try:
            place, now = self._stamped(name, kind)
            if opened and stamp != now:
                opened.close()
                opened = None
            opened = opened or make(place, now)
            opened.loaded.room_bytes = self._room_bytes
        except BaseException:
            if opened:
                opened.close()
            raise
        self._open[key] = now, opened  # the last is the one that ran last
        for _, oldest in _shorten(self._open):
            oldest.close()
        return opened


def _shorten(known: dict[Any, Any]) -> list[Any]:
    """Leave the newest MOST, and answer the others."""
    return [known.pop(key) for key in [*known][: max(0, len(known) - MOST)]]
