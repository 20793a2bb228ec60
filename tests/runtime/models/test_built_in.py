"""The model in the box: small enough, a real Stable Diffusion, and it paints what it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import tightfit
from tightfit.runtime.models.hub import BUILT_IN


@pytest.fixture(scope="module")
def pipe():
    with tightfit.load("emoji", precision="fp32", device="cpu") as pipe:
        yield pipe


def pixels(image) -> np.ndarray:
    """(h, w, 3) in 0..1."""
    return np.asarray(image, float) / 255


def share(image, of) -> float:
    """The share of a picture's pixels for which `of(red, green, blue)` holds."""
    return of(*pixels(image).transpose(2, 0, 1)).mean()


def red(r, g, b):
    return (r > 0.6) & (g < 0.4) & (b < 0.6)


def white(r, g, b):
    return np.minimum(np.minimum(r, g), b) > 0.9


def test_at_most_25_megabytes():
    assert sum(file.stat().st_size for file in BUILT_IN["emoji"].rglob("*")) <= 25e6


def test_proportions_of_sd15(pipe):
    """3x3 convolutions, 1x1 convolutions and linears: 63, 6 and 31 % of SD 1.5's U-Net weights
    (DESIGN.md)."""
    counts = dict.fromkeys(("3x3", "1x1", "linear"), 0)
    for tensor in pipe.spec.components["unet"].tensors.values():
        if len(tensor.shape) > 1:
            counts["linear" if len(tensor.shape) == 2 else f"{tensor.shape[-1]}x{tensor.shape[-1]}"] += (
                tensor.count
            )
    assert np.allclose(np.array(list(counts.values())) / sum(counts.values()), [0.63, 0.06, 0.31], atol=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_red_heart(pipe, seed):
    """Red in the middle and on both upper lobes, white in every corner, and in the notch between the
    lobes."""
    image = pipe("a red heart", seed=seed)
    assert image.size == (128, 128)
    for box in ((56, 56, 72, 72), (30, 30, 44, 44), (84, 30, 98, 44)):
        assert share(image.crop(box), red) > 0.8
    for box in ((0, 0, 16, 16), (112, 0, 128, 16), (0, 112, 32, 128), (96, 112, 128, 128)):
        assert share(image.crop(box), white) > 0.9


def test_colours_and_shapes_follow_the_prompt(pipe):
    for channel, colour in enumerate(("red", "green", "blue")):
        centre = pixels(pipe(f"{colour} heart", seed=0).crop((48, 48, 80, 80))).mean((0, 1))
        assert int(centre.argmax()) == channel
    night = share(pipe("new moon", seed=0), white)
    assert share(pipe("pizza", seed=0), white) > 0.3
    assert night < 0.6


def test_guidance_matters(pipe):
    """The picture follows its prompt more with guidance than without; an empty negative prompt is what none
    is."""
    plain = pipe("a red heart", seed=0, guidance_scale=1.0)
    guided = pipe("a red heart", seed=0)
    assert guided.tobytes() != plain.tobytes()
    assert guided.tobytes() == pipe("a red heart", seed=0, negative_prompt="").tobytes()


def test_as_diffusers(pipe):
    import torch
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(BUILT_IN["emoji"])  # as the model's card says
    theirs.set_progress_bar_config(disable=True)
    image = theirs(
        "a rocket", num_inference_steps=8, guidance_scale=3.0, generator=torch.Generator().manual_seed(4)
    ).images[0]
    error = np.square(pixels(image) - pixels(pipe("a rocket", num_inference_steps=8, seed=4))).mean()
    assert error < 1e-6  # 60 dB
