"""Quality measures against what they are by definition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tightfit.benchmarks import metrics, suite


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
    """torchmetrics refuses more than it has pixels for: no side of a picture may be one too few, nor one too
    many."""
    assert [metrics.scale_count(side) for side in (8, 16, 128, 176, 512)] == [1, 2, 4, 5, 5]
    for side in range(16, 200, 8):
        one, other = (metrics._tensor(picture(seed, side)) for seed in (1, 2))
        assert 0 <= metrics.ms_ssim(one, other) <= 1
        assert metrics.ms_ssim(one, one) == pytest.approx(1)


def test_comparison_of_several():
    pictures = [picture(seed) for seed in range(5)]
    same = {"psnr": 99.0, "ssim": 1.0, "ms_ssim": 1.0}
    assert metrics.compare(pictures[0], pictures[0]) == same
    assert metrics.summary(pictures, pictures) == same | {"psnr_tenth": 99.0, "psnr_worst": 99.0}
    others = [*pictures[:4], picture(9)]
    found = metrics.summary(pictures, others)
    assert found["psnr"] == 99.0
    assert found["psnr_worst"] == pytest.approx(metrics.psnr(pictures[4], others[4]), abs=1e-3)


def test_match_is_the_nearest_emoji():
    """Each of the gallery's own pictures, larger and noisy, is found by its label alone."""
    with Image.open(metrics.GALLERY) as sheet:
        labels, whole = json.loads(sheet.info["labels"]), sheet.convert("RGB")
    assert len(labels) == len(set(labels)) == 459
    side = metrics.THUMBNAIL
    for i in (0, 7, 100, 458):
        x, y = i % (whole.width // side) * side, i // (whole.width // side) * side
        pixels = np.asarray(
            whole.crop((x, y, x + side, y + side)).resize((128, 128), Image.Resampling.NEAREST), float
        )
        noisy = Image.fromarray(
            np.clip(pixels + np.random.default_rng(i).normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
        )
        assert metrics.match(noisy, labels[i])
        assert not metrics.match(noisy, labels[i - 1])


def test_what_bench_paints_is_known_to_the_gallery():
    with Image.open(metrics.GALLERY) as sheet:
        assert set(suite.PROMPTS) <= set(json.loads(sheet.info["labels"]))


def test_difference_is_amplified():
    dark, light = Image.new("RGB", (4, 4), (100, 100, 100)), Image.new("RGB", (4, 4), (100, 103, 100))
    assert set(metrics.difference(dark, light, 8).tobytes()) == {24}
    assert set(metrics.difference(dark, Image.new("RGB", (4, 4), (255,) * 3), 8).tobytes()) == {255}
