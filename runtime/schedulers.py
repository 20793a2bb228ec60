"""The six schedulers, by the names users know; the arithmetic is diffusers'."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from .errors import explained
from .spec import ModelSpec


@dataclass(frozen=True)
class Scheduler:
    """A name of ours, what A1111 calls it, diffusers' class, and the options that make the name mean one algorithm."""

    name: str
    a1111: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SCHEDULERS = {
    scheduler.name: scheduler
    for scheduler in (
        Scheduler("euler", "Euler", "EulerDiscreteScheduler", _PLAIN),
        Scheduler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler"),
        Scheduler("ddim", "DDIM", "DDIMScheduler"),
        Scheduler(
            "dpmpp_2m_karras", "DPM++ 2M Karras", "DPMSolverMultistepScheduler", _DPMPP_2M | _PLAIN | {"use_karras_sigmas": True}
        ),
        Scheduler("unipc", "UniPC", "UniPCMultistepScheduler", _PLAIN | {"solver_order": 2, "solver_type": "bh2"}),
        Scheduler("lcm", "LCM", "LCMScheduler"),
    )
}
FALLBACK = "dpmpp_2m_karras"


def default(spec: ModelSpec) -> str:
    """The nearest of our six to the model's own: that of the same class, else DPM++ 2M Karras."""
    own = spec.scheduler.get("_class_name")
    return next((s.name for s in SCHEDULERS.values() if s.kind == own), FALLBACK)


def make(name: str, spec: ModelSpec, steps: int):
    """A diffusers scheduler made from the model's scheduler config, with its `steps` timesteps set, on the CPU.

    Raises TightfitError if the config is broken or the scheduler cannot take so many steps.
    """
    import diffusers

    chosen = SCHEDULERS[name]
    config = dict(spec.scheduler)
    if spec.family != "sdxl":  # StableDiffusionPipeline corrects older configs in the same way
        config |= {"steps_offset": 1, "clip_sample": False}
    where = spec.folder / "scheduler" / "scheduler_config.json"
    with explained(f"{where} describes no scheduler", "copy or download it again"):
        scheduler = getattr(diffusers, chosen.kind).from_config(config, **chosen.options)
    with explained(f"{name} cannot take {steps} steps with this model", "choose another number or another --scheduler"):
        scheduler.set_timesteps(steps)
        levels = scheduler.timesteps.tolist()
        if max(levels) >= scheduler.config.num_train_timesteps or len(set(levels)) == 1 < len(levels):
            raise ValueError("it has not so many noise levels")
    return scheduler


def step_options(scheduler, generator) -> dict[str, Any]:
    """What `scheduler.step` wants beside the tensors: the generator, where the scheduler adds noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
