"""Samplers and schedules as data: our names, A1111's, diffusers' classes, and which go together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ...errors import TightfitError

AUTOMATIC = "automatic"
OWN = "own"  # the model's, exactly as its config has it


@dataclass(frozen=True)
class Schedule:
    """Noise levels by name. diffusers takes it by the options of a class that has them, or by `spacing`, as
    classes do that count in timesteps; else levels.py computes it."""

    name: str
    a1111: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = ""


def _schedules() -> Iterable[Schedule]:
    yield Schedule(AUTOMATIC, "Automatic")
    yield Schedule("uniform", "Uniform", spacing="linspace")
    yield Schedule("karras", "Karras", {"use_karras_sigmas": True})
    yield Schedule("exponential", "Exponential", {"use_exponential_sigmas": True})
    yield Schedule("polyexponential", "Polyexponential")
    yield Schedule("sgm_uniform", "SGM Uniform", spacing="trailing")
    yield Schedule("simple", "Simple")
    yield Schedule("normal", "Normal")
    yield Schedule("ddim", "DDIM", spacing="leading")
    yield Schedule("beta", "Beta", {"use_beta_sigmas": True})
    yield Schedule("align_your_steps", "Align Your Steps")


SCHEDULES = {schedule.name: schedule for schedule in _schedules()}


@dataclass(frozen=True)
class Sampler:
    """Our name, A1111's name, diffusers' class, and the options that make the name mean one algorithm.

    flow and edm: the class of the same algorithm for models trained by flow matching or in EDM's terms, or
    "". ours: the sampler of stochastic.py that is used where diffusers has no class, or its class takes no
    such schedule or option. step: options of a request that `kind` takes. automatic: the schedule that A1111
    means by "Automatic". noisy: whether it draws noise in its steps. also: other names.
    """

    name: str
    a1111: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    flow: str = ""
    edm: str = ""
    ours: str = ""
    step: tuple[str, ...] = ()
    automatic: str = AUTOMATIC
    noisy: bool = False
    also: tuple[str, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Options of a request that change this sampler."""
        return ("eta", "s_noise") if self.ours else self.step

    @property
    def schedules(self) -> tuple[str, ...]:
        """Those it takes, by our names."""
        if self.ours or self.kind in BY_SIGMAS:
            return tuple(SCHEDULES)
        if self.kind in BY_TIMESTEPS:
            return AUTOMATIC, *(name for name, schedule in SCHEDULES.items() if schedule.spacing)
        return (AUTOMATIC,)


PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPM, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
_SINGLE = "DPMSolverSinglestepScheduler"
# diffusers' classes that take noise levels: each has use_karras_sigmas.
BY_SIGMAS = frozenset({
    "DEISMultistepScheduler", _DPM, "DPMSolverSDEScheduler", _SINGLE, "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", _UNIPC,
})  # fmt: skip
# Those that take timesteps, spaced by timestep_spacing. LCM's and TCD's are those they were trained at.
BY_TIMESTEPS = frozenset({
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler", "PNDMScheduler",
})  # fmt: skip


def _multistep(algorithm: str, solver: str = "midpoint") -> Mapping[str, Any]:
    """Options of DPMSolverMultistepScheduler."""
    return {
        "algorithm_type": algorithm,
        "solver_order": 2,
        "solver_type": solver,
        "use_lu_lambdas": False,
        **PLAIN,
    }


def _samplers() -> Iterable[Sampler]:
    flow, edm = "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"
    churn = ("s_churn", "s_noise")
    yield Sampler(
        "euler", "Euler", "EulerDiscreteScheduler", PLAIN, flow, edm, step=churn, automatic="uniform"
    )
    kind = "EulerAncestralDiscreteScheduler"
    also = ("euler ancestral",)
    yield Sampler("euler_a", "Euler a", kind, ours="euler", automatic="uniform", noisy=True, also=also)
    yield Sampler("ddim", "DDIM", "DDIMScheduler", step=("eta",))
    edm = "EDMDPMSolverMultistepScheduler"
    options = _multistep("dpmsolver++")
    yield Sampler("dpmpp_2m", "DPM++ 2M", _DPM, options, _DPM, edm, automatic="karras")
    options = PLAIN | {"solver_order": 2, "solver_type": "bh2"}
    yield Sampler("unipc", "UniPC", _UNIPC, options, _UNIPC, also=("uni pc",))
    yield Sampler("lcm", "LCM", "LCMScheduler", noisy=True)
    kind, flow = "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
    yield Sampler("heun", "Heun", kind, PLAIN, flow, automatic="uniform")
    yield Sampler("lms", "LMS", "LMSDiscreteScheduler", PLAIN, automatic="uniform")
    also = ("kdpm2", "dpm 2", "k dpm 2")
    yield Sampler("dpm2", "DPM2", "KDPM2DiscreteScheduler", PLAIN, automatic="karras", also=also)
    kind, also = "KDPM2AncestralDiscreteScheduler", ("dpm2 ancestral", "kdpm2 a", "dpm 2 a", "k dpm 2 a")
    yield Sampler("dpm2_a", "DPM2 a", kind, PLAIN, ours="dpm2", automatic="karras", noisy=True, also=also)
    also = ("dpmpp 2s ancestral", "dpm++ 2s ancestral")
    yield Sampler("dpmpp_2s_a", "DPM++ 2S a", "", ours="dpmpp_2s", automatic="karras", noisy=True, also=also)
    kind, takes = "DPMSolverSDEScheduler", ("s_noise",)
    yield Sampler("dpmpp_sde", "DPM++ SDE", kind, PLAIN, step=takes, automatic="karras", noisy=True)
    options = _multistep("sde-dpmsolver++")
    sde = {"automatic": "exponential", "noisy": True}
    yield Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", _DPM, options, ours="2m_sde", **sde)
    options = _multistep("sde-dpmsolver++", solver="heun")
    yield Sampler("dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", _DPM, options, ours="2m_sde_heun", **sde)
    yield Sampler("dpmpp_3m_sde", "DPM++ 3M SDE", "", ours="3m_sde", **sde)
    options = PLAIN | {
        "algorithm_type": "dpmsolver",
        "solver_order": 3,
        "final_sigmas_type": "sigma_min",
        "lower_order_final": True,
    }
    yield Sampler("dpm_fast", "DPM fast", _SINGLE, options)
    yield Sampler("ddpm", "DDPM", "DDPMScheduler", noisy=True)
    yield Sampler("pndm", "PLMS", "PNDMScheduler", {"skip_prk_steps": True}, also=("plms",))
    options = PLAIN | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"}
    yield Sampler("deis", "DEIS", "DEISMultistepScheduler", options)
    yield Sampler("tcd", "TCD", "TCDScheduler", step=("eta",))
    yield Sampler(OWN, "Model's own", "")


