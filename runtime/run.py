"""One pass of a request: encode → denoise → decode as a generator of events, within the budget, and all state
of that one run; and all passes of a request, one after another."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image

from . import infotext, previews, sampling
from .backends.protocol import Session
from .conditioning import Conditioning, Together, encoded, remembering
from .conditions import Painted, Steering, Steerings
from .errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from .events import Event, Measured, Pass, Result
from .loaded import Loaded
from .machine.process import ProcessPeak
from .models import schedulers
from .models.families.family import KEPT, STEPPING, Role
from .models.spec import ModelSpec
from .passes import left, mixed
from .planner.plan import Plan
from .request import Job
from .texts import TEXTS, Chunk, machine
from .units import shown

T = TypeVar("T")
OnStage = Callable[[str], AbstractContextManager[object]]
"""Called with a stage's name as it begins; what it returns is entered then, and left as the stage ends."""
CURE = "make the picture smaller, or close what else uses the memory"


class Call(NamedTuple):
    """A call of the U-Net: its number in the schedule, whether it is of the conditioned branches `alone`, in
    steps without guidance, and of a step that is taken in `full`, where steps are cached. `without`: layers
    that one of these alone leaves out; a guided one is followed by such a call."""

    number: int
    alone: bool = False
    full: bool = True
    without: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ways:
    """How to plan a job: `first` is the plan to begin with, `every` all there are, for when that needs too
    much."""

    first: Callable[[Job], Plan]
    every: Callable[[Job], list[Plan]]


