"""Samplers that draw noise in their steps, with eta and s_noise, for any schedule, behind the interface of
diffusers' schedulers.

Each is a generator of one picture's steps, in k-diffusion's terms: x has the data plus sigma times noise. It
yields x and the sigma at which it wants it denoised, and is sent x, as conditions left it, and the data that
the model predicts. Formulas: Karras et al. 2022, Lu et al. 2022 (DPM-Solver++ and its SDE), with the
ancestral step of DDPM (Song et al. 2021) in variance-exploding terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Options(NamedTuple):
    """eta: how much of the noise that a step takes out is drawn anew. s_noise: how strong that is."""

    eta: float = 1.0
    s_noise: float = 1.0


Denoised = tuple[Any, Any]
Steps = Generator[tuple[Any, float], Denoised, Any]
Draw = Callable[[], Any]


def euler(x: Any, sigmas: Sequence[float], options: Options, draw: Draw) -> Steps:
    for sigma, to in pairwise(sigmas):
        x, data = yield x, sigma
        down, up = _split(sigma, to, options.eta)
        x = _line(x, data, sigma, down) + options.s_noise * up * draw() if up else _line(x, data, sigma, down)
    return x


def dpm2(x: Any, sigmas: Sequence[float], options: Options, draw: Draw) -> Steps:
    """The slope halfway, in the logarithm of sigma, is that of the whole step."""
    for sigma, to in pairwise(sigmas):
        x, data = yield x, sigma
        down, up = _split(sigma, to, options.eta)
        if not down:
            x = _line(x, data, sigma, down)
            continue
        begin, middle = x, math.sqrt(sigma * down)
        x, data = yield _line(x, data, sigma, middle), middle
        x = begin + (x - data) / middle * (down - sigma)
        x = x + options.s_noise * up * draw() if up else x
    return x


def dpmpp_2s(x: Any, sigmas: Sequence[float], options: Options, draw: Draw) -> Steps:
    """DPM-Solver++(2S): the data predicted halfway, in the logarithm of sigma, is that of the whole step."""
    for sigma, to in pairwise(sigmas):
        x, data = yield x, sigma
        down, up = _split(sigma, to, options.eta)
        if not down:
            x = data
            continue
        begin, middle = x, math.sqrt(sigma * down)
        _, data = yield _ratio(x, data, middle / sigma), middle
        x = _ratio(begin, data, down / sigma)
        x = x + options.s_noise * up * draw() if up else x
    return x


def _multistep(order: int, midpoint: bool = False) -> Callable[..., Steps]:
    """DPM-Solver++'s SDE of order 1, then 2, then `order`, by the data of the steps before; the last step is
    of order 1. Of its two second orders, the midpoint one or Heun's.

    diffusers 0.42 has a part of the third order with a wrong sign: it does not vanish with the step.
    """

    def steps(x: Any, sigmas: Sequence[float], options: Options, draw: Draw) -> Steps:
        known: list[tuple[Any, float]] = []  # data, and the step that was taken with it; the latest first
        for sigma, to in pairwise(sigmas):
            x, data = yield x, sigma
            if not to:
                x = data
                continue
            step = math.log(sigma / to)
            drawn = step * options.eta
            bend = _bend(data, step, step + drawn, known[: order - 1], midpoint)
            x = to / sigma * math.exp(-drawn) * x - math.expm1(-step - drawn) * data + bend
            if up := options.s_noise * to * math.sqrt(-math.expm1(-2 * drawn)):
                x = x + up * draw()
            known = [(data, step), *known[:1]]
        return x

    return steps


def _bend(data: Any, step: float, whole: float, known: Sequence[tuple[Any, float]], midpoint: bool) -> Any:
    """What the data's slope, and where two steps are known its curvature, add to a step. `whole` is the step
    with the noise that it draws anew."""
    if not known:
        return 0.0
    (first, before), phi = known[0], math.expm1(-whole) / whole + 1
    slope = (data - first) * (step / before)
    if len(known) == 1:
        return slope * (-math.expm1(-whole) / 2 if midpoint else phi)
    second, earlier = known[1]
    curve = (slope - (first - second) * (step / earlier)) * (step / (before + earlier))
    return phi * (slope + curve * (before / step)) - (phi / whole - 0.5) * curve


def _split(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """The level to go down to, and the noise that leads up to `to` again."""
    up = min(to, eta * math.sqrt(to**2 * (sigma**2 - to**2)) / sigma)
    return math.sqrt(to**2 - up**2), up


def _line(x: Any, data: Any, sigma: float, to: float) -> Any:
    return x + (x - data) / sigma * (to - sigma)


def _ratio(x: Any, data: Any, ratio: float) -> Any:
    """The exact solution for data that stays the same."""
    return ratio * x + (1 - ratio) * data


_SAMPLERS: dict[str, Callable[..., Steps]] = {
    "euler": euler,
    "dpm2": dpm2,
    "dpmpp_2s": dpmpp_2s,
    "2m_sde": _multistep(2, midpoint=True),
    "2m_sde_heun": _multistep(2),
    "3m_sde": _multistep(3),
}
_TWICE = "dpm2", "dpmpp_2s"  # calls a step
SHORTENED = "3m_sde"
"""It leaves out the next to last level of one step more, as A1111 does: the curvature that it knows says
nothing of so long a step, and where levels are even in time it broke the picture."""


class Stepped(NamedTuple):
    prev_sample: Any


def scheduler_class() -> Any:
    """A class of diffusers' schedulers that steps by one of the samplers above. Scaling of inputs, betas and
    schedules are EulerDiscreteScheduler's."""
    from diffusers import EulerDiscreteScheduler

    return type("Stochastic", (_Stochastic, EulerDiscreteScheduler), {})


