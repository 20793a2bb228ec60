"""encode → denoise → decode: holds a plan and runs requests through it as a generator of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from PIL import Image

from . import parameters, schedulers
from .backends import Session, backend
from .errors import TightfitError
from .events import Event, Measured, Result
from .hardware import Hardware
from .hub import inspect
from .plan import Plan, check_choices, plan
from .prompt import Tokens, tokenize
from .request import Request
from .spec import ModelSpec


def load(
    model: str = "emoji",
    *,
    precision: str = "auto",
    device: str = "auto",
    residency: str = "auto",
    local_files_only: bool = False,
) -> Pipeline:
    """A pipeline for a built-in model, a diffusers folder or a hub id. No weight is read before the first request.

    precision: auto, fp32, bf16 or fp16. device: auto, cuda, mps or cpu. residency: resident keeps every component
    loaded between requests, staged loads each for its stage and frees it after. With local_files_only nothing is
    fetched. Raises TightfitError.
    """
    check_choices(precision, residency)
    hardware = Hardware.detect(device)
    spec = inspect(model, local_files_only=local_files_only)
    return Pipeline(spec, plan(hardware, spec, precision, residency)[0])


class Pipeline:
    """Runs requests for one model by one plan. Use as a context manager, or `close` it, to free what stays loaded."""

    def __init__(self, spec: ModelSpec, plan: Plan) -> None:
        if plan.placements.keys() != spec.components.keys():
            raise TightfitError(f"this plan is for another kind of model than {spec.name}: make it again with 'tightfit plan'")
        self.spec, self.plan = spec, plan
        self._backends = {p.backend: backend(p.backend, plan.device) for p in plan.placements.values()}
        self._peak = self._backends[plan.placements["unet"].backend].peak()
        self._loaded: dict[str, Session] = {}
        self._load_seconds = 0.0
        self._checked = self._running = False

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

    def run(self, request: Request, preview_every: int = 0) -> Iterator[Event]:
        """Events while `request` runs; the last has stage "done" and the result. Closing the generator stops the run.

        With `preview_every` every n-th step's event has a picture of the latents as they are then, which costs a
        decode each time. A pipeline runs one request at a time.
        """
        request = request.resolve(self.spec)
        if self._running:
            raise TightfitError("this pipeline is painting already: finish or close that run first, or load another")
        self._running = True
        try:
            yield from self._run(request, preview_every)
        finally:
            self._running = False

    def close(self) -> None:
        """Free every component that is still loaded. The pipeline can be used again; it then loads them again."""
        while self._loaded:
            self._loaded.popitem()[1].close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self, request: Request, preview_every: int) -> Iterator[Event]:
        stages: dict[str, Measured] = {}
        with self._stage("prepare", stages):
            tokens = self._prepare(request)
        notices = _cut(tokens)
        with self._stage("encode", stages):
            conditioning = self._encode(request, tokens)
        yield Event("encode", 1, 1, notices=notices)
        with self._stage("denoise", stages):
            latents = yield from self._denoise(request, conditioning, preview_every)
        images = []
        with self._stage("decode", stages), self._session("vae_decoder") as decoder:
            for i, one in enumerate(latents):
                images.append(self._picture(decoder, one, request, i))
                yield Event("decode", i + 1, request.num_images, i)
        result = Result(request, self.plan, tuple(images), stages, notices)
        yield Event("done", request.num_images, request.num_images, result=result)

    @contextmanager
    def _stage(self, name: str, stages: dict[str, Measured]):
        self._peak.reset()
        self._load_seconds, start = 0.0, time.perf_counter()
        yield
        stages[name] = Measured(time.perf_counter() - start, self._load_seconds, self._peak.bytes())

    @contextmanager
    def _session(self, name: str):
        placement = self.plan.placements[name]
        if name not in self._loaded:
            start = time.perf_counter()
            self._loaded[name] = self._backends[placement.backend].load(self.spec, self.spec.components[name], placement)
            self._load_seconds += time.perf_counter() - start
        try:
            yield self._loaded[name]
        finally:
            if placement.residency == "staged" and (session := self._loaded.pop(name, None)):  # None after close()
                session.close()

    def _prepare(self, request: Request) -> dict[str, Tokens]:
        """Find out whatever can fail before any weight is read; the tokens, by text encoder, are kept."""
        if not self._checked:
            for name, component in self.spec.components.items():
                self._backends[self.plan.placements[name].backend].check(component)
            self._checked = True
        schedulers.make(str(request.scheduler), self.spec, request.num_inference_steps)
        texts = {"negative prompt": request.negative_prompt or ""} if self._guided(request) else {}
        texts["prompt"] = request.prompt
        return {encoder.name: tokenize(self.spec, encoder, texts) for encoder in self.spec.text_encoders}

    def _encode(self, request: Request, tokens: dict[str, Tokens]) -> dict[str, np.ndarray]:
        """The U-Net's inputs that stay the same over all steps, the unguided half of the batch first."""
        hidden, pooled = [], None
        for name, each in tokens.items():
            with self._session(name) as session:  # one text at a time, as diffusers, for the same last bits
                out, *rest = (np.concatenate(parts) for parts in zip(*(session(tokens=ids[None]) for ids in each.ids), strict=True))
            hidden.append(out)
            pooled = rest[0] if rest else pooled
        conditioning = {"hidden": np.concatenate(hidden, axis=-1)}
        if self.spec.family == "sdxl":
            if pooled is None:
                raise TightfitError("text_encoder_2 has no projection, which SDXL needs: copy or download the model again")
            conditioning["text_embeds"] = pooled
            size = (request.height, request.width)
            conditioning["time_ids"] = np.array([[*size, 0, 0, *size]] * len(pooled), np.float32)
            if self._guided(request) and request.negative_prompt is None and self.spec.force_zeros:
                conditioning["hidden"][0] = conditioning["text_embeds"][0] = 0
        if width := self.spec.guidance_width:
            conditioning["time_condition"] = guidance_embedding(float(request.guidance_scale or 0), width)
        return conditioning

    def _guided(self, request: Request) -> bool:
        """Classifier-free guidance: asked for above one, as in diffusers, but not of models distilled for it."""
        return (request.guidance_scale or 0) > 1 and not self.spec.guidance_width

    def _denoise(
        self, request: Request, conditioning: dict[str, np.ndarray], preview_every: int
    ) -> Generator[Event, None, list[np.ndarray]]:
        """The latents of every picture, one after another."""
        finished: list[np.ndarray] = []
        with self._session("unet") as unet:
            for i in range(request.num_images):
                for number, (event, latents) in enumerate(self._steps(unet, request, conditioning, i), 1):
                    if preview_every and number % preview_every == 0:
                        with self._session("vae_decoder") as decoder:
                            event = replace(event, preview=self._picture(decoder, latents, request, i))
                    yield event
                    finished[i:] = [latents]
        return finished

    def _steps(
        self, unet: Session, request: Request, conditioning: dict[str, np.ndarray], index: int
    ) -> Iterator[tuple[Event, np.ndarray]]:
        """The steps of picture `index` with its latents (1, channels, h, w); noise and scheduler stay on the CPU in fp32."""
        import torch

        assert request.seed is not None and request.width is not None and request.height is not None
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        scheduler = schedulers.make(str(request.scheduler), self.spec, request.num_inference_steps)
        options = schedulers.step_options(scheduler, generator)
        factor = self.spec.downsampling
        shape = (1, self.spec.unet["in_channels"], request.height // factor, request.width // factor)
        latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        steps = len(scheduler.timesteps)
        for step, timestep in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(latents, timestep).numpy()
            noise = torch.from_numpy(self._predict(unet, request, sample, float(timestep), conditioning))
            latents = scheduler.step(noise, timestep, latents, **options).prev_sample
            yield Event("denoise", index * steps + step + 1, request.num_images * steps, index), latents.numpy()

    def _predict(
        self, unet: Session, request: Request, sample: np.ndarray, timestep: float, conditioning: dict[str, np.ndarray]
    ) -> np.ndarray:
        """The U-Net's prediction for one picture, guided if asked, in one batched call or one call for each half."""
        time_step = np.array(timestep, np.float32)
        if not self._guided(request):
            return unet(sample=sample, timestep=time_step, **conditioning)[0]
        if self.plan.cfg == "batched":
            both = unet(sample=np.concatenate([sample, sample]), timestep=time_step, **conditioning)[0]
        else:
            halves = [{name: array[i : i + 1] for name, array in conditioning.items()} for i in range(2)]
            both = np.concatenate([unet(sample=sample, timestep=time_step, **half)[0] for half in halves])
        without, given = both[:1], both[1:]
        return without + np.float32(request.guidance_scale) * (given - without)

    def _picture(self, decoder: Session, latents: np.ndarray, request: Request, index: int) -> Image.Image:
        """One PIL picture with its own request in `info["parameters"]`."""
        latents = latents / np.float32(self.spec.latent_scale)
        values = decoder(latents=latents)[0][0].transpose(1, 2, 0)
        if not np.isfinite(values).all():
            raise TightfitError(
                f"the picture overflowed in {self.plan.precision}: try --precision fp32, or a smaller guidance scale"
            )
        image = Image.fromarray(((values / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))
        own = replace(request, seed=(request.seed or 0) + index, num_images=1)
        image.info["parameters"] = parameters.write(own, self.spec.name, self.plan.precision)
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
