"""A model on a machine: plans each request, runs one at a time, keeps loaded what stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from . import spelling
from .adapters import Adapter, adapted, check
from .asking import request_of
from .budget import Turn
from .events import Event, Result
from .loaded import Loaded
from .machine.hardware import Hardware
from .models.families.family import Role
from .models.hub import inspect
from .models.spec import ModelSpec
from .passes import passes, wishes_after
from .planner import choose as planner
from .planner.estimate import ESTIMATOR, Estimate
from .planner.plan import Plan
from .planner.wishes import Wishes
from .recent import Recent
from .request import Job, Request
from .run import OnStage, Passes, Run, Ways

# Requests that a pipeline in Python is taken to serve: what stays loaded is loaded once for all of them.
MANY = 100
_MOST_PLANNED = 8  # jobs of other sizes, whose plans stay known


def load(
    model: str = "emoji",
    *,
    device: str = "auto",
    plan: Plan | None = None,
    adapters: Sequence[Adapter] = (),
    local_files_only: bool = False,
    **wishes: Any,
) -> Pipeline:
    """A pipeline for a built-in model, a checkpoint file, a diffusers folder or a hub id. No weight is read
    before the first request.

    device: auto, cuda, xpu, mps or cpu. Each request is planned for what was free here, by `wishes`, the
    fields of Wishes: precision, compute, residency, attention, tiling and cfg (auto unless named), budget
    (bytes, or text such as "4GiB"; of the GPU's memory, or of the process's on a CPU), min_psnr (decibels),
    prefer (quality, balanced or speed: whether steps are cached). Or else all run by `plan`, if it fits; so
    does a second pass by the same model, but for networks that `plan` has not, or in its precision alone
    where that is what fits. `adapters` change the model for every request. With local_files_only nothing is
    fetched. Raises TightfitError.
    """
    known = Wishes.__dataclass_fields__
    if unknown := [name for name in wishes if name not in known]:
        raise spelling.unknown(unknown[0], known, spelling.OF_MODELS)
    wishes.setdefault("requests", MANY)
    hardware = Hardware.detect(device)
    spec = inspect(model, local_files_only=local_files_only)
    return Pipeline(spec, hardware, Wishes(**wishes), plan, adapters=adapters)


class Planned(NamedTuple):
    """A pass of a request, every way to run it, and, where none fits, what says so."""

    job: Job
    plans: list[Plan]
    refusal: planner.NoneFitsError | None = None


class Pipeline:
    """Runs requests for one model on one machine, each by the best plan for it, within the budget.

    When memory runs out all the same, it goes on from where it was by a plan that takes less. Use as a
    context manager, or `close` it, to free what stays loaded. Safe to use from threads: runs on one device
    follow one another, whichever pipelines they are of. `on_stage` is called with the name of each stage as
    it begins (prepare, encode, denoise, decode); the context manager that it returns is left as the stage
    ends.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        wishes: Wishes | None = None,
        plan: Plan | None = None,
        *,
        adapters: Sequence[Adapter] = (),
        on_stage: OnStage = nullcontext,
    ) -> None:
        """`adapters` are of every request, before its own."""
        self.spec, self.hardware, self.wishes = spec, hardware, wishes or Wishes()
        check(adapters)
        self._adapters = tuple(adapters)
        adapted(spec, self._adapters)  # raises here for those that are not for this model
        self.loaded = Loaded(hardware)
        self._saved, self._on_stage = plan, on_stage
        self._planned: tuple[tuple[Any, ...], list[Plan]] = (spec,), []  # of what, which plans
        self._planned_next: tuple[tuple[Any, ...], list[Plan]] = (spec,), []  # the same of a second pass
        self._is_wanted: Callable[[], bool] = lambda: True  # what is planned now
        self._planned_before: Recent[list[Plan]] = Recent(_MOST_PLANNED)
        self._found_before: Recent[Plan] = Recent(_MOST_PLANNED)
        # Held while something of this pipeline is read or changed, not between two events.
        self._using = threading.RLock()
        self._current: tuple[Passes, Turn] | None = None

    def plans(self, request: Request) -> list[Plan]:
        """Every way to run `request` here, the one that will be taken first; of several passes, the first.
        Raises TightfitError if none fits."""
        first, *_ = passes(self._job(request))
        return self._plans(first)

    def plan(self, request: Request) -> Plan:
        """The plan that will be taken, the first of `plans`, which takes less time to find than all."""
        first, *_ = passes(self._job(request))
        return self._first(first)

    def planned(self, request: Request, is_wanted: Callable[[], bool] = lambda: True) -> list[Planned]:
        """Each pass of `request` with every way to run it here, the one that will be taken first. The last
        is the first that does not fit. Raises planner.UnwantedError soon after `is_wanted` says no."""
        planned: list[Planned] = []
        with self._using:
            self._is_wanted = is_wanted
            try:
                for job in passes(self._job(request)):
                    try:
                        planned.append(Planned(job, self._plans_of_pass(job, planned)))
                    except planner.NoneFitsError as refusal:
                        planned.append(Planned(job, [*refusal.plans], refusal))
                        break
            finally:
                self._is_wanted = lambda: True
        return planned

    def _plans_of_pass(self, job: Job, before: Sequence[Planned]) -> list[Plan]:
        if not before:
            return self._plans(job)
        first = before[0]
        wishes = wishes_after(first.job, first.plans[0], job, self.wishes)
        return self._planned_by(ESTIMATOR.estimate(self.hardware, job, wishes))

    def _plans(self, job: Job) -> list[Plan]:
        return self._every(ESTIMATOR.estimate(self.hardware, job, self.wishes))

    def _every(self, estimate: Estimate) -> list[Plan]:
        spec, key = estimate.spec, _costs_of(estimate)
        with self._using:
            (known_spec, *known), _ = self._planned
            if known_spec is not spec or (*known,) != key:
                plans = self._planned_before.get(key, partial(self._planned_anew, estimate), spec)
                self._planned = (spec, *key), plans
            return list(self._planned[1])

    def _plans_after(self, first: Run, job: Job) -> list[Plan]:
        """Every way to run the second pass, beside what the first leaves loaded."""
        wishes = wishes_after(first.job, first.plan, job, self.wishes)
        estimate = ESTIMATOR.estimate(self.hardware, job, wishes)
        key = (*_costs_of(estimate), wishes)
        with self._using:
            (spec, *known), _ = self._planned_next
            if spec is not job.spec or (*known,) != key:
                plans = _before(self._continued(job, wishes), self._planned_by(estimate))
                self._planned_next = (job.spec, *key), plans
            return list(self._planned_next[1])

    def _first_after(self, first: Run, job: Job) -> Plan:
        """The plan to begin the second pass with."""
        wishes = wishes_after(first.job, first.plan, job, self.wishes)
        return (self._continued(job, wishes) or self._plans_after(first, job))[0]

    def _continued(self, job: Job, wishes: Wishes) -> list[Plan]:
        """The plan that was given for all requests, for a second pass by this model, if the first was run by
        it."""
        if not (self._saved and wishes.after and wishes.after.arithmetic == self._saved.denoiser.arithmetic):
            return []
        planner.refuse_hopeless(self.hardware, job, wishes)
        return planner.continued(self._saved, self.hardware, job, wishes)

    def _planned_by(self, estimate: Estimate) -> list[Plan]:
        asked = self.hardware, estimate.job, estimate.wishes
        planner.refuse_hopeless(*asked)
        plans = planner.every(estimate, self._is_wanted)
        if not plans[0].fits:
            raise planner.none_fits(plans, *asked)
        return plans

    def _job(self, request: Request, preview_every: int = 0) -> Job:
        """For this pipeline's model, with its adapters before the request's own, also of another's job."""
        if isinstance(request, Job) and request.model is self.spec and not self._adapters:
            return request
        asked = request.request if isinstance(request, Job) else request
        asked = replace(asked, preview_every=preview_every or asked.preview_every)
        return replace(asked, adapters=(*self._adapters, *asked.adapters)).resolve(self.spec)

    def _planned_anew(self, estimate: Estimate) -> list[Plan]:
        if not (saved := self._checked(estimate.job)):
            return self._planned_by(estimate)
        return _before(saved, planner.every(estimate))

    def _checked(self, job: Job) -> list[Plan]:
        """The plan that was given for all requests, predicted for this one; nothing without one."""
        if not self._saved:
            return []
        return [planner.checked(self._saved, self.hardware, job, self.wishes)]

    def _first(self, job: Job) -> Plan:
        """The plan to begin with."""
        if saved := self._checked(job):
            return saved[0]
        estimate = ESTIMATOR.estimate(self.hardware, job, self.wishes)
        key = _costs_of(estimate)
        with self._using:
            (spec, *known), plans = self._planned
            if spec is job.spec and (*known,) == key:
                return plans[0]
            return self._found_before.get(key, partial(self._found, estimate), job.spec)

    def _found(self, estimate: Estimate) -> Plan:
        planner.refuse_hopeless(self.hardware, estimate.job, self.wishes)
        return planner.first(estimate, self._is_wanted) or self._every(estimate)[0]

    def __call__(self, prompt: str, **options) -> Image.Image | list[Image.Image]:
        """Paint `prompt`: a picture, or a list of them with num_images above one.

        Options are those of Request, named as in diffusers: negative_prompt, num_inference_steps,
        guidance_scale, width, height, seed, scheduler, num_images …; image, mask_image, strength and the
        others of conditions, whose pictures are files, PIL images or arrays; and lora and the others of
        adapters, as on the command line: "FILE:0.8", or a list of such texts.
        """
        images = self.generate(request_of({"prompt": prompt, **options}, model=lambda: self.spec)).images
        return images[0] if len(images) == 1 else list(images)

    def generate(self, request: Request, on_event: Callable[[Event], object] | None = None) -> Result:
        """Run to the end and return everything known about the run; `on_event` is told of each step."""
        result = None
        for event in self.run(request):
            result = event.result
            if on_event:
                on_event(event)
        assert result is not None  # the last event has it
        return result

    def run(self, request: Request, preview_every: int = 0) -> Generator[Event, None, None]:
        """Events while `request` runs; the last has stage "done" and the result. Closing the generator stops
        the run.

        A picture comes with the event of its decoding: as soon as it is painted where U-Net and VAE stay
        loaded together, else after all are painted, as the VAE takes the U-Net's place. On KeyboardInterrupt,
        raised here or thrown in, those that are painted are decoded before it is raised; on a second at once.

        With `preview_every`, of this or of the request, every n-th step's event has a picture of the latents
        as they are then: by a tiny decoder, which is in the plan, where there is one for the model and room
        for it, else by a linear map, which takes no memory. What is painted is the same.

        A device runs one request at a time, from its first event until the last or `close`. A second run on
        it, of this or another pipeline, waits for that in another thread; in the same one it is refused with
        a TightfitError.
        """
        jobs = passes(self._job(request, preview_every))
        with self.loaded.budget.claim(self.loaded) as turn:
            run = Passes(self._runs(jobs))
            self._current = run, turn
            try:
                yield from self._resumed(run.events(), turn)
            finally:
                if self._current == (run, turn):
                    self._current = None
                for other in {one.loaded for one in run.runs} - {self.loaded}:
                    other.close()

    def _runs(self, jobs: Sequence[Job]) -> list[Run]:
        """A run for each pass. Another model has sessions of its own, for this request."""
        first = Run(jobs[0], self.loaded, Ways(self._first, self._plans), self._on_stage)
        runs = [first]
        for job in jobs[1:]:
            loaded = self.loaded if job.model is self.spec else Loaded(self.hardware, self.loaded.room_bytes)
            ways = Ways(partial(self._first_after, first), partial(self._plans_after, first))
            runs.append(Run(job, loaded, ways, self._on_stage, runs[-1]))
        return runs

    def _resumed(self, events: Generator[Event, None, None], turn: Turn) -> Generator[Event, None, None]:
        """`events`, each made while nothing else of this pipeline is used."""
        resume: Callable[[], Event] = partial(next, events)
        try:
            while True:
                with self._using:
                    turn.resumed()
                    try:
                        event = resume()
                    except StopIteration:
                        return
                try:
                    yield event
                    resume = partial(next, events)
                except GeneratorExit:
                    raise
                except BaseException as error:  # thrown in
                    resume = partial(events.throw, error)
        finally:
            with self._using:
                events.close()

    def close(self) -> None:
        """Free every component that is still loaded, and end a run that is under way once it has made its
        next event.

        The pipeline can be used again; it then loads them again.
        """
        with self._using:
            if self._current:
                run, turn = self._current
                run.close()
                self._current = None
                turn.release()
            self.loaded.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _before(saved: list[Plan], plans: list[Plan]) -> list[Plan]:
    """All of them, those from a file first and chosen, if there are some."""
    return [*saved, *(replace(plan, chosen=False) for plan in plans)] if saved else plans


def _costs_of(estimate: Estimate) -> tuple[Any, ...]:
    """What the plans of a job depend on, besides its model and what else was asked of the pipeline."""
    job = estimate.job
    words, share = job.prompting, job.share
    encodings = (job.text_encodings, *(job.encodings(name) for name in job.spec.components))
    calls = [job.calls_with(name) for name in job.spec.components]
    previews = job.previews if job.spec.of_role(Role.PREVIEW) else 0
    counts = (*calls, job.skipping_calls, len(job.prompted), words.lengths, *encodings, previews)
    parts = (share.encodes, share.decodes, job.whole.refiner is None, job.whole is job)
    full = job.full_calls(job.step_cache or 2, job.spec.denoiser.name)
    cached = (job.step_cache, job.steps_taken, *full, job.is_steady)
    sizes = (job.width, job.height, *job.references)
    return (*sizes, job.num_images, job.branches, *counts, *parts, *cached, estimate.texts)
