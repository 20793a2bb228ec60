"""Who paints: takes pictures of one group as plain data, and tells what becomes of them. Knows no ledger."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..asking import request_of
from ..errors import TightfitError, first_line
from ..events import Event, Result
from ..machine.energy import Energy
from ..open_models import OpenModels
from ..passes import passes
from ..pictures import FORMATS, PARAMETERS, QUALITY, content
from ..pipeline import Pipeline
from ..request import Job, together, words_in_common
from .ledger import Item, Measures

if TYPE_CHECKING:
    from PIL import Image

    from ..planner.plan import Plan


MOST_TOGETHER = 16
"""Pictures of one run: their texts are encoded, then all are denoised, then decoded."""
LOST_SECONDS = 600.0  # of a run: whoever is killed loses no more


@dataclass(frozen=True)
class Stepped:
    """A step is done for `item`."""

    item: Item
    event: Event


@dataclass(frozen=True)
class Made:
    """A picture is painted; its request is in its info."""

    item: Item
    image: Image.Image


@dataclass(frozen=True)
class Encoded:
    """The same as the bytes of a file, and its request as the text inside."""

    item: Item
    content: bytes
    parameters: str


@dataclass(frozen=True)
class Failed:
    """It cannot be painted."""

    item: Item
    error: str


@dataclass(frozen=True)
class Took:
    """What each of these took, which were made before."""

    items: tuple[Item, ...]
    measures: Measures


News = Stepped | Made | Encoded | Failed | Took


@dataclass(frozen=True)
class Encoding:
    """How pictures become files. name: a template for those whose rows have none. ending: of those whose
    names have none. quality, metadata: as `pictures.save` has them."""

    name: str
    ending: str = ".png"
    quality: int = QUALITY
    metadata: str = "full"

    def path(self, item: Item) -> Path:
        """What its file is called, a template."""
        path = Path(item.name or self.name)
        return path if path.suffix.lower() in FORMATS else path.with_name(path.name + self.ending)

    def encoded(self, made: Made) -> Encoded:
        ending, image = self.path(made.item).suffix.lower(), made.image
        parameters = image.info.get(PARAMETERS, "")
        return Encoded(made.item, content(image, ending, self.quality, self.metadata), parameters)


@dataclass(frozen=True)
class Predicted:
    """What a group takes here: its plan, seconds of one picture, and how many are taken at once."""

    plan: Plan
    seconds: float
    together: int


class Planner(Protocol):
    """Who says what pictures take."""

    def predicted(self, item: Item, count: int) -> Predicted:
        """What each of so many like it takes. Raises TightfitError for one that does not run here."""
        ...


class Painter(Planner, Protocol):
    """A machine that paints, or a part of one."""

    def paint(self, items: Sequence[Item]) -> Iterator[News]:
        """Paint those, all of one group. Each is made or has failed at the end. A KeyboardInterrupt that is
        thrown in ends it after the pictures that are painted."""
        ...


class Here:
    """The device of this process."""

    def __init__(self, models: OpenModels, models_dirs: Sequence[Path] = ()) -> None:
        self.models, self._models_dirs = models, tuple(models_dirs)

    def predicted(self, item: Item, count: int) -> Predicted:
        pipeline, job = self._pipeline(item), self._job(item)
        # Runs are as long as one another, so that all fill the plan's calls.
        most = -(-count // -(-count // MOST_TOGETHER)) if may_join(job) else 1
        plans = _planned(pipeline, replace(job, num_images=most))
        seconds, at_once = sum(plan.predicted.seconds for plan in plans) / most, plans[0].images_per_call
        calls = max(1, min(most, int(LOST_SECONDS / max(seconds, 1e-9))) // at_once)
        return Predicted(plans[0], seconds, min(most, calls * at_once))

    def pixels(self, item: Item) -> int:
        """Of its picture, after its last pass. Raises TightfitError."""
        last = passes(self._job(item))[-1]
        return last.width * last.height

    def paint(self, items: Sequence[Item]) -> Generator[News, None, None]:
        jobs: list[tuple[Item, Job]] = []
        for item in items:
            try:
                jobs.append((item, self._job(item)))
            except TightfitError as error:
                yield Failed(item, str(error))
        for _, alike in groupby(sorted(jobs, key=_likeness), _likeness):
            yield from self._together([*alike])

    def _together(self, pairs: Sequence[tuple[Item, Job]]) -> Generator[News, None, None]:
        """In one run; where that fails, each that is not there yet alone."""
        made: set[int] = set()
        try:
            yield from self._run(pairs, made)
        # Whatever a library raises for one request is no reason to lose the others.
        except Exception as error:
            if len(pairs) > 1:
                for pair in pairs:
                    if pair[0].number not in made:
                        yield from self._together([pair])
            else:
                said = str(error) if isinstance(error, TightfitError) else first_line(error)
                yield Failed(pairs[0][0], said)

    def _pipeline(self, item: Item) -> Pipeline:
        return self.models.pipeline(item.model, self.models.wished(item.wishes))

    def _job(self, item: Item) -> Job:
        spec = self._pipeline(item).spec
        return request_of(item.options, self.models.shelves, self._models_dirs, lambda: spec).resolve(spec)

    def _run(self, pairs: Sequence[tuple[Item, Job]], made: set[int]) -> Generator[News, None, None]:
        """What is thrown in is thrown into the run. The numbers of those that are made come into `made`."""
        items = tuple(item for item, _ in pairs)
        pipeline = self._pipeline(items[0])
        energy = Energy(self.models.hardware.device)
        with closing(pipeline.run(together([job for _, job in pairs]))) as events:
            advance: Callable[[], Event] = partial(next, events)
            while True:
                try:
                    event = advance()
                except StopIteration:
                    return
                joules = energy.joules()
                try:
                    yield _news(event, items, joules)
                    advance = partial(next, events)
                except KeyboardInterrupt as interrupt:
                    advance = partial(events.throw, interrupt)
                if event.picture:
                    made.add(items[event.image].number)


def _planned(pipeline: Pipeline, job: Job) -> list[Plan]:
    """The plan of each pass. Raises NoneFitsError."""
    if may_join(job):
        return [pipeline.plan(job)]
    passes = pipeline.planned(job)
    if refusal := passes[-1].refusal:
        raise refusal
    return [one.plans[0] for one in passes]


def _news(event: Event, items: tuple[Item, ...], joules: float | None) -> News:
    if event.picture:
        return Made(items[event.image], event.picture)
    if event.result:
        return Took(items, _measures(event.result, len(items), joules))
    return Stepped(items[min(event.image, len(items) - 1)], event)


def may_join(job: Job) -> bool:
    """Whether it can be painted in a run with others."""
    return not job.conditions and not job.is_enlarged and job.refiner is None


def _likeness(pair: tuple[Item, Job]) -> str:
    """The same for those of one run."""
    item, job = pair
    return f"{words_in_common(job)} {id(job.spec)}" if may_join(job) else f"alone {item.number}"


def _measures(result: Result, count: int, joules: float | None) -> Measures:
    predicted = sum(one.plan.predicted.seconds for one in result.passes)
    plan = "; then ".join(one.plan.summary() for one in result.passes)
    each = None if joules is None else joules / count
    return Measures(result.seconds / count, predicted / count, result.peak_bytes, plan, each)
