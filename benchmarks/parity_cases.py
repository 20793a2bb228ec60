"""Kinds of models and schedulers whose pictures must equal diffusers' own, for tests/runtime and
parity.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ..runtime.models.families.networks import DECODER, UNET

Config = Mapping[str, Any]
PROMPT, SEED = "a red heart", 7
# Where choices differ in rounding, diffusers'.
AS_DIFFUSERS: dict[str, Any] = {"attention": "sdpa", "tiling": "whole", "cfg": "batched"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Our name → diffusers' class, and what its documentation changes.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m_karras": (DPM, {"use_karras_sigmas": True}),
    "unipc": (UNIPC, {}),
    "lcm": ("LCMScheduler", {}),
}
# Models' own schedulers: one of each class as models publish them, and options that were once dropped.
OWN: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction"},
    "ddim-2022": {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0},
    "ddim-parallel": {"_class_name": "DDIMParallelScheduler"},
    "ddpm": {"_class_name": "DDPMScheduler"},
    "ddpm-v": {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction",
        "variance_type": "fixed_large"},
    "ddpm-parallel": {"_class_name": "DDPMParallelScheduler"},
    "deis": {"_class_name": "DEISMultistepScheduler"},
    "dpm-sde": {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "dpm-3": {"_class_name": DPM, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "dpm-lu": {"_class_name": DPM, "use_lu_lambdas": True, "euler_at_final": True},
    "dpm-flow": {"_class_name": DPM, **FLOW},
    "dpm-torchsde": {"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 5},
    "dpm-single": {"_class_name": "DPMSolverSinglestepScheduler", "use_karras_sigmas": True},
    "edm-dpm": {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0, "sigma_min": 0.002,
        "sigma_data": 0.5},
    "edm-euler": {"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"},
    "euler": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True,
        "timestep_spacing": "trailing"},
    "euler-continuous": {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous",
        "prediction_type": "v_prediction", "sigma_min": 0.03, "sigma_max": 14.6, "use_karras_sigmas": True},
    "euler_a": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "heun": {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True},
    "heun-2022": {"_class_name": "HeunDiscreteScheduler", "timestep_spacing": "leading"},
    "kdpm2": {"_class_name": "KDPM2DiscreteScheduler"},
    "kdpm2_a": {"_class_name": "KDPM2AncestralDiscreteScheduler", "use_karras_sigmas": True},
    "lcm": {"_class_name": "LCMScheduler", "clip_sample": True, "original_inference_steps": 20},
    "lms": {"_class_name": "LMSDiscreteScheduler"},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "pndm-prk": {"_class_name": "PNDMScheduler"},
    "sa": {"_class_name": "SASolverScheduler"},
    "sa-flow": {"_class_name": "SASolverScheduler", **FLOW},
    "tcd": {"_class_name": "TCDScheduler"},
    "unipc": {"_class_name": UNIPC, "solver_order": 3, "use_karras_sigmas": True},
    "unipc-flow": {"_class_name": UNIPC, **FLOW},
}  # fmt: skip
NEEDS = {"lms": "scipy", "dpm-torchsde": "torchsde"}
FAMILY = {
    "ddim": "sd2",
    "dpm-sde": "sdxl",
    "euler": "sdxl",
    "dpm-flow": "sdxl",
    "edm-dpm": "sdxl",
    "tcd": "sdxl",
    "kdpm2": "sdxl",
}
# Models trained by flow matching, and what our names mean for them: family, config, name → diffusers' config.
# _SHIFT has no betas, which flows do not need.
_SHIFT = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 3.0,
}
FLOWS: dict[str, tuple[str, Config, dict[str, Config]]] = {
    "unipc": ("sdxl", {**BETAS, "_class_name": UNIPC, **FLOW}, {
        "unipc": {**BETAS, "_class_name": UNIPC, **FLOW},
        "dpmpp_2m_karras": {**BETAS, "_class_name": DPM, **FLOW},
        "euler": _SHIFT,
    }),
    "euler": ("sd1", _SHIFT, {
        "unipc": {"_class_name": UNIPC, **FLOW}, "dpmpp_2m_karras": {"_class_name": DPM, **FLOW},
        "euler": _SHIFT,
    }),
}  # fmt: skip
EDM = {"euler": "EDMEulerScheduler", "dpmpp_2m_karras": "EDMDPMSolverMultistepScheduler"}
# Playground 2.5 and similar: a mean and a deviation per channel of the latents.
AFFINE = {
    "latents_mean": [-1.65, 0.13, -0.66, 1.3],
    "latents_std": [8.47, 5.98, 7.98, 4.21],
    "scaling_factor": 0.5,
}
CONSISTENT = {"_class_name": "LCMScheduler", "clip_sample_range": 0.5, "steps_offset": 0}
_V = {"prediction_type": "v_prediction"}
_ZERO_SNR = {**_V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_DDIM = {"_class_name": "DDIMScheduler", **BETAS}


@dataclass(frozen=True)
class Case:
    """A tiny model of `family`, with `changes` to its components' configs and the scheduler config `own`,
    painted with the scheduler `asked`; and diffusers' pipeline with the scheduler config `theirs`."""

    kind: str
    name: str
    family: str
    own: Config
    theirs: Config
    asked: str | None = None
    options: Config = field(default_factory=lambda: {"num_inference_steps": 4, "guidance_scale": 4.0})
    changes: Mapping[str, Config] = field(default_factory=dict)
    pipeline: str = ""

    @property
    def lacks(self) -> str:
        """The missing package that diffusers' scheduler needs, or ""."""
        need = NEEDS.get(self.name, "")
        return "" if not need or find_spec(need) else need


