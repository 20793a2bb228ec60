"""Editing: a picture that the denoiser sees, and a text that says what to change (Brooks et al. 2023,
"InstructPix2Pix", arXiv 2211.09800)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TightfitError
from ..models.spec import ModelSpec
from .condition import Arrays, Call, Steering
from .image import ENCODER, STRENGTH, ImageToImage, edits, pixels_of

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job


@dataclass(frozen=True)
class Editing(ImageToImage):
    """What a picture to begin with is to a model that edits: it is seen in all steps, which begin with noise.
    `image_guidance_scale` says how much the result is guided towards it."""

    image_guidance_scale: float = 1.5  # diffusers'

    def said(self) -> dict[str, Any]:
        return {"image_guidance_scale": self.image_guidance_scale, "resize": self.resize}

    def a1111(self) -> dict[str, Any]:
        return {"Image CFG scale": f"{self.image_guidance_scale:g}"}

    def channels(self, spec: ModelSpec) -> int:
        return spec.latents.channels if edits(spec) else 0

    def skipped(self, steps: int) -> int:  # noqa: ARG002
        return 0

    def scales(self) -> tuple[float, ...]:
        return () if self.image_guidance_scale == 1 else (self.image_guidance_scale,)

    def check(self, job: Job) -> None:
        if self.strength != STRENGTH:
            raise TightfitError(
                f"strength changes nothing with {job.spec.name}, which edits: leave it out, "
                "or give --image-guidance-scale, by which less changes where it is higher"
            )

    def prepare(self, job: Job, call: Call) -> Steering:
        import numpy as np

        (moments,) = call(ENCODER.name, pixels=pixels_of(self.image, job, self.resize))
        latents, _ = np.split(moments, 2, axis=1)  # as the VAE has them, and none is drawn
        texts = len(job.prompting.lines)
        return Shown(np.concatenate([latents] * texts + [0 * latents] * (job.branches - texts)))


class Shown(Steering):
    """Shows the denoiser a picture's latents beside its own, of each branch."""

    def __init__(self, latents: np.ndarray) -> None:
        self._latents = latents

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:
        import numpy as np

        sample = arrays["sample"]
        beside = self._latents[rows.start : rows.stop].astype(sample.dtype)
        return {**arrays, "sample": np.concatenate([sample, beside], 1)}
