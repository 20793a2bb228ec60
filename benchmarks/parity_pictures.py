"""Pictures in, and two passes: what must equal the pictures of diffusers' own pipelines, for parity.py."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from .. import Pipeline, load
from ..export import random_model
from ..runtime import adapters
from . import random_parts
from .metrics import psnr
from .parity_cases import AS_DIFFUSERS, PROMPT, SCHEDULERS, SEED

SAMPLERS = ("euler", "euler_a", "ddim", "dpmpp_2m_karras")
STEPS = 5
_COMMON: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
_SIDES: dict[str, Any] = {"width": 64, "height": 64}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), 3)
    for seed in (1, 2)
]
_PART = (8, 16, 40, 50)  # which the mask lets through
_MASK = Image.new("L", (64, 64))
_MASK.paste(255, _PART)


@dataclass(frozen=True)
class Case:
    """What is asked of a tiny model of `family`; `options` are in diffusers' words."""

    kind: str
    name: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Pair(NamedTuple):
    """Our picture, diffusers', and, where the same model paints without it, ours without what is asked."""

    ours: Image.Image
    theirs: Image.Image
    plain: Image.Image | None = None


class Models(ExitStack):
    """Tiny models in a temporary folder, each written once, and loaded once by us and once by diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self._work = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._made: dict[tuple[Any, ...], Any] = {}

    def once(self, make: Callable[..., Any], *key: Any) -> Any:
        """What `make` makes of a new folder's path, once for each key."""
        if (make, *key) not in self._made:
            folder = self._work / str(len(self._made))
            self._made[make, *key] = make(*key, folder)
        return self._made[make, *key]

    def folder(self, family: str, channels: int = 4) -> Path:
        if channels != 4:
            return self.once(random_parts.wider, self.folder(family), channels)
        return self.once(_written, family)

    def controlnets(self, family: str, count: int) -> list[Path]:
        folder = self.folder(family)
        return [self.once(random_parts.controlnet, folder, seed) for seed in range(count)]

    def t2i_adapter(self, family: str) -> Path:
        return self.once(random_parts.t2i_adapter, self.folder(family))

    def ip_adapter(self, family: str, plus: bool) -> Path:
        return self.once(random_parts.ip_adapter, self.folder(family), plus)

    def ours(self, folder: Path, sampler: str, adapter: str = "", **options: Any) -> Image.Image:
        """Our picture, by an IP-Adapter as it is written after its option."""
        pipeline = self.once(self._opened, folder, adapter)
        return pipeline(PROMPT, seed=SEED, scheduler=sampler, **{**_COMMON, **_SIDES, **options})

    def _opened(self, folder: Path, adapter: str, _: Path) -> Pipeline:
        given = adapters.written({"ip_adapter": [adapter]}) if adapter else ()
        wishes = {**AS_DIFFUSERS, "precision": "fp32", "residency": "resident"}
        return self.enter_context(load(str(folder), device="cpu", adapters=given, **wishes))

    def theirs(self, folder: Path, what: str, sampler: str, **options: Any) -> Any:
        """What diffusers' pipeline of that kind paints of a folder."""
        return painted(self.once(_diffusers, folder), what, sampler, **options)


def _written(family: str, folder: Path) -> Path:
    random_model.write(family, folder, tiny=True, precision="fp32")
    return folder


