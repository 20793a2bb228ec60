"""What the torch engine knows of any machine: what it refuses, and what dry runs have found out. Imports
torch where that is asked of it and is not known."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from typing import Any

from ...costs.footprint import Footprint
from ...costs.known import KNOWN
from ...machine.hardware import Hardware
from ...machine.remembered import TORCH
from ...models.families.family import SHALLOW, STEPPING, Extent, Role
from ...models.spec import Component, ModelSpec
from ...placement import DYNAMIC, QUANTISED, Placement
from ...recent import Recent
from ...rules import Rule, first_broken

_orders: Recent[tuple[str, ...]] = Recent(64)


@dataclass(frozen=True)
class _Case:
    """What the rules below look at: a component, its placement and the hardware."""

    component: Component
    placement: Placement
    hardware: Hardware

    @property
    def dynamic(self) -> bool:
        return self.placement.precision == DYNAMIC

    @property
    def streamed(self) -> bool:
        return self.placement.residency == "streamed"

    @property
    def quantised(self) -> bool:
        return self.placement.precision in QUANTISED or self.component.formats is not None

    @property
    def compute(self) -> str:
        return self.placement.compute

    @property
    def compiled(self) -> bool:
        return self.placement.compiled

    @functools.cached_property
    def compiler_problem(self) -> str | None:
        return _compiler_problem(self.hardware)

    @functools.cached_property
    def triton_problem(self) -> str | None:
        return _triton_problem(self.hardware)


_REFUSALS: tuple[Rule[_Case], ...] = (
    Rule(
        lambda case: not case.component.tensors,
        lambda case: (
            f"the {case.component.name} is here as ONNX only: "
            "use --backend onnx, or the model it was exported from"
        ),
    ),
    # One message for all, as a cure for one of them alone would be refused for the next. Streamed weights are
    # put in place by hooks, which a compiled block does not call; quantised ones are dequantised into a
    # buffer that layers share, from which blocks answered wrongly; attention in parts is a loop that would be
    # written out.
    Rule(
        lambda case: (
            case.compiled
            and (
                case.streamed or case.quantised or case.placement.packed or case.placement.attention != "sdpa"
            )
        ),
        lambda case: (
            "compiled blocks need plain weights that stay loaded, in torch's order, and attention as one: "
            f"leave out --compile, or choose --precision {case.hardware.precisions[0]} --attention sdpa, "
            "without --prefer and streaming"
        ),
    ),
    Rule(
        lambda case: case.compiled and case.compiler_problem,
        lambda case: f"torch's compiler does not run here ({case.compiler_problem}): leave out --compile",
    ),
    Rule(
        lambda case: case.dynamic and "int8" not in case.hardware.rates,
        "this device has no fast 8-bit integer products that tightfit can use: choose int8",
    ),
    Rule(
        lambda case: case.dynamic and case.triton_problem,
        lambda case: (
            f"int8-dynamic needs Triton, which does not run here ({case.triton_problem}): choose int8"
        ),
    ),
    Rule(
        lambda case: (
            case.dynamic and case.hardware.device == "cpu" and case.compute not in case.hardware.precisions
        ),
        lambda case: f"oneDNN turns integer sums into {case.compute} only by a slow loop here: choose int8",
    ),
    Rule(
        lambda case: case.dynamic and case.streamed,
        "int8-dynamic packs its weights once, so they cannot stream: choose int8",
    ),
    Rule(
        lambda case: case.dynamic and case.component.role not in STEPPING,
        lambda case: f"int8-dynamic is for U-Nets: choose int8 for the {case.component.name}",
    ),
    Rule(
        lambda case: case.dynamic and not all(patch.low_rank for patch in case.component.patches),
        "int8-dynamic dequantises no weight, into which an adapter of this form is merged: choose int8",
    ),
    Rule(
        lambda case: case.quantised and any(patch.whole for patch in case.component.patches),
        lambda case: (
            "an adapter that scales columns (a DoRA over inputs) needs all of a weight at once, "
            f"and quantised ones are dequantised in parts: choose {case.hardware.precisions[0]}"
        ),
    ),
    Rule(
        lambda case: (
            case.streamed and case.placement.precision in QUANTISED and case.component.formats is None
        ),
        "weights that are quantised while they load cannot stream: export the model first",
    ),
    Rule(
        lambda case: case.streamed and case.component.role is Role.DECODER,
        "a VAE's weights, a hundredth of a U-Net's, must stay loaded: each strip reads them again",
    ),
    Rule(
        lambda case: (
            case.compute == "bf16" and case.hardware.capability and case.hardware.capability < (8, 0)
        ),
        lambda case: (
            f"cuDNN has no bf16 convolutions below compute capability 8.0: choose {_instead(case.hardware)}"
        ),
    ),
    Rule(
        lambda case: case.compute == "fp16" and case.hardware.half_is_broken,
        lambda case: (
            f"fp16 convolutions return NaN on {case.hardware.name}: choose {_instead(case.hardware)}"
        ),
    ),
    Rule(
        lambda case: case.placement.packed and "fp32" not in TORCH.said().packs,
        "torch has no products by packed weights for this processor: make a plan without --prefer",
    ),
    Rule(
        lambda case: case.placement.captured and case.hardware.device != "cuda",
        lambda case: f"CUDA has graphs, {case.hardware.device} has none: leave out --cuda-graphs",
    ),
    Rule(
        lambda case: case.placement.captured and case.streamed,
        "weights that stream are copied by the host, call by call, which no CUDA graph does: "
        "leave out --cuda-graphs",
    ),
    Rule(
        lambda case: case.streamed and case.hardware.unified and case.hardware.device == "cuda",
        "GPU and host share one memory: streamed weights would be in it twice",
    ),
    Rule(
        lambda case: (
            case.hardware.device == "cpu" and case.compute == "fp16" and case.placement.attention == "sliced"
        ),
        "torch multiplies fp16 matrices 30 times slower than fp32 ones on a CPU",
    ),
)


class TorchEngine:
    @staticmethod
    def refuses(
        spec: ModelSpec,  # noqa: ARG004
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,  # noqa: ARG004
    ) -> str | None:
        """Why the component cannot run with this placement on that hardware, or None if it can."""
        return first_broken(_REFUSALS, _Case(component, placement, hardware))

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """A module's needs are checked when it is built."""

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> Footprint:
        """Memory of the component called at `extent`: batch, and the picture's height and width in pixels.

        By a dry run, which is cached, by commands also for the next process.
        """
        said = TORCH.said()
        environment = (
            spec.family, hardware.device, hardware.name, hardware.capability, hardware.fused_attention,
            said.version, said.threads, said.capability, *extent[1:3],
        )  # fmt: skip
        module = module_key(component, placement, hardware.device)
        way = (astuple(placement), module, extent.cache, *spec.inputs(component, *extent).items())

        def followed() -> Footprint:
            from . import dryrun

            return dryrun.footprint(spec, component, placement, hardware, extent)

        known = KNOWN.get(component, environment, way, followed)
        if extent.cache != SHALLOW:
            _orders.get(module, lambda: tuple(path for path, *_ in known.trace.calls), component)
        return known


