"""Schedulers of diffusers, made for a model by the names of samplers/names.py, and the model's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from ..budget import BUILDING
from ..errors import TightfitError, explained
from .samplers.names import (
    AUTOMATIC,
    BY_SIGMAS,
    BY_TIMESTEPS,
    OWN,
    PLAIN,
    SAMPLERS,
    SCHEDULES,
    Sampler,
    joined,
    nearest,
    split,
)
from .samplers.stochastic import SHORTENED, scheduler_class
from .spec import ModelSpec

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
# Names that a model's own config may mean just as well.
_KNOWN = "euler", "euler_a", "ddim", "dpmpp_2m_karras", "unipc", "lcm"
_LINSPACE = MappingProxyType({"timestep_spacing": "linspace"})
# Levels are put in the place of Karras's, which each of BY_SIGMAS has: one seam for all of these.
_SEAM = MappingProxyType({"use_karras_sigmas": True})
_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
_STOCHASTIC = "Stochastic"  # the class of samplers/stochastic.py
# What else would change the levels that our class is given.
_DISCRETE = MappingProxyType(
    {
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    }
)
# Two calls of the U-Net per step, except one for the last: classes of diffusers, and samplers of ours.
TWICE = {
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler", "FlowMatchHeunDiscreteScheduler", "dpm2", "dpmpp_2s",
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """Options of a request that change a sampler. None is the sampler's own value, or the model's."""

    eta: float | None = None
    s_churn: float = 0.0
    s_noise: float = 1.0
    zero_snr: bool | None = None

    def asked(self) -> dict[str, float]:
        """Options of steps that change something."""
        values = {"eta": self.eta, "s_churn": self.s_churn, "s_noise": self.s_noise}
        return {name: value for name, value in values.items() if value != getattr(UNTUNED, name)}


UNTUNED = Tuning()


def default(spec: ModelSpec) -> str:
    """The model's own scheduler: our name if it means the same, else "own".

    Raises TightfitError if its config names none that runs here.
    """
    kind = spec.scheduler.get("_class_name")
    if kind not in KINDS:
        choices = ", ".join(name for name in SAMPLERS if name != OWN)
        raise TightfitError(
            f"{_file(spec)} names {kind!r}, which tightfit does not run: choose --scheduler {choices}"
        )
    if _trained(spec.scheduler):
        return _plain_flow(spec)
    return next((name for name in _KNOWN if _same(*split(name), spec.scheduler)), OWN)


def _plain_flow(spec: ModelSpec) -> str:
    """Our name of the sampler that a family's noise levels are for, where the model's config changes nothing
    of it; else "own"."""
    config, others = spec.scheduler, (*PLAIN, "stochastic_sampling", "shift_terminal", "invert_sigmas")
    names = (name for name, sampler in SAMPLERS.items() if sampler.flow == config["_class_name"])
    is_plain = has_levels(spec) and not any(config.get(option) for option in others)
    return next(names, OWN) if is_plain else OWN


def has_levels(spec: ModelSpec) -> bool:
    """Whether the model's family knows the noise levels, whatever takes the noise out."""
    is_flow = _trained(spec.scheduler) == "flow"
    return is_flow and spec.design.levels(spec, spec.some_size, 1) is not None


