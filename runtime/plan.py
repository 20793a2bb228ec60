"""Which way to run a model. Pure choice: no device is touched and no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import TightfitError
from .hardware import DEVICES, Hardware
from .spec import PRECISION_BYTES, ModelSpec

VERSION = 1
PRECISIONS = ("auto", *PRECISION_BYTES)
RESIDENCIES = ("auto", "resident", "staged")
CFG = ("batched", "sequential")


@dataclass(frozen=True)
class Placement:
    """How one component runs, and the bytes its weights take there.

    residency: `resident` (stays loaded) or `staged` (loaded for its stage, freed after it).
    """

    backend: str
    precision: str
    residency: str
    attention: str
    tiling: str
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """Every decision about one run of one model on one device, with the reasons. `cfg` is batched or sequential."""

    model: str
    device: str
    cfg: str
    placements: Mapping[str, Placement]
    reasons: tuple[str, ...]
    version: int = VERSION

    @property
    def weight_bytes(self) -> int:
        """Most bytes of weights that are loaded at one time."""
        resident = sum(p.weight_bytes for p in self.placements.values() if p.residency == "resident")
        return resident + max((p.weight_bytes for p in self.placements.values() if p.residency == "staged"), default=0)

    @property
    def precision(self) -> str:
        """The U-Net's, by which a plan is called."""
        return self.placements["unet"].precision

    def summary(self) -> str:
        """One phrase: 'torch bf16 on cpu, staged, batched CFG'."""
        unet = self.placements["unet"]
        return f"{unet.backend} {unet.precision} on {self.device}, {unet.residency}, {self.cfg} CFG"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `json.dumps(plan.to_json())` saved. Raises TightfitError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("version") != VERSION:
                raise TightfitError(f"this plan is not of version {VERSION}: make it again with 'tightfit plan'")
            placements = {name: Placement(**fields) for name, fields in data.pop("placements").items()}
            plan = cls(placements=placements, reasons=tuple(data.pop("reasons")), **data)
            if (
                plan.cfg not in CFG
                or plan.device not in DEVICES
                or not {"unet", "vae_decoder", "text_encoder"} <= placements.keys()
            ):
                raise ValueError("it leaves open how something runs")
            for placement in placements.values():
                if placement.precision not in PRECISION_BYTES or placement.residency not in RESIDENCIES[1:]:
                    raise ValueError(f"it has {placement.precision} and {placement.residency}")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TightfitError(f"this is not a tightfit plan ({error}): make it again with 'tightfit plan'") from None


def check_choices(precision: str, residency: str) -> None:
    """Raise TightfitError for a name that no plan knows."""
    if precision not in PRECISIONS:
        raise TightfitError(f"unknown precision '{precision}': choose {', '.join(PRECISIONS)}")
    if residency not in RESIDENCIES:
        raise TightfitError(f"unknown residency '{residency}': choose {', '.join(RESIDENCIES)}")


def plan(hardware: Hardware, spec: ModelSpec, precision: str = "auto", residency: str = "auto") -> list[Plan]:
    """Ways to run `spec` on `hardware`, best first. For now that is one: a fixed choice, which the caller can steer."""
    check_choices(precision, residency)
    reasons = []
    chosen, why = _precision(hardware, precision)
    reasons.append(f"{chosen}: {why}")
    precisions = dict.fromkeys(spec.components, chosen)
    if chosen == "fp16" and spec.family == "sdxl" and spec.vae.get("force_upcast", True):
        precisions["vae_decoder"] = "bf16" if "bf16" in hardware.precisions else "fp32"
        reasons.append(f"vae_decoder {precisions['vae_decoder']}: this SDXL VAE overflows in fp16")
    sizes = {name: c.weight_bytes(precisions[name]) for name, c in spec.components.items()}
    stay, why = _residency(hardware, sum(sizes.values()), residency)
    reasons.append(f"{stay}: {why}")
    placements = {name: Placement("torch", precisions[name], stay, "sdpa", "whole", sizes[name]) for name in spec.components}
    return [Plan(spec.name, hardware.device, "batched", placements, tuple(reasons))]


def _precision(hardware: Hardware, asked: str) -> tuple[str, str]:
    if asked == "auto":
        return hardware.precisions[0], f"{hardware.name} computes in it natively and it is the fastest of those"
    if asked not in hardware.precisions:
        return asked, f"asked for, although {hardware.name} has no arithmetic for it: expect it to be slow"
    return asked, "asked for"


def _residency(hardware: Hardware, total: int, asked: str) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for" if asked == "resident" else "each part is loaded for its stage and freed after it"
    if total <= hardware.free_bytes // 4:
        return "resident", "all weights together take less than a quarter of the free memory"
    return "staged", "all weights together take more than a quarter of the free memory"
