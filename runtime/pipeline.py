"""encode → denoise → decode: plans each request and runs it as a generator of events, within the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import infotext as parameters
from .backends import backend
from .backends.protocol import Backend, Session
from .errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from .events import Event, Measured, Result
from .machine.hardware import Hardware
from .machine.process import ProcessPeak
from .models import schedulers
from .models.hub import inspect
from .models.spec import ModelSpec
from .models.tokens import Tokens, painted_as_words, tokenize
from .placement import Placement
from .planner import choose as planner
from .planner.plan import Plan
from .planner.wishes import Wishes
from .request import Request, guided
from .units import shown

T = TypeVar("T")
MANY = 100  # requests that a pipeline in Python is taken to serve: what stays loaded is loaded once for all of them


def load(
    model: str = "emoji",
    *,
    device: str = "auto",
    plan: Plan | None = None,
    local_files_only: bool = False,
    **wishes: Any,
) -> Pipeline:
    """A pipeline for a built-in model, a diffusers folder or a hub id. No weight is read before the first request.

    device: auto, cuda, xpu, mps or cpu. Each request is planned for what was free here, by `wishes`, the fields of Wishes:
    precision, compute, residency, attention, tiling and cfg (auto unless named), budget (bytes, or text such as "4GiB"; of the
    GPU's memory, or of the process's on a CPU), min_psnr (decibels). Or else all run by `plan`, if it fits. With
    local_files_only nothing is fetched. Raises TightfitError.
    """
    known = Wishes.__dataclass_fields__
    if unknown := [name for name in wishes if name not in known]:
        raise TightfitError(f"unknown option '{unknown[0]}': choose {', '.join(known)}")
    wishes.setdefault("requests", MANY)
    hardware = Hardware.detect(device)
    return Pipeline(inspect(model, local_files_only=local_files_only), hardware, Wishes(**wishes), plan)


class Pipeline:
    """Runs requests for one model on one machine, each by the best plan for it, within the budget.

    When memory runs out all the same, it goes on from where it was by a plan that takes less. Use as a context manager, or
    `close` it, to free what stays loaded.
    """

    def __init__(self, spec: ModelSpec, hardware: Hardware, wishes: Wishes | None = None, plan: Plan | None = None) -> None:
        self.spec, self.hardware, self.wishes = spec, hardware, wishes or Wishes()
        self._saved, self._planned = plan, ([], [])
        self._plan: Plan | None = None
        self._request = Request("")
        self._backends: dict[str, Backend] = {}
        self._rooms: dict[str, int] = {}
        self._loaded: dict[str, tuple[Placement, Session]] = {}
        self._process = ProcessPeak()
        self._stage, self._load_seconds = "prepare", 0.0
        self._notices: list[str] = []
        self._told = 0
        self._running = self._closed = False

    def plans(self, request: Request) -> list[Plan]:
        """Every way to run `request` here, the one that will be taken first. Raises TightfitError if none fits."""
        request = request.resolve(self.spec)
        steps = schedulers.calls(str(request.scheduler), self.spec, int(request.num_inference_steps or 0))
        key = [request.width, request.height, steps, request.num_images, guided(self.spec, request)]
        if key != self._planned[0]:
            saved = self._checked(request)
            if not saved:
                planner.refuse_hopeless(self.hardware, self.spec, request, self.wishes)
            plans = planner.plan(self.hardware, self.spec, request, self.wishes)
            if saved:
                plans = [*saved, *(replace(each, chosen=False) for each in plans)]
            elif not plans[0].fits:
                raise planner.none_fits(plans, self.hardware, self.spec, request, self.wishes)
            self._planned = key, plans
        return list(self._planned[1])

    def _checked(self, request: Request) -> list[Plan]:
        """The plan that was given for all requests, predicted for this one; nothing without one."""
        return [planner.checked(self._saved, self.hardware, self.spec, request, self.wishes)] if self._saved else []

    def __call__(self, prompt: str, **options) -> Image.Image | list[Image.Image]:
        """Paint `prompt`: a picture, or a list of them with num_images above one.

        Options are those of Request, named as in diffusers: negative_prompt, num_inference_steps, guidance_scale,
        width, height, seed, scheduler, num_images.
        """
        fields = Request.__dataclass_fields__
        if unknown := [name for name in options if name not in fields]:
            raise TightfitError(f"unknown option '{unknown[0]}': choose {', '.join(name for name in fields if name != 'prompt')}")
        images = self.generate(Request(prompt, **options)).images
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
        """Events while `request` runs; the last has stage "done" and the result. Closing the generator stops the run.

        A picture comes with the event of its decoding: as soon as it is painted where U-Net and VAE stay loaded together, else
        after all are painted, as the VAE takes the U-Net's place. On KeyboardInterrupt, raised here or thrown in, those that are
        painted are decoded before it is raised; on a second at once.

        With `preview_every` every n-th step's event has a picture of the latents as they are then, which costs a
        decode each time, and its memory on top of what is predicted; without room for that there is none. A pipeline runs
        one request at a time.
        """
        request = request.resolve(self.spec)
        if self._running:
            raise TightfitError("this pipeline is painting already: finish or close that run first, or load another")
        self._running = True
        try:
            yield from self._run(request, preview_every)
        except (MemoryError, RuntimeError, ImportError, OSError) as error:  # of planning too, and of a library that comes late
            if not out_of_memory(error):
                raise
            cure = "make the picture smaller, or close what else uses the memory"
            raise OutOfMemoryError(f"out of memory to {self._stage} ({first_line(error)}): {cure}") from error
        finally:
            self._running = False

    def close(self) -> None:
        """Free every component that is still loaded. The pipeline can be used again; it then loads them again."""
        self._closed = True
        for name in list(self._loaded):
            self._drop(name)
        for each in self._backends.values():
            each.keep({})
            each.meter.limit(None)
        self._rooms.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self, request: Request, preview_every: int) -> Iterator[Event]:
        stages: dict[str, Measured] = {}
        self._notices, self._told, self._closed = [], 0, False
        with self._measured("prepare", stages):
            self._request = request
            self._take((self._checked(request) or self.plans(request))[0])
            tokens = self._prepare(request)
        with self._measured("encode", stages):
            conditioning = self._encode(request, tokens)
        yield Event("encode", 1, 1, notices=self._news())
        finished: list[np.ndarray] = []
        images: list[Image.Image] = []
        while len(images) < request.num_images:
            stopped = None
            try:
                with self._measured("denoise", stages):
                    yield from self._denoise(request, conditioning, preview_every, finished)
            except KeyboardInterrupt as interrupt:
                if len(images) == len(finished):
                    raise
                stopped = interrupt
                yield self._stopping(request, finished, images)
            with self._measured("decode", stages):
                stopped = yield from self._decode(request, finished, images, stopped)
            if stopped:
                raise stopped
        assert self._plan
        result = Result(request, self._plan, tuple(images), stages, tuple(self._notices))
        yield Event("done", request.num_images, request.num_images, notices=self._news(), result=result)

    def _decode(
        self, request: Request, finished: list[np.ndarray], images: list[Image.Image], stopped: KeyboardInterrupt | None
    ) -> Generator[Event, None, KeyboardInterrupt | None]:
        """The pictures of the latents in `finished`, added to `images`. Returns the first interrupt once all are there."""
        while (i := len(images)) < len(finished):
            try:
                images.append(self._picture(self._surviving(lambda i=i: self._decoded(finished[i])), request, i))
                yield Event("decode", i + 1, request.num_images, i, notices=self._news(), picture=images[i])
            except KeyboardInterrupt as interrupt:
                if stopped or len(images) == len(finished):
                    raise
                stopped = interrupt
                yield self._stopping(request, finished, images)
        return stopped

    def _stopping(self, request: Request, finished: list[np.ndarray], images: list[Image.Image]) -> Event:
        count = len(finished) - len(images)
        pictures = "1 picture that is painted is" if count == 1 else f"{count} pictures that are painted are"
        self._notices.append(f"stopping; {pictures} decoded first, a second Ctrl-C gives up on that")
        return Event("decode", len(images), request.num_images, len(images), notices=self._news())

    def _news(self) -> tuple[str, ...]:
        """The notices that no event has told yet."""
        news, self._told = self._notices[self._told :], len(self._notices)
        return tuple(news)

    def _take(self, plan: Plan) -> None:
        """Run by `plan` from now on, under its budget; what another placed otherwise is freed."""
        self._plan = plan
        for engine in {placement.backend for placement in plan.placements.values()} - self._backends.keys():
            self._backends[engine] = backend(engine, plan.device)
        for name, (placement, _) in list(self._loaded.items()):
            if placement != plan.placements[name]:
                self._drop(name)
        for each in self._backends.values():
            each.keep(plan.placements)
        # arenas of a larger picture give nothing back
        crowded = {engine for engine, each in self._backends.items() if each.meter.held() > plan.predicted.peak_bytes}
        for name in [name for name, (placement, _) in self._loaded.items() if placement.backend in crowded]:
            self._drop(name)
        self._share()

    def _share(self) -> None:
        """Let each engine take of the budget what the others leave."""
        assert self._plan
        held = {name: each.meter.held() for name, each in self._backends.items()}
        for name, each in self._backends.items():
            room = self._plan.budget_bytes - self._plan.predicted.context_bytes - (sum(held.values()) - held[name])
            if self._rooms.get(name) != room:
                self._rooms[name] = room
                each.meter.limit(room)

    @contextmanager
    def _measured(self, name: str, stages: dict[str, Measured]) -> Iterator[None]:
        """One stage: measured, compared with the budget, and what was loaded for it alone freed at its end."""
        self._stage, self._load_seconds, start = name, 0.0, time.perf_counter()
        self._process.reset()
        for each in self._backends.values():
            each.meter.reset()
        try:
            yield
        finally:
            held = [each.meter.bytes() for each in self._backends.values()]
            for component in list(self._loaded):
                if not self._plan or self._plan.placements[component].residency != "resident":
                    self._drop(component)
        process = self._process.bytes()
        now = Measured(time.perf_counter() - start, self._load_seconds, max(held, default=0), process)
        stages[name] = now if name not in stages else stages[name].and_then(now)
        if self.hardware.device == "cpu" and self._plan and process > self._plan.budget_bytes:
            over = f"to {name}, the process held {shown(process)}, more than the {shown(self._plan.budget_bytes)} it was to keep to"
            self._notices.append(over)

    def _session(self, name: str) -> Session:
        assert self._plan
        if self._closed:
            raise TightfitError("the pipeline was closed while it was painting")
        if len(self._backends) > 1:
            self._share()
        if name not in self._loaded:
            placement, start = self._plan.placements[name], time.perf_counter()
            engine = self._backends[placement.backend]
            self._loaded[name] = placement, engine.load(self.spec, self.spec.components[name], placement)
            self._load_seconds += time.perf_counter() - start
            self._notices += [each for each in self._loaded[name][1].notices if each not in self._notices]
        return self._loaded[name][1]

    def _drop(self, name: str) -> None:
        if name in self._loaded:
            self._loaded.pop(name)[1].close()

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
        now = self._plan
        assert now
        needs = now.predicted.stages[self._stage]
        lower = [p for p in self.plans(self._request) if p.fits and p.predicted.stages[self._stage] < needs]
        for name in list(self._loaded):
            self._drop(name)
        if not lower:
            cure = "make the picture smaller, or close what else uses the memory"
            raise TightfitError(f"out of memory to {self._stage} ({failure}), and no plan takes less: {cure}")
        self._take(min(lower, key=lambda plan: plan.precision != now.precision))
        assert self._plan
        self._notices.append(f"out of memory to {self._stage} ({failure}); went on with {self._plan.summary()}")

    def _prepare(self, request: Request) -> dict[str, Tokens]:
        """Find out whatever else can fail before any weight is read; the tokens, by text encoder, are kept."""
        schedulers.rehearse(str(request.scheduler), self.spec, int(request.num_inference_steps or 0))
        texts = {"negative prompt": request.negative_prompt or ""} if guided(self.spec, request) else {}
        texts["prompt"] = request.prompt
        tokens = {encoder.name: tokenize(self.spec, encoder, texts) for encoder in self.spec.text_encoders}
        self._notices += (*painted_as_words(texts), *_cut(tokens))
        return tokens

    def _encode(self, request: Request, tokens: dict[str, Tokens]) -> dict[str, np.ndarray]:
        """The U-Net's inputs that stay the same over all steps, the unguided half of the batch first."""
        hidden, pooled = [], None
        for name, each in tokens.items():
            rows = [self._encoded(name, ids) for ids in each.ids]  # one text at a time, as diffusers, for the same last bits
            out, *rest = (np.concatenate(parts) for parts in zip(*rows, strict=True))
            if self._plan and self._plan.placements[name].residency != "resident":
                self._drop(name)
            hidden.append(out)
            pooled = rest[0] if rest else pooled
        conditioning = {"hidden": np.concatenate(hidden, axis=-1)}
        if self.spec.family == "sdxl":
            if pooled is None:
                raise TightfitError("text_encoder_2 has no projection, which SDXL needs: copy or download the model again")
            conditioning["text_embeds"] = pooled
            size = (request.height, request.width)
            conditioning["time_ids"] = np.array([[*size, 0, 0, *size]] * len(pooled), np.float32)
            if guided(self.spec, request) and request.negative_prompt is None and self.spec.force_zeros:
                conditioning["hidden"][0] = conditioning["text_embeds"][0] = 0
        if width := self.spec.guidance_width:
            conditioning["time_condition"] = guidance_embedding(float(request.guidance_scale or 0), width)
        return conditioning

    def _encoded(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        return self._surviving(lambda: self._session(name)(tokens=ids[None]))

    def _denoise(
        self, request: Request, conditioning: dict[str, np.ndarray], preview_every: int, finished: list[np.ndarray]
    ) -> Iterator[Event]:
        """The next picture's latents, added to `finished`; all that are left, unless U-Net and VAE stay loaded together anyway."""
        for i in range(len(finished), request.num_images):
            latents = np.empty(0)
            for number, (event, latents) in enumerate(self._steps(request, conditioning, i), 1):
                if preview_every and number % preview_every == 0:
                    event = replace(event, preview=self._preview(latents, request, i))
                yield event
            finished.append(latents)
            assert self._plan
            if all(self._plan.placements[name].residency == "resident" for name in ("unet", "vae_decoder")):
                return

    def _steps(self, request: Request, conditioning: dict[str, np.ndarray], index: int) -> Iterator[tuple[Event, np.ndarray]]:
        """The steps of picture `index` with its latents (1, channels, h, w); noise and scheduler stay on the CPU in fp32.

        A step is done after one call of the U-Net, or two, as its scheduler has it.
        """
        import torch

        assert request.seed is not None and request.width is not None and request.height is not None
        assert request.num_inference_steps is not None
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        steps = request.num_inference_steps
        scheduler = schedulers.make(str(request.scheduler), self.spec, steps, request.seed + index)
        options = schedulers.step_options(scheduler, generator)
        factor = self.spec.downsampling
        shape = (1, self.spec.unet["in_channels"], request.height // factor, request.width // factor)
        latents = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        ends = schedulers.ends(scheduler, steps)
        for call, timestep in enumerate(scheduler.timesteps):
            sample = schedulers.scaled(scheduler, latents, timestep).numpy()
            noise = torch.from_numpy(self._surviving(lambda: self._predict(request, sample, float(timestep), conditioning)))  # noqa: B023
            latents = scheduler.step(noise, timestep, latents, **options).prev_sample
            if call in ends:
                done = index * len(ends) + ends.index(call) + 1
                yield Event("denoise", done, request.num_images * len(ends), index, notices=self._news()), latents.numpy()

    def _predict(self, request: Request, sample: np.ndarray, timestep: float, conditioning: dict[str, np.ndarray]) -> np.ndarray:
        """The U-Net's prediction for one picture, guided if asked, in one batched call or one call for each half."""
        assert self._plan
        unet, time_step = self._session("unet"), np.array(timestep, np.float32)
        if not guided(self.spec, request):
            return unet(sample=sample, timestep=time_step, **conditioning)[0]
        if self._plan.cfg == "batched":
            both = unet(sample=np.concatenate([sample, sample]), timestep=time_step, **conditioning)[0]
        else:
            halves = [{name: array[i : i + 1] for name, array in conditioning.items()} for i in range(2)]
            both = np.concatenate([unet(sample=sample, timestep=time_step, **half)[0] for half in halves])
        without, given = both[:1], both[1:]
        return without + np.float32(request.guidance_scale) * (given - without)

    def _preview(self, latents: np.ndarray, request: Request, index: int) -> Image.Image | None:
        """The picture as it is now, if there is room for the VAE beside the U-Net, which goes on after."""
        assert self._plan
        try:
            return self._picture(self._decoded(latents), request, index)
        except OutOfMemoryError:
            if (notice := "there is no room for previews beside the U-Net") not in self._notices:
                self._notices.append(notice)
            return None
        finally:
            if self._plan.placements["vae_decoder"].residency != "resident":
                self._drop("vae_decoder")

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        """(height, width, 3) in -1..1."""
        deviation, scale, mean = self.spec.latent_affine
        with np.errstate(all="ignore"):  # what overflows is said of the picture
            widened = latents * np.array(deviation, np.float32)[:, None, None] / np.float32(scale)
            latents = widened + np.array(mean, np.float32)[:, None, None]
        return self._session("vae_decoder")(latents=latents)[0][0].transpose(1, 2, 0)

    def _picture(self, values: np.ndarray, request: Request, index: int) -> Image.Image:
        """One PIL picture with its own request in `info["parameters"]`."""
        assert self._plan
        if not np.isfinite(values).all():
            compute = self._plan.placements["unet"].compute
            damaged = "copy or download the model again, its weights may be damaged"
            cure = damaged if compute == "fp32" else "try --precision fp32"
            raise TightfitError(f"the picture overflowed in {compute}: {cure}, or try a smaller guidance scale")
        image = Image.fromarray(((values / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))
        own = replace(request, seed=(request.seed or 0) + index, num_images=1)
        image.info["parameters"] = parameters.write(own, self.spec.name, self._plan.precision)
        return image


def _cut(tokens: dict[str, Tokens]) -> tuple[str, ...]:
    """A notice for each text whose end did not fit a text encoder."""
    ends = [(name, end) for each in tokens.values() for name, end in each.cut.items()]
    return tuple(dict.fromkeys(f"the {name} is too long; this end of it was cut: {end}" for name, end in ends))


def guidance_embedding(scale: float, width: int) -> np.ndarray:
    """(1, width): the sinusoids by which guidance-distilled U-Nets read w = scale - 1 (arXiv 2310.04378, appendix)."""
    half = width // 2
    frequencies = np.exp(np.arange(half) * -(np.log(10000.0) / (half - 1)))
    angles = (scale - 1) * 1000.0 * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2))[None].astype(np.float32)