class Run:
    """A job, run with the sessions of `loaded`, which outlive it.

    When memory runs out all the same, it goes on from where it was by a plan that takes less. `before` is the
    run of the pass before, from which it goes on.
    """

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        ways: Ways,
        on_stage: OnStage = nullcontext,
        before: Run | None = None,
    ) -> None:
        self.job, self.spec, self.loaded = job, job.spec, loaded
        self.notices: list[str] = before.notices if before else []
        self.stage = "prepare"
        self.closed = False
        self.images: list[Image.Image] = []
        self._before, self._after = before, cast("Run | None", None)
        if before:
            before._after = self
        self._ways, self._on_stage = ways, on_stage
        self._plan: Plan | None = None
        self._measures: dict[str, Measured] = {}
        self._process = ProcessPeak()
        self._load_seconds, self._announced = 0.0, 0
        self._finished: list[sampling.Step] = []
        self._conditionings: list[Conditioning] = []  # of each picture
        self._known: Mapping[tuple[str, bytes], tuple[np.ndarray, ...]] = {}  # by text encoder and tokens
        self._together = Together()
        self._steering = Steerings(())
        # What full steps have kept, which is on the device, by the number of a picture, then of a branch.
        self._features: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self._shallow = False  # whether the U-Net's call that is under way takes these

    @property
    def plan(self) -> Plan:
        """The plan that runs now."""
        assert self._plan
        return self._plan

    @property
    def measured(self) -> Pass:
        """The plan that ran, and what its stages took."""
        return Pass(self.plan, self._measures)

    @property
    def painted(self) -> Painted:
        """What the next pass is handed."""
        steps = self._finished
        return Painted(
            [step.latents for step in steps], [step.generator for step in steps], tuple(self.images)
        )

    def events(self) -> Generator[Event, None, None]:
        """Events while this pass runs. Closing the generator stops it."""
        try:
            yield from self._stages()
        # Of planning too, and of a library that comes late.
        except (MemoryError, RuntimeError, ImportError, OSError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"out of memory to {self.stage} ({first_line(error)}): {CURE}", complete=True
            ) from error

    def _stages(self) -> Iterator[Event]:
        if self._before:
            self._go_on(self._before)
        else:
            with self._measured("prepare"):
                self._plan_all()
                self._begin()
        with self._measured("encode") if self.plan.predicted.stages["encode"] else nullcontext():
            self._conditionings = self._encode()
            self._steering = self._steer()
        yield Event("encode", 1, 1, notices=self._news())
        job, images = self.job, self.images
        while len(images if job.share.decodes else self._finished) < job.num_images:
            stopped = None
            try:
                with self._measured("denoise"):
                    yield from self._denoise()
            except KeyboardInterrupt as interrupt:
                if self._after or len(images) == len(self._finished):
                    raise
                stopped = interrupt
                yield self._stopping()
            if job.share.decodes:
                with self._measured("decode"):
                    stopped = yield from self._decode(stopped)
            if stopped:
                raise stopped

    def _plan_all(self) -> None:
        """Plan this pass and those that follow, and find out whatever else can fail, before anything is
        loaded."""
        self._plan, whole = self._ways.first(self.job), self.job.whole
        if seconds := self.plan.predicted.compiling_seconds:
            self._note(f"compiling blocks takes about {seconds:.0f} s, once")
        self._prepare()
        infotext.write(whole, whole.spec.name, self.plan.precision)  # hashes adapters while they are there
        if self._after:
            self._after._plan_all()

    def _go_on(self, before: Run) -> None:
        """Begin with what the pass before has painted, and with what it has loaded, but for what there is no
        room for."""
        painted, self._announced = before.painted, before._announced
        conditions = tuple(condition.after(painted) for condition in self.job.conditions)
        self.job = replace(self.job, conditions=conditions)
        self._note(*mixed(before.plan, self.plan))
        self._begin()

    def _begin(self) -> None:
        """Take the plan: where it counts on texts that are known, these, or the plan without if they are
        not any more."""
        while self.plan.texts_known and self.job.share.encodes:
            if (answers := TEXTS.read(self.job, self.plan)) is not None:
                self._known = answers
                break
            self._plan = self._ways.first(self.job)
        self._take(self.plan)

    def _prepare(self) -> None:
        """Find out whatever else can fail before any weight is read."""
        job = self.job
        schedulers.rehearse(job.scheduler, self.spec, job.num_inference_steps, job.tuning, job.size)
        of_adapters = job.spec.notes[len(job.model.notes) :]
        pictures = job.pictures or (job,)
        of_words = (notice for picture in pictures for notice in picture.prompting.notices())
        self._note(*dict.fromkeys((*of_adapters, *job.notices(), *of_words)))
        for picture in pictures:
            picture.prompting.read  # noqa: B018  every word is one that the text encoders know

    def _encode(self) -> list[Conditioning]:
        """The U-Net's inputs that depend on texts, of each picture: the same object for the same words."""
        pictures = self.job.prompted_pictures
        if self._before and self._before._conditionings and not self.job.share.encodes:
            return [self._before._conditionings[0].again(self.job)] * len(pictures)
        jobs = {job.words: job for job in pictures}
        answers: dict[Any, list[Any]] = {words: [] for words in jobs}
        for name in self.job.prompting.read:
            encode = remembering(partial(self._encoded, name))
            for words, job in jobs.items():
                answers[words].append(encoded(job, job.prompting.read[name], encode))
            if self.plan.placements[name].residency != "resident":
                self.loaded.drop(name)
        self._known = {}
        made = {words: Conditioning(job, answers[words]) for words, job in jobs.items()}
        return [made[job.words] for job in pictures]

    def _steer(self) -> Steering:
        """What the conditions do to the steps."""
        steerings = [condition.prepare(self.job, self._called) for condition in self.job.conditions]
        self._let_go()
        return Steerings(steerings)

    def _let_go(self, but: str = "") -> None:
        """Free the encoders that do not stay loaded."""
        for name in [component.name for component in self.spec.of_role(Role.ENCODER)]:
            if name != but and self.plan.placements[name].residency != "resident":
                self.loaded.drop(name)

    def _called(self, name: str, **arrays: Any) -> tuple[Any, ...]:
        """What the network answers. In a step all is done again that led to it when memory runs out, as the
        next plan may call it otherwise."""
        if self.stage == "denoise":
            shallow = self._shallow and self.spec.components[name].network.call_cached
            return self._session(name)(**arrays, **({"caching": True} if shallow else {}))
        self._let_go(but=name)
        return self._surviving(lambda: self._session(name)(**arrays))

    def _encoded(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """What a text encoder answers, or has answered before."""
        if (known := self._known.get((name, ids.tobytes()))) is not None:
            return known
        answers = self._called(name, tokens=ids[None])
        placement = self.plan.placements[name]
        if placement.residency != "resident":  # else there is nothing to gain
            own = machine(self.plan.device, self.plan.hardware)
            TEXTS.put(Chunk(self.spec.components[name], own, ids), placement, answers)
        return answers

    def _denoise(self) -> Iterator[Event]:
        """The latents of the pictures of the next call; all that are left, unless U-Net and VAE stay loaded
        together anyway."""
        preview_every, count = self.job.preview_every, self.job.num_images
        while (first := len(self._finished)) < count:
            last: dict[int, sampling.Step] = {}
            for event, step in self._steps(range(first, min(first + self.plan.images_per_call, count))):
                if preview_every and step.number % preview_every == 0:
                    event = replace(event, preview=self._preview(step.latents, event.image))
                last[event.image] = step
                yield event
            self._finished += last.values()
            if (
                self.job.share.decodes
                and self.plan.denoiser.residency == self.plan.decoder.residency == "resident"
            ):
                return

    def _steps(self, indices: range) -> Iterator[tuple[Event, sampling.Step]]:
        """The steps of these pictures, which go in step with one another."""
        job = self.job
        calls, guided, is_guided = count(job.first_call), job.guided, job.branches > 1

        def predict(samples: Sequence[np.ndarray], timestep: float, step: int) -> list[np.ndarray]:
            alone = is_guided and step not in guided
            full = step in job.full_steps(self.plan.step_cache)
            without = job.skipped_layers if step in job.skipping else ()
            return self._predict_all(samples, timestep, indices, Call(next(calls), alone, full, without))

        pictures = [self._sampled(job.alone(index)) for index in indices]
        total, done = sum(map(self._steps_of, (self._before, self, self._after))), None
        try:
            for steps in sampling.denoise(pictures, predict):
                done = self._steps_of(self._before) + indices[0] * steps[0].count if done is None else done
                for index, step in zip(indices, steps, strict=True):
                    done += 1
                    yield Event("denoise", done, total, index, notices=self._news()), step
        finally:
            self._features.clear()

    def _sampled(self, job: Job) -> sampling.Picture:
        """One picture, with a scheduler of its own."""
        steps = job.num_inference_steps
        scheduler = schedulers.make(job.scheduler, self.spec, steps, job.seed, job.tuning, job.size)
        sampler = sampling.Sampling(scheduler, steps, job.tuning, job.skipped, job.share.end)
        return sampling.picture(sampler, job.noise, self._steering)

    @staticmethod
    def _steps_of(run: Run | None) -> int:
        """Of all pictures, in one pass."""
        return run.job.num_images * run.job.steps_taken if run else 0

    def _predict_all(
        self, samples: Sequence[np.ndarray], timestep: float, indices: range, how: Call
    ) -> list[np.ndarray]:
        """The U-Net's prediction for each picture, as many a call as the plan has that then runs."""
        done: list[np.ndarray] = []
        while (first := len(done)) < len(samples):

            def some(first: int = first) -> list[np.ndarray]:
                part = slice(first, first + self.plan.images_per_call)
                return self._predict(samples[part], timestep, indices[part], how)

            done += self._surviving(some)
        if len(samples) > self.plan.images_per_call:
            self._features.clear()  # since memory ran out a call is of fewer, and the plan keeps no more
        return done

    def _predict(
        self, pictures: Sequence[np.ndarray], timestep: float, indices: range, how: Call
    ) -> list[np.ndarray]:
        """The U-Net's prediction for some pictures, guided if asked, in one batched call or one call for each
        branch."""
        for component in self.spec.components.values():
            # All before one answers, as answers would be alive meanwhile.
            if component.role in STEPPING and component.name in self.plan.placements:
                self._session(component.name)
        alone, given = how.alone, [self._conditionings[index] for index in indices]
        every = [one.given(how.number) if alone else one.of(self.plan.cfg, how.number) for one in given]
        parts = [self._together.of(part) for part in zip(*every, strict=True)]
        time_step = np.array(timestep, np.float32)
        count = 1 if alone else self.job.branches // len(parts)
        samples = np.concatenate([picture for picture in pictures for _ in range(count)])
        first = self.job.prompted if alone else range(0, self.job.branches, count)
        features = self._features[indices[0]]
        self._shallow = not how.full and {*features} == {*first}
        if not self._shallow:
            features.clear()  # before others are made

        def denoised(part: Mapping[str, np.ndarray], row: int) -> np.ndarray:
            arrays = {"sample": samples, "timestep": time_step, **part}
            rows = range(row, row + count)
            beside = self._steering.beside(arrays, rows)
            inputs = {**self._steering.inputs(arrays, rows), **beside}
            return self._denoised(inputs, features, row, how.without if alone else ())

        answers = [denoised(part, row) for part, row in zip(parts, first, strict=True)]
        rows = [slice(place * count, (place + 1) * count) for place in range(len(pictures))]
        whole = [np.concatenate([answer[own] for answer in answers]) for own in rows]
        combined = [self._combined(one, index, alone) for one, index in zip(whole, indices, strict=True)]
        if alone or not how.without:
            return combined
        less, own = self._predict(pictures, timestep, indices, how._replace(alone=True)), self.job.prompted
        scale = np.float32(self.job.skip_layer_guidance_scale)
        return [
            guided + scale * (self._combined(one[own.start : own.stop], index, alone=True) - without)
            for guided, one, without, index in zip(combined, whole, less, indices, strict=True)
        ]

    def _denoised(
        self, inputs: Mapping[str, Any], features: dict[int, Any], row: int, without: tuple[int, ...]
    ) -> np.ndarray:
        """What the U-Net answers `without` some layers; where steps are cached, around what is kept of the
        branches from `row` on, or all of it, which is kept then."""
        session = self._session(self.spec.denoiser.name)
        if self.plan.step_cache == 1:
            return session(**inputs, **({"without": without} if without else {}))[0]
        known = {KEPT: features[row]} if self._shallow else {}
        predicted, *kept = session(caching=True, **inputs, **known)
        if kept:
            features[row] = kept[0]
        return predicted

    def _combined(self, predicted: np.ndarray, index: int, alone: bool) -> np.ndarray:
        """One picture's prediction, of those of its branches."""
        if self.job.branches == 1:
            return predicted
        weights = [line.weight for line in self.job.prompted_pictures[index].prompting.lines[1:]]
        return averaged(predicted, weights) if alone else self._guided(predicted, weights)

    def _guided(self, predicted: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Classifier-free guidance, by each of the prompt's parts with its weight, then by what conditions
        ask."""
        without, whole, job = predicted[:1], predicted[:1], self.job
        for row, weight in enumerate(weights, 1):
            whole = whole + np.float32(job.guidance_scale * weight) * (predicted[row : row + 1] - without)
        for row, scale in enumerate(job.scales, len(weights) + 1):
            whole = whole + np.float32(scale - 1) * (without - predicted[row : row + 1])
        if not job.guidance_rescale:
            return whole
        return rescaled(whole, averaged(predicted[1 : len(weights) + 1], weights), job.guidance_rescale)

    def _preview(self, latents: np.ndarray, index: int) -> Image.Image:
        """The picture as it is now, whatever is in it."""
        values = self._surviving(lambda: self._previewed(latents))
        image = self._picture(np.nan_to_num(values), index)
        return image.resize((self.job.width, self.job.height), Image.Resampling.BILINEAR)

    def _previewed(self, latents: np.ndarray) -> np.ndarray:
        """(height, width, 3) in -1..1, by the decoder that the plan has for that, or smaller without one."""
        decoders = (part for part in self.spec.of_role(Role.PREVIEW) if part.name in self.plan.placements)
        if (decoder := next(decoders, None)) is None:
            return previews.mapped(self.spec, latents)
        (pictures, *_) = self._session(decoder.name)(latents=previews.decodable(decoder, latents))
        return pictures[0].transpose(1, 2, 0)

    def _decode(self, stopped: KeyboardInterrupt | None) -> Generator[Event, None, KeyboardInterrupt | None]:
        """The pictures of the latents that are finished. Returns the first interrupt once all are there."""
        job, finished, images = self.job, self._finished, self.images
        decoded: dict[int, np.ndarray] = {}
        while (index := len(images)) < len(finished):
            try:
                if index not in decoded:
                    decoded = self._surviving(partial(self._decoded, index))
                images.append(self._finished_picture(decoded[index], index))
                shown_as = "preview" if self._after else "picture"  # which is saved
                known = {"notices": self._news(), shown_as: images[index]}
                yield Event("decode", index + 1, job.num_images, index, **known)
            except KeyboardInterrupt as interrupt:
                if stopped or len(images) == len(finished):
                    raise
                stopped = interrupt
                yield self._stopping()
        return stopped

    def _decoded(self, first: int) -> dict[int, np.ndarray]:
        """(height, width, 3) in -1..1, of as many pictures from the first as the plan decodes at once."""
        steps = self._finished[first : first + self.plan.images_per_decode]
        latents = widened(self.spec, np.concatenate([step.latents for step in steps]))
        (pictures, *_) = self._session(self.spec.decoder.name)(latents=latents)
        return dict(enumerate(pictures.transpose(0, 2, 3, 1), first))

    def _picture(self, values: np.ndarray, index: int) -> Image.Image:
        """One PIL picture with its own request in `info["parameters"]`."""
        if not np.isfinite(values).all():
            compute = self.plan.denoiser.compute
            damaged = "copy or download the model again, its weights may be damaged"
            cure = damaged if compute == "fp32" else "try --precision fp32"
            raise TightfitError(
                f"the picture overflowed in {compute}: {cure}, or try a smaller guidance scale"
            )
        image = Image.fromarray(((values / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))
        whole = self.job.whole
        said = replace(whole.alone(index), step_cache=self.step_cache)
        image.info["parameters"] = infotext.write(said, whole.spec.name, self.plan.precision)
        return image

    @property
    def step_cache(self) -> int | None:
        """Of how many steps one is taken in full, as a picture carries it. A larger pass caches none."""
        every = max(run.plan.step_cache for run in (self, self._before) if run)
        return self.job.whole.step_cache if every == 1 else every

    def _finished_picture(self, values: np.ndarray, index: int) -> Image.Image:
        image = self._picture(values, index)
        finished = self._steering.finish(image)
        finished.info["parameters"] = image.info["parameters"]
        return finished

    def _stopping(self) -> Event:
        done, count = len(self.images), len(self._finished) - len(self.images)
        pictures = "1 picture that is painted is" if count == 1 else f"{count} pictures that are painted are"
        self.notices.append(f"stopping; {pictures} decoded first, a second Ctrl-C gives up on that")
        return Event("decode", done, self.job.num_images, done, notices=self._news())

    def _note(self, *notices: str) -> None:
        """Say each once in a run."""
        unsaid = {*notices} - {*self.notices}
        self.notices += [notice for notice in notices if notice in unsaid]

    def _news(self) -> tuple[str, ...]:
        """The notices that no event has had yet."""
        news, self._announced = self.notices[self._announced :], len(self.notices)
        return tuple(news)

    def _take(self, plan: Plan) -> None:
        """Run by `plan` from now on."""
        self._plan = plan
        self._features.clear()
        self.loaded.take(plan, self.spec, self._beside_bytes())

    def _beside_bytes(self) -> int:
        """What another model of this run holds beside it, after it is freed where there is no room for
        both."""
        others = self._before.loaded if self._before else self.loaded
        if others is self.loaded:
            return 0
        predicted = self.plan.predicted
        if others.held() + predicted.peak_bytes > self.plan.budget_bytes - predicted.context_bytes:
            others.free()
        return others.held()

    def _session(self, name: str) -> Session:
        if self.closed:
            raise TightfitError("the pipeline was closed while it was painting")
        is_new, start = name not in self.loaded.sessions, time.perf_counter()
        session = self.loaded.session(self.spec.components[name], self.plan.placements[name])
        if is_new:
            self._load_seconds += time.perf_counter() - start
        self._note(*session.notices)  # one may come with a call
        return session

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        """One stage: measured, compared with the budget, and what was loaded for it alone freed at its
        end."""
        with self._on_stage(name):
            self.stage, self._load_seconds, start = name, 0.0, time.perf_counter()
            self._process.reset()
            self.loaded.reset_peak()
            try:
                yield
            finally:
                peak_bytes = self.loaded.peak_bytes()
                if not self.closed:  # else another run may be using what is loaded
                    self.loaded.drop_staged(self._kept if name == "denoise" else ())
            process_bytes = self._process.bytes()
            measure = Measured(time.perf_counter() - start, self._load_seconds, peak_bytes, process_bytes)
            self._measures[name] = (
                self._measures[name].and_then(measure) if name in self._measures else measure
            )
            self._compare(process_bytes)

    @property
    def _kept(self) -> list[str]:
        """What the next pass goes on with as it is loaded."""
        if not self._after or self._after.loaded is not self.loaded:
            return []
        plan = self._after.plan
        of_next = left(self.job, self.plan.placements, self._after.job)
        return [name for name, placement in of_next if plan.placements.get(name) == placement]

    def _compare(self, process_bytes: int) -> None:
        """A notice where a CPU's process held more than its budget: no allocator can be capped there."""
        if self.plan.device == "cpu" and process_bytes > self.plan.budget_bytes:
            held, allowed = shown(process_bytes), shown(self.plan.budget_bytes)
            self.notices.append(
                f"to {self.stage}, the process held {held}, more than the {allowed} it was to keep to"
            )

    def _surviving(self, work: Callable[[], T]) -> T:
        """What `work` answers; when it runs out of memory it is done again by a plan that takes less.

        `work` must change nothing before it is done.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                failure = first_line(error)  # the error itself holds on to frames, and these to tensors
            self._step_down(failure)

    def _step_down(self, failure: str) -> None:
        """Take the fastest plan that needs less in this stage, of the same precision if there is one."""
        now, stage = self.plan, self.stage
        needs = now.predicted.stages[stage]
        self._features.clear()
        self.loaded.free()
        if self._before:  # if it is of another model
            self._before.loaded.free()
        unread = stage == "encode" and not now.texts_known  # texts that are known otherwise
        lower = [
            plan
            for plan in self._ways.every(self.job)
            if plan.fits and plan.predicted.stages[stage] < needs and not (unread and plan.texts_known)
        ]
        if not lower:
            raise OutOfMemoryError(
                f"out of memory to {stage} ({failure}), and no plan takes less: {CURE}", complete=True
            )
        by_likeness = lambda plan: (plan.precision != now.precision, plan.step_cache != now.step_cache)  # noqa: E731
        self._take(min(lower, key=by_likeness))
        if self._after and self.plan.denoiser.arithmetic != now.denoiser.arithmetic:
            self._after._plan = self._after._ways.first(self._after.job)
        self.notices.append(f"out of memory to {stage} ({failure}); went on with {self.plan.summary()}")


class Passes:
    """All passes of a request, each a run. State of the request lives here and there."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def close(self) -> None:
        """End it, as what it runs with is freed."""
        for run in self.runs:
            run.closed = True

    def events(self) -> Generator[Event, None, None]:
        """Events while the request runs; the last has the result. Closing the generator stops the run."""
        *earlier, last = self.runs
        try:
            for run in self.runs:
                yield from run.events()
        finally:
            for run in self.runs:
                if not run.closed:
                    run.loaded.drop_staged()
        done, whole = len(last.images), last.job.whole
        before = tuple(run.measured for run in earlier)
        ran, notices = last.measured, tuple(last.notices)
        # Previews are no part of the pictures.
        request = replace(whole.request, preview_every=0, step_cache=last.step_cache)
        result = Result(request, ran.plan, tuple(last.images), ran.stages, notices, before)
        yield Event("done", done, done, notices=last._news(), result=result)


_NO_SUM = 1e-3  # of weights, beside their sizes


def averaged(predictions: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """(1, channels, h, w) of several, by their weights, or alike where these have no sum."""
    if len(predictions) == 1:
        return predictions
    shares = weights if abs(sum(weights)) > _NO_SUM * sum(map(abs, weights)) else None
    return np.average(predictions, axis=0, weights=shares)[None].astype(np.float32)


def rescaled(whole: np.ndarray, given: np.ndarray, share: float) -> np.ndarray:
    """A guided prediction, a share of it with the deviation of the conditioned one (Lin et al. 2024, 3.4), as
    diffusers computes it."""
    import torch

    deviations = [
        torch.from_numpy(array).std(dim=(1, 2, 3), keepdim=True).numpy() for array in (given, whole)
    ]
    ratio = np.divide(
        deviations[0], deviations[1], out=np.ones_like(whole[:1, :1, :1, :1]), where=deviations[1] != 0
    )
    return share * (whole * ratio) + (1 - share) * whole


def widened(spec: ModelSpec, latents: np.ndarray) -> np.ndarray:
    """Latents as the VAE takes them."""
    deviation, scale, mean = spec.latent_affine
    with np.errstate(all="ignore"):  # what overflows is said of the picture
        wide = latents * np.array(deviation, np.float32)[:, None, None] / np.float32(scale)
        return wide + np.array(mean, np.float32)[:, None, None]
