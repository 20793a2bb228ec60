"""The denoising loop. It knows no family and no engine: one function predicts the noise, another's scheduler
takes it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conditions import Steering
from .models import schedulers

Predict = Callable[[np.ndarray, float], np.ndarray]
"""(sample, timestep) → the prediction, of the sample's shape."""


@dataclass(frozen=True)
class Step:
    """Step `number`, from 1, of `count`, and the latents after it."""

    number: int
    count: int
    latents: np.ndarray


@dataclass(frozen=True)
class Noise:
    """What a picture's latents begin as: their shape, and the seed that they are drawn by."""

    shape: tuple[int, ...]
    seed: int


def denoise(scheduler: Any, steps: int, noise: Noise, predict: Predict, steering: Steering) -> Iterator[Step]:
    """The steps of one picture. Noise and scheduler stay on the CPU in fp32, so one seed is the same noise on
    every device.

    A step is done after one call of `predict`, or two, as its scheduler has it.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(noise.seed)
    options = schedulers.step_options(scheduler, generator)
    drawn = torch.randn(noise.shape, generator=generator)
    latents = drawn * getattr(scheduler, "init_noise_sigma", 1.0)
    latents = torch.from_numpy(steering.start(latents.numpy(), drawn.numpy(), scheduler))
    ends = schedulers.ends(scheduler, steps)
    for call, timestep in enumerate(scheduler.timesteps):
        sample = schedulers.scaled(scheduler, latents, timestep).numpy()
        prediction = torch.from_numpy(predict(sample, float(timestep)))
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        if call in ends:
            number = ends.index(call) + 1
            latents = torch.from_numpy(steering.after(latents.numpy(), number))
            yield Step(number, len(ends), latents.numpy())
