"""Schedulers: six by the names users know, and the model's own. The arithmetic is diffusers'."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TightfitError, explained
from .spec import ModelSpec


@dataclass(frozen=True)
class Scheduler:
    """Our name, A1111's name, diffusers' class, and the options that make the name mean one algorithm.

    `flow` and `edm` are the class of the same algorithm for models trained by flow matching or in EDM's
    terms, or "".
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
_PACKAGES = "scipy", "torchsde"  # needed by some schedulers, or some of their options
# diffusers' classes that work with these families' U-Nets. No other name from a config is looked up.
KINDS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
# Two calls of the U-Net per step, except one for the last.
_TWICE = {
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler", "FlowMatchHeunDiscreteScheduler",
}  # fmt: skip


def default(spec: ModelSpec) -> str:
    """The model's own scheduler: our name if it means the same, else "own".

    Raises TightfitError if its config names none that runs here.
    """
    kind = spec.scheduler.get("_class_name")
    if kind not in KINDS:
        choices = ", ".join(name for name in SCHEDULERS if name != OWN)
        raise TightfitError(
            f"{_file(spec)} names {kind!r}, which tightfit does not run: choose --scheduler {choices}"
        )
    plain = () if _trained(spec.scheduler) else SCHEDULERS.values()
    same = (known for known in plain if known.kind == kind and _same(known, spec.scheduler))
    return next((known.name for known in same), OWN)


def _same(scheduler: Scheduler, config: Mapping[str, Any]) -> bool:
    """Whether a config of the same class has the options of our name. Without Karras they are the class's
    defaults."""
    karras = {"use_karras_sigmas": False}
    return all(
        config.get(name, (scheduler.options | karras)[name]) == value
        for name, value in scheduler.options.items()
    )


def _trained(config: Mapping[str, Any]) -> str:
    """ "flow" or "edm" if a scheduler config says that the model was trained so, else ""."""
    kind = str(config.get("_class_name"))
    if (
        kind.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas") is True
    ):
        return "flow"
    return "edm" if kind.startswith("EDM") else ""


def _chosen(name: str, spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """diffusers' class for a name and a model, and the options to override in its config. Raises
    TightfitError if there is none."""
    if name == OWN:
        default(spec)  # raises for one that does not run
        return spec.scheduler["_class_name"], {}
    chosen, trained = SCHEDULERS[name], _trained(spec.scheduler)
    if not trained:
        return chosen.kind, chosen.options
    if not (kind := getattr(chosen, trained)):
        choices = ", ".join(known.name for known in SCHEDULERS.values() if getattr(known, trained))
        how = "by flow matching" if trained == "flow" else "in EDM's terms"
        raise TightfitError(
            f"{spec.name} was trained {how}, for which there is no {name}: "
            f"choose --scheduler {choices}, or leave it out"
        )
    if trained == "edm":  # its noise levels are already Karras's
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
    """A diffusers scheduler from the model's config, with `steps` timesteps set, on the CPU.

    `seed` is for noise that is not drawn from a generator. Raises TightfitError if the config is broken or
    the scheduler cannot take that many steps.
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
        # diffusers would warn about another class's options
        parameters = inspect.signature(made.__init__).parameters
        try:
            scheduler = made.from_config(
                {key: value for key, value in {**spec.scheduler, **options}.items() if key in parameters}
            )
        except ImportError as error:  # scipy or torchsde
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
            raise ValueError("it does not have that many noise levels")
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = seed
    # As StableDiffusionXLPipeline does.
    if spec.design.first_step_is_known and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def rehearse(name: str, spec: ModelSpec, steps: int) -> None:
    """Take every step with numbers in place of latents. Raises TightfitError for faults that only show in a
    step: a step too many, a foreign prediction type, noise levels that lead to nothing finite."""
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
    """The latents as the U-Net expects them; flow matching needs no scaling."""
    return (
        scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
    )


def calls(name: str, spec: ModelSpec, steps: int) -> int:
    """How often the U-Net is called per picture for `steps` steps. Needs no diffusers."""
    kind, _ = _chosen(name, spec)
    if kind in _TWICE:
        return 2 * steps - 1
    if kind == "PNDMScheduler" and spec.scheduler.get("skip_prk_steps"):
        return steps + (steps > 1)  # the second step runs twice
    # Four Runge-Kutta calls in each of the first three steps; it takes four or more steps.
    if kind == "PNDMScheduler":
        return steps + 9
    return steps


def ends(scheduler, steps: int) -> list[int]:
    """The calls of the U-Net, counted from 0, that end a step, as diffusers counts them for its progress
    bar."""
    count, order = len(scheduler.timesteps), scheduler.order
    early = count - steps * order
    return [i for i in range(count) if i == count - 1 or (i + 1 > early and (i + 1) % order == 0)]


def step_options(scheduler, generator) -> dict[str, Any]:
    """Keyword arguments of `scheduler.step` beside the tensors, as diffusers' pipelines give them: the
    generator if the scheduler adds noise, and eta 0."""
    parameters = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in parameters}


def _steps_explained(name: str, spec: ModelSpec, steps: int):
    shown = spec.scheduler["_class_name"] if name == OWN else name
    return explained(
        f"{shown} cannot take {steps} steps with this model", "choose another number or another --scheduler"
    )


def _file(spec: ModelSpec):
    return spec.folder / "scheduler" / "scheduler_config.json"
