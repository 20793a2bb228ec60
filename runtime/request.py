"""What a person wants, and the job that it becomes for one model: checked once, then total."""

from __future__ import annotations

import dataclasses
import functools
import operator
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, SupportsIndex

from . import previews
from .adapters import Adapter, adapted, by_option, check, check_whole
from .adapters.prompt import from_words
from .conditions import Condition
from .conditions.handed import placed as way_placed
from .errors import TightfitError
from .fields import described, kinds, option
from .files import shortened
from .models import schedulers
from .models.clip_skip import skipping
from .models.families.image_prompt import TOKENS
from .models.hub import placed
from .models.prompts import EMPHASES, SYNTAXES, Prompting, Wanted, prompting
from .models.samplers.names import AUTOMATIC, SAMPLERS, SCHEDULES, joined, schedule_of, split
from .models.schedulers import Tuning
from .models.spec import ModelSpec
from .noise import CPU, SOURCES, Noise

SKIPPING = "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"
_LAYERS = "skip_guidance_layers"
_GUIDANCE = "guidance_rescale", "guidance_start", "guidance_end", _LAYERS
_HIRES = "hires_size", "hires_strength", "hires_steps", "hires_upscaler", "hires_prompt", "hires_scheduler"
_RESIZED = "seed_resize's width", "seed_resize's height"
RANDOM_SEED = -1  # as A1111 has it: the seed that is drawn is told, and written into the picture
_SIDES = 1, 2**16
MOST_CACHED = 10
"""Steps of which one is taken in full."""
_FEW_FULL = 4
_SEEDS = 0, 2**63 - 1


def _tuning(default: Any, help: str, metavar: str = "", **others: Any) -> Any:  # noqa: A002
    """An option of sampling, which few requests have."""
    return option(default, help, metavar, panel="Sampling", terse=True, **others)


def _second(default: Any, help: str, metavar: str = "", **others: Any) -> Any:  # noqa: A002
    """An option of a second pass."""
    return option(default, help, metavar, panel="Second pass", terse=True, **others)


