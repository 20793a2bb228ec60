"""How far pictures are from others of the same seed: PSNR, SSIM and MS-SSIM, and LPIPS where its networks are
at hand."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

MOST_PSNR = 99.0  # what identical pictures count as, as in a plan
# Weights of MS-SSIM's scales: Wang, Simoncelli and Bovik, Asilomar 2003.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11
# What pictures of emoji are looked up in; pixels of each.
GALLERY, THUMBNAIL = (
    Path(__file__).with_name("emoji.png"),
    16,
)


def psnr(one: Any, other: Any) -> float:
    """Decibels between two pictures of 8 bits; infinite if they are the same."""
    error = np.square(np.asarray(one, float) - np.asarray(other, float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(picture: Any, exact: Any) -> dict[str, float]:
    """A PIL picture beside the one that it should be: PSNR, at most MOST_PSNR, SSIM, MS-SSIM, and LPIPS where
    its networks are."""
    one, other = _tensor(picture), _tensor(exact)
    measures = {"ssim": ssim, "ms_ssim": ms_ssim} | ({"lpips": lpips} if lpips_is_here() else {})
    found = {"psnr": min(psnr(picture, exact), MOST_PSNR)} | {
        name: measure(one, other) for name, measure in measures.items()
    }
    return {name: round(value, 4) for name, value in found.items()}


def summary(pictures: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """Of several: PSNR (median, tenth percentile, worst), and medians of the others."""
    every = [compare(one, other) for one, other in zip(pictures, exact, strict=True)]
    found = {name: float(np.median([each[name] for each in every])) for name in every[0]}
    decibels = [each["psnr"] for each in every]
    return found | {
        name: float(np.percentile(decibels, q)) for name, q in (("psnr_tenth", 10), ("psnr_worst", 0))
    }


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity of (1, 3, h, w) in 0..1: a Gaussian window of 11x11, Wang et al., IEEE TIP 13(4),
    2004."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    return float(torch.as_tensor(measure(one, other, data_range=1.0)))  # pyright: ignore[reportArgumentType]


def ms_ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """The same at five scales, or as many as there are before the window is larger than the picture."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    scales = _SCALES[: scale_count(min(one.shape[-2:]))]
    betas = tuple(scale / sum(scales) for scale in scales)
    return float(measure(one, other, data_range=1.0, betas=betas))


def scale_count(side: int) -> int:
    """Scales at which torchmetrics takes a picture of `side` pixels: it asks for more than the window's ten
    times the square of the halvings."""
    return max((n for n in range(2, len(_SCALES) + 1) if side // (n - 1) ** 2 > _WINDOW - 1), default=1)


def lpips_is_here() -> bool:
    """torchvision, and AlexNet's weights where torch.hub keeps them: nothing is downloaded."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    return find_spec("torchvision") is not None and weights.exists()


def lpips(one: torch.Tensor, other: torch.Tensor) -> float:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as measure

    return float(measure(one, other, net_type="alex", normalize=True))


def match(picture: Any, label: str) -> bool:
    """Whether a PIL picture is nearer to the emoji of this label than to any other of the 459 that the model
    in the box was trained on. Distance is the mean square over THUMBNAIL x THUMBNAIL averaged pixels."""
    from PIL import Image

    known, every = _gallery()
    own = np.asarray(
        picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), float
    ).reshape(-1)
    return known[int(np.square(every - own).sum(1).argmin())] == label


@functools.cache
def _gallery() -> tuple[list[str], np.ndarray]:
    """Labels, and a row of values for each."""
    from PIL import Image

    with Image.open(GALLERY) as sheet:
        known: list[str] = json.loads(sheet.info["labels"])
        pixels = np.asarray(sheet.convert("RGB"), float)
    rows, columns = (side // THUMBNAIL for side in pixels.shape[:2])
    every = pixels.reshape(rows, THUMBNAIL, columns, THUMBNAIL, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    return known, every[: len(known)]


def difference(one: Any, other: Any, gain: int = 8) -> Any:
    """A PIL picture of how far each pixel is off, so many times amplified."""
    from PIL import Image

    off = np.abs(np.asarray(one, int) - np.asarray(other, int)).max(axis=2)
    return Image.fromarray(np.minimum(gain * off, 255).astype(np.uint8))


def _tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
