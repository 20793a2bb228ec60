"""The denoising loop. It knows no family and no engine: one function predicts the noise, another's scheduler
takes it out. Several pictures may go in step with one another, so that one call predicts for all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conditions import Steering
from .models import schedulers
from .noise import Noise

Predict = Callable[[Sequence[np.ndarray], float, int], Sequence[np.ndarray]]
"""(a sample of each picture, timestep, number of the step from 1) → a prediction of each sample's shape."""


@dataclass(frozen=True)
class Step:
    """Step `number`, from 1, of `count`, the latents after it, and what draws the noise of the next."""

    number: int
    count: int
    latents: np.ndarray
    generator: Any


@dataclass(frozen=True)
class Asked:
    """What is to be predicted in step `number`."""

    sample: np.ndarray
    timestep: float
    number: int


Picture = Generator[Asked | Step, np.ndarray | None, None]
"""One picture on its way: asks for predictions, which it is sent, and tells its steps."""


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


def denoise(pictures: Sequence[Picture], predict: Predict) -> Iterator[tuple[Step, ...]]:
    """The steps of pictures that have the same schedule, each of all.

    A step is done after one call of `predict`, or two, as its scheduler has it.
    """
    told = [next(picture) for picture in pictures]
    while True:
        asked = [one for one in told if isinstance(one, Asked)]
        try:
            if asked:
                predictions = predict([one.sample for one in asked], asked[0].timestep, asked[0].number)
                told = [
                    picture.send(prediction)
                    for picture, prediction in zip(pictures, predictions, strict=True)
                ]
            else:
                yield tuple(one for one in told if isinstance(one, Step))
                told = [next(picture) for picture in pictures]
        except StopIteration:
            return


def picture(sampling: Sampling, noise: Noise, steering: Steering) -> Picture:
    """One picture. Noise and scheduler stay on the CPU in fp32, so one seed is the same noise on every
    device."""
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
        predicted = yield Asked(sample, float(timestep), number)
        assert predicted is not None
        prediction = torch.from_numpy(predicted)
        with generator.drawing():
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        latents = torch.from_numpy(steering.after(latents.numpy(), call))
        if call in ends:
            yield Step(number, len(ends), latents.numpy(), generator)
            number += 1
