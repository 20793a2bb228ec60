"""A part of a picture that is painted: its mask, what lies under that, and the way out and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageFilter

from .input_pictures import Picture

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job
    from .mask import Inpainting


def np_of(image: Image.Image) -> np.ndarray:
    import numpy as np

    return np.asarray(image)


def white(mask: Picture) -> Image.Image:
    """255 where to paint, 0 elsewhere."""
    return sharp(mask.image.convert("L"))


def sharp(grey: Image.Image) -> Image.Image:
    return grey.point([0] * 128 + [255] * 128)


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The colours around the mask drawn over it, by blurs of what is not masked, from wide to narrow."""
    known, out = image.convert("RGBA"), Image.new("RGBA", image.size)
    known.putalpha(ImageChops.invert(mask))
    premultiplied = Image.new("RGBa", image.size)
    premultiplied.paste(known.convert("RGBa"))
    for radius in (256, 64, 16, 4, 1):
        blurred = premultiplied.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        out.alpha_composite(blurred)
    return Image.composite(out.convert("RGB"), image, mask)


class Place:
    """Which part of the picture is painted, and the way there and back."""

    def __init__(self, condition: Inpainting, job: Job) -> None:
        self.size, image, how = (job.width, job.height), condition.image, condition.resize
        self.box = (0, 0, image.width, image.height)
        self._how = how
        if condition.padding is not None:
            self.box, self._how = _around(white(condition.mask), condition.padding, self.size), "resize"

    def inside(self, image: Image.Image) -> Image.Image:
        """That part at the size that is painted."""
        if self._how == "resize":
            return image.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)
        fitted = Picture("", np_of(image.convert("RGB"))).fitted(*self.size, self._how)
        return fitted.convert(image.mode)

    def outside(
        self, painted: Image.Image, original: Image.Image, mask: Image.Image, blur: int
    ) -> Image.Image:
        """The picture with what was painted set into it."""
        left, top, right, bottom = self.box
        whole = original.copy()
        if painted.size != (right - left, bottom - top):
            painted = painted.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole.paste(painted, (left, top))
        return Image.composite(whole, original, faded(mask, blur))


def faded(mask: Image.Image, blur: int) -> Image.Image:
    """0 outside the mask, and rising to 255 over its edge."""
    inner = _eroded(mask, blur) if blur else mask
    if not inner.getbbox():
        return mask
    return ImageChops.multiply(inner.filter(ImageFilter.GaussianBlur(blur / 2)), mask)


def _eroded(mask: Image.Image, radius: int) -> Image.Image:
    """White where a square of so many pixels to each side is white, as far as the picture goes: by sums, as
    Pillow's MinFilter takes the square of the radius for each pixel."""
    import numpy as np

    black = np.pad((np.asarray(mask) < 255).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ends = np.array([[-radius], [radius + 1]])
    (top, bottom), (left, right) = (
        (np.arange(side) + ends).clip(0, side) for side in (mask.height, mask.width)
    )
    sums = black[bottom][:, right] - black[top][:, right] - black[bottom][:, left] + black[top][:, left]
    return Image.fromarray((sums == 0) * np.uint8(255))


def _around(mask: Image.Image, padding: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The masked part with so many pixels around it, in the proportions of `size` as far as the picture
    goes."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    box = [left - padding, top - padding, right + padding, bottom + padding]
    wide, tall = max(box[2] - box[0], 1), max(box[3] - box[1], 1)
    width = max(wide, round(tall * size[0] / size[1]))
    height = max(tall, round(wide * size[1] / size[0]))
    sides = (_span(box[0], wide, width, mask.width), _span(box[1], tall, height, mask.height))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def _span(start: int, length: int, wanted: int, most: int) -> tuple[int, int]:
    """A span of `wanted` around that of `length` from `start`, moved and cut to lie in 0..`most`."""
    wanted = min(wanted, most)
    begin = min(max(start - (wanted - length) // 2, 0), most - wanted)
    return begin, begin + wanted
