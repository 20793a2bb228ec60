"""Image to image: a picture that the painting begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TightfitError
from ..fields import option, plain
from ..models.families.networks import ENCODER
from ..models.spec import Component, ModelSpec
from .condition import Call, Condition, Draw, Steering
from .input_pictures import RESIZES, Picture

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job

STRENGTH = 0.8  # diffusers'
_MOST_SCALE = 100
PANEL = "Picture"
MULTIPLE = 8  # of pixels, as A1111's sliders have it


@dataclass(frozen=True)
class Options:
    """What asks for a picture to begin with."""

    image: str | None = option(None, "Begin with this one.", "FILE", panel=PANEL)
    strength: float | None = option(
        None, "Share to change, to 1.", "X", bounds=(0, 1), panel=PANEL, carried=True
    )
    resize: str | None = option(
        None, f"{', '.join(RESIZES)}.", "HOW", choices=RESIZES, panel=PANEL, carried=True
    )
    image_guidance_scale: float | None = option(
        None, "To edit by: 1.5.", "X", bounds=(0, _MOST_SCALE), panel=PANEL, carried=True
    )


@dataclass(frozen=True)
class ImageToImage(Condition):
    """Paint over `image`: the last `strength` of the steps, begun with the picture under their noise. Of
    another size it is fitted as `resize` says ("resize", "crop", "fill"). 1 keeps nothing of it."""

    image: Picture
    strength: float = STRENGTH
    resize: str = "resize"
    image_guidance_scale: float | None = None  # of models that edit

    networks: ClassVar = (ENCODER,)

    def said(self) -> dict[str, Any]:
        return {"strength": self.strength, "resize": self.resize}

    def a1111(self) -> dict[str, Any]:
        return {"Denoising strength": f"{self.strength:g}"}

    def __post_init__(self) -> None:
        for name in ("strength", "image_guidance_scale"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not isinstance(self.strength, int | float) or not 0 < self.strength <= 1:
            raise TightfitError(f"strength must be a number above 0, up to 1, not {self.strength!r}")
        if self.resize not in RESIZES:
            raise TightfitError(f"resize must be one of {', '.join(RESIZES)}, not {self.resize!r}")

        scale = self.image_guidance_scale
        if scale is not None and not (isinstance(scale, int | float) and 0 <= scale <= _MOST_SCALE):
            raise TightfitError(
                f"image_guidance_scale must be a number from 0 to {_MOST_SCALE}, not {scale!r}"
            )

    def resolved(self, spec: ModelSpec) -> Condition:
        """What models that edit make of it."""
        from .edit import Editing

        if not edits(spec):
            return self
        scale = (
            {} if self.image_guidance_scale is None else {"image_guidance_scale": self.image_guidance_scale}
        )
        return Editing(self.image, self.strength, self.resize, **scale)

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        if self.image_guidance_scale is not None and not edits(spec):
            raise TightfitError(
                f"{spec.name} does not edit pictures, as instruct-pix2pix does: "
                "leave --image-guidance-scale out"
            )
        return (spec.on_demand(ENCODER),)

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:
        return size_of(self.image, spec)

    def skipped(self, steps: int) -> int:
        taken = min(int(steps * self.strength), steps)  # as diffusers rounds it
        if not taken:
            raise TightfitError(
                f"strength {self.strength:g} of {steps} steps leaves none to take: "
                f"ask for {-(-100 // steps) / 100:g} or more, or for more steps"
            )
        return steps - taken

    def prepare(self, job: Job, call: Call) -> Steering:
        pixels = pixels_of(self.image, job, self.resize)
        return Begun(Encoded(job.spec, *call(ENCODER.name, pixels=pixels)))


def size_of(picture: Picture, spec: ModelSpec) -> tuple[int, int]:
    """Height and width: the picture's, or in its proportions as many pixels as the model was trained on, if
    it has more."""
    height, width = spec.native_size
    factor = min(1.0, (height * width / (picture.height * picture.width)) ** 0.5)
    step = max(spec.latents.multiple, MULTIPLE)
    tall, wide = (max(step, int(side * factor) // step * step) for side in (picture.height, picture.width))
    return tall, wide


def edits(spec: ModelSpec) -> bool:
    """Whether the denoiser reads a picture's latents beside its own."""
    return spec.channels_beside == spec.latents.channels


def pixels_of(picture: Picture, job: Job, how: str, mode: str = "LANCZOS") -> np.ndarray:
    """(1, 3, height, width) in -1..1."""
    import numpy as np

    values = np.asarray(picture.fitted(job.width, job.height, how, mode), np.float32) / 255
    return (2 * values - 1).transpose(2, 0, 1)[None]


class Encoded:
    """What the VAE's encoder answers for a picture: a distribution of latents, sampled anew for each picture
    that is painted; or the latents themselves."""

    def __init__(self, spec: ModelSpec, moments: np.ndarray) -> None:
        self._spec, self._moments = spec, moments

    def sample(self, draw: Draw) -> np.ndarray:
        """(1, channels, h, w), as the denoiser has latents."""
        import torch

        if self._moments.shape[1] == self._spec.latents.channels:
            return narrowed(self._spec, self._moments)
        mean, variance = torch.from_numpy(self._moments).chunk(2, dim=1)
        deviation = torch.exp(0.5 * variance.clamp(-30, 20))
        return narrowed(self._spec, (mean + deviation * torch.from_numpy(draw(mean.shape))).numpy())


def narrowed(spec: ModelSpec, latents: np.ndarray) -> np.ndarray:
    """Latents that the VAE's encoder answers as the denoiser takes them. A tiny decoder, whose numbers are
    others, has none of its own: beside it the model's encodes."""
    import numpy as np

    decoder = replace(spec.decoder, config=spec.on_demand(ENCODER).config)
    whole = replace(spec, components={**spec.components, decoder.name: decoder})
    deviation, scale, mean = whole.latent_affine
    shift, factor = (np.array(part, np.float32)[:, None, None] for part in (mean, deviation))
    return (latents - shift) * np.float32(scale) / factor


class Begun(Steering):
    """Begins with a picture under the noise of the first step that is taken."""

    def __init__(self, encoded: Encoded | None) -> None:
        self._encoded = encoded
        self.latents: Any = None

    def draw(self, draw: Draw) -> None:
        self.latents = self._encoded.sample(draw) if self._encoded else None

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:  # noqa: ARG002
        return noised(scheduler, self.latents, noise, call)


def noised(scheduler: Any, latents: np.ndarray, noise: np.ndarray, call: int) -> np.ndarray:
    """Latents under the noise of one of the scheduler's calls."""
    import torch

    timestep = scheduler.timesteps[call : call + 1]
    of_latents, of_noise = torch.from_numpy(latents), torch.from_numpy(noise)
    if hasattr(scheduler, "scale_noise"):  # of those for flow matching alone
        return scheduler.scale_noise(of_latents, timestep, of_noise).numpy()
    return scheduler.add_noise(of_latents, of_noise, timestep).numpy()