@dataclass(frozen=True)
class Request:
    """One text-to-image request, in diffusers' words; None means "as the model likes it" until `resolve`
    decides.

    Sizes are pixels. Picture i of `num_images` is made from seed + i, so each can be made again alone. A
    negative prompt of None is no negative prompt, which SDXL treats differently from an empty one, as
    diffusers does. A seed of -1 is a random one, as None is. `adapters` change the model for this request;
    `conditions` are what it asks besides its text. `preview_every`: after how many steps there is a picture
    of the latents as they are then; 0: never.
    """

    prompt: str
    negative_prompt: str | None = option(None, "What not to paint.", "TEXT")
    width: int | None = option(None, "Pixels; default: model's.", "N", bounds=_SIDES, costs=True)
    height: int | None = option(None, "Pixels; default: model's.", "N", bounds=_SIDES, costs=True)
    num_inference_steps: int | None = option(
        None,
        "Default 20, or model's.",
        "N",
        options=("--num-inference-steps", "--steps"),
        bounds=(1, 1000),
        costs=True,
    )
    guidance_scale: float | None = option(None, "Default: model's.", "X", bounds=(0, 1000), costs=True)
    seed: int | None = option(None, "Default, and -1: random.", "N", bounds=_SEEDS)
    scheduler: str | None = option(
        None, '"Euler a"; docs/samplers.md.', "NAME", choices=tuple(SAMPLERS), costs=True
    )
    num_images: int = option(1, "From seed, seed + 1 …", "N", bounds=(1, 10_000), costs=True)
    prompt_syntax: str = option(
        "a1111", "a1111, or plain: as words.", "NAME", choices=SYNTAXES, costs=True, panel="Words"
    )
    clip_skip: int = option(
        1, "As A1111 counts: 1 is none.", "N", bounds=(1, 64), costs=True, panel="Words", terse=True
    )
    emphasis: str = option(
        "original",
        "Of (a:1.2): original, no-norm, ignore.",
        "NAME",
        choices=EMPHASES,
        panel="Words",
        terse=True,
    )
    adapters: tuple[Adapter, ...] = ()
    conditions: tuple[Condition, ...] = ()
    schedule: str = _tuning(AUTOMATIC, "Of noise: karras, simple …", "NAME", choices=tuple(SCHEDULES))
    eta: float | None = _tuning(None, "Share of noise drawn anew.", "X", bounds=(0, 1))
    s_churn: float = _tuning(0.0, "Noise that euler adds.", "X", bounds=(0, 100))
    s_noise: float = _tuning(1.0, "Strength of noise in steps.", "X", bounds=(0, 2))
    zero_snr: bool | None = _tuning(None, "Begin with noise alone.")
    guidance_rescale: float = _tuning(0.0, "Against burnt colours: 0.7.", "X", bounds=(0, 1))
    guidance_start: float = _tuning(0.0, "Guided from there: 0 to 1.", "X", bounds=(0, 1))
    guidance_end: float = _tuning(1.0, "Guided until there: 0 to 1.", "X", bounds=(0, 1))
    skip_guidance_layers: str | None = _tuning(
        None,
        "Guided from them: 7,8,9.",
        "N,N",
        options=("--skip-layers",),
        costs=True,
    )
    skip_layer_guidance_scale: float = _tuning(
        2.8, "How much; 2.8.", "X", bounds=(0, 100), options=("--skip-layer-scale",)
    )
    skip_layer_guidance_start: float = _tuning(
        0.01, "From there: 0 to 1.", "X", bounds=(0, 1), options=("--skip-layer-start",), costs=True
    )
    skip_layer_guidance_stop: float = _tuning(
        0.2, "Until there: 0 to 1.", "X", bounds=(0, 1), options=("--skip-layer-end",), costs=True
    )
    step_cache: int | None = _tuning(
        None, "1 step of N in full; 1 to 10.", "N", bounds=(1, MOST_CACHED), costs=True
    )
    noise_source: str = _tuning(CPU, "cpu, gpu, nv: whose numbers.", "NAME", choices=SOURCES)
    subseed: int | None = _tuning(None, "A second; -1: random.", "N", bounds=_SEEDS)
    subseed_strength: float = _tuning(0.0, "Share of the second.", "X", bounds=(0, 1))
    seed_resize: str | None = _tuning(None, "The noise of that size.", "WxH")
    ensd: int = _tuning(0, "Added to the seed in steps.", "N", bounds=(-(2**32), 2**32))
    hires: float | None = _second(None, "Painted again, larger: 2.", "X", bounds=(1, 8))
    hires_size: str | None = _second(None, "The size instead.", "WxH")
    hires_strength: float = _second(0.7, "How much anew, to 1; 0.7.", "X", bounds=(0, 1))
    hires_steps: int = _second(0, "0: as many as the first.", "N", bounds=(0, 1000))
    hires_upscaler: str = _second("latent", "latent, lanczos … or a file.", "NAME")
    hires_prompt: str | None = _second(None, "Default: the same.", "TEXT")
    hires_scheduler: str | None = _second(None, "Default: the same.", "NAME", choices=tuple(SAMPLERS))
    refiner: str | None = _second(None, "Another model goes on.", "MODEL")
    refiner_start: float = _second(0.8, "From there: 0 to 1; 0.8.", "X", bounds=(0, 1))
    preview_every: int = option(0, bounds=(0, 10_000), costs=True, untold=True)

    def checked(self) -> Request:
        """The same request with plain Python numbers; raises TightfitError for what no model could do."""
        if self.prompt is None:  # as the command line leaves it
            raise TightfitError(
                'no prompt was given: say what to paint, for example "a red heart"; "" is an empty prompt'
            )
        listed = {_LAYERS} if isinstance(self.skip_guidance_layers, list | tuple) else {}
        for name in (name for name, kind in _KINDS.items() if kind is str and name not in listed):
            _check_text(name, getattr(self, name))
        check(self.adapters)
        given = {name: getattr(self, name) for name in _WHOLE}
        for name in ("seed", "subseed"):
            if isinstance(given[name], SupportsIndex) and operator.index(given[name]) == RANDOM_SEED:
                given[name] = None
        whole = {name: _whole(name, given[name], *limits) for name, limits in _WHOLE.items()}
        for name in ("seed", "subseed"):
            if (whole[name] or 0) + (whole["num_images"] or 1) > _SEEDS[1] + 1:
                raise TightfitError(
                    f"{name} {whole[name]} leaves no seeds for {whole['num_images']} pictures: "
                    "choose a smaller one"
                )
        numbers = {name: _number(name, getattr(self, name), *limits) for name, limits in _NUMBERS.items()}
        for name in (name for name, kind in _KINDS.items() if kind is bool):
            _check_truth(name, getattr(self, name))
        texts = {
            "scheduler": _joined(self.scheduler),
            "hires_scheduler": _joined(self.hires_scheduler),
            "schedule": schedule_of(self.schedule or AUTOMATIC),
            **{name: _choice(name, getattr(self, name), known) for name, known in _CHOICES.items()},
            **{name: _shown(sides_of(name, getattr(self, name))) for name in ("seed_resize", "hires_size")},
            "hires_upscaler": way_placed(self.hires_upscaler or _DEFAULTS["hires_upscaler"]),
            _LAYERS: ",".join(map(str, layers_of(self.skip_guidance_layers))) or None,
        }
        return dataclasses.replace(self, **texts, **numbers, **whole)

    @property
    def is_enlarged(self) -> bool:
        """Whether a second, larger pass goes on from its picture."""
        return self.hires is not None or self.hires_size is not None

    def to_json(self) -> dict[str, Any]:
        """Its numbers and texts by field, and the names of its adapters and conditions, if it has any."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in PLAIN if self.is_written(name)}
        fields |= self.adapters_json()
        if self.conditions:
            fields["conditions"] = [type(condition).__name__ for condition in self.conditions]
            said = {name: value for one in self.conditions for name, value in one.said().items()}
            fields |= {"asking": said} if said else {}
        return fields

    def is_written(self, name: str) -> bool:
        """Whether a field is part of what a picture carries."""
        return not _ABOUT[name].terse or getattr(self, name) != _DEFAULTS[name]

    def adapters_json(self) -> dict[str, dict[str, list[str]]]:
        """The names of its adapters by their options, if it has any."""
        named = by_option(self.adapters)
        return {"adapters": named} if named else {}

    def resolve(self, spec: ModelSpec, share: Share | None = None) -> Job:
        """This request with everything decided for `spec`; raises TightfitError for what cannot be done.
        `share` is what one of several passes does of it: see passes.py."""
        share = share or Share()
        request = self.checked()
        _check_passes(request)
        prompt, named = from_words(request.prompt)
        conditions = tuple(condition.resolved(spec) for condition in request.conditions)
        adapters = *request.adapters, *named
        request = dataclasses.replace(request, prompt=prompt, adapters=adapters, conditions=conditions)
        sizes = (condition.size(spec) for condition in request.conditions)
        height, width = (
            (request.height, request.width)
            if request.height and request.width
            else next(filter(None, sizes), None) or spec.native_size
        )
        given = {field.name: getattr(request, field.name) for field in dataclasses.fields(Request)}
        decided = {
            "width": request.width or width,
            "height": request.height or height,
            "num_inference_steps": request.num_inference_steps or spec.default_steps,
            "guidance_scale": float(spec.default_guidance)
            if request.guidance_scale is None
            else request.guidance_scale,
            "seed": drawn(request.seed),
            "scheduler": schedulers.said_plainly(
                _scheduled(request.scheduler or schedulers.default(spec), request.schedule), spec
            ),
            "schedule": AUTOMATIC,
            "subseed": _subseed(request),
            "refiner": request.refiner and placed(request.refiner),
        }
        resize = dict(zip(_RESIZED, sides_of("seed_resize", request.seed_resize) or (), strict=False))
        check_sides({"width": decided["width"], "height": decided["height"], **resize}, spec.latents.multiple)
        changed = skipping(adapted(spec, request.adapters), request.clip_skip)
        check_whole(changed)
        _check_networks(request.conditions)
        _check_channels(changed, request.conditions)
        parts = [part for condition in request.conditions for part in condition.components(changed)]
        parts += filter(None, [previews.decoder(changed) if request.preview_every else None])
        given |= decided
        job = Job(
            **given,
            model=spec,
            spec=changed.with_components(parts),
            prompting=prompting(changed, _wanted(given), _counted_calls(given, spec, share)),
            share=share,
        )
        schedulers.check(job.scheduler, spec, job.tuning)
        _check_guidance(job)
        for condition in job.conditions:
            condition.check(job)
        if job.ensd:
            schedulers.check_draws(job.scheduler, spec, job.tuning, "ensd")
        assert job.skipped < job.num_inference_steps  # or its conditions said that none would be left
        return job


@dataclass(frozen=True)
class Share:
    """What one of several passes does of a request: see passes.py.

    begin, end: of the steps, those that are taken; where None, from where the conditions have it, and to the
    last. counts: the steps that a prompt's schedule counts, from the first that is taken; None: all, on from
    the pass before. encodes: whether texts are, or are those of the pass before. decodes: whether it makes
    pictures, or hands its latents on alone. whole: the job of all passes, which pictures carry.
    """

    begin: int | None = None
    end: int | None = None
    counts: int | None = None
    encodes: bool = True
    decodes: bool = True
    whole: Job | None = None


@dataclass(frozen=True, kw_only=True)
class Job(Request):
    """A request with everything decided for one model. Only a job is planned and run; no field is None but
    the negative prompt; eta and zero_snr, which then are as the scheduler and the model have them;
    step_cache, which then is the plan's; and what of the seeds, of layers that are skipped, and of a second
    pass, is not asked for. The scheduler's name has its schedule.

    `model` is the model that it was resolved for; `spec` is that with the adapters, and with the networks of
    the conditions.
    """

    width: int = dataclasses.field()
    height: int = dataclasses.field()
    num_inference_steps: int = dataclasses.field()
    guidance_scale: float = dataclasses.field()
    seed: int = dataclasses.field()
    scheduler: str = dataclasses.field()
    model: ModelSpec = dataclasses.field(compare=False, repr=False)
    spec: ModelSpec = dataclasses.field(compare=False, repr=False)
    prompting: Prompting = dataclasses.field(compare=False, repr=False)
    share: Share = dataclasses.field(default_factory=Share, compare=False, repr=False)
    pictures: tuple[Job, ...] = dataclasses.field(default=(), compare=False, repr=False)
    """The job of each picture, where these differ in their prompts: see `together`."""

    @property
    def whole(self) -> Job:
        """What is asked, of which this may be one pass."""
        return self.share.whole or self

    @property
    def request(self) -> Request:
        """What would be asked to have just this again, of the same model."""
        return Request(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Request)})

    @property
    def prompted_pictures(self) -> tuple[Job, ...]:
        """A job for each picture, with its words."""
        return self.pictures or (self,) * self.num_images

    @property
    def is_steady(self) -> bool:
        """Whether each picture is guided by one text in all steps, beside the negative one."""
        return all(one.prompting.is_steady for one in self.prompted_pictures)

    @property
    def words(self) -> tuple[Any, ...]:
        """The same for jobs that are guided alike by their texts."""
        return self.negative_prompt is None, self.prompting.said

    @property
    def text_encodings(self) -> int:
        """Calls of each text encoder: what pictures have in common is encoded once."""
        words = {job.words: job.prompting.encodings for job in self.pictures or (self,)}
        return sum(words.values())

    @property
    def branches(self) -> int:
        """Predictions a step. Classifier-free guidance takes two, and one more for each AND, each with texts
        of its own: asked for above one, as in diffusers, but not of models distilled for it. Those of
        `scales` come last, with the texts of the first."""
        return len(self.prompting.lines) + len(self.scales)

    @property
    def scales(self) -> tuple[float, ...]:
        """Of guidance by what conditions ask, where there is guidance at all."""
        if len(self.prompting.lines) == 1:
            return ()
        return tuple(scale for condition in self.conditions for scale in condition.scales())

    @property
    def prompted(self) -> range:
        """Of the branches, those with the prompt's texts: they run alone where guidance does not act."""
        lines = len(self.prompting.lines)
        return range(min(1, lines - 1), lines)

    @property
    def skipped(self) -> int:
        """Of the steps, how many are left out at the beginning: by its conditions, or as another pass takes
        them."""
        if self.share.begin is not None:
            return self.share.begin
        return max((condition.skipped(self.num_inference_steps) for condition in self.conditions), default=0)

    @functools.cached_property
    def skipped_layers(self) -> tuple[int, ...]:
        """Numbers, from 0, of the denoiser's layers that a call more does without."""
        return layers_of(self.skip_guidance_layers)

    @functools.cached_property
    def skipping(self) -> frozenset[int]:
        """The steps, from 1, that take a call more, of the prompt alone: those between the bounds, as
        diffusers counts them, in which guidance acts."""
        before, count = len(self._earlier), len(self._schedule)
        first, last = (
            part * count for part in (self.skip_layer_guidance_start, self.skip_layer_guidance_stop)
        )
        steps = (step for step in self.guided if first < step + before - 1 < last)
        return frozenset(steps if self.skipped_layers else ())

    @property
    def skipping_calls(self) -> float:
        """Of one picture: as many whole calls of the denoiser as those without some of its layers take."""
        if not self.skipping:
            return 0.0
        share = 1 - len(self.skipped_layers) / _layers(self.spec)
        return share * sum(self._calls_by_step[step - 1] for step in self.skipping)

    @property
    def references(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of each picture that the denoiser reads beside its latents."""
        return tuple(size for condition in self.conditions for size in condition.references(self.spec))

    def encodings(self, name: str) -> int:
        """How often its conditions call the encoder of that name."""
        return sum(condition.encodings(name, self) for condition in self.conditions)

    @property
    def calls(self) -> int:
        """How often one picture's denoiser predicts: some schedulers take two predictions a step."""
        return sum(self._calls_by_step)

    @property
    def steps_taken(self) -> int:
        return len(self._calls_by_step)

    @property
    def previews(self) -> int:
        """How many there are, of all pictures."""
        return self.num_images * (self.steps_taken // self.preview_every) if self.preview_every else 0

    @functools.cached_property
    def _calls_by_step(self) -> list[int]:
        """Of the steps that are taken."""
        return self._calls_between(self.skipped, self.share.end)

    def _calls_between(self, begin: int, end: int | None) -> list[int]:
        return schedulers.calls_by_step(self.scheduler, self.spec, self.num_inference_steps, begin, end)

    @functools.cached_property
    def _earlier(self) -> list[int]:
        """The calls of the steps that passes before took, which it goes on from."""
        goes_on = self.share.begin and self.share.counts is None
        return self._calls_between(0, self.share.begin) if goes_on else []

    @functools.cached_property
    def _schedule(self) -> list[int]:
        """The calls of the steps that it takes, with those that passes before took, and those that are left
        to the next."""
        return self._calls_between(self.skipped - len(self._earlier), None)

    @property
    def first_call(self) -> int:
        """The number of its first call in the schedules of its prompt."""
        return sum(self._earlier)

    @functools.cached_property
    def guided(self) -> range:
        """The steps, from 1, in which guidance acts; in others the conditioned half runs alone."""
        before, taken, count = len(self._earlier), self.steps_taken, len(self._schedule)
        first, last = (int(part * count + 0.5) for part in (self.guidance_start, self.guidance_end))
        return range(max(first - before, 0) + 1, min(last - before, taken) + 1)

    def full_steps(self, every: int) -> frozenset[int]:
        """The steps, from 1, that are taken in full where one of `every` is: the first, and others counted
        back from the last but one, which is worth up to 11 dB. A few lie at even distances, worth up to 9.
        Those in which guidance begins or ends are, too, as what is kept is of the same branches."""
        if every not in self._full:  # asked for in each step, and for each of a hundred candidates
            last, guided = self.steps_taken, self.guided
            bounds = (guided.start, guided.stop) if self.branches > 1 else ()
            spaced = {1, *range(last - 1, 0, -every)}
            if 2 < (count := len(spaced)) <= _FEW_FULL:
                spaced = {1 + round(place * (last - 2) / (count - 1)) for place in range(count)}
            self._full[every] = frozenset({*spaced, *bounds}).intersection(range(1, last + 1))
        return self._full[every]

    @functools.cached_property
    def _full(self) -> dict[int, frozenset[int]]:
        return {}

    def full_calls(self, every: int, name: str) -> tuple[int, int]:
        """As `calls_with`, of the calls in steps that are taken in full where one of `every` is."""
        calls = [step for step in self._steps_with(name) if step in self.full_steps(every)]
        return len(calls), sum(step in self.guided for step in calls)

    def calls_with(self, name: str) -> tuple[int, int]:
        """Of one picture's calls of the denoiser, those in which the network called so is called too, and how
        many of these are guided, if any are. All, but where a condition leaves some out."""
        if name not in self._counted:  # asked for each of a hundred candidates
            self._counted[name] = self._count_calls(name)
        return self._counted[name]

    @functools.cached_property
    def _counted(self) -> dict[str, tuple[int, int]]:
        return {}

    def _count_calls(self, name: str) -> tuple[int, int]:
        calls, guided = self._steps_with(name), self.guided
        return len(calls), sum(step in guided for step in calls)

    def _steps_with(self, name: str) -> list[int]:
        """Of each call of the denoiser in which the network is called too, the step."""
        calls = [step for step, count in enumerate(self._calls_by_step, 1) for _ in range(count)]
        for condition in self.conditions:
            if (acting := condition.acting(name, self.scheduled_calls)) is not None:
                here = self.of_schedule(acting)
                calls = calls[here.start : here.stop]
        return calls

    @property
    def scheduled_calls(self) -> int:
        """Its own, those of passes before, and those that are left to the next."""
        return sum(self._schedule)

    def of_schedule(self, acting: range) -> range:
        """Of calls of the whole schedule, those that are its own, from its first. Raises TightfitError if
        none is."""
        first = self.first_call
        here = range(max(acting.start - first, 0), min(acting.stop - first, self.calls))
        if not here:
            raise TightfitError(
                f"a control acts in calls {acting.start + 1} to {acting.stop} of {self.scheduled_calls}, all "
                "of which the refiner takes: let it act earlier, or leave it out"
            )
        return here

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    def notices(self) -> Iterator[str]:
        """What of it changes nothing, and is no mistake."""
        if self.spec.takes_no_guidance and self.guidance_scale != self.spec.default_guidance:
            yield (
                f"{self.spec.name} was distilled for its guidance: "
                f"--guidance-scale {self.guidance_scale:g} changes nothing"
            )
        elif self.negative_prompt and self.guidance_scale <= 1 == self.spec.default_guidance:
            yield (
                f"{self.spec.name} is not guided by default, so the negative prompt changes nothing: "
                "give --guidance-scale above 1"
            )
        if self.skipped_layers and not self.skipping:
            yield (
                f"no step of {self.steps_taken} is between --skip-layer-start "
                f"{self.skip_layer_guidance_start:g} and --skip-layer-end "
                f"{self.skip_layer_guidance_stop:g}: --skip-layers changes nothing"
            )
        encoders, count = self.model.text_encoders, self.clip_skip
        if count > 1 and all(encoder.network.skip(encoder, count) is encoder for encoder in encoders):
            same = f"{self.spec.name} reads texts by the same layers without it"
            yield f"{same}: --clip-skip {count} changes nothing"

    @property
    def tuning(self) -> Tuning:
        """What changes the sampler."""
        return Tuning(self.eta, self.s_churn, self.s_noise, self.zero_snr)

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """Height and width of the pictures that networks of its conditions are called with, where these are
        not its own."""
        return {name: size for one in self.conditions for name, size in one.sides(self).items()}

    @property
    def noise(self) -> Noise:
        """What the first picture begins as."""
        (channels, factor, _), size = self.spec.latents, sides_of("seed_resize", self.seed_resize)
        shape = (1, channels, self.height // factor, self.width // factor)
        resize = (size[1] // factor, size[0] // factor) if size else None
        share, subseed = self.subseed_strength, self.subseed or 0
        return Noise(shape, self.seed, self.noise_source, subseed, share, resize, self.ensd)

    def alone(self, index: int) -> Job:
        """Picture `index` alone. Each has the next seed, or, as A1111 has it, the next of a second noise."""
        if self.pictures:
            return self.pictures[index]
        return dataclasses.replace(self, num_images=1, **numbers_of(self, index))

    def resolve(self, spec: ModelSpec, share: Share | None = None) -> Job:
        return self if spec is self.model and share is None else super().resolve(spec, share)


def together(jobs: Sequence[Job]) -> Job:
    """One job of pictures that have all in common that a plan depends on, each with its own prompt and seed.
    Raises ValueError for others."""
    first, *others = jobs
    if not all(in_common(job) == in_common(first) and job.spec is first.spec for job in others):
        raise ValueError("these pictures are of several plans")
    return first if not others else dataclasses.replace(first, num_images=len(jobs), pictures=tuple(jobs))


def in_common(job: Job) -> tuple[Any, ...]:
    """What pictures of one run have in common, besides the model."""
    own = ("prompt", "seed", "subseed", "negative_prompt")
    fields = tuple(getattr(job, field.name) for field in dataclasses.fields(Request) if field.name not in own)
    return *fields, *words_in_common(job)


def words_in_common(job: Job) -> tuple[Any, ...]:
    """What the words of such pictures have in common: how often and at what length the U-Net is called."""
    return job.branches, job.prompting.lengths, len(job.prompted), job.prompting.plain


def numbers_of(request: Request, index: int) -> dict[str, int]:
    """What picture `index` has in place of the request's: the next seed, or, as A1111 has it, the next of a
    second noise."""
    name = "subseed" if request.subseed_strength else "seed"
    return {name: drawn(getattr(request, name)) + index}


def drawn(seed: int | None) -> int:
    """The seed, or a random one where none is named."""
    return random.SystemRandom().randrange(2**32) if seed is None else seed


_KINDS, _ABOUT = kinds(Request), described(Request)
PLAIN = tuple(
    name for name, kind in _KINDS.items() if kind in (str, int, float, bool) and not _ABOUT[name].untold
)
"""Fields that are numbers, texts or truths, and that a picture may carry."""
_WHOLE = {name: known.bounds for name, known in _ABOUT.items() if known.bounds and _KINDS[name] is int}
_FORGIVING = "scheduler", "hires_scheduler", "schedule"  # which have many spellings
_CHOICES = {name: known.choices for name, known in _ABOUT.items() if known.choices and name not in _FORGIVING}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Request)}
_NUMBERS = {name: known.bounds for name, known in _ABOUT.items() if known.bounds and _KINDS[name] is float}


def _joined(scheduler: str | None) -> str | None:
    """The name as it is spelled here."""
    return scheduler if scheduler is None else joined(*split(scheduler))


def _scheduled(scheduler: str, schedule: str) -> str:
    """A scheduler's name, with another schedule unless that is automatic."""
    sampler, own = split(scheduler)
    return joined(sampler, own if schedule == AUTOMATIC else schedule)


def _wanted(decided: Mapping[str, Any]) -> Wanted:
    prompt, negative = decided["prompt"], decided["negative_prompt"]
    return Wanted(prompt, negative, decided["guidance_scale"] > 1, decided["prompt_syntax"] == "plain")


def _counted_calls(decided: Mapping[str, Any], spec: ModelSpec, share: Share) -> int:
    """What the schedules of a prompt count: steps, or both calls of each where a scheduler takes two, as
    A1111 counts them."""
    steps = share.counts or decided["num_inference_steps"]
    return steps * max(1, round(schedulers.calls(decided["scheduler"], spec, steps) / steps))


def _check_text(name: str, value: object) -> None:
    if value is None and _DEFAULTS[name] is None:
        return
    if not isinstance(value, str):
        raise TightfitError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TightfitError(f"{name} is not valid UTF-8 text") from None


def _whole(name: str, value: Any, least: int, most: int) -> int | None:
    if value is None and name != "num_images":
        return _DEFAULTS[name]
    number = operator.index(value) if isinstance(value, SupportsIndex) else None  # numpy's integers too
    if number is None or isinstance(value, bool) or not least <= number <= most:
        is_seed = name in ("seed", "subseed")
        random_one = f"; leave it out, or give {RANDOM_SEED}, for a random one" if is_seed else ""
        raise TightfitError(
            f"{name} must be a whole number from {least} to {most}, not {value!r}{random_one}"
        )
    return number


def _number(name: str, value: Any, least: int, most: int) -> float | None:
    if value is None:
        return _DEFAULTS[name]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool | str) or not least <= number <= most:
        raise TightfitError(f"{name} must be a number from {least} to {most}, not {value!r}")
    return number


def _check_truth(name: str, value: object) -> None:
    if not isinstance(value, bool | None):
        raise TightfitError(f"{name} must be true or false, not {value!r}")


def _choice(name: str, value: str | None, known: Sequence[str]) -> str:
    word = (value or _DEFAULTS[name]).lower()
    if word not in known:
        close = get_close_matches(word, known, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise TightfitError(f"unknown {name} '{value}'{meant}: choose {', '.join(known)}")
    return word


def sides_of(name: str, text: str | None) -> tuple[int, int] | None:
    """Width and height of "512x768"."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(_SIDES[0] <= side <= _SIDES[1] for side in sides):
        raise TightfitError(f"{name} must be a size such as 512x512, not {text!r}")
    return sides


def _shown(sides: tuple[int, int] | None) -> str | None:
    return f"{sides[0]}x{sides[1]}" if sides else None


def _subseed(request: Request) -> int | None:
    """None without a share. Raises TightfitError for one that would change nothing."""
    if request.subseed_strength:
        return drawn(request.subseed)
    if request.subseed is not None:
        raise TightfitError("subseed changes nothing without a share: give --subseed-strength above 0 too")
    return None


def _check_networks(conditions: Sequence[Condition]) -> None:
    """Raise TightfitError for two conditions that call one network, which is costed for one of them."""
    callers: dict[str, str] = {}
    for condition in conditions:
        kind, names = type(condition).__name__, [network.name for network in condition.networks]
        if shared := next((name for name in names if name in callers), None):
            raise TightfitError(
                f"two conditions, {callers[shared]} and {kind}, call the network {shared}: "
                "make one of them, or leave one out"
            )
        callers |= dict.fromkeys(names, kind)


def _check_channels(spec: ModelSpec, conditions: Sequence[Condition]) -> None:
    """Raise TightfitError for inputs of the denoiser that nothing fills."""
    if sum(condition.tokens(spec) for condition in conditions) != spec.unet.get(TOKENS, 0):
        raise TightfitError("--ip-adapter reads a picture: give one by --ip-image")
    beside = spec.channels_beside
    if beside == sum(condition.channels(spec) for condition in conditions):
        return
    edits = "is a model that edits pictures: give one, and no mask"
    paints = "is an inpainting model: give a picture and a mask to paint in"
    raise TightfitError(f"{spec.name} {edits if beside == spec.latents.channels else paints}")


def _check_passes(request: Request) -> None:
    """Raise TightfitError for options of a second pass that change nothing, or contradict one another."""
    asked = [name for name in _HIRES if getattr(request, name) != _DEFAULTS[name]]
    if asked and not request.is_enlarged:
        raise TightfitError(f"{asked[0]} is of a second pass: give --hires 2 too, or leave it out")
    if request.hires is not None and request.hires_size is not None:
        raise TightfitError("hires and hires_size say both how large the second pass is: give one of them")
    if not request.hires_strength:
        raise TightfitError("hires_strength must be a number above 0, up to 1: 0 paints nothing anew")
    if request.refiner_start != _DEFAULTS["refiner_start"] and request.refiner is None:
        raise TightfitError("refiner_start is of another model that goes on: give --refiner MODEL too")
    if request.is_enlarged and request.refiner is not None:
        raise TightfitError("hires and refiner are both second passes: leave one of them out")


def of_others(fields: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Which fields, as a picture by another model carries them, this one would refuse."""
    names = [] if spec.denoiser.network.skips_layers else [_LAYERS, *SKIPPING]
    names += ["negative_prompt", *_GUIDANCE] if spec.is_distilled else []
    return [name for name in dict.fromkeys(names) if fields.get(name) not in (None, "", _DEFAULTS[name])]


def layers_of(given: str | Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of layers in "7,8,9", or in a list as diffusers takes them, the least first. Raises
    TightfitError for what is none."""
    if given is None:
        return ()
    words = re.split(r"[\s,]+", given.strip(" []")) if isinstance(given, str) else given
    if not all(re.fullmatch(r"\d{1,3}", str(word)) for word in words):
        raise TightfitError(f"{_LAYERS} must be numbers of layers such as 7,8,9, not {shortened(given)}")
    return tuple(sorted({*map(int, words)}))


def _layers(spec: ModelSpec) -> int:
    """Of the denoiser."""
    return sum(spec.denoiser.network.layers(spec.denoiser.config).values())


def _check_skipping(job: Job) -> None:
    """Raise TightfitError for options of guidance by layers that are skipped which cannot be, or change
    nothing."""
    asked = next((name for name in SKIPPING if getattr(job, name) != _DEFAULTS[name]), None)
    if not job.skipped_layers:
        if asked:
            raise TightfitError(f"{asked} changes nothing without layers: give --skip-layers 7,8,9 too")
        return
    if not job.spec.denoiser.network.skips_layers:
        raise TightfitError(f"{job.spec.name} is not guided by its layers: leave --skip-layers out")
    if job.skipped_layers[-1] >= (count := _layers(job.spec)):
        raise TightfitError(
            f"{job.spec.name} has layers 0 to {count - 1}, no {job.skipped_layers[-1]}: "
            "give others by --skip-layers"
        )


def _check_guidance(job: Job) -> None:
    """Raise TightfitError for options of guidance that change nothing."""
    _check_skipping(job)
    if job.guidance_start >= job.guidance_end:
        raise TightfitError(
            f"guidance_start {job.guidance_start:g} must be below guidance_end {job.guidance_end:g}: "
            "for no guidance give --guidance-scale 1"
        )
    if job.negative_prompt and job.spec.is_distilled:
        raise TightfitError(
            f"{job.spec.name} was distilled for its guidance, and takes no negative prompt: leave it out"
        )
    asked = next((name for name in _GUIDANCE if getattr(job, name) != _DEFAULTS[name]), None)
    if asked and job.branches == 1:
        cure = "leave it out" if job.spec.is_distilled else "give --guidance-scale above 1, or leave it out"
        raise TightfitError(f"{asked} changes nothing where a step takes one prediction: {cure}")


def check_sides(sides: Mapping[str, int], factor: int) -> None:
    """Raise TightfitError for the first side, by its name, that a model cannot shrink by `factor`."""
    for name, value in sides.items():
        if value % factor:
            below, above = value // factor * factor, (value // factor + 1) * factor
            near = f"{below} or {above}" if below else str(above)
            raise TightfitError(
                f"{name} {value} is not a multiple of {factor}, by which this model shrinks a picture: "
                f"the nearest are {near}"
            )
