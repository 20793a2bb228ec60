"""Pictures that people give: opened with care, turned upright, without transparency, fitted to a size."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import TightfitError, explained
from ..files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

RESIZES = ("resize", "crop", "fill")
_MOST_BYTES = 2**30
_AGAIN = "save it again as a PNG, or name another"
_MOST_PIXELS = 2**26  # 8192 x 8192
_MOST_SIDE = 2**15
# Of Pillow's, those whose decoders are Pillow's own or well-kept libraries; EPS would run Ghostscript.
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "TGA",
    "PPM",
    "QOI",
    "ICO",
)


@dataclass(frozen=True)
class Picture:
    """`pixels` are (height, width, 3) uint8, and `alpha` (height, width) uint8 where the picture had any. Two
    of the same content are equal. `source` is where it came from."""

    digest: str
    pixels: np.ndarray = field(compare=False, repr=False)
    alpha: np.ndarray | None = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False)

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def image(self) -> Image.Image:
        """Pillow's, RGB."""
        from PIL import Image

        return Image.fromarray(self.pixels)

    def fitted(self, width: int, height: int, how: str = "resize", mode: str = "LANCZOS") -> Image.Image:
        """The picture at that size: stretched ("resize"), cut at its longer sides ("crop"), or whole, with
        its edges drawn out over what is left ("fill"). `mode` is Pillow's filter; Lanczos as in diffusers
        and A1111."""
        from PIL import Image

        resampling = Image.Resampling[mode]
        if (self.width, self.height) == (width, height):
            return self.image
        if how == "resize":
            return self.image.resize((width, height), resampling)
        ratios = width / self.width, height / self.height
        factor = max(ratios) if how == "crop" else min(ratios)
        sides = max(1, round(self.width * factor)), max(1, round(self.height * factor))
        scaled, place = self.image.resize(sides, resampling), _middle((width, height), sides)
        if how == "fill":
            return _drawn_out(scaled, place, (width, height))
        left, top = (-side for side in place)
        return scaled.crop((left, top, left + width, top + height))


def _middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def _drawn_out(image: Image.Image, place: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    import numpy as np
    from PIL import Image

    (left, top), (width, height) = place, size
    sides = (top, height - top - image.height), (left, width - left - image.width), (0, 0)
    return Image.fromarray(np.pad(np.asarray(image), sides, mode="edge"))


def decoded(content: bytes, source: str, most_pixels: int = _MOST_PIXELS) -> Image.Image:
    """The picture in a file's content, RGB or RGBA, turned as its EXIF says. Raises TightfitError as
    `open_picture` does; of more than `most_pixels` before they are decoded."""
    from io import BytesIO

    with _opened(BytesIO(content), source) as image:
        _check_size(image, source, most_pixels)
        return _upright(image, source)


def open_picture(given: Any) -> Picture:
    """The picture in a file, or a PIL image, or an array (height, width, 1, 3 or 4) of uint8, or of floats in
    0..1. Turned as its EXIF says, on white where it is transparent.

    Raises TightfitError for what is no picture, moves, is damaged, or is too large to be read.
    """
    from PIL import Image

    if isinstance(given, Picture):
        return given
    if isinstance(given, str | Path):
        return _of_file(Path(given))
    if isinstance(given, Image.Image):
        return _picture(given, "the picture")
    return _of_array(given)


def _of_file(path: Path) -> Picture:
    if not path.exists():
        raise TightfitError(f"{path} does not exist: name a picture")
    with (
        explained(f"{path} is no picture that can be read", _AGAIN),
        open_regular(path, _MOST_BYTES) as stream,
        _opened(stream, str(path)) as image,
    ):
        return _picture(image, str(path))


@contextmanager
def _opened(stream: IO[bytes], source: str) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    with explained(f"{source} is no picture that can be read", _AGAIN), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which are checked, and of damaged EXIF
        try:
            image = Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError:
            raise TightfitError(
                f"{source} is no picture that can be read, of no format that is known: {_AGAIN}"
            ) from None
        with image:
            yield image


def _of_array(given: Any) -> Picture:
    import numpy as np
    from PIL import Image

    array = np.asarray(given)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating) and array.size and 0 <= array.min() <= array.max() <= 1:
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise TightfitError(
            f"a picture is a file, a PIL image or an array (height, width, 3) of uint8 or of floats in 0..1, "
            f"not {array.dtype} {array.shape}"
        )
    return _picture(Image.fromarray(array), "the picture")


def _check_size(image: Image.Image, source: str, most_pixels: int = _MOST_PIXELS) -> None:
    """Raise TightfitError for one that is too large to be read. No pixel is decoded."""
    (width, height), most = image.size, min(most_pixels, _MOST_PIXELS)
    if not width or not height or max(width, height) > _MOST_SIDE or width * height > most:
        raise TightfitError(
            f"{source} has {width}x{height} pixels, {width * height} pixels in all, "
            f"where 1 to {_MOST_SIDE} a side and {most} in all are read: make it smaller"
        )


def _upright(image: Image.Image, source: str) -> Image.Image:
    """RGB or RGBA. Raises TightfitError for what moves."""
    from PIL import ImageOps

    if getattr(image, "n_frames", 1) > 1 and image.format in ("GIF", "WEBP", "PNG", "AVIF"):
        raise TightfitError(f"{source} is animated: save one of its pictures as a PNG")
    return _in_colour(ImageOps.exif_transpose(image), source)


def _picture(image: Image.Image, source: str) -> Picture:
    import numpy as np

    _check_size(image, source)
    image = _upright(image, source)
    pixels = np.asarray(image.convert("RGB"))
    alpha = np.asarray(image.getchannel("A")) if "A" in image.getbands() else None
    if alpha is not None:
        share = alpha[..., None].astype(np.uint16)
        pixels = ((pixels * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)
    content = b"".join(part.tobytes() for part in (pixels, alpha) if part is not None)
    digest = hashlib.sha256(f"{pixels.shape}".encode() + content).hexdigest()
    return Picture(digest, pixels, alpha, source)


def _in_colour(image: Image.Image, source: str) -> Image.Image:
    """RGB, or RGBA where it is transparent anywhere; of 16 bits the higher eight."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise TightfitError(f"{source} has pixels of floating-point numbers: save it as a PNG")
    transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")
