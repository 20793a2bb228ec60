"""Picture files: the texts that they carry, and how ours are written, as PNG, JPEG or WebP."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import exif, png
from .errors import TightfitError
from .files import adding, open_regular, replacing

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""By the ending of a file's name."""
METADATA = ("full", "a1111", "none")
"""What of a request is written into a picture: all, what A1111 would write, or nothing."""
QUALITY = 90
"""Of JPEG and WebP, of 100."""
PARAMETERS = "parameters"
# A1111's and ours, ComfyUI's, InvokeAI's two, and three of NovelAI's.
_KEYWORDS = (PARAMETERS, "prompt", "invokeai_metadata", "sd-metadata", "Comment", "Description", "Source")
KEPT = (
    *_KEYWORDS, "workflow", "invokeai_graph", "invokeai_workflow", "fooocus_scheme", "Title", "Software",
)  # fmt: skip
"""What programs read from a PNG, that an enlarged one keeps."""
_MOST_BYTES = 2**31
_SIDES = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # libjpeg's and libwebp's limits
_OURS = re.compile(r', tightfit: "(?:\\.|[^\\"])*"\Z')


def texts(picture: Path, every: bool = False) -> dict[str, str]:
    """What programs have written into `picture`, by the keywords that they use in a PNG: what says how it was
    made, or `every` text that is kept. No pixel is read.

    Raises TightfitError for what is no picture, or damaged.
    """
    try:
        with open_regular(picture, _MOST_BYTES) as stream:
            return _read(stream, str(picture), every)
    except FileNotFoundError:
        raise TightfitError(f"{picture} does not exist") from None
    except OSError as error:
        raise TightfitError(f"{picture} cannot be read: {error.strerror}") from None


def _read(stream: BinaryIO, source: str, every: bool) -> dict[str, str]:
    try:
        return _texts(stream, every)
    except (ValueError, struct.error, zlib.error) as error:
        raise TightfitError(
            f"{source} is not a picture that can be read ({error}): "
            "name a PNG, JPEG or WebP, or save it again"
        ) from None


def texts_inside(content: bytes, source: str, every: bool = False) -> dict[str, str]:
    """As `texts`, of what a picture's file holds; errors call it `source`."""
    return _read(BytesIO(content), source, every)


def _texts(stream: BinaryIO, every: bool) -> dict[str, str]:
    head = stream.read(12)
    if head.startswith(png.SIGNATURE):
        return png.texts(stream, KEPT if every else _KEYWORDS, every)
    if head.startswith(b"\xff\xd8\xff"):
        return _by_keyword(exif.texts(stream, "JPEG"))
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _by_keyword(exif.texts(stream, "WEBP"))
    raise ValueError("it is no PNG, JPEG or WebP")


def _by_keyword(found: Sequence[str]) -> dict[str, str]:
    """ComfyUI says the keyword before its text; the comment of others is what PNG has as parameters."""
    graph = next((text for text in found if text.startswith("prompt:")), None)
    others = [text for text in found if not re.match("(prompt|workflow):", text)]
    named = {PARAMETERS: others[0]} if others else {}
    return named if graph is None else named | {"prompt": graph.removeprefix("prompt:")}


def ours(text: str) -> str:
    """The end of a picture's text that holds our exact JSON, "" without one."""
    found = _OURS.search(text)
    return found[0] if found else ""


def kept(text: str | None, metadata: str, ending: str) -> str | None:
    """What of a picture's text is written: by `metadata`, and less where that does not fit in a JPEG's
    EXIF."""
    for choice in METADATA[METADATA.index(metadata) :]:
        said = {"full": text, "a1111": _OURS.sub("", text or "") or None}.get(choice)
        if said is None or FORMATS[ending] != "JPEG" or len(exif.written(said)) <= exif.MOST_BYTES:
            return said
    return None


def save(
    image: Image.Image,
    path: str | Path,
    overwrite: bool = True,
    *,
    quality: int = QUALITY,
    metadata: str = "full",
) -> Path:
    """Write `image` as `path` ends: .png, .jpg, .jpeg or .webp, with its request inside, through a temporary
    sibling, so that no half picture is ever seen.

    quality: of JPEG and WebP, 1 to 100; a WebP of 100 has every pixel as it is. metadata: "full", "a1111"
    (without our exact JSON) or "none". Without `overwrite` a file that is there stays: heart-2.png is
    written beside heart.png. Answers where the picture is. Raises TightfitError.
    """
    if not hasattr(image, "save"):
        raise TightfitError(f"save takes one picture, not a {type(image).__name__}: call it for each")
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise TightfitError(f"{path} ends in none of {', '.join(FORMATS)}: pictures are written as these")
    check_quality(quality)
    if metadata not in METADATA:
        raise TightfitError(f"unknown metadata {metadata!r}: choose {', '.join(METADATA)}")
    options = _options(image, ending, quality, metadata)
    try:
        if overwrite:
            with replacing(path) as partial:
                image.save(partial, **options)
            return path
        with adding(path) as places:
            image.save(places[0], **options)
        return places[-1]
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise TightfitError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None


def content(image: Image.Image, ending: str, quality: int = QUALITY, metadata: str = "full") -> bytes:
    """What `save` writes into a file with that ending."""
    stream = BytesIO()
    image.save(stream, **_options(image, ending, quality, metadata))
    return stream.getvalue()


def _options(image: Image.Image, ending: str, quality: int, metadata: str) -> dict[str, Any]:
    texts = {PARAMETERS: kept(image.info.get(PARAMETERS), metadata, ending)}
    if metadata == "full":
        texts |= {name: image.info.get(name) for name in KEPT[1:]}
    return written_as(texts, FORMATS[ending], quality)


def check_quality(quality: int) -> None:
    if type(quality) is not int or not 1 <= quality <= 100:
        raise TightfitError(f"quality must be a whole number from 1 to 100, not {quality!r}")


def written_as(texts: Mapping[str, str | None], name: str, quality: int = QUALITY) -> dict[str, Any]:
    """What Pillow is told to write a picture in the format of that name, with these texts inside."""
    if name == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for keyword, text in texts.items():
            if isinstance(text, str):
                info.add_text(keyword, text)
        return {"format": name, "pnginfo": info}
    text = texts[PARAMETERS]
    comment = {} if text is None else {"exif": exif.written(text)}
    lossless = {"lossless": True} if name == "WEBP" and quality == 100 else {}
    return {"format": name, "quality": quality, **lossless, **comment}


def sheet(images: Sequence[Image.Image], ending: str) -> Image.Image | None:
    """All pictures on one, in rows, as near to a square as A1111 has it, with the text of the first. None
    where it would be too large for its format."""
    from PIL import Image

    rows = round(math.sqrt(len(images)))
    columns = math.ceil(len(images) / rows)
    width, height = images[0].size
    if (
        max(columns * width, rows * height) > _SIDES[FORMATS[ending]]
        or columns * width * rows * height > 2**28
    ):
        return None
    whole = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate(images):
        whole.paste(image, (number % columns * width, number // columns * height))
    whole.info |= {name: text for name, text in images[0].info.items() if name == PARAMETERS}
    return whole
