"""What the caller decides of a plan, and leaves open."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import TightfitError
from ..placement import CFG, CHOICES
from ..units import parse_bytes


@dataclass(frozen=True)
class Wishes:
    """What the caller decides; "auto" and None leave it to the planner.

    `backend` is of every component that is there for it, `provider` ONNX Runtime's, by its name or a part of that such as cuda.
    `budget` is bytes or text such as "4GiB", context included; `min_psnr` decibels against fp32. `requests` says how many
    will run with the components that stay loaded, which share the time of loading them.
    """

    backend: str = "auto"
    provider: str = "auto"
    precision: str = "auto"
    compute: str = "auto"
    residency: str = "auto"
    attention: str = "auto"
    tiling: str = "auto"
    cfg: str = "auto"
    budget: Any = None
    min_psnr: float | None = None
    requests: int = 1

    def __post_init__(self) -> None:
        """Raise TightfitError for what no plan knows; a budget may be text, such as "4GiB"."""
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_bytes(self.budget, "budget"))
        if self.min_psnr is not None and not 0 <= self.min_psnr <= 99:
            raise TightfitError(f"min_psnr must be decibels from 0 to 99, which is fp32 itself, not {self.min_psnr:g}")
        known = {**CHOICES, "cfg": CFG}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in known and value not in ("auto", *known[field.name]):
                raise TightfitError(f"unknown {field.name} '{value}': choose auto, {', '.join(known[field.name])}")