def cases() -> Iterator[Case]:
    """All cases, grouped by kind and family."""
    yield from _of_schedulers()
    yield from _of_flows()
    yield from _of_pipelines()


def _of_schedulers() -> Iterator[Case]:
    for name, config in OWN.items():
        full = {**BETAS, **config}
        yield Case("a model's own scheduler", name, FAMILY.get(name, "sd1"), full, full)
    for kind, fields in (("v-prediction", _V), ("zero terminal SNR", _ZERO_SNR)):
        for name, (cls, changes) in SCHEDULERS.items():
            if fields is _V or name in ("ddim", "dpmpp_2m_karras", "unipc", "lcm"):
                yield Case(
                    kind,
                    name,
                    "sd2",
                    {**_DDIM, **fields},
                    {**_DDIM, **fields, **changes, "_class_name": cls},
                    name,
                )
    karras = {**BETAS, **OWN["dpm-sde"]}
    plain = {"use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}
    for name, (cls, changes) in SCHEDULERS.items():
        expected = {**karras, **plain, **changes, "_class_name": cls}
        yield Case("a name, of a model with SDE and Karras", name, "sdxl", karras, expected, name)


def _of_flows() -> Iterator[Case]:
    for own_name, (family, config, names) in FLOWS.items():
        yield Case("flow matching", f"{own_name}: its own", family, config, config)
        for name, expected in names.items():
            yield Case("flow matching", f"{own_name}: {name}", family, config, expected, name)
    for name, cls in EDM.items():
        yield Case(
            "in EDM's terms", name, "sdxl", OWN["edm-dpm"], {**OWN["edm-dpm"], "_class_name": cls}, name
        )


def _of_pipelines() -> Iterator[Case]:
    for clip in (True, False):
        config = {**BETAS, **CONSISTENT, "clip_sample": clip}
        yield Case("latent consistency", f"clip_sample {clip}, its defaults", "sd1", config, config,
                   options={}, changes={UNET.folder: {"time_cond_proj_dim": 16}},
                   pipeline="LatentConsistencyModelPipeline")  # fmt: skip
    for field_ in ({}, {"steps_offset": 0, "clip_sample": True}, _V):
        name = ", ".join(f"{key} {value}" for key, value in field_.items()) or "no more than betas"
        yield Case("configs of 2022", name, "sd1", {**_DDIM, **field_}, {**_DDIM, **field_})
    euler = {**BETAS, "_class_name": "EulerDiscreteScheduler"}
    for family in ("sdxl", "sd1"):
        yield Case(
            "latents_mean and latents_std", family, family, euler, euler, changes={DECODER.folder: AFFINE}
        )
    old = {"sample_size": 32, "_diffusers_version": "0.6.0"}
    yield Case(
        "sizes", "sample_size 32 of 2022, the default size", "sd1", euler, euler, changes={UNET.folder: old}
    )
    for family in ("sd1", "sdxl"):
        size = {"num_inference_steps": 4, "width": 72, "height": 104}
        yield Case(
            "sizes", f"72x104, {family}: latents that halve unevenly", family, euler, euler, options=size
        )
    for guidance in (0.0, 1.0, 7.5):
        options = {"num_inference_steps": 4, "guidance_scale": guidance}
        yield Case("guidance", f"{guidance:g}", "sdxl", euler, euler, options=options)
    for negative in ("", "blurry"):
        options = {"num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": negative}
        yield Case("a negative prompt, SDXL", repr(negative), "sdxl", euler, euler, options=options)
