"""What a person wants, and the job that it becomes for one model: checked once, then total."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, SupportsIndex

from .adapters import Adapter, adapted, check
from .adapters.prompt import from_words
from .conditions import Condition
from .errors import TightfitError
from .fields import described, kinds, option
from .models import schedulers
from .models.clip_skip import skipping
from .models.prompts import EMPHASES, SYNTAXES, Prompting, Wanted, prompting
from .models.schedulers import SCHEDULERS
from .models.spec import ModelSpec

RANDOM_SEED = -1  # as A1111 has it: the seed that is drawn is told, and written into the picture
_SIDES = 1, 2**16
_NAMES = f"{', '.join(sorted(SCHEDULERS, key=len))}."


@dataclass(frozen=True)
class Request:
    """One text-to-image request, in diffusers' words; None means "as the model likes it" until `resolve`
    decides.

    Sizes are pixels. Picture i of `num_images` is made from seed + i, so each can be made again alone. A
    negative prompt of None is no negative prompt, which SDXL treats differently from an empty one, as
    diffusers does. A seed of -1 is a random one, as None is. `adapters` change the model for this request;
    `conditions` are what it asks besides its text.
    """

    prompt: str
    negative_prompt: str | None = option(None, "What not to paint.", "TEXT")
    width: int | None = option(None, "Pixels; default: model's.", "N", bounds=_SIDES, costs=True)
    height: int | None = option(None, "Pixels; default: model's.", "N", bounds=_SIDES, costs=True)
    num_inference_steps: int | None = option(
        None,
        "Default 20; 4 for LCM.",
        "N",
        options=("--num-inference-steps", "--steps"),
        bounds=(1, 1000),
        costs=True,
    )
    guidance_scale: float | None = option(None, "Default: model's.", "X", bounds=(0, 1000), costs=True)
    seed: int | None = option(None, "Default, and -1: random.", "N", bounds=(0, 2**63 - 1))
    scheduler: str | None = option(None, _NAMES, "NAME", choices=tuple(SCHEDULERS), costs=True)
    num_images: int = option(1, "From seed, seed + 1 …", "N", bounds=(1, 10_000), costs=True)
    prompt_syntax: str = option(
        "a1111", "a1111, or plain: as words.", "NAME", choices=SYNTAXES, costs=True, panel="Words"
    )
    clip_skip: int = option(1, "As A1111 counts: 1 is none.", "N", bounds=(1, 64), costs=True, panel="Words")
    emphasis: str = option(
        "original", "Of (a:1.2): original, no-norm, ignore.", "NAME", choices=EMPHASES, panel="Words"
    )
    adapters: tuple[Adapter, ...] = ()
    conditions: tuple[Condition, ...] = ()

    def checked(self) -> Request:
        """The same request with plain Python numbers; raises TightfitError for what no model could do."""
        if self.prompt is None:  # as the command line leaves it
            raise TightfitError(
                'no prompt was given: say what to paint, for example "a red heart"; "" is an empty prompt'
            )
        for name in (name for name, kind in _KINDS.items() if kind is str):
            _check_text(name, getattr(self, name))
        for name, words in _WORDS.items():
            _check_word(name, getattr(self, name), words)
        check(self.adapters)
        given = {name: getattr(self, name) for name in _WHOLE}
        if isinstance(self.seed, SupportsIndex) and operator.index(self.seed) == RANDOM_SEED:
            given["seed"] = None
        whole = {name: _whole(name, given[name], *limits) for name, limits in _WHOLE.items()}
        if (whole["seed"] or 0) + (whole["num_images"] or 1) > _WHOLE["seed"][1] + 1:
            raise TightfitError(
                f"seed {whole['seed']} leaves no seeds for {whole['num_images']} pictures: "
                "choose a smaller one"
            )
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            close = get_close_matches(self.scheduler.lower(), SCHEDULERS, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            known = ", ".join(SCHEDULERS)
            raise TightfitError(f"unknown scheduler '{self.scheduler}'{meant}: choose {known}")
        return dataclasses.replace(self, guidance_scale=_scale(self.guidance_scale), **whole)

    def to_json(self) -> dict[str, Any]:
        """Its numbers and texts by field, and the names of its adapters and conditions, if it has any."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in PLAIN}
        fields |= self.adapters_json()
        if self.conditions:
            fields["conditions"] = [type(condition).__name__ for condition in self.conditions]
        return fields

    def adapters_json(self) -> dict[str, dict[str, list[str]]]:
        """The names of its adapters by their options, if it has any."""
        options = dict.fromkeys(adapter.option for adapter in self.adapters)
        named = {
            option: [adapter.name for adapter in self.adapters if adapter.option == option]
            for option in options
        }
        return {"adapters": named} if named else {}

    def resolve(self, spec: ModelSpec) -> Job:
        """This request with everything decided for `spec`; raises TightfitError for what cannot be done."""
        request = self.checked()
        prompt, named = from_words(request.prompt)
        request = dataclasses.replace(request, prompt=prompt, adapters=(*request.adapters, *named))
        height, width = (
            (request.height, request.width) if request.height and request.width else spec.native_size
        )
        given = {field.name: getattr(request, field.name) for field in dataclasses.fields(Request)}
        decided = {
            "width": request.width or width,
            "height": request.height or height,
            "num_inference_steps": request.num_inference_steps or spec.default_steps,
            "guidance_scale": _scale(spec.default_guidance)
            if request.guidance_scale is None
            else request.guidance_scale,
            "seed": drawn(request.seed),
            "scheduler": request.scheduler or schedulers.default(spec),
        }
        for name in ("width", "height"):
            if decided[name] % spec.downsampling:
                raise TightfitError(_size_error(name, decided[name], spec.downsampling))
        changed = skipping(adapted(spec, request.adapters), request.clip_skip)
        parts = [part for condition in request.conditions for part in condition.components(changed)]
        given |= decided
        return Job(
            **given,
            model=spec,
            spec=changed.with_components(parts),
            prompting=prompting(changed, _wanted(given), _counted_calls(given, spec)),
        )