SAMPLERS = {sampler.name: sampler for sampler in _samplers()}
# The schedule to name where a sampler does not take one.
_NEAREST = {"karras": "sgm_uniform", "simple": "sgm_uniform", "beta": "uniform", "normal": "uniform"}


def _folded(name: str) -> str:
    """Without what people spell in many ways: case, spaces, dashes, underscores. ++ is pp."""
    return re.sub(r"[\s_\-.]+", "", name.lower().replace("++", "pp"))


def _spelled(table: Mapping[str, Any]) -> dict[str, str]:
    """Every folded name of a table's entries → ours."""
    names: dict[str, str] = {}
    for name, known in table.items():
        kind = getattr(known, "kind", "")
        # The first of a class has its name. That of singlestep solvers means another algorithm by default.
        is_first = kind not in {"", _SINGLE, *(getattr(table[other], "kind", "") for other in names.values())}
        kinds = (kind, kind.removesuffix("Scheduler")) if is_first else ()
        for spelling in (name, known.a1111, *getattr(known, "also", ()), *kinds):
            names.setdefault(_folded(spelling), name)
    return names


_SAMPLERS, _SCHEDULES = _spelled(SAMPLERS), _spelled(SCHEDULES) | {"ays": "align_your_steps"}


def split(name: str) -> tuple[Sampler, str]:
    """The sampler and the schedule that a name means, "DPM++ 2M SDE Karras" or "dpmpp_2m_sde_karras" alike.
    Raises TightfitError for one that is not known."""
    folded = _folded(name)
    if folded in _SAMPLERS:
        return SAMPLERS[_SAMPLERS[folded]], AUTOMATIC
    for ending, schedule in _SCHEDULES.items():
        if folded.endswith(ending) and (known := _SAMPLERS.get(folded.removesuffix(ending))):
            return SAMPLERS[known], schedule
    close = get_close_matches(folded, _SAMPLERS, 1)
    meant = f" (did you mean {_SAMPLERS[close[0]]}?)" if close else ""
    raise TightfitError(f"unknown scheduler '{name}'{meant}: choose {', '.join(SAMPLERS)}")


def schedule_of(name: str) -> str:
    """Our name of a schedule. Raises TightfitError for one that is not known."""
    if known := _SCHEDULES.get(_folded(name)):
        return known
    close = get_close_matches(_folded(name), _SCHEDULES, 1)
    meant = f" (did you mean {_SCHEDULES[close[0]]}?)" if close else ""
    raise TightfitError(f"unknown schedule '{name}'{meant}: choose {', '.join(SCHEDULES)}")


def joined(sampler: Sampler, schedule: str) -> str:
    """One name for both, which `split` reads."""
    return sampler.name if schedule == AUTOMATIC else f"{sampler.name}_{schedule}"


def a1111_fields(name: str) -> dict[str, str]:
    """A1111's fields. Its older versions, and who reads its pictures, know the schedule as part of the
    sampler's name."""
    sampler, schedule = split(name)
    if schedule == AUTOMATIC:
        return {"Sampler": sampler.a1111}
    label = SCHEDULES[schedule].a1111
    return {"Sampler": f"{sampler.a1111} {label}", "Schedule type": label}


def of_a1111(name: str, schedule: str, automatic: bool = True) -> str:
    """Our name for what A1111 calls so. A name that is not known stays, and is refused later. `automatic`:
    where no schedule is said, it is the one that A1111 takes."""
    try:
        sampler, part = split(name)
        asked = part if part != AUTOMATIC else schedule_of(schedule or AUTOMATIC)
    except TightfitError:
        return f"{name} {schedule}" if schedule.lower() != AUTOMATIC else name
    return joined(sampler, sampler.automatic if asked == AUTOMATIC and automatic else asked)


def nearest(schedule: str, known: tuple[str, ...]) -> str:
    """Of `known` schedules that one which is most like `schedule`."""
    near = _NEAREST.get(schedule, "uniform")
    return schedule if schedule in known else near if near in known else AUTOMATIC
