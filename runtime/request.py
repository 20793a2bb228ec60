"""What a person wants: checked once, then total."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from difflib import get_close_matches

from .errors import TightfitError
from .spec import ModelSpec

SCHEDULERS = ("euler", "euler_a", "ddim", "dpmpp_2m_karras", "unipc", "lcm")
_CLASSES = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m_karras",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


@dataclass(frozen=True)
class Request:
    """One text-to-image request, in diffusers' words; None means "as the model likes it" until `resolve` decides.

    Sizes are pixels. Picture i of `num_images` is made from seed + i, so each can be made again alone.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    seed: int | None = None
    scheduler: str | None = None
    num_images: int = 1

    def resolve(self, spec: ModelSpec) -> Request:
        """The same request with every None decided for `spec`; raises TightfitError for what cannot be done."""
        whole = dataclasses.replace(
            self,
            width=spec.native_size if self.width is None else self.width,
            height=spec.native_size if self.height is None else self.height,
            guidance_scale=default_guidance(spec) if self.guidance_scale is None else self.guidance_scale,
            seed=random.SystemRandom().randrange(2**32) if self.seed is None else self.seed,
            scheduler=default_scheduler(spec) if self.scheduler is None else self.scheduler,
        )
        whole._check(spec)
        return whole

    def _check(self, spec: ModelSpec) -> None:
        for name, kind in (("prompt", str), ("negative_prompt", str), ("scheduler", str)):
            if not isinstance(getattr(self, name), kind):
                raise TightfitError(f"{name} must be text, not {type(getattr(self, name)).__name__}")
        if not self.prompt.strip():
            raise TightfitError('the prompt is empty: say what to paint, for example "a red heart"')
        whole_numbers = {"width": 2**16, "height": 2**16, "num_inference_steps": 1000, "num_images": 10_000}
        for name, most in whole_numbers.items():
            if not _between(getattr(self, name), 1, most):
                raise TightfitError(f"{name} must be a whole number from 1 to {most}, not {getattr(self, name)!r}")
        if not _between(self.seed, 0, 2**63 - 1):
            raise TightfitError(
                f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}; leave it out for a random one"
            )
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
            raise TightfitError(f"guidance_scale must be a number of 0 or more, not {scale!r}")
        for name in ("width", "height"):
            if getattr(self, name) % spec.downsampling:
                raise TightfitError(_size_error(name, getattr(self, name), spec.downsampling))
        if self.scheduler not in SCHEDULERS:
            close = get_close_matches(str(self.scheduler).lower(), SCHEDULERS, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise TightfitError(f"unknown scheduler '{self.scheduler}'{meant}: choose {', '.join(SCHEDULERS)}")

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is asked for: above one, as in diffusers."""
        return self.guidance_scale is not None and self.guidance_scale > 1


def _between(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _size_error(name: str, value: int, factor: int) -> str:
    below, above = value // factor * factor, (value // factor + 1) * factor
    near = f"{below} or {above}" if below else str(above)
    return f"{name} {value} is not a multiple of {factor}, by which this model shrinks a picture: the nearest are {near}"


def default_scheduler(spec: ModelSpec) -> str:
    """The model's own where it is one of SCHEDULERS, else DPM++ 2M Karras."""
    return _CLASSES.get(spec.scheduler.get("_class_name", ""), "dpmpp_2m_karras")


def default_guidance(spec: ModelSpec) -> float:
    """diffusers' defaults: 7.5, and 5.0 for SDXL."""
    return 5.0 if spec.family == "sdxl" else 7.5
