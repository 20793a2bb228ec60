"""Quality measures against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tightfit.benchmarks import metrics


def picture(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def test_psnr_by_hand():
    dark, light = (Image.new("RGB", (8, 8), (value,) * 3) for value in (100, 110))
    assert metrics.psnr(dark, light) == pytest.approx(20 * math.log10(255 / 10))
    assert metrics.psnr(dark, dark) == math.inf


def test_ssim_of_constants_by_hand():
    """Without variance only its luminance is left: (2ab + c1) / (a² + b² + c1), c1 = 0.01²."""
    a, b = 0.2, 0.6
    one, other = (torch.full((1, 3, 32, 32), value) for value in (a, b))
    assert metrics.ssim(one, other) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), rel=1e-3)


def test_as_many_scales_as_the_picture_has():
    """The window of 11 pixels must be smaller than the picture at each scale."""
    assert [metrics.scale_count(side) for side in (8, 11, 20, 21, 128, 160, 161, 512)] == [1, 1, 1, 2, 4, 4, 5, 5]
    one, other = (metrics._tensor(picture(seed, 16)) for seed in (1, 2))
    assert metrics.ms_ssim(one, other) == pytest.approx(max(metrics.ssim(one, other), 0), abs=0.02)  # of one scale


def test_comparison_of_several():
    pictures = [picture(seed) for seed in range(5)]
    assert metrics.compare(pictures, pictures) == {
        "psnr": 99.0, "psnr_tenth": 99.0, "psnr_worst": 99.0, "ssim": 1.0, "ms_ssim": 1.0
    }  # fmt: skip
    others = [*pictures[:4], picture(9)]
    found = metrics.compare(pictures, others)
    assert found["psnr"] == 99.0
    assert found["psnr_worst"] == pytest.approx(metrics.psnr(pictures[4], others[4]), abs=1e-3)


def test_difference_is_amplified():
    dark, light = Image.new("RGB", (4, 4), (100, 100, 100)), Image.new("RGB", (4, 4), (100, 103, 100))
    assert set(metrics.difference(dark, light, 8).tobytes()) == {24}
    assert set(metrics.difference(dark, Image.new("RGB", (4, 4), (255,) * 3), 8).tobytes()) == {255}
