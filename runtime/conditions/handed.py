"""What a second pass goes on from: what the first has painted, as it is, or enlarged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import TightfitError
from ..models.families.networks import ENCODER
from ..models.layouts import library
from ..models.spec import Component, ModelSpec
from ..models.upscalers import UPSCALER, enlarged, file_of, read_upscaler
from .condition import Call, Condition, Draw, Painted, Steering
from .image import Begun, Encoded, noised, pixels_of
from .input_pictures import Picture, open_picture

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job


class Way(NamedTuple):
    """How a picture is enlarged: A1111's name for it, torch's mode of interpolation or Pillow's filter."""

    a1111: str
    mode: str
    antialias: bool = False


LATENTS = {
    "latent": Way("Latent", "bilinear"),
    "latent-antialiased": Way("Latent (antialiased)", "bilinear", True),
    "latent-bicubic": Way("Latent (bicubic)", "bicubic"),
    "latent-bicubic-antialiased": Way("Latent (bicubic antialiased)", "bicubic", True),
    "latent-nearest": Way("Latent (nearest)", "nearest"),
    "latent-nearest-exact": Way("Latent (nearest-exact)", "nearest-exact"),
}
PIXELS = {"lanczos": Way("Lanczos", "LANCZOS"), "nearest": Way("Nearest", "NEAREST")}
WAYS = {**LATENTS, **PIXELS}
_ALSO = {"none": "lanczos"}  # as A1111 then resizes


def way_of(name: str) -> str | None:
    """Our name of a way, also of A1111's: "Latent (nearest)". None for one that is not known, and for a
    network."""
    folded = re.sub(r"[\s_()]+", "-", name.lower()).strip("-")
    folded = _ALSO.get(folded, folded)
    return folded if folded in WAYS else None


def placed(name: str, models_dirs: Sequence[str | Path] = ()) -> str:
    """A way, or the path of an upscaler's network, by its name in a folder of models too. Raises
    TightfitError for what is neither."""
    if way := way_of(name):
        return way
    file = file_of(name)
    path = Path(library.located(file, library.Kind.UPSCALER, models_dirs, or_name=True)).expanduser()
    if not library.exists(str(path)):
        known = f"unknown hires_upscaler '{name}': choose {', '.join(WAYS)}, or the file of an upscaler"
        lost = f"{name} is {file}.safetensors, which is in no folder of models: put it there"
        raise TightfitError(known if file == name else f"{lost} (tightfit convert makes it of the .pth)")
    return str(path.absolute())


def enlarging(way: str) -> Enlarged | EnlargedPicture:
    """The condition of a second pass that goes on from enlarged latents or pictures."""
    if way in LATENTS:
        return Enlarged(way=way)
    return EnlargedPicture(way=way) if way in PIXELS else EnlargedByNetwork(way=way)


@dataclass(frozen=True)
class Handed(Condition):
    """Go on from the first pass's latents, with the noise that is left in them, and with its generators."""

    painted: Painted | None = field(default=None, compare=False, repr=False)

    def after(self, painted: Painted) -> Handed:
        return replace(self, painted=painted)

    def prepare(self, job: Job, call: Call) -> Steering:  # noqa: ARG002
        assert self.painted
        return _GoingOn(self.painted)


@dataclass(frozen=True)
class Enlarged(Handed):
    """Go on from the first pass's latents, interpolated by `way`, under the noise of the step that is begun
    with."""

    way: str = "latent"

    def prepare(self, job: Job, call: Call) -> Steering:  # noqa: ARG002
        assert self.painted
        factor = job.spec.downsampling
        size = job.height // factor, job.width // factor
        return _Following([Known(interpolated(latents, size, self.way)) for latents in self.painted.latents])


@dataclass(frozen=True)
class EnlargedPicture(Handed):
    """Go on from the first pass's pictures, enlarged by `way` and encoded."""

    way: str = "lanczos"

    networks: ClassVar = (ENCODER,)

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        return (spec.on_demand(ENCODER),)

    def encodings(self, name: str, job: Job) -> int:
        return super().encodings(name, job) * job.num_images

    def prepare(self, job: Job, call: Call) -> Steering:
        assert self.painted
        pictures = [self._larger(open_picture(image.convert("RGB")), call) for image in self.painted.images]
        pixels = (pixels_of(picture, job, "crop", self._mode) for picture in pictures)
        return _Following([Encoded(job.spec, *call(ENCODER.name, pixels=each)) for each in pixels])

    @property
    def _mode(self) -> str:
        return WAYS[self.way].mode

    def _larger(self, picture: Picture, call: Call) -> Picture:  # noqa: ARG002
        return picture


@dataclass(frozen=True)
class EnlargedByNetwork(EnlargedPicture):
    """The same, enlarged once by the network in the file `way`, then resized to the size that is wanted."""

    networks: ClassVar = (UPSCALER, ENCODER)

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        return (read_upscaler(self.way), *super().components(spec))

    def sides(self, job: Job) -> Mapping[str, tuple[int, int]]:
        return {UPSCALER.name: (job.whole.height, job.whole.width)}

    @property
    def _mode(self) -> str:
        return "LANCZOS"

    def _larger(self, picture: Picture, call: Call) -> Picture:
        pixels = picture.pixels.transpose(2, 0, 1)[None]
        (larger,) = enlarged(read_upscaler(self.way), call, pixels)
        return open_picture(larger.transpose(1, 2, 0))


def interpolated(latents: np.ndarray, size: tuple[int, int], way: str) -> np.ndarray:
    """(1, channels, *size). Of other proportions they cover the size, and what juts out is cut, as A1111
    cuts it."""
    import torch

    _, mode, antialias = LATENTS[way]
    covered = _covering((latents.shape[-1], latents.shape[-2]), (size[1], size[0]))
    larger = torch.nn.functional.interpolate(
        torch.from_numpy(latents), size=covered[::-1], mode=mode, antialias=antialias
    )
    top, left = ((whole - part) // 2 for whole, part in zip(covered[::-1], size, strict=True))
    return larger[..., top : top + size[0], left : left + size[1]].numpy()


def _covering(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The sides, enlarged in their proportions until they cover the size."""
    factor = max(size[0] / sides[0], size[1] / sides[1])
    return max(size[0], int(sides[0] * factor)), max(size[1], int(sides[1] * factor))


class Known:
    """Latents of a picture, where an encoder would answer a distribution of them."""

    def __init__(self, latents: np.ndarray) -> None:
        self._latents = latents

    def sample(self, draw: Draw) -> np.ndarray:  # noqa: ARG002
        return self._latents


class _Following(Begun):
    """Begins each picture with the next of what the first pass has painted."""

    def __init__(self, encoded: Sequence[Encoded | Known]) -> None:
        super().__init__(None)
        self._rest: Iterator[Encoded | Known] = iter(encoded)

    def draw(self, draw: Draw) -> None:
        self.latents = next(self._rest).sample(draw)

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:  # noqa: ARG002
        return noised(scheduler, self.latents, noise, call)


class _GoingOn(Steering):
    def __init__(self, painted: Painted) -> None:
        self._rest = iter(zip(painted.latents, painted.generators, strict=True))
        self._generator: Any = None

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:  # noqa: ARG002
        latents, self._generator = next(self._rest)
        return latents

    def generator(self, own: Any) -> Any:  # noqa: ARG002
        return self._generator