def _diffusers(folder: Path, _: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def painted(
    base: Any, what: str, sampler: str, parts: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """The answer of diffusers' pipeline of the kind `what`, from the components of another, and `parts`
    beside."""
    pipe = getattr(diffusers, f"StableDiffusion{'XL' * is_xl(base)}{what}Pipeline").from_pipe(
        base, **(parts or {})
    )
    name, changes = SCHEDULERS[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(base.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, **{"generator": seeded(), **_COMMON, **options}).images


def is_xl(base: Any) -> bool:
    return "XL" in type(base).__name__


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


# ------------------------------------------------------------------------------------------------- kinds


def image_to_image(models: Models, case: Case, sampler: str) -> Pair:
    folder, given = models.folder(case.family), {"image": PICTURES[0], **case.options}
    return Pair(models.ours(folder, sampler, **given), models.theirs(folder, "Img2Img", sampler, **given)[0])


def inpainting(models: Models, case: Case, sampler: str, channels: int = 4) -> Pair:
    """Under the mask: outside it ours has the original's pixels, and diffusers' has not."""
    folder = models.folder(case.family, channels)
    given = {"image": PICTURES[0], "mask_image": _MASK, **case.options}
    ours = models.ours(folder, sampler, mask_blur=0, **given)
    (theirs,) = models.theirs(folder, "Inpaint", sampler, **_SIDES, **given)
    return Pair(ours.crop(_PART), theirs.crop(_PART))


def editing(models: Models, case: Case, sampler: str) -> Pair:
    folder, given = models.folder(case.family, 8), {"image": PICTURES[0], **case.options}
    sides = _SIDES if case.family == "sdxl" else {}
    (theirs,) = models.theirs(folder, "InstructPix2Pix", sampler, **sides, **given)
    return Pair(models.ours(folder, sampler, **given), theirs)


def following(models: Models, case: Case, sampler: str, count: int = 1, over: bool = False) -> Pair:
    """ControlNets, also over a picture."""
    folder, nets = models.folder(case.family), models.controlnets(case.family, count)
    begun = {"image": PICTURES[1], "strength": 0.7} if over else {}
    ours = models.ours(
        folder, sampler, controlnet=nets, control_image=PICTURES[:count], **begun, **case.options
    )
    read = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    one: Callable[[Sequence[Any]], Any] = lambda values: values[0] if count == 1 else values  # noqa: E731
    pictures = one(PICTURES[:count])
    shown = {"control_image": pictures, **begun} if over else {"image": pictures, **_SIDES}
    what, parts = f"ControlNet{'Img2Img' * over}", {"controlnet": one(read)}
    (theirs,) = models.theirs(folder, what, sampler, parts=parts, **shown, **case.options)
    return Pair(ours, theirs, models.ours(folder, sampler, **begun))


def t2i_adapter(models: Models, case: Case, sampler: str) -> Pair:
    """Its end is a factor of SDXL's pipeline alone."""
    folder, net = models.folder(case.family), models.t2i_adapter(case.family)
    words = {
        "controlnet_conditioning_scale": "adapter_conditioning_scale",
        "control_guidance_end": "adapter_conditioning_factor",
    }
    options = {words[name]: value for name, value in case.options.items()}
    parts = {"adapter": diffusers.T2IAdapter.from_pretrained(net)}
    (theirs,) = models.theirs(folder, "Adapter", sampler, parts=parts, image=PICTURES[0], **_SIDES, **options)
    ours = models.ours(folder, sampler, controlnet=[net], control_image=PICTURES[:1], **case.options)
    return Pair(ours, theirs, models.ours(folder, sampler))


def ip_adapter(models: Models, case: Case, sampler: str, plus: bool = False) -> Pair:
    folder, file = models.folder(case.family), models.ip_adapter(case.family, plus)
    scale = case.options["scale"]
    base = models.once(_with_ip_adapter, folder, file, scale)
    (theirs,) = painted(base, "", sampler, ip_adapter_image=PICTURES[0], **_SIDES)
    ours = models.ours(folder, sampler, f"{file}:{scale}", ip_adapter_image=PICTURES[0])
    return Pair(ours, theirs, models.ours(folder, sampler))


def _with_ip_adapter(folder: Path, file: Path, scale: float, _: Path) -> Any:
    side = random_parts.VISION_SIDE
    parts = {
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(file.parent / "image_encoder"),
        "feature_extractor": CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    }
    base: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    base.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    base.set_ip_adapter_scale(scale)
    return base


def hires(models: Models, case: Case, sampler: str, way: str) -> Pair:
    """Twice the size, half painted anew: all steps, then the last half of twice as many."""
    folder, enlarged = models.folder(case.family), 2 * _SIDES["width"]
    kind = "pil" if way == "lanczos" else "latent"
    first = models.theirs(folder, "", sampler, output_type=kind, **_SIDES)
    if kind == "pil":
        larger = first[0].resize((enlarged, enlarged), Image.Resampling.LANCZOS)
    else:
        mode = {"latent": "bilinear", "latent-nearest": "nearest"}[way]
        larger = torch.nn.functional.interpolate(first, scale_factor=2, mode=mode)
    second = {"strength": 0.5, "num_inference_steps": 2 * STEPS}
    (theirs,) = models.theirs(folder, "Img2Img", sampler, image=larger, **second)
    return Pair(models.ours(folder, sampler, hires=2, hires_strength=0.5, hires_upscaler=way), theirs)


def refiner(models: Models, case: Case, sampler: str) -> Pair:
    folder, other = models.folder(case.family), models.folder(f"{case.family}-refiner")
    start, generator = case.options["refiner_start"], seeded()
    first = models.theirs(
        folder, "", sampler, output_type="latent", denoising_end=start, generator=generator, **_SIDES
    )
    (theirs,) = models.theirs(
        other, "Img2Img", sampler, image=first, denoising_start=start, generator=generator
    )
    ours = models.ours(folder, sampler, refiner=str(other), **case.options)
    return Pair(ours, theirs, models.ours(folder, sampler))


KINDS: dict[str, Callable[..., Pair]] = {
    "image to image": image_to_image,
    "inpainting, by a plain model": inpainting,
    "inpainting, by a model of 9 channels": functools.partial(inpainting, channels=9),
    "editing (instruct-pix2pix)": editing,
    "a ControlNet": following,
    "two ControlNets": functools.partial(following, count=2),
    "a ControlNet, over a picture": functools.partial(following, over=True),
    "a T2I-Adapter": t2i_adapter,
    "an IP-Adapter": ip_adapter,
    "an IP-Adapter plus": functools.partial(ip_adapter, plus=True),
    "hires fix, latent": functools.partial(hires, way="latent"),
    "hires fix, latent-nearest": functools.partial(hires, way="latent-nearest"),
    "hires fix, lanczos": functools.partial(hires, way="lanczos"),
    "a refiner": refiner,
}
_WEIGHT, _START, _END = "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"
_BOTH, _EVERY = ("sd1", "sdxl"), ("sd1", "sd2", "sdxl")
# By the name of a kind: the families, and what is asked.
_ASKED: tuple[tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]], ...] = (
    ("image to image", _EVERY, ({"strength": 0.3}, {"strength": 0.8})),
    ("inpainting, by a plain model", _BOTH, ({"strength": 0.5}, {"strength": 1.0})),
    ("inpainting, by a model of 9 channels", _BOTH, ({"strength": 0.5}, {"strength": 1.0})),
    ("editing (instruct-pix2pix)", _BOTH, ({"image_guidance_scale": 1.2}, {"image_guidance_scale": 2.5})),
    ("a ControlNet", _EVERY, ({_WEIGHT: 0.8}, {_WEIGHT: 1.0, "guess_mode": True})),
    ("two ControlNets", _BOTH, ({_WEIGHT: [0.6, 1.2], _START: [0.2, 0.0], _END: [0.7, 1.0]},)),
    ("a ControlNet, over a picture", _BOTH, ({_WEIGHT: 0.8},)),
    ("a T2I-Adapter", ("sd1",), ({_WEIGHT: 0.7},)),
    ("a T2I-Adapter", ("sdxl",), ({_WEIGHT: 0.7}, {_WEIGHT: 0.7, _END: 0.5})),
    ("an IP-Adapter", _BOTH, ({"scale": 0.6},)),
    ("an IP-Adapter plus", _BOTH, ({"scale": 1.0},)),
    ("hires fix, latent", _BOTH, ({},)),
    ("hires fix, latent-nearest", _BOTH, ({},)),
    ("hires fix, lanczos", _BOTH, ({},)),
    ("a refiner", ("sdxl",), ({"refiner_start": 0.5}, {"refiner_start": 0.8})),
)
_WORDS = {_WEIGHT: "weight", _START: "start", _END: "end", "guess_mode": "guess mode",
          "image_guidance_scale": "scale", "refiner_start": "from"}  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them, those of one kind together."""
    for kind, families, every in _ASKED:
        for family, options in product(families, every):
            yield Case(kind, _named(options), family, options)


def _named(options: Mapping[str, Any]) -> str:
    texts = ((_WORDS.get(name, name), value) for name, value in options.items())
    return ", ".join(name if value is True else f"{name} {_shown(value)}" for name, value in texts)


def _shown(value: Any) -> str:
    return " and ".join(f"{each:g}" for each in (value if isinstance(value, list) else [value]))


def decibels(models: Models, case: Case, sampler: str) -> tuple[float, float | None]:
    """PSNR between our picture and diffusers'; and, if the model paints without it, without what is asked."""
    ours, theirs, plain = KINDS[case.kind](models, case, sampler)
    return psnr(ours, theirs), None if plain is None else psnr(plain, theirs)
