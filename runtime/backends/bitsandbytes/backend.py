"""The torch engine, which leaves a denoiser's linears to bitsandbytes."""

from __future__ import annotations

from typing import NamedTuple

from ....kernels import nf4
from ...machine.hardware import Hardware
from ...models.families.family import Extent, Role
from ...models.spec import Component, ModelSpec
from ...placement import Placement
from ...rules import Rule, first_broken
from ..torch.backend import TorchBackend


class _Case(NamedTuple):
    """What the rules below look at."""

    component: Component
    placement: Placement
    hardware: Hardware


_REFUSALS: tuple[Rule[_Case], ...] = (
    Rule(
        lambda case: case.hardware.device not in ("cuda", "cpu"),
        "bitsandbytes is used on CUDA, ROCm and CPUs: leave out --backend bitsandbytes",
    ),
    Rule(
        lambda case: case.hardware.providers is None and nf4.problem(),  # only of the machine that this is
        lambda case: f"bitsandbytes does not run here: {nf4.problem()}",  # noqa: ARG005
    ),
    Rule(
        lambda case: case.placement.precision != "int4",
        "bitsandbytes multiplies by NF4 here, 4 bits: choose int4",
    ),
    Rule(
        lambda case: case.component.formats is not None,
        "weights that were exported are in other formats than bitsandbytes': use the original model",
    ),
    Rule(
        lambda case: not all(patch.low_rank for patch in case.component.patches),
        "bitsandbytes dequantises no weight for an adapter of this form: leave out --backend bitsandbytes",
    ),
)


class BitsAndBytesBackend(TorchBackend):
    @staticmethod
    def refuses(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> str | None:
        """Why the component cannot run with this placement on that hardware, or None if it can."""
        denoises = component.role is Role.DENOISER
        own = first_broken(_REFUSALS, _Case(component, placement, hardware)) if denoises else None
        return own or TorchBackend.refuses(spec, component, placement, hardware, extent)
