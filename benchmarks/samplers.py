"""Every sampler with every schedule it takes, and three kinds of prediction, beside diffusers' own scheduler
or the published formulas in fp64: decibels of PSNR of the latents.

    python -m tightfit.benchmarks.samplers          # the tables of docs/samplers.md

No network runs: what stands for the U-Net is the exact denoiser of a Gaussian, bent a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from .. import inspect
from ..runtime.models import schedulers
from ..runtime.models.samplers.names import AUTOMATIC, BY_SIGMAS, OWN, SAMPLERS, SCHEDULES, Sampler, joined
from ..runtime.models.spec import ModelSpec
from .record import command, envelope
from .sampler_references import FORMULAS, schedule

DOCS = Path(__file__).parent.parent / "docs" / "samplers.md"
STEPS, SEED, SHAPE = 20, 7, (1, 4, 8, 8)
_V = {"prediction_type": "v_prediction"}
PREDICTIONS: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": _V,
    "v, zero SNR": {**_V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
LACKS = {"lms": "scipy", "dpmpp_sde": "torchsde"}
DIFFUSERS, LEVELS, FORMULA = "diffusers", "diffusers' class, levels by hand", "formulas in fp64"


@dataclass(frozen=True)
class Case:
    of: str
    schedule: str
    prediction: str

    @property
    def sampler(self) -> Sampler:
        return SAMPLERS[self.of]

    @property
    def name(self) -> str:
        return joined(self.sampler, self.schedule)

    @property
    def lacks(self) -> str:
        """A package that is not installed here, or ""."""
        package = "scipy" if self.schedule == "beta" else LACKS.get(self.sampler.name, "")
        return package if package and not find_spec(package) else ""

    @property
    def reference(self) -> str:
        """What the case is held against."""
        of_class = self.schedule == AUTOMATIC or SCHEDULES[self.schedule].options
        by_spacing = self.sampler.kind not in BY_SIGMAS and not self.sampler.ours
        if self.sampler.kind and (by_spacing or (of_class and self._has_levels)):
            return DIFFUSERS
        return FORMULA if self.sampler.name in FORMULAS else LEVELS

    @property
    def _has_levels(self) -> bool:
        return self.schedule == AUTOMATIC or self.sampler.kind in BY_SIGMAS


def cases() -> Iterator[Case]:
    for prediction in PREDICTIONS:
        for sampler in SAMPLERS.values():
            if sampler.name != OWN:
                yield from (Case(sampler.name, name, prediction) for name in sampler.schedules)


def decibels(case: Case, spec: ModelSpec) -> float:
    """PSNR of a case's latents; infinite if they are identical."""
    spec = replace(spec, scheduler={"_class_name": "DDIMScheduler", **BETAS, **PREDICTIONS[case.prediction]})
    made = schedulers.make(case.name, spec, STEPS, SEED)
    latents = run(made).numpy()
    if case.reference == FORMULA:
        exact = by_formula(case, made, spec)
    else:
        exact = run(theirs(case, spec, case.reference == LEVELS)).numpy()
    error = np.square(latents.astype(np.float64) - exact).mean()
    return 10 * math.log10(np.ptp(exact) ** 2 / error) if error else math.inf


def data(x: np.ndarray, sigma: float) -> np.ndarray:
    """What the Gaussian's denoiser says of x, bent a little."""
    mean, spread = np.linspace(-1, 1, x.size).reshape(x.shape), np.linspace(0.3, 1, x.size).reshape(x.shape)
    share = spread**2 / (spread**2 + sigma**2)
    return mean + share * (x - mean) + 0.1 * np.tanh(x / (1 + sigma))


def _trained(scheduler: Any) -> np.ndarray:
    """Sigmas by timestep, computed once."""
    if not hasattr(scheduler, "trained"):
        scheduler.trained = _computed(scheduler)
    return scheduler.trained


def _computed(scheduler: Any) -> np.ndarray:
    return np.sqrt(1 / scheduler.alphas_cumprod.double().clamp(min=2**-24).numpy() - 1)  # some have 0


