"""Schedulers: six by the names users know, and the model's own; the arithmetic is diffusers'."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TightfitError, explained
from .spec import ModelSpec


@dataclass(frozen=True)
class Scheduler:
    """A name of ours, what A1111 calls it, diffusers' class, and the options that make the name mean one
    algorithm.

    `flow` and `edm` are the class of the same algorithm for models trained by flow matching or in EDM's
    terms, if there is one.
    """

    name: str
    a1111: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    flow: str = ""
    edm: str = ""


OWN = "own"  # the model's, exactly as its config has it
_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPMPP_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
}
_DPM, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SCHEDULERS = {
    scheduler.name: scheduler
    for scheduler in (
        Scheduler(
            "euler",
            "Euler",
            "EulerDiscreteScheduler",
            _PLAIN,
            "FlowMatchEulerDiscreteScheduler",
            "EDMEulerScheduler",
        ),
        Scheduler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler"),
        Scheduler("ddim", "DDIM", "DDIMScheduler"),
        Scheduler(
            "dpmpp_2m_karras",
            "DPM++ 2M Karras",
            _DPM,
            _DPMPP_2M | _PLAIN | {"use_karras_sigmas": True},
            _DPM,
            "EDMDPMSolverMultistepScheduler",
        ),
        Scheduler("unipc", "UniPC", _UNIPC, _PLAIN | {"solver_order": 2, "solver_type": "bh2"}, _UNIPC),
        Scheduler("lcm", "LCM", "LCMScheduler"),
        Scheduler(OWN, "Model's own", ""),
    )
}
_PACKAGES = "scipy", "torchsde"  # which some schedulers, and some of their options, ask for
# The classes of diffusers that paint from text with these families' U-Nets; no other name of a config is
# looked up.
KINDS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
# Two calls of the U-Net for a step, but one for the last.
_TWICE = {
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler", "FlowMatchHeunDiscreteScheduler",
}  # fmt: skip


def default(spec: ModelSpec) -> str:
    """The model's own scheduler: by our name where that means the same, else "own".

    Raises TightfitError if its config names none that runs here.
    """
    own = spec.scheduler.get("_class_name")
    if own not in KINDS:
        others = ", ".join(name for name in SCHEDULERS if name != OWN)
        raise TightfitError(
            f"{_file(spec)} names {own!r}, which tightfit does not run: choose --scheduler {others}"
        )
    plain = () if _trained(spec.scheduler) else SCHEDULERS.values()
    return next((each.name for each in plain if each.kind == own and _same(each, spec.scheduler)), OWN)


def _same(scheduler: Scheduler, config: Mapping[str, Any]) -> bool:
    """Whether the options of a name are what a config of the same class has. What they are without Karras are
    the class's own."""
    karras = {"use_karras_sigmas": False}
    return all(
        config.get(name, (scheduler.options | karras)[name]) == value
        for name, value in scheduler.options.items()
    )


def _trained(config: Mapping[str, Any]) -> str:
    """flow or edm, if a scheduler config tells that the model was trained so."""
    kind = str(config.get("_class_name"))
    if (
        kind.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas") is True
    ):
        return "flow"
    return "edm" if kind.startswith("EDM") else ""


def _chosen(name: str, spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """diffusers' class for a name and a model, and what of its config is changed. Raises TightfitError if
    there is none."""
    if name == OWN:
        default(spec)  # which knows what runs here
        return spec.scheduler["_class_name"], {}
    chosen, trained = SCHEDULERS[name], _trained(spec.scheduler)
    if not trained:
        return chosen.kind, chosen.options
    if not (kind := getattr(chosen, trained)):
        others = ", ".join(each.name for each in SCHEDULERS.values() if getattr(each, trained))
        how = "by flow matching" if trained == "flow" else "in EDM's terms"
        raise TightfitError(
            f"{spec.name} was trained {how}, for which there is no {name}: "
            f"choose --scheduler {others}, or leave it out"
        )
    if trained == "edm":  # its noise levels are Karras's already
        return kind, {option: value for option, value in chosen.options.items() if option not in _PLAIN}
    shift = spec.scheduler.get("flow_shift", spec.scheduler.get("shift", 1.0))
    # In place of Karras's levels.
    flow = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": shift,
    }
    return kind, chosen.options | (_PLAIN | flow if kind == chosen.kind else _PLAIN | {"shift": shift})


