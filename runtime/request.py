"""What a person wants: checked once, then total."""

from __future__ import annotations

import dataclasses
import operator
import random
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, SupportsIndex

from .errors import TightfitError
from .fields import described, kinds, option
from .models import schedulers
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
    diffusers does. A seed of -1 is a random one, as None is.
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

    def checked(self) -> Request:
        """The same request with plain Python numbers; raises TightfitError for what no model could do."""
        for name in (name for name, kind in _KINDS.items() if kind is str):
            _check_text(name, getattr(self, name))
        if not self.prompt.strip():
            raise TightfitError('the prompt is empty: say what to paint, for example "a red heart"')
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

    def resolve(self, spec: ModelSpec) -> Request:
        """The same request with everything decided for `spec`; raises TightfitError for what cannot be
        done."""
        request = self.checked()
        height, width = (
            (request.height, request.width) if request.height and request.width else spec.native_size
        )
        whole = dataclasses.replace(
            request,
            width=request.width or width,
            height=request.height or height,
            num_inference_steps=request.num_inference_steps or spec.default_steps,
            guidance_scale=_scale(spec.default_guidance)
            if request.guidance_scale is None
            else request.guidance_scale,
            seed=random.SystemRandom().randrange(2**32) if request.seed is None else request.seed,
            scheduler=request.scheduler or schedulers.default(spec),
        )
        for name in ("width", "height"):
            if getattr(whole, name) % spec.downsampling:
                raise TightfitError(_size_error(name, getattr(whole, name), spec.downsampling))
        return whole


_KINDS, _ABOUT = kinds(Request), described(Request)
_WHOLE = {name: known.bounds for name, known in _ABOUT.items() if known.bounds and _KINDS[name] is int}


def _check_text(name: str, value: object) -> None:
    if value is None and name != "prompt":
        return
    if not isinstance(value, str):
        raise TightfitError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TightfitError(f"{name} is not valid UTF-8 text") from None


def _whole(name: str, value: Any, least: int, most: int) -> int | None:
    if value is None and name != "num_images":
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


def guided(spec: ModelSpec, request: Request) -> bool:
    """Classifier-free guidance: asked for above one, as in diffusers, but not of models distilled for it."""
    return (request.guidance_scale or 0) > 1 and not spec.guidance_width