def _same(sampler: Sampler, schedule: str, config: Mapping[str, Any]) -> bool:
    """Whether a config has the class and the options of our name. Without Karras they are the class's
    defaults."""
    options = {**sampler.options, **SCHEDULES[schedule].options}
    defaults = options | {"use_karras_sigmas": False}
    return config.get("_class_name") == sampler.kind and all(
        config.get(name, defaults[name]) == value for name, value in options.items()
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


def check(name: str, spec: ModelSpec, tuning: Tuning = UNTUNED) -> None:
    """Raise TightfitError for a schedule or an option that the scheduler `name` cannot take."""
    sampler, schedule = split(name)
    _check_schedule(sampler, schedule, spec)
    takes = _takes(sampler, spec)
    for option in tuning.asked():
        if option not in takes:
            those = ", ".join(known.name for known in SAMPLERS.values() if option in known.takes)
            raise TightfitError(f"{_shown(sampler, spec)} has no {option}: leave it out, or choose {those}")
    if tuning.s_noise != UNTUNED.s_noise and "s_churn" in takes and not tuning.s_churn:
        raise TightfitError(
            f"s_noise of {_shown(sampler, spec)} is the strength of the noise that s_churn adds: "
            "give --s-churn too"
        )
    if tuning.zero_snr and _trained(spec.scheduler):
        raise TightfitError(f"{spec.name} has no betas to rescale to zero SNR: leave --zero-snr out")


def check_draws(name: str, spec: ModelSpec, tuning: Tuning, option: str) -> None:
    """Raise TightfitError if `name` draws no noise in its steps, which `option` is about."""
    sampler, _ = split(name)
    if not draws(sampler, tuning):
        those = ", ".join(known.name for known in SAMPLERS.values() if known.noisy)
        raise TightfitError(
            f"{_shown(sampler, spec)} draws no noise in its steps, which {option} is about: "
            f"leave it out, or choose {those}"
        )


def draws(sampler: Sampler, tuning: Tuning) -> bool:
    """Whether noise is drawn in its steps. The model's own may be any."""
    return tuning.eta != 0 if sampler.noisy or sampler.name == OWN else bool(tuning.eta or tuning.s_churn)


def _check_schedule(sampler: Sampler, schedule: str, spec: ModelSpec) -> None:
    if sampler.name == OWN:
        kind = str(spec.scheduler.get("_class_name"))
        own = Sampler(OWN, "", "" if _trained(spec.scheduler) else kind)
        known = own.schedules if kind in BY_SIGMAS | BY_TIMESTEPS else (AUTOMATIC,)
    elif has_levels(spec):
        known = _flow_schedules(sampler)
    elif _trained(spec.scheduler):
        # By the name of old, whose levels are then replaced by the model's.
        known = (AUTOMATIC, "karras") if sampler.name == "dpmpp_2m" else (AUTOMATIC,)
    else:
        known = sampler.schedules
    if schedule not in known:
        cure = f"choose --schedule {nearest(schedule, known)}"
        more = f" (it takes {', '.join(known)})" if len(known) > 1 else ""
        raise TightfitError(f"{_shown(sampler, spec)} takes no schedule {schedule}: {cure}{more}")
    if schedule == "align_your_steps" and not published(spec):
        raise TightfitError(f"{spec.name} is of a family that has none: choose --schedule karras")


# A1111's names for a flow's own levels: even in time, then shifted.
_EVEN = "simple", "sgm_uniform"


def _flow_schedules(sampler: Sampler) -> tuple[str, ...]:
    """With a family's levels: these by A1111's names, that which it takes by itself included; and what the
    class of Euler's method makes of their ends."""
    others = (name for name, one in SCHEDULES.items() if one.options) if sampler.flow == _FLOW_EULER else ()
    return tuple(dict.fromkeys((AUTOMATIC, sampler.automatic, *_EVEN, *others)))


def said_plainly(name: str, spec: ModelSpec) -> str:
    """The name without a schedule that means a family's own levels."""
    sampler, schedule = split(name)
    return sampler.name if has_levels(spec) and schedule in (sampler.automatic, *_EVEN) else name


def published(spec: ModelSpec) -> tuple[float, ...]:
    """Noise levels that were found best for the model's family, if any were ("Align Your Steps")."""
    return spec.design.align_your_steps


def _takes(sampler: Sampler, spec: ModelSpec) -> tuple[str, ...]:
    """Options of a request that the sampler takes; the model's own those of the first of its class."""
    if sampler.name != OWN:
        return () if _trained(spec.scheduler) == "flow" else sampler.takes
    kind = spec.scheduler.get("_class_name")
    return next((known.step for known in SAMPLERS.values() if kind in (known.kind, known.edm)), ())


def _shown(sampler: Sampler, spec: ModelSpec) -> str:
    return spec.scheduler["_class_name"] if sampler.name == OWN else sampler.name


def _chosen(name: str, spec: ModelSpec, tuning: Tuning = UNTUNED) -> tuple[str, dict[str, Any]]:
    """diffusers' class for a name and a model, or ours, and the options to override in its config. Raises
    TightfitError if there is none."""
    sampler, schedule = split(name)
    if sampler.name == OWN:
        default(spec)  # raises for one that does not run
        return spec.scheduler["_class_name"], _levels(spec.scheduler["_class_name"], schedule)
    if trained := _trained(spec.scheduler):
        return _chosen_trained(sampler, schedule, trained, spec)
    is_ours = sampler.ours and (
        not sampler.kind or tuning.asked() or (schedule != AUTOMATIC and sampler.kind not in BY_SIGMAS)
    )
    kind = _STOCHASTIC if is_ours else sampler.kind
    options = {**sampler.options, **(PLAIN | _DISCRETE if is_ours else {})}
    return kind, options | _levels(kind, schedule)


def _levels(kind: str, schedule: str) -> dict[str, Any]:
    """The options of a class that lead to a schedule."""
    known = SCHEDULES[schedule]
    if schedule == AUTOMATIC:
        return {}
    if kind in BY_SIGMAS or kind == _STOCHASTIC:
        return {**PLAIN, **_LINSPACE, **(known.options or _SEAM)}
    return {"timestep_spacing": known.spacing}


def _chosen_trained(
    sampler: Sampler, schedule: str, trained: str, spec: ModelSpec
) -> tuple[str, dict[str, Any]]:
    """The same for a model trained by flow matching or in EDM's terms."""
    if not (kind := getattr(sampler, trained)):
        choices = ", ".join(known.name for known in SAMPLERS.values() if getattr(known, trained))
        how = "by flow matching" if trained == "flow" else "in EDM's terms"
        raise TightfitError(
            f"{spec.name} was trained {how}, for which there is no {sampler.name}: "
            f"choose --scheduler {choices}, or leave it out"
        )
    if trained == "edm":  # its noise levels are already Karras's
        return kind, {option: value for option, value in sampler.options.items() if option not in PLAIN}
    shift = spec.scheduler.get("flow_shift", spec.scheduler.get("shift", 1.0))
    # In place of Karras's levels.
    flow = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": shift,
    }
    levels = SCHEDULES[schedule].options if kind == _FLOW_EULER and has_levels(spec) else {}
    return kind, {
        **sampler.options,
        **PLAIN,
        **(flow if kind == sampler.kind else {"shift": shift}),
        **levels,
    }