def predicted(scheduler: Any, scaled: np.ndarray, timestep: float) -> np.ndarray:
    """What a model of this kind of prediction answers, in fp64. It is called with scaled x."""
    trained = _trained(scheduler)
    sigma = math.exp(np.interp(timestep, np.arange(len(trained)), np.log(trained)))
    x = scaled * math.sqrt(sigma**2 + 1)
    exact = data(x, sigma)
    noise = (x - exact) / sigma
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return (noise - sigma * exact) / math.sqrt(sigma**2 + 1)


def run(scheduler: Any, begin: float | None = None) -> torch.Tensor:
    """All steps in fp32, from noise that is as strong as the scheduler wants it, or `begin`."""
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(SHAPE, generator=generator) * (begin or scheduler.init_noise_sigma)
    options = schedulers.step_options(scheduler, generator)
    for timestep in scheduler.timesteps:
        scaled = schedulers.scaled(scheduler, latents, timestep)
        answer = predicted(scheduler, scaled.double().numpy(), float(timestep))
        answer = torch.from_numpy(answer.astype(np.float32))
        latents = scheduler.step(answer, timestep, latents, **options).prev_sample
    return latents


def theirs(case: Case, spec: ModelSpec, by_hand: bool) -> Any:
    """diffusers' own class with the options of its documentation, or with our levels set by hand."""
    name = case.sampler.kind
    known = SCHEDULES[case.schedule]
    options = {**spec.scheduler, **case.sampler.options, **known.options}
    if known.options:
        options["timestep_spacing"] = "linspace"
    elif known.spacing and case.sampler.kind not in BY_SIGMAS:
        options["timestep_spacing"] = known.spacing
    made: Any = getattr(diffusers, name)
    if spec.scheduler.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in made._get_init_keys(
        made
    ):
        options["trained_betas"] = zero_snr_betas().tolist()
    kept = made._get_init_keys(made)
    scheduler = made.from_config({key: value for key, value in options.items() if key in kept})
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = SEED
    scheduler.set_timesteps(STEPS)
    if case.schedule != AUTOMATIC and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if by_hand:
        put_by_hand(scheduler, case, spec)
    return scheduler


def zero_snr_betas() -> np.ndarray:
    """By diffusers' own function, with the last product of alphas that its schedulers put in place of 0."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2
    betas = rescale_zero_terminal_snr(betas.double()).numpy()
    betas[-1] = 1 - 2**-24 / np.prod(1 - betas[:-1])
    return betas


def put_by_hand(scheduler: Any, case: Case, spec: ModelSpec) -> None:
    trained = _trained(scheduler)
    sigmas = schedule(case.schedule, trained, STEPS, schedulers.published(spec))
    last = {"dpm_fast": trained[0], "deis": sigmas[-2]}.get(case.sampler.name, 0.0)
    sigmas[-1] = last
    times = np.interp(np.log(sigmas[:-1]), np.log(trained), np.arange(len(trained)))
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(times.round().astype(np.int64))
    scheduler.set_begin_index(0)


def by_formula(
    case: Case, scheduler: Any, spec: ModelSpec, draw: Callable[..., np.ndarray] | None = None
) -> np.ndarray:
    """The latents by the formulas, at the timesteps that the scheduler has: some round them. `draw` is
    for other noise than torch's, the first included."""
    trained, timesteps = _trained(scheduler), scheduler.timesteps.double().numpy()
    if case.schedule == AUTOMATIC:
        sigmas = getattr(scheduler, "levels", None) or scheduler.sigmas.double().tolist()
        sigmas = np.array(sigmas, np.float64)
    else:
        more = case.of == "dpmpp_3m_sde"  # leaves out the next to last
        sigmas = schedule(case.schedule, trained, STEPS + more, schedulers.published(spec))
        sigmas = np.delete(sigmas, -2) if more else sigmas
    generator = torch.Generator().manual_seed(SEED)
    noise = draw or _noise(case, generator, sigmas)
    x = draw() if draw else torch.randn(SHAPE, generator=generator).double().numpy()
    x = x * float(scheduler.init_noise_sigma)

    def denoise(x: np.ndarray, sigma: float, place: int) -> np.ndarray:
        time = timesteps[place]
        exact = np.interp(math.log(sigma), np.log(trained), np.arange(len(trained)))
        assert abs(time - exact) <= 1, (case, place, time, exact)
        answer = predicted(scheduler, x / math.sqrt(sigma**2 + 1), time)
        if scheduler.config.prediction_type == "epsilon":
            return x - sigma * answer
        return x / (sigma**2 + 1) - answer * sigma / math.sqrt(sigma**2 + 1)

    if case.sampler.kind == "DPMSolverMultistepScheduler":  # its x is smaller by the same factor throughout
        x = x * math.sqrt(sigmas[0] ** 2 + 1)
    return FORMULAS[case.sampler.name](x, sigmas, denoise, noise)


