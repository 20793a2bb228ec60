"""The six schedulers, by the names users know; the arithmetic is diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import TightfitError

_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make(name: str, config: Mapping[str, Any], steps: int):
    """A diffusers scheduler made from the model's scheduler config, with its `steps` timesteps set, on the CPU."""
    import diffusers

    kind, changes = _CLASSES[name]
    scheduler = getattr(diffusers, kind).from_config(dict(config), **changes)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise TightfitError(f"{name} cannot take {steps} steps with this model ({str(error).splitlines()[0]})") from None
    return scheduler


def step_options(scheduler, generator) -> dict[str, Any]:
    """What `scheduler.step` wants beside the tensors: the generator, where the scheduler adds noise."""
    import inspect

    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