def make(
    name: str,
    spec: ModelSpec,
    steps: int,
    seed: int = 0,
    tuning: Tuning = UNTUNED,
    size: tuple[int, int] | None = None,
):
    """A scheduler of diffusers from the model's config, with `steps` timesteps set, on the CPU.

    `seed` is for noise that is not drawn from a generator. `size` is the picture's height and width, by
    default the model's. Raises TightfitError if the config is broken or the scheduler cannot take that many
    steps.
    """
    (sampler, schedule), (kind, options) = split(name), _chosen(name, spec, tuning)
    levels = spec.design.levels(spec, size or spec.some_size, steps) if has_levels(spec) else None
    scheduler = _built(kind, options | ({} if levels is None else _LEVELLED), spec, tuning)
    if kind == _STOCHASTIC:
        scheduler.sampler = sampler.ours
        scheduler.options = scheduler.options._replace(**tuning.asked())
    with _steps_explained(name, spec, steps):
        if levels is not None:
            _set_levels(scheduler, levels)
        else:
            if schedule != AUTOMATIC and not _trained(spec.scheduler):
                _put_levels(scheduler, schedule, spec, steps + (sampler.ours == SHORTENED))
            scheduler.set_timesteps(steps, device="cpu")
        if len(times := set(scheduler.timesteps.tolist())) == 1 < len(scheduler.timesteps) or not times:
            raise ValueError("it does not have that many noise levels")
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = seed
    # As StableDiffusionXLPipeline does. Levels that share a rounded timestep would be found by it wrongly.
    is_known = spec.design.first_step_is_known or schedule != AUTOMATIC or levels is not None
    if is_known and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


