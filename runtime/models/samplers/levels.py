"""The noise levels of schedules that diffusers' classes do not have: sigmas in fp64, highest first and
without the last, 0.

From k-diffusion (uniform, polyexponential), generative-models (SGM uniform), ComfyUI (simple, normal, DDIM)
and Sabour et al. 2024 (align your steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trained:
    """The levels a model was trained at, sigma by timestep, rising; `published` are those that were found
    best for its family in ten steps, if any were."""

    sigmas: np.ndarray
    published: Sequence[float] = ()

    def at(self, timesteps: np.ndarray) -> np.ndarray:
        """Sigmas between two timesteps, by their logarithms."""
        return np.exp(np.interp(timesteps, np.arange(len(self.sigmas)), np.log(self.sigmas)))

    def timesteps(self, sigmas: np.ndarray) -> np.ndarray:
        """The timesteps of sigmas, between two of them too; those beyond are the first or the last."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas)))


def _uniform(trained: Trained, steps: int) -> np.ndarray:
    return trained.at(np.linspace(len(trained.sigmas) - 1, 0, steps))


def _sgm_uniform(trained: Trained, steps: int) -> np.ndarray:
    return trained.at(np.linspace(len(trained.sigmas) - 1, 0, steps + 1)[:-1])


def _polyexponential(trained: Trained, steps: int) -> np.ndarray:
    """Of power 1, as A1111 has it, which is exponential."""
    least, most = np.log(trained.sigmas[[0, -1]])
    return np.exp(np.linspace(most, least, steps))


def _simple(trained: Trained, steps: int) -> np.ndarray:
    back = (np.arange(steps) * (len(trained.sigmas) / steps)).astype(int)
    return trained.sigmas[-1 - back]


def _ddim(trained: Trained, steps: int) -> np.ndarray:
    """The first `steps`, where ComfyUI has one more for some numbers."""
    last = len(trained.sigmas) - 1
    places = 1 + np.arange(steps) * max(len(trained.sigmas) // steps, 1)
    return trained.sigmas[np.minimum(places, last)][::-1].copy()


def _align_your_steps(trained: Trained, steps: int) -> np.ndarray:
    """Between the published levels by their logarithms, as its authors say."""
    published = np.log(np.asarray(trained.published, np.float64))
    places = np.linspace(0, len(published) - 1, steps)
    return np.exp(np.interp(places, np.arange(len(published)), published))


_FORMULAS: dict[str, Callable[[Trained, int], np.ndarray]] = {
    "uniform": _uniform,
    "normal": _uniform,  # the same: from the highest timestep to the lowest, both included
    "sgm_uniform": _sgm_uniform,
    "polyexponential": _polyexponential,
    "simple": _simple,
    "ddim": _ddim,
    "align_your_steps": _align_your_steps,
}


def levels(schedule: str, trained: Trained, steps: int) -> np.ndarray:
    """`steps` sigmas of a schedule, by our name of it."""
    return _FORMULAS[schedule](trained, steps)