def call_order(component: Component, placement: Placement, device: str) -> tuple[str, ...]:
    """Paths of the component's parts in call order, from the dry run at any size; empty if it was never
    planned."""
    return _orders.get(module_key(component, placement, device), tuple, component)


def module_key(component: Component, placement: Placement, device: str) -> tuple[str, str, str]:
    """What a component's module depends on."""
    weights_are = placement.precision if placement.precision in QUANTISED else ""
    if device == "cpu" and packs(component, placement):
        weights_are = "packed"
    return placement.backend, weights_are, device


def packs(component: Component, placement: Placement) -> bool:
    """Whether this CPU packs the component's plain weights."""
    return component.is_ordered(placement) and placement.compute in TORCH.said().packs


def _triton_problem(hardware: Hardware) -> str | None:
    """Why Triton fails on the GPU of this machine; None for a GPU that is only planned for."""
    if hardware.device != "cuda" or hardware.providers is not None:
        return None
    import torch

    from ....kernels.dequantise import triton_problem

    return triton_problem(torch.device("cuda")) if torch.cuda.is_available() else None


def _compiler_problem(hardware: Hardware) -> str | None:
    """Why torch's compiler fails on this machine; None for a device that is only planned for."""
    if hardware.providers is not None:
        return None
    import torch

    from . import compiled

    part: Any = torch.backends.mps if hardware.device == "mps" else getattr(torch, hardware.device)
    return compiled.compiler_problem(torch.device(hardware.device)) if part.is_available() else None


def _instead(hardware: Hardware) -> str:
    """A precision that works, to name in place of the refused one."""
    best = hardware.precisions[0]
    return f"{best}, or int8 or int4, which compute in {best} here"
