"""What samplers must do, written again in fp64 from the published formulas, for tests and samplers.py.

x has the data plus sigma times noise (Karras et al. 2022). `denoise(x, sigma, place)` is the data that a
model predicts at the call `place` of a picture; `noise()` is the next noise, as the sampler under test drew
it. Formulas: Karras et al. 2022 (Heun, DPM2), Lu et al. 2022 (DPM-Solver++ and its SDE), Adams and Bashforth
(LMS), Song et al. 2021 (the ancestral step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np

Denoise = Callable[[np.ndarray, float, int], np.ndarray]
Noise = Callable[..., Any]


def schedule(name: str, trained: np.ndarray, steps: int, published: Sequence[float]) -> np.ndarray:
    """Levels of a schedule, then 0. `trained` are sigmas by timestep."""
    least, most, last = trained[0], trained[-1], len(trained) - 1
    places = np.arange(steps) / max(steps - 1, 1)

    def between(timesteps: np.ndarray) -> np.ndarray:
        low = np.minimum(np.floor(timesteps).astype(int), last - 1)
        return trained[low] ** (1 - (timesteps - low)) * trained[low + 1] ** (timesteps - low)

    if name in ("uniform", "normal"):
        sigmas = between(last * (1 - places))
    elif name == "sgm_uniform":
        sigmas = between(last * (1 - np.arange(steps) / steps))
    elif name == "karras":
        sigmas = (most ** (1 / 7) * (1 - places) + least ** (1 / 7) * places) ** 7
    elif name in ("exponential", "polyexponential"):
        sigmas = most ** (1 - places) * least**places
    elif name == "simple":
        sigmas = np.array([trained[last - int(step * (last + 1) / steps)] for step in range(steps)])
    elif name == "ddim":
        stride = max((last + 1) // steps, 1)
        sigmas = np.array([trained[min(1 + step * stride, last)] for step in range(steps)][::-1])
    elif name == "beta":
        from scipy.special import betaincinv  # pyright: ignore[reportMissingImports]

        sigmas = least + (most - least) * betaincinv(0.6, 0.6, 1 - places)
    else:
        logs = np.log(np.array(published))
        ten = places * (len(logs) - 1)
        low = np.minimum(ten.astype(int), len(logs) - 2)
        sigmas = np.exp(logs[low] + (ten - low) * (logs[low + 1] - logs[low]))
    return np.append(sigmas, 0.0)


def euler(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:  # noqa: ARG001
    for place, (sigma, to) in enumerate(pairwise(sigmas)):
        data = denoise(x, sigma, place)
        x = data + (to / sigma) * (x - data)
    return x


def heun(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:  # noqa: ARG001
    call = count()
    for sigma, to in pairwise(sigmas):
        slope = (x - denoise(x, sigma, next(call))) / sigma
        guess = x + slope * (to - sigma)
        if to:
            slope = (slope + (guess - denoise(guess, to, next(call))) / to) / 2
        x = x + slope * (to - sigma)
    return x


def dpm2(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:  # noqa: ARG001
    return _ancestral_dpm2(x, sigmas, denoise, lambda *_: 0.0, eta=0.0)


def dpm2_a(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:
    return _ancestral_dpm2(x, sigmas, denoise, noise, eta=1.0)


def _ancestral_dpm2(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise, eta: float) -> Any:
    call = count()
    for sigma, to in pairwise(sigmas):
        down, up = ancestral(sigma, to, eta)
        slope = (x - denoise(x, sigma, next(call))) / sigma
        if down:
            middle = np.sqrt(sigma * down)
            guess = x + slope * (middle - sigma)
            slope = (guess - denoise(guess, middle, next(call))) / middle
        x = x + slope * (down - sigma) + (up * noise() if up else 0.0)
    return x


def euler_a(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:
    for place, (sigma, to) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, to, 1.0)
        data = denoise(x, sigma, place)
        x = data + (down / sigma) * (x - data) + (up * noise() if up else 0.0)
    return x


def dpmpp_2s_a(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:
    call = count()
    for sigma, to in pairwise(sigmas):
        down, up = ancestral(sigma, to, 1.0)
        data = denoise(x, sigma, next(call))
        if down:
            step = np.log(sigma / down)
            guess = np.exp(-step / 2) * x - np.expm1(-step / 2) * data
            data = denoise(guess, sigma * np.exp(-step / 2), next(call))
            x = np.exp(-step) * x - np.expm1(-step) * data + up * noise()
        else:
            x = data
    return x


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """Where a step goes down to, and the deviation of the noise that leads up again."""
    up = min(to, eta * np.sqrt(to**2 - to**4 / sigma**2))
    return np.sqrt(to**2 - up**2), up


def lms(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:  # noqa: ARG001
    """The polynomial through the last four slopes, integrated exactly."""
    slopes: list[Any] = []
    for place, (sigma, to) in enumerate(pairwise(sigmas)):
        slopes.append((x - denoise(x, sigma, place)) / sigma)
        known = range(place, max(place - 4, -1), -1)
        for i in known:
            basis = np.poly1d([1.0])
            for j in known:
                if j != i:
                    basis *= np.poly1d([1.0, -sigmas[j]]) / (sigmas[i] - sigmas[j])
            integral = basis.integ()
            x = x + (integral(to) - integral(sigma)) * slopes[i]
    return x


def dpmpp_2m(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:  # noqa: ARG001
    before, last = None, 0.0
    for place, (sigma, to) in enumerate(pairwise(sigmas)):
        data = denoise(x, sigma, place)
        if not to:
            return data
        step = np.log(sigma / to)
        mean = data if before is None else data + (data - before) * step / (2 * last)
        x = np.exp(-step) * x - np.expm1(-step) * mean
        before, last = data, step
    return x


def _sde(order: int, heun_type: bool = False) -> Callable[..., Any]:
    """DPM-Solver++'s SDE of order 1 to `order`, as it has more to go by; the last step is of order 1."""

    def sample(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:
        known: list[tuple[Any, float]] = []  # data and the step that followed, the latest first
        for place, (sigma, to) in enumerate(pairwise(sigmas)):
            data = denoise(x, sigma, place)
            if not to:
                return data
            h = np.log(sigma / to)
            x = np.exp(-2 * h) * x - np.expm1(-2 * h) * data + _bent(data, h, known[: order - 1], heun_type)
            x = x + to * np.sqrt(-np.expm1(-2 * h)) * noise()
            known.insert(0, (data, h))
        return x

    return sample


def _bent(data: Any, h: float, known: list[tuple[Any, float]], heun_type: bool) -> Any:
    """What the slope, and where two steps are known the curvature, of the data add to a step."""
    if not known:
        return 0.0
    (first, h0), phi = known[0], np.expm1(-2 * h) / (2 * h) + 1
    slope = (data - first) * h / h0
    if len(known) == 1:
        return slope * (phi if heun_type else -np.expm1(-2 * h) / 2)
    (second, h1), r0, r1 = known[1], h0 / h, known[1][1] / h
    older = (first - second) * h / h1
    mean = slope + (slope - older) * r0 / (r0 + r1)
    return mean * phi - (slope - older) / (r0 + r1) * (phi / (2 * h) - 0.5)


def dpmpp_sde(x: Any, sigmas: np.ndarray, denoise: Denoise, noise: Noise) -> Any:
    """DPM-Solver++(2S) with two ancestral steps, each from the level where it begins."""
    call = count()
    for sigma, to in pairwise(sigmas):
        data = denoise(x, sigma, next(call))
        if not to:
            return data
        middle = np.sqrt(sigma * to)
        down, up = ancestral(sigma, middle, 1.0)
        guess = data + (down / sigma) * (x - data) + up * noise(sigma, middle)
        data = denoise(guess, middle, next(call))
        down, up = ancestral(sigma, to, 1.0)
        x = data + (down / sigma) * (x - data) + up * noise(sigma, to)
    return x


FORMULAS: dict[str, Callable[..., Any]] = {
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": _sde(2),
    "dpmpp_2m_sde_heun": _sde(2, heun_type=True),
    "dpmpp_3m_sde": _sde(3, heun_type=True),
}
