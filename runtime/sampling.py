"""The denoising loop. It knows no family and no engine: one function predicts the noise, another's scheduler
takes it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conditions import Steering
from .models import schedulers
from .noise import Noise

Predict = Callable[[np.ndarray, float, int], np.ndarray]
"""(sample, timestep, number of the step from 1) → the prediction, of the sample's shape."""


@dataclass(frozen=True)
class Step:
    """Step `number`, from 1, of `count`, the latents after it, and what draws the noise of the next."""

    number: int
    count: int
    latents: np.ndarray
    generator: Any


@dataclass(frozen=True)
class Sampling:
    """What takes the noise out: a scheduler, in so many steps, changed so. The first `skipped` are left
    out, and all from `until` on."""

    scheduler: Any
    steps: int
    tuning: schedulers.Tuning = schedulers.UNTUNED
    skipped: int = 0
    until: int | None = None

    @property
    def begin(self) -> int:
        """The first of the scheduler's timesteps that is called."""
        return self.skipped * self.scheduler.order

    @property
    def end(self) -> int:
        """The first that is not."""
        return len(self.scheduler.timesteps) if self.until is None else self.until * self.scheduler.order


def denoise(sampling: Sampling, noise: Noise, predict: Predict, steering: Steering) -> Iterator[Step]:
    """The steps of one picture. Noise and scheduler stay on the CPU in fp32, so one seed is the same noise on
    every device.

    A step is done after one call of `predict`, or two, as its scheduler has it.
    """
    import torch

    scheduler, begin = sampling.scheduler, sampling.begin
    drawn, generator = noise.first(steering.draw)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    latents = torch.from_numpy(drawn) * getattr(scheduler, "init_noise_sigma", 1.0)
    latents = torch.from_numpy(steering.start(latents.numpy(), drawn, scheduler, begin))
    generator = steering.generator(generator)
    options = schedulers.step_options(scheduler, generator.token, sampling.tuning)
    ends = [end for end in schedulers.ends(scheduler, sampling.steps) if begin <= end < sampling.end]
    number = 1
    for call, timestep in enumerate(scheduler.timesteps[begin : sampling.end], begin):
        sample = schedulers.scaled(scheduler, latents, timestep).numpy()
        prediction = torch.from_numpy(predict(sample, float(timestep), number))
        with generator.drawing():
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        latents = torch.from_numpy(steering.after(latents.numpy(), call))
        if call in ends:
            yield Step(number, len(ends), latents.numpy(), generator)
            number += 1
