"""Similarity of pictures with the same seed: PSNR, SSIM, MS-SSIM, and LPIPS if its networks are available."""

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

MOST_PSNR = 99.0  # of identical pictures, as in a plan
# Weights of MS-SSIM's scales: Wang, Simoncelli and Bovik, Asilomar 2003.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11
# The emoji that pictures are matched against, and the side of each in pixels.
GALLERY, THUMBNAIL = (
    Path(__file__).with_name("emoji.png"),
    16,
)


def psnr(picture: Any, exact: Any) -> float:
    """Decibels between two 8-bit pictures; infinite if they are identical."""
    error = np.square(np.asarray(picture, float) - np.asarray(exact, float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(picture: Any, exact: Any) -> dict[str, float]:
    """Similarity of a PIL picture to the exact one: PSNR (at most MOST_PSNR), SSIM, MS-SSIM, and LPIPS if its
    networks are available."""
    drawn, target = _tensor(picture), _tensor(exact)
    measures = {"ssim": ssim, "ms_ssim": ms_ssim} | ({"lpips": lpips} if lpips_is_here() else {})
    values = {"psnr": min(psnr(picture, exact), MOST_PSNR)} | {
        name: measure(drawn, target) for name, measure in measures.items()
    }
    return {name: round(value, 4) for name, value in values.items()}


def summary(pictures: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """Over several pictures: PSNR (median, tenth percentile, worst), and medians of the other measures."""
    every = [compare(picture, target) for picture, target in zip(pictures, exact, strict=True)]
    values = {name: float(np.median([row[name] for row in every])) for name in every[0]}
    decibels = [row["psnr"] for row in every]
    return values | {
        name: float(np.percentile(decibels, q)) for name, q in (("psnr_tenth", 10), ("psnr_worst", 0))
    }


def ssim(picture: torch.Tensor, exact: torch.Tensor) -> float:
    """Structural similarity of (1, 3, h, w) in 0..1, with an 11x11 Gaussian window (Wang et al., IEEE TIP
    13(4), 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    return float(torch.as_tensor(measure(picture, exact, data_range=1.0)))  # pyright: ignore[reportArgumentType]


def ms_ssim(picture: torch.Tensor, exact: torch.Tensor) -> float:
    """SSIM at five scales, or as many as fit before the window is larger than the picture."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    scales = _SCALES[: scale_count(min(picture.shape[-2:]))]
    betas = tuple(scale / sum(scales) for scale in scales)
    return float(measure(picture, exact, data_range=1.0, betas=betas))


def scale_count(side: int) -> int:
    """Scales that torchmetrics accepts for a side of `side` pixels: side // (scales - 1)² must exceed 10."""
    return max((n for n in range(2, len(_SCALES) + 1) if side // (n - 1) ** 2 > _WINDOW - 1), default=1)


def lpips_is_here() -> bool:
    """Whether torchvision is installed and torch.hub has AlexNet's weights; nothing is downloaded."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    return find_spec("torchvision") is not None and weights.exists()


def lpips(picture: torch.Tensor, exact: torch.Tensor) -> float:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as measure

    return float(measure(picture, exact, net_type="alex", normalize=True))


def match(picture: Any, label: str) -> bool:
    """Whether a PIL picture is nearer to the emoji of this label than to the other 458 that the built-in
    model was trained on. Distance is the mean square over THUMBNAIL x THUMBNAIL averaged pixels."""
    from PIL import Image

    labels, every = _gallery()
    thumbnail = np.asarray(
        picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), float
    ).reshape(-1)
    return labels[int(np.square(every - thumbnail).sum(1).argmin())] == label


@functools.cache
def _gallery() -> tuple[list[str], np.ndarray]:
    """Labels, and one row of values per emoji."""
    from PIL import Image

    with Image.open(GALLERY) as sheet:
        labels: list[str] = json.loads(sheet.info["labels"])
        pixels = np.asarray(sheet.convert("RGB"), float)
    rows, columns = (side // THUMBNAIL for side in pixels.shape[:2])
    every = pixels.reshape(rows, THUMBNAIL, columns, THUMBNAIL, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    return labels, every[: len(labels)]


def difference(picture: Any, exact: Any, gain: int = 8) -> Any:
    """A PIL picture of the error in each pixel, amplified `gain` times."""
    from PIL import Image

    off = np.abs(np.asarray(picture, int) - np.asarray(exact, int)).max(axis=2)
    return Image.fromarray(np.minimum(gain * off, 255).astype(np.uint8))


def _tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
