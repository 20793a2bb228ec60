"""Inpainting: a picture that is painted anew where a mask is white, and stays as it is elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TightfitError
from ..fields import option, plain
from ..models.spec import ModelSpec
from .condition import Arrays, Call, Condition, Draw, Steering
from .image import ENCODER, PANEL, Begun, Encoded, ImageToImage, noised, pixels_of
from .image import Options as OfImage
from .input_pictures import Picture, open_picture

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..request import Job
    from .pasting import Place

_MOST = 1024  # pixels of an edge, or around a mask
CONTENTS = ("original", "fill", "noise", "zeros")
_A1111 = {"fill": "fill", "noise": "latent noise", "zeros": "latent nothing"}


@dataclass(frozen=True)
class Options(OfImage):
    """What asks for a picture to begin with, and for a part of it to be painted."""

    mask_image: str | None = option(
        None, "White where to paint.", "FILE", options=("--mask-image", "--mask"), panel=PANEL
    )
    mask_blur: int | None = option(
        None, "Pixels it fades; 4.", "N", bounds=(0, _MOST), panel=PANEL, carried=True
    )
    mask_padding: int | None = option(
        None, "That around it alone.", "N", bounds=(0, _MOST), panel=PANEL, carried=True
    )
    mask_content: str | None = option(
        None, f"{', '.join(CONTENTS)}.", "HOW", choices=CONTENTS, panel=PANEL, carried=True
    )
    invert_mask: bool | None = option(None, "Paint what is black.", panel=PANEL)


@dataclass(frozen=True, kw_only=True)
class Inpainting(ImageToImage):
    """Paint where `mask` is white (half or more), and leave all other pixels as they are.

    blur: pixels over which the edge fades, inside the mask. padding: if given, only the masked part and so
    many pixels around it are painted, at full size, and set back into the picture. content: what is under the
    mask to begin with: the picture ("original"), the colours around it ("fill"), or latents of noise or
    zeros.
    """

    options: ClassVar = Options

    mask: Picture
    strength: float = 1.0
    blur: int = 4
    padding: int | None = None
    content: str = "original"

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> ImageToImage | None:
        typed = {name: value for name, value in given.items() if name in _FIELDS and value is not None}
        if "image" not in typed:
            if typed:
                name = next(iter(typed)).replace("_", "-")
                raise TightfitError(f"--{name} is of a picture to begin with: give it by --image")
            return None
        picture, of_mask = open_picture(typed.pop("image")), [name for name in typed if "mask" in name]
        if not of_mask:
            return ImageToImage(picture, **typed)
        mask = _mask(picture, typed.pop("mask_image", None), of_mask[0])
        if typed.pop("invert_mask", False):
            mask = open_picture(255 - mask.pixels)
        return Inpainting(picture, mask=mask, **{name.removeprefix("mask_"): typed[name] for name in typed})

    def said(self) -> dict[str, Any]:
        own = {"mask_blur": self.blur, "mask_padding": self.padding, "mask_content": self.content}
        return {**super().said(), **own}

    def a1111(self) -> dict[str, Any]:
        said = {**super().a1111(), "Mask blur": self.blur}
        if self.padding is not None:
            said |= {"Inpaint area": "Only masked", "Masked area padding": self.padding}
        return said | ({"Masked content": _A1111[self.content]} if self.content != "original" else {})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blur", "padding"):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None and not (isinstance(value, int) and 0 <= value <= _MOST):
                raise TightfitError(f"mask_{name} must be a whole number from 0 to {_MOST}, not {value!r}")
        if self.content not in CONTENTS:
            raise TightfitError(f"content must be one of {', '.join(CONTENTS)}, not {self.content!r}")
        if (self.mask.width, self.mask.height) != (self.image.width, self.image.height):
            raise TightfitError(
                f"the mask has {self.mask.width}x{self.mask.height} pixels and the picture "
                f"{self.image.width}x{self.image.height}: make both of one size"
            )
        from . import pasting

        if not pasting.white(self.mask).getbbox():
            raise TightfitError(
                "the mask is black, so there is nothing to paint: make white what is to change"
            )

    def resolved(self, spec: ModelSpec) -> Condition:  # noqa: ARG002
        return self

    def channels(self, spec: ModelSpec) -> int:
        """Inpainting models read the mask, and the latents of what is not masked."""
        own = spec.latents.channels + 1
        return own if spec.channels_beside == own else 0

    def encodings(self, name: str, job: Job) -> int:
        return super().encodings(name, job) * sum(self._encoded(job.spec))

    def _encoded(self, spec: ModelSpec) -> tuple[bool, bool]:
        """Whether the picture is encoded as what latents begin with, and as what the denoiser is shown."""
        shown = bool(self.channels(spec))
        return not shown or self.strength < 1, shown

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:
        return super().size(spec) if self.padding is None else spec.native_size

    def filled(self, picture: Image.Image, mask: Image.Image) -> Image.Image:
        """The colours around the mask drawn over it."""
        from . import pasting

        return pasting.filled(picture, mask)

    def prepare(self, job: Job, call: Call) -> Steering:
        from . import pasting

        place = pasting.Place(self, job)
        picture, mask = place.inside(self.image.image), pasting.sharp(place.inside(pasting.white(self.mask)))
        begun = self.filled(picture, mask) if self.content == "fill" else picture
        whole, rest = (Picture("", pasting.np_of(image)) for image in (begun, picture))
        begins, shows = self._encoded(job.spec)
        parts = [
            pixels_of(whole, job, "resize") if begins else None,
            pixels_of(rest, job, "resize") * (pasting.np_of(mask) < 128) if shows else None,
        ]
        encoded = [
            None if part is None else Encoded(job.spec, *call(ENCODER.name, pixels=part)) for part in parts
        ]
        return Masked(self, job, place, encoded, pasting.np_of(mask) >= 128)


_FIELDS = [field.name for field in dataclasses.fields(Options)]


def _mask(picture: Picture, white: Any, option: str) -> Picture:
    """The one that is given, or white where the picture is transparent."""
    if white is not None:
        return open_picture(white)
    if picture.alpha is None:
        name = option.replace("_", "-")
        raise TightfitError(f"--{name} is of a mask: give that by --mask, or a picture with transparency")
    return open_picture(255 - picture.alpha)


class Masked(Begun):
    """Keeps the latents of what is not masked, under the noise of each step; or shows them to the denoiser,
    where that has inputs for them."""

    def __init__(
        self,
        condition: Inpainting,
        job: Job,
        place: Place,
        encoded: Sequence[Encoded | None],
        mask: np.ndarray,
    ) -> None:
        super().__init__(encoded[0])
        self._condition, self._place, self._rest = condition, place, encoded[1]
        self._inputs = bool(condition.channels(job.spec))
        factor = job.spec.downsampling
        self._mask = mask[None, None, ::factor, ::factor].astype("float32")  # nearest, as diffusers
        self._pixels = mask
        self._draw: Any = None
        self._scheduler: Any = None

    def draw(self, draw: Draw) -> None:
        self._draw = draw
        super().draw(draw)

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:
        self._scheduler, self._noise = scheduler, noise
        begun = self._under_mask(self.latents) if self.latents is not None else None
        if begun is not None and self._condition.strength < 1:
            latents = noised(scheduler, begun, noise, call)
        # Drawn in any case, as diffusers does.
        self._shown = self._rest.sample(self._draw) if self._rest else self._draw(noise.shape)
        return latents

    def _under_mask(self, latents: np.ndarray) -> np.ndarray:
        other = {"noise": self._noise, "zeros": 0 * self._noise}.get(self._condition.content)
        return latents if other is None else latents * (1 - self._mask) + other * self._mask

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:  # noqa: ARG002
        if not self._inputs:
            return arrays
        import numpy as np

        sample = arrays["sample"]
        beside = np.concatenate([self._mask, self._shown], 1).repeat(len(sample), 0).astype(sample.dtype)
        return {**arrays, "sample": np.concatenate([sample, beside], 1)}

    def after(self, latents: np.ndarray, call: int) -> np.ndarray:
        if self._inputs:
            return latents
        kept = self.latents
        if call + 1 < len(self._scheduler.timesteps):
            kept = noised(self._scheduler, kept, self._noise, call + 1)
        return (1 - self._mask) * kept + self._mask * latents

    def finish(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        from . import pasting

        condition = self._condition
        if condition.padding is not None:
            return self._place.outside(
                image, condition.image.image, pasting.white(condition.mask), condition.blur
            )
        original = self._place.inside(condition.image.image)
        mask = Image.fromarray((self._pixels * 255).astype("uint8"))
        return Image.composite(image, original, pasting.faded(mask, condition.blur))
