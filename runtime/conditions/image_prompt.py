"""A picture as a prompt: the denoiser reads it beside the text, by an IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TightfitError
from ..fields import option
from ..models.families.image_prompt import IMAGE_ENCODER, TOKENS
from ..models.spec import ModelSpec
from .condition import Arrays, Call, Condition, Steering
from .input_pictures import Picture, open_picture

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job

# CLIP's, of red, green and blue
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Options:
    """What asks for a picture as a prompt."""

    ip_adapter_image: str | None = option(
        None,
        "A picture as a prompt.",
        "FILE",
        options=("--ip-image",),
        panel="Picture",
    )


@dataclass(frozen=True)
class ImagePrompt(Condition):
    """Read `image` beside the text, in the branches that have the prompt."""

    image: Picture

    networks: ClassVar = (IMAGE_ENCODER,)
    options: ClassVar = Options
    limited: ClassVar = ("ip_image", "ip_adapter_image")

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> ImagePrompt | None:
        picture = given.get("ip_adapter_image")
        return None if picture is None else cls(open_picture(picture))

    def tokens(self, spec: ModelSpec) -> int:
        spec.check_takes("ip_image")
        if TOKENS not in spec.unet:
            raise TightfitError("--ip-image is read by an IP-Adapter: give that by --ip-adapter")
        return spec.unet[TOKENS]

    def prepare(self, job: Job, call: Call) -> Steering:
        side = job.spec.components[IMAGE_ENCODER.name].config["image_size"]
        (tokens,) = call(IMAGE_ENCODER.name, pixels=_pixels(self.image, side))
        rows = [int(row in job.prompted) for row in range(job.branches)]
        return Read(tokens[rows])


def _pixels(picture: Picture, side: int) -> np.ndarray:
    """(1, 3, side, side), its middle, as CLIPImageProcessor makes it."""
    import numpy as np
    from PIL import Image

    factor = side / min(picture.width, picture.height)
    width, height = (max(side, int(length * factor)) for length in (picture.width, picture.height))
    scaled = picture.image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    values = np.asarray(scaled.crop((left, top, left + side, top + side)), np.float32) / 255
    normal = (values - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
    return normal.transpose(2, 0, 1)[None]


class Read(Steering):
    """Has tokens after the texts, a row for each branch."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self._joined: dict[range, tuple[np.ndarray, np.ndarray]] = {}

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:
        import numpy as np

        texts = arrays["hidden"]
        before, joined = self._joined.get(rows, (None, texts))
        if before is not texts:  # the same array while texts stay, which an engine finds on its device
            joined = np.concatenate([texts, self._tokens[rows.start : rows.stop].astype(texts.dtype)], axis=1)
            self._joined[rows] = texts, joined
        return {**arrays, "hidden": joined}
