"""Outpainting: a picture on a larger canvas, painted where that goes beyond it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, SupportsIndex

from ..errors import TightfitError
from ..fields import option
from ..models.checks import brief
from ..models.spec import ModelSpec
from .image import MULTIPLE, PANEL
from .input_pictures import Picture, open_picture
from .mask import Inpainting
from .mask import Options as OfMask

if TYPE_CHECKING:
    from PIL import Image

    from ..request import Job

_LENGTH = re.compile(r"[0-9]{1,5}")
_MOST = 4096  # pixels at one side
_MOST_TIMES = 4  # the pixels that a model was trained on: beyond, it repeats things
_BLUR = 0.25  # of the largest margin
_EXAMPLE = "left=128,right=64 or all=64"


class Margins(NamedTuple):
    """Pixels that a picture grows by."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    @classmethod
    def read(cls, given: Any) -> Margins:
        """Of "left=128,right=64" or a mapping; "all" is each that is not named. Raises TightfitError."""
        words: dict[str, Any] = dict(given if isinstance(given, Mapping) else _pairs(given))
        sides: dict[str, Any] = dict.fromkeys(cls._fields, words.get("all", 0))
        sides |= {name: value for name, value in words.items() if name != "all"}
        good = sides.keys() == {*cls._fields} and all(map(_is_length, sides.values()))
        if not good or not any(sides.values()):
            raise TightfitError(
                f"outpaint must be pixels at the left, right, top or bottom, to {_MOST} each, "
                f"such as {_EXAMPLE}, not {brief(given)}"
            )
        return cls(**{name: int(value) for name, value in sides.items()})

    def rounded(self, width: int, height: int) -> Margins:
        """Grown until both sides of the canvas are multiples of what models take: where there is a margin,
        else at the right and the bottom."""
        wide, tall = (
            -(side + first + last) % MULTIPLE
            for side, first, last in ((width, self.left, self.right), (height, self.top, self.bottom))
        )
        wider = {"right": self.right + wide} if self.right or not self.left else {"left": self.left + wide}
        taller = {"bottom": self.bottom + tall} if self.bottom or not self.top else {"top": self.top + tall}
        return self._replace(**wider, **taller)

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._asdict().items() if value)


def _pairs(given: Any) -> Iterator[tuple[str, Any]]:
    for part in str(given).split(","):
        name, _, number = part.strip().lower().partition("=")
        yield name.strip(), int(number) if _LENGTH.fullmatch(number.strip()) else number


def _is_length(value: Any) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and 0 <= int(value) <= _MOST


@dataclass(frozen=True)
class Options(OfMask):
    """What asks for a picture to begin with, for a part of it to be painted, or for more around it."""

    outpaint: str | None = option(None, "More around: left=64 …", "SIDES", panel=PANEL, carried=True)


@dataclass(frozen=True, kw_only=True)
class Outpainting(Inpainting):
    """Paint `margins` around a picture, which stays as it is. `image` is the canvas: that picture with its
    edges drawn out over them. `mask` is white there, so the fade lies in what is new."""

    options: ClassVar = Options

    margins: Margins
    content: str = "fill"

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Any:
        if given.get("outpaint") is None:
            return Inpainting.asked(given)
        if of_mask := next((name for name in ("mask_image", "invert_mask") if given.get(name)), None):
            name = of_mask.replace("_", "-")
            raise TightfitError(
                f"--outpaint and --{name} are two masks: give one, and the other for the picture that is made"
            )
        if given.get("image") is None:
            raise TightfitError("--outpaint is of a picture to begin with: give it by --image")
        whole = open_picture(given["image"])
        margins = Margins.read(given["outpaint"]).rounded(whole.width, whole.height)
        canvas, mask = _canvas(whole, margins)
        content = given.get("mask_content") or cls.content
        inside = Inpainting.asked({**given, "image": canvas, "mask_image": mask, "mask_content": content})
        return cls(
            margins=margins, **{field.name: getattr(inside, field.name) for field in fields(Inpainting)}
        )

    def said(self) -> dict[str, Any]:
        return {**super().said(), "outpaint": str(self.margins)}

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:
        """The canvas's, so that no pixel of the picture changes."""
        return super().size(spec) if self.padding is not None else (self.image.height, self.image.width)

    def filled(self, picture: Image.Image, mask: Image.Image) -> Image.Image:
        """Its edges, drawn out and blurred. Colours from farther away are those of things, not of what is
        behind them."""
        from PIL import Image, ImageFilter

        blurred = picture.filter(ImageFilter.GaussianBlur(_BLUR * max(self.margins)))
        return Image.composite(blurred, picture, mask)

    def check(self, job: Job) -> None:
        size, (height, width) = self.size(job.spec), job.spec.some_size
        if not size:
            return
        if (job.height, job.width) != size:
            raise TightfitError(
                f"--outpaint makes a picture of {size[1]}x{size[0]}, not {job.width}x{job.height}: "
                "leave --width and --height out"
            )
        if size[0] * size[1] > _MOST_TIMES * height * width:
            raise TightfitError(
                f"--outpaint makes a picture of {size[1]}x{size[0]}, more than {_MOST_TIMES} times the "
                f"model's {width}x{height}: give --mask-padding 64, to paint at that size what is new and "
                "so much beside it alone; or begin with a smaller picture"
            )


def _canvas(whole: Picture, margins: Margins) -> tuple[Picture, Picture]:
    """A picture with its edges drawn out over the margins, and a mask that is white there, and where the
    picture is transparent."""
    import numpy as np

    sides = (margins.top, margins.bottom), (margins.left, margins.right)
    canvas = np.pad(whole.pixels, (*sides, (0, 0)), mode="edge")
    inside = np.zeros(whole.pixels.shape[:2], np.uint8) if whole.alpha is None else 255 - whole.alpha
    mask = np.pad(inside, sides, constant_values=255)
    return open_picture(canvas), open_picture(mask)