class _Stochastic:
    sampler = "euler"
    options = Options()
    alphas_cumprod: Any
    config: Any
    sigmas: Any
    _init_step_index: Callable[[Any], None]
    _step_index: int | None
    begin_index: int | None

    @property
    def order(self) -> int:
        return 2 if self.sampler in _TWICE else 1

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        import numpy as np
        import torch

        from .levels import Trained

        is_shortened = self.sampler == SHORTENED
        count = num_inference_steps + is_shortened
        super().set_timesteps(count, device=device)  # pyright: ignore[reportAttributeAccessIssue]
        self.levels = [float(sigma) for sigma in self.sigmas]
        if is_shortened:
            del self.levels[-2]
        self.sigmas = torch.tensor([*self._asked(), self.levels[-1]], dtype=torch.float32)
        trained = Trained(np.sqrt(1 / self.alphas_cumprod.double().numpy() - 1))
        self.timesteps = torch.from_numpy(trained.timesteps(self.sigmas[:-1].numpy()).astype(np.float32))
        self._steps: Steps | None = None

    def _asked(self) -> list[float]:
        """The levels at which data is wanted, found by going through all steps with numbers."""
        steps, asked = self._begin(0.0, self.levels, lambda: 0.0), []
        try:
            _, sigma = next(steps)
            while True:
                asked.append(sigma)
                _, sigma = steps.send((0.0, 0.0))
        except StopIteration:
            return asked

    def _begin(self, x: Any, levels: Sequence[float], draw: Draw) -> Steps:
        return _SAMPLERS[self.sampler](x, levels, self.options, draw)

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None) -> Stepped:
        import torch

        if self._step_index is None:
            self._init_step_index(timestep)
        place = self._step_index or 0
        self._step_index = place + 1
        sigma = float(self.sigmas[place])
        if self._steps is None:
            levels = self.levels[(self.begin_index or 0) // self.order :]
            self._steps = self._begin(sample, levels, lambda: torch.randn(sample.shape, generator=generator))
            next(self._steps)
        try:
            after, _ = self._steps.send((sample, self._data(model_output, sample, sigma)))
        except StopIteration as end:
            after = end.value
        return Stepped(after)

    def _data(self, output: Any, x: Any, sigma: float) -> Any:
        kind = self.config.prediction_type
        if kind == "epsilon":
            return x - sigma * output
        if kind == "v_prediction":
            return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))
        if kind == "sample":
            return output
        raise ValueError(f"prediction_type given as {kind}")