@functools.cache
def _class(kind: str) -> Any:
    with BUILDING:  # while one thread imports parts of diffusers, another finds packages missing
        import diffusers

        made = scheduler_class() if kind == _STOCHASTIC else getattr(diffusers, kind, None)
    if made is None:
        raise TightfitError(
            f"diffusers {diffusers.__version__} has no {kind}: "
            "pip install -U diffusers, or choose another --scheduler"
        )
    return made


def _built(kind: str, options: Mapping[str, Any], spec: ModelSpec, tuning: Tuning):
    """A scheduler from the model's config, with `options` in place of its own."""
    made = _class(kind)
    with explained(
        f"{_file(spec)} describes no {kind} that runs here",
        "copy or download it again, or choose a --scheduler",
    ):
        # diffusers would warn about another class's options
        parameters = inspect.signature(made.__init__).parameters
        config = {**spec.scheduler, **options, **_rescaled(spec, options, tuning)}

        def build(**more: Any):
            known = {key: value for key, value in (config | more).items() if key in parameters}
            try:
                return made.from_config(known)
            except ImportError as error:  # scipy or torchsde
                package = next((name for name in _PACKAGES if name in str(error)), None)
                if package is None:
                    raise
                raise TightfitError(
                    f"{kind} needs {package} for this: pip install {package}, "
                    "or choose another --scheduler or --schedule"
                ) from None

        scheduler = build()
        if config.get("rescale_betas_zero_snr") is True and "rescale_betas_zero_snr" not in parameters:
            scheduler = build(trained_betas=_zero_snr_betas(scheduler.betas))
        if spec.corrected:  # as StableDiffusionPipeline does
            if getattr(scheduler.config, "steps_offset", 1) != 1:
                scheduler.register_to_config(steps_offset=1)
            if getattr(scheduler.config, "clip_sample", False) is True:
                scheduler.register_to_config(clip_sample=False)
    return scheduler


def _rescaled(spec: ModelSpec, options: Mapping[str, Any], tuning: Tuning) -> dict[str, Any]:
    """Options for zero SNR at the last timestep, which Lin et al. 2024 begin with."""
    if tuning.zero_snr is None or tuning.zero_snr == (spec.scheduler.get("rescale_betas_zero_snr") is True):
        return {}
    spacing = (
        {"timestep_spacing": "trailing"} if tuning.zero_snr and "timestep_spacing" not in options else {}
    )
    return {"rescale_betas_zero_snr": tuning.zero_snr, **spacing}


def _zero_snr_betas(betas: Any) -> list[float]:
    """Lin et al. 2024, algorithm 1, for classes of diffusers that do not have it. The last product of alphas
    is 2**-24 in place of 0, as in those that do."""
    import torch

    roots = (1 - betas.double()).cumprod(0).sqrt()
    products = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    products[-1] = 2**-24
    return (1 - products / torch.cat([products.new_ones(1), products[:-1]])).tolist()


def _put_levels(scheduler: Any, schedule: str, spec: ModelSpec, steps: int) -> None:
    """Have the class use the levels of a schedule that it does not know."""
    if SCHEDULES[schedule].options or not hasattr(scheduler, "_convert_to_karras"):
        return
    import numpy as np

    from .samplers.levels import Trained, levels

    products = scheduler.alphas_cumprod.double().numpy()
    values = levels(schedule, Trained(np.sqrt(1 / products - 1), published(spec)), steps)
    scheduler._convert_to_karras = lambda in_sigmas, num_inference_steps=steps: values  # noqa: ARG005


# A family's levels are shifted already.
_LEVELLED = MappingProxyType({"use_dynamic_shifting": False, "shift": 1.0, "flow_shift": 1.0})
# From a level of 1, all noise, a step by the logarithm of signal to noise is without end. As diffusers.
_NOT_ONE = 1 - 1e-6