def make(name: str, spec: ModelSpec, steps: int, seed: int = 0):
    """A diffusers scheduler made from the model's scheduler config, with its `steps` timesteps set, on the
    CPU.

    `seed` is of the noise that is not drawn from a generator. Raises TightfitError if the config is broken or
    the scheduler cannot take so many steps.
    """
    import diffusers

    kind, options = _chosen(name, spec)
    made = getattr(diffusers, kind, None)
    if made is None:
        raise TightfitError(
            f"diffusers {diffusers.__version__} has no {kind}: "
            "pip install -U diffusers, or choose another --scheduler"
        )
    with explained(
        f"{_file(spec)} describes no {kind} that runs here",
        "copy or download it again, or choose a --scheduler",
    ):
        known = inspect.signature(made.__init__).parameters  # of what another class has diffusers would warn
        try:
            scheduler = made.from_config(
                {key: value for key, value in {**spec.scheduler, **options}.items() if key in known}
            )
        except ImportError as error:  # scipy or torchsde, which some ask for
            package = next((name for name in _PACKAGES if name in str(error)), None)
            if package is None:
                raise
            raise TightfitError(
                f"{kind} needs {package}: pip install {package}, or choose another --scheduler"
            ) from None
        if spec.corrected:  # as StableDiffusionPipeline does
            if getattr(scheduler.config, "steps_offset", 1) != 1:
                scheduler.register_to_config(steps_offset=1)
            if getattr(scheduler.config, "clip_sample", False) is True:
                scheduler.register_to_config(clip_sample=False)
    with _steps_explained(name, spec, steps):
        scheduler.set_timesteps(steps, device="cpu")
        if len(levels := set(scheduler.timesteps.tolist())) == 1 < len(scheduler.timesteps) or not levels:
            raise ValueError("it has not so many noise levels")
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = seed
    # As StableDiffusionXLPipeline does.
    if spec.design.first_step_is_known and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def rehearse(name: str, spec: ModelSpec, steps: int) -> None:
    """Take all steps with numbers in place of latents. Raises TightfitError for what a scheduler finds out as
    it goes: a step too many, a prediction type that is not its own, noise levels from which nothing finite
    follows."""
    import torch

    scheduler = make(name, spec, steps)
    latents = torch.ones(1, 1, 2, 2)
    options = step_options(scheduler, torch.Generator("cpu").manual_seed(0))
    with _steps_explained(name, spec, steps):
        for timestep in scheduler.timesteps:
            answer = 0.1 * scaled(scheduler, latents, timestep)
            latents = scheduler.step(answer, timestep, latents, **options).prev_sample
        if not latents.isfinite().all():
            raise ValueError("its noise levels lead to nothing finite")


def scaled(scheduler, latents, timestep):
    """The latents as the U-Net wants them; flow matching has them so already."""
    return (
        scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
    )


def calls(name: str, spec: ModelSpec, steps: int) -> int:
    """How often the U-Net is called, for one picture, to take `steps` steps. Nothing of diffusers is needed
    for that."""
    kind, _ = _chosen(name, spec)
    if kind in _TWICE:
        return 2 * steps - 1
    if kind == "PNDMScheduler" and spec.scheduler.get("skip_prk_steps"):
        return steps + (steps > 1)  # its second step is taken twice
    # Four calls of Runge and Kutta for each of the first three steps; it takes four or more.
    if kind == "PNDMScheduler":
        return steps + 9
    return steps


def ends(scheduler, steps: int) -> list[int]:
    """After which calls of the U-Net, counted from 0, a step is done: as diffusers counts them for its
    progress bar."""
    count, order = len(scheduler.timesteps), scheduler.order
    early = count - steps * order
    return [i for i in range(count) if i == count - 1 or (i + 1 > early and (i + 1) % order == 0)]


def step_options(scheduler, generator) -> dict[str, Any]:
    """What `scheduler.step` wants beside the tensors: the generator, where the scheduler adds noise, and how
    much (eta 0), as diffusers' pipelines say it."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in known}


def _steps_explained(name: str, spec: ModelSpec, steps: int):
    shown = spec.scheduler["_class_name"] if name == OWN else name
    return explained(
        f"{shown} cannot take {steps} steps with this model", "choose another number or another --scheduler"
    )


def _file(spec: ModelSpec):
    return spec.folder / "scheduler" / "scheduler_config.json"