@dataclass(frozen=True, kw_only=True)
class Job(Request):
    """A request with everything decided for one model. Only a job is planned and run; no field is None but
    the negative prompt.

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

    @property
    def request(self) -> Request:
        """What would be asked to have just this again, of the same model."""
        return Request(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Request)})

    @property
    def branches(self) -> int:
        """Predictions a step, each with texts of its own. Classifier-free guidance takes two, and one more
        for each AND: asked for above one, as in diffusers, but not of models distilled for it."""
        return len(self.prompting.lines)

    @property
    def calls(self) -> int:
        """How often one picture's denoiser predicts: some schedulers take two predictions a step."""
        return schedulers.calls(self.scheduler, self.spec, self.num_inference_steps)

    def resolve(self, spec: ModelSpec) -> Job:
        return self if spec is self.model else super().resolve(spec)


def drawn(seed: int | None) -> int:
    """The seed, or a random one where none is named."""
    return random.SystemRandom().randrange(2**32) if seed is None else seed


_KINDS, _ABOUT = kinds(Request), described(Request)
_FIELDS = {field.name: field for field in dataclasses.fields(Request)}
PLAIN = tuple(name for name, kind in _KINDS.items() if kind in (str, int, float))
"""Fields that are numbers or texts."""
_WHOLE = {name: known.bounds for name, known in _ABOUT.items() if known.bounds and _KINDS[name] is int}


_WORDS = {name: known.choices for name, known in _ABOUT.items() if known.choices and name != "scheduler"}


def _wanted(decided: Mapping[str, Any]) -> Wanted:
    prompt, negative = decided["prompt"], decided["negative_prompt"]
    return Wanted(prompt, negative, decided["guidance_scale"] > 1, decided["prompt_syntax"] == "plain")


def _counted_calls(decided: Mapping[str, Any], spec: ModelSpec) -> int:
    """What the schedules of a prompt count: steps, or both calls of each where a scheduler takes two, as
    A1111 counts them."""
    steps = decided["num_inference_steps"]
    return steps * max(1, round(schedulers.calls(decided["scheduler"], spec, steps) / steps))


def _check_word(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        close = get_close_matches(value.lower(), words, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise TightfitError(f"unknown {name} '{value}'{meant}: choose {', '.join(words)}")


def _check_text(name: str, value: object) -> None:
    if value is None and _FIELDS[name].default is None:
        return
    if not isinstance(value, str):
        raise TightfitError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TightfitError(f"{name} is not valid UTF-8 text") from None


def _whole(name: str, value: Any, least: int, most: int) -> int | None:
    if value is None and _FIELDS[name].default is None:
        return None
    number = operator.index(value) if isinstance(value, SupportsIndex) else None  # numpy's integers too
    if number is None or isinstance(value, bool) or not least <= number <= most:
        random_one = f"; leave it out, or give {RANDOM_SEED}, for a random one" if name == "seed" else ""
        raise TightfitError(
            f"{name} must be a whole number from {least} to {most}, not {value!r}{random_one}"
        )
    return number


def _scale(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    least, most = _ABOUT["guidance_scale"].bounds or (0, 0)
    if isinstance(value, bool | str) or not least <= number <= most:
        raise TightfitError(f"guidance_scale must be a number from {least} to {most}, not {value!r}")
    return number


def _size_error(name: str, value: int, factor: int) -> str:
    below, above = value // factor * factor, (value // factor + 1) * factor
    near = f"{below} or {above}" if below else str(above)
    return (
        f"{name} {value} is not a multiple of {factor}, by which this model shrinks a picture: "
        f"the nearest are {near}"
    )