def _noise(case: Case, generator: torch.Generator, sigmas: np.ndarray) -> Callable[..., np.ndarray]:
    """As the sampler under test draws it."""
    if case.sampler.name != "dpmpp_sde":
        return lambda: torch.randn(SHAPE, generator=generator).double().numpy()
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    levels: Any = torch.tensor(sigmas, dtype=torch.float32)
    tree: Any = BrownianTreeNoiseSampler(torch.zeros(SHAPE), levels[levels > 0].min(), levels.max(), SEED)
    return lambda *ends: tree(*(torch.tensor(end, dtype=torch.float32) for end in ends)).double().numpy()


def shown(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.0f}"


def names_table() -> Iterator[str]:
    """Each sampler: what runs it, and what it takes."""
    yield "| name | A1111 | what runs it | calls a step | options |"
    yield "|---|---|---|---|---|"
    for sampler in SAMPLERS.values():
        if sampler.name == OWN:
            continue
        twice = sampler.kind in schedulers.TWICE or sampler.ours in schedulers.TWICE
        ours = "ours, from the formulas"
        source = (sampler.kind and f"diffusers' `{sampler.kind.removesuffix('Scheduler')}`") or ours
        if sampler.kind and sampler.ours:
            other = "other schedules and options" if sampler.kind not in BY_SIGMAS else "options"
            source += f"; with {other}, {ours}"
        takes = ", ".join(f"`{option}`" for option in sampler.takes) or "–"
        yield f"| `{sampler.name}` | {sampler.a1111} | {source} | {2 if twice else 1} | {takes} |"


def tables(spec: ModelSpec) -> Iterator[tuple[str, Mapping[Case, str]]]:
    for prediction in PREDICTIONS:
        found = {}
        for case in cases():
            if case.prediction == prediction:
                found[case] = f"needs {case.lacks}" if case.lacks else shown(decibels(case, spec))
        yield prediction, found


_MARKS = {DIFFUSERS: "", LEVELS: " ·", FORMULA: " *"}


def main() -> None:
    setup = envelope(command())
    facts, versions = setup["hardware"], setup["versions"]
    print(*names_table(), sep="\n")
    print(
        f"\nMade by `{setup['command']}` on {facts['name']} ({facts['device']}, {facts['threads']} threads),"
    )
    print(f"{setup['date']}: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    for prediction, rows in tables(inspect("emoji")):
        print(f"\n### {prediction}\n")
        print("| | " + " | ".join(schedule.a1111 for schedule in SCHEDULES.values()) + " |")
        print("|---" * (len(SCHEDULES) + 1) + "|")
        for name in dict.fromkeys(case.of for case in rows):
            cells = {
                case.schedule: value + _MARKS[case.reference]
                for case, value in rows.items()
                if case.of == name
            }
            print(f"| `{name}` | " + " | ".join(cells.get(key, "–") for key in SCHEDULES) + " |", flush=True)


if __name__ == "__main__":
    main()