def _set_levels(scheduler: Any, levels: Any) -> None:
    """Have the scheduler take the noise out of a flow at these levels."""
    import torch

    if type(scheduler).__name__ == _FLOW_EULER:
        scheduler.set_timesteps(sigmas=levels, device="cpu")
        return
    scheduler.set_timesteps(len(levels), device="cpu")  # of as many steps
    is_multistep = hasattr(scheduler, "model_outputs")
    sigmas = torch.from_numpy(levels).clamp(max=_NOT_ONE if is_multistep else 1.0)
    end = sigmas.new_zeros(1)
    if scheduler.order == 2:
        sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = (
        torch.cat([sigmas, end]),
        sigmas * scheduler.config.num_train_timesteps,
    )


def rehearse(
    name: str,
    spec: ModelSpec,
    steps: int,
    tuning: Tuning = UNTUNED,
    size: tuple[int, int] | None = None,
) -> None:
    """Take every step with numbers in place of latents. Raises TightfitError for faults that only show in a
    step: a step too many, a foreign prediction type, noise levels that lead to nothing finite."""
    import torch

    scheduler = make(name, spec, steps, tuning=tuning, size=size)
    latents = torch.ones(1, 1, 2, 2)
    options = step_options(scheduler, torch.Generator("cpu").manual_seed(0), tuning)
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
    if kind in TWICE or split(name)[0].ours in TWICE:
        return 2 * steps - 1
    config = {**spec.scheduler, **split(name)[0].options}
    if kind == "PNDMScheduler" and config.get("skip_prk_steps"):
        return steps + (steps > 1)  # the second step runs twice
    # Four Runge-Kutta calls in each of the first three steps; it takes four or more steps.
    if kind == "PNDMScheduler":
        return steps + 9
    return steps


def calls_by_step(
    name: str, spec: ModelSpec, steps: int, skipped: int = 0, until: int | None = None
) -> list[int]:
    """How often the U-Net is called in each step, which are not as many as `steps` for every scheduler.
    `skipped` are left out at the beginning, and all but `until` at the end."""
    kind, _ = _chosen(name, spec)
    order = 2 if kind in TWICE or split(name)[0].ours in TWICE else 1
    count = calls(name, spec, steps)
    begin, stop = skipped * order, count if until is None else until * order
    ends = [end for end in _ends(count, steps, order) if begin <= end < stop]
    return [last - before for before, last in pairwise([begin - 1, *ends])]


def steps_before(name: str, spec: ModelSpec, steps: int, share: float, tuning: Tuning) -> int:
    """How many of the steps begin in the first `share` of the noise levels that a model was trained with, as
    diffusers counts it for denoising_end, and A1111 for a refiner."""
    scheduler = make(name, spec, steps, tuning=tuning)
    levels = scheduler.config.num_train_timesteps
    least = round(levels - share * levels)
    return sum(timestep >= least for timestep in scheduler.timesteps[:: scheduler.order].tolist())


def ends(scheduler, steps: int) -> list[int]:
    """The calls of the U-Net, counted from 0, that end a step, as diffusers counts them for its progress
    bar."""
    return _ends(len(scheduler.timesteps), steps, scheduler.order)


def _ends(count: int, steps: int, order: int) -> list[int]:
    early = count - steps * order
    return [i for i in range(count) if i == count - 1 or (i + 1 > early and (i + 1) % order == 0)]


def step_options(scheduler, generator, tuning: Tuning = UNTUNED) -> dict[str, Any]:
    """Keyword arguments of `scheduler.step` beside the tensors, as diffusers' pipelines give them: the
    generator if the scheduler adds noise, and eta 0 unless another is asked for."""
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, "eta": 0.0, **tuning.asked()}
    return {name: value for name, value in options.items() if name in parameters}


def _steps_explained(name: str, spec: ModelSpec, steps: int):
    sampler, schedule = split(name)
    shown = joined(sampler, schedule) if sampler.name != OWN else spec.scheduler["_class_name"]
    return explained(
        f"{shown} cannot take {steps} steps with this model", "choose another number or another --scheduler"
    )


def _file(spec: ModelSpec):
    return spec.folder / "scheduler" / "scheduler_config.json"
