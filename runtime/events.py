"""What a running pipeline tells, and what it hands over at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .planner.plan import Plan
from .request import Request

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Measured:
    """One stage: its seconds, loading included; the most bytes held at once for its tensors, as a plan
    predicts them; and the most memory the whole process held.

    The stages are prepare (libraries, plan, tokens), encode, denoise and decode.
    """

    seconds: float
    load_seconds: float
    peak_bytes: int
    process_bytes: int

    def and_then(self, later: Measured) -> Measured:
        """Both, of a stage that was run in parts."""
        seconds, load_seconds = self.seconds + later.seconds, self.load_seconds + later.load_seconds
        most = max(self.peak_bytes, later.peak_bytes), max(self.process_bytes, later.process_bytes)
        return Measured(seconds, load_seconds, *most)


@dataclass(frozen=True)
class Pass:
    """One of the passes of a request: the plan that ran, and what was measured."""

    plan: Plan
    stages: Mapping[str, Measured]


@dataclass(frozen=True)
class Result:
    """A finished request: as it was resolved, the plan that ran, the pictures, what was measured, what to
    know about it. Of several passes, plan and stages are the last one's; `earlier` has the others'."""

    request: Request
    plan: Plan
    images: tuple[Image.Image, ...]
    stages: Mapping[str, Measured]
    notices: tuple[str, ...]
    earlier: tuple[Pass, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All of them, in order."""
        return (*self.earlier, Pass(self.plan, self.stages))

    @property
    def _measured(self) -> list[Measured]:
        return [stage for one in self.passes for stage in one.stages.values()]

    @property
    def predicted_bytes(self) -> int:
        return max(one.plan.predicted.peak_bytes for one in self.passes)

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self._measured)

    @property
    def process_bytes(self) -> int:
        return max(stage.process_bytes for stage in self._measured)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self._measured)


@dataclass(frozen=True)
class Event:
    """`stage` is encode, denoise, decode or done; `step` of `steps` are finished; the last event carries the
    result.

    Steps count on over all pictures of a request; `image` says which picture (from 0) the step belongs to.
    One that is decoded is `picture`. The notices, such as the end of a prompt that was cut, come with the
    first event after what they tell of.
    """

    stage: str
    step: int
    steps: int
    image: int = 0
    preview: Image.Image | None = None
    notices: tuple[str, ...] = ()
    result: Result | None = None
    picture: Image.Image | None = None


def joined(results: Sequence[Result]) -> Result:
    """One result of several requests that differ in their words: the first's request and plan, and all
    pictures."""
    if len(results) == 1:
        return results[0]
    every = [result.passes for result in results]
    *earlier, last = (Pass(passes[0].plan, _together(passes)) for passes in zip(*every, strict=True))
    return replace(
        results[0],
        images=tuple(image for result in results for image in result.images),
        stages=last.stages,
        notices=tuple(dict.fromkeys(notice for result in results for notice in result.notices)),
        earlier=tuple(earlier),
    )


def _together(passes: Sequence[Pass]) -> dict[str, Measured]:
    stages: dict[str, Measured] = {}
    for one in passes:
        for name, measured in one.stages.items():
            stages[name] = stages[name].and_then(measured) if name in stages else measured
    return stages
