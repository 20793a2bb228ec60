"""What the caller decides of a plan, and leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import TightfitError
from ..fields import described, option
from ..placement import ATTENTIONS, BACKENDS, CFG, COMPUTES, PRECISIONS, RESIDENCIES, TILINGS, Placement
from ..request import MOST_CACHED
from ..units import parse_bytes

_PANEL = "Machine"
# Least decibels, against the same with all steps in full, that step caching may have, and packed fp32 against
# plain: where none is said, no step is cached and nothing packed.
PREFERENCES = {"quality": None, "balanced": 45.0, "speed": 30.0}


def _word(help: str, choices: tuple[str, ...] = ()) -> Any:  # noqa: A002
    return option("auto", help, "NAME", choices=choices, panel=_PANEL)


@dataclass(frozen=True)
class Wishes:
    """What the caller decides; "auto" and None leave it to the planner.

    `backend` is of every component that is there for it, `provider` ONNX Runtime's, by its name or a part of
    that such as cuda. `budget` is bytes or text such as "4GiB", context included; `min_psnr` decibels against
    fp32. `prefer` says how much quality may go for speed, by the caching of steps where a request leaves it
    open, and by fp32 in oneDNN's order: none, hardly any, or some. `compile` has the denoiser's repeated
    blocks compiled by torch, which takes seconds once; `cuda_graphs` has its calls recorded. `requests` says
    how many will run with the components that stay loaded, which share the time of loading them;
    `images_per_call` how many pictures may go through the U-Net at once; `cache_every` of how many steps one
    is taken in full, where a request leaves that open; `loaded` how those are placed that a pass before
    leaves loaded, by name; `after` how the U-Net ran in that pass, in whose precision this one runs if it
    fits.
    """

    backend: str = _word(f"auto, {', '.join(BACKENDS)}.", BACKENDS)
    provider: str = _word("Of onnx: cuda, dml, cpu …")
    precision: str = _word(f"auto, {', '.join(PRECISIONS)}.", PRECISIONS)
    compute: str = _word(f"int8/int4: {', '.join(COMPUTES)}.", COMPUTES)
    residency: str = _word(f"{', '.join(RESIDENCIES)}.", RESIDENCIES)
    attention: str = _word(f"auto, {', '.join(ATTENTIONS)}.", ATTENTIONS)
    tiling: str = _word(f"VAE: auto, {', '.join(TILINGS)}.", TILINGS)
    cfg: str = _word("", CFG)
    budget: Any = option(  # noqa: RUF009
        None, "Keep to it: 4GiB.", "BYTES", options=("--vram", "--ram"), panel=_PANEL
    )
    min_psnr: float | None = option(None, "Least dB against fp32.", "DB", bounds=(0, 99), panel=_PANEL)
    prefer: str = option(
        "quality", f"{', '.join(PREFERENCES)}.", "NAME", choices=tuple(PREFERENCES), panel=_PANEL
    )
    compile: bool = option(False, "Compile blocks.", options=("--compile",), panel=_PANEL)
    cuda_graphs: bool = option(False, "Replay its calls.", options=("--cuda-graphs",), panel=_PANEL)
    requests: int = 1
    images_per_call: int = 1
    cache_every: int | None = None
    loaded: tuple[tuple[str, Placement], ...] = ()
    after: Placement | None = None

    def __post_init__(self) -> None:
        """Raise TightfitError for what no plan knows; a budget may be text, such as "4GiB"."""
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_bytes(self.budget, "budget"))
        known = described(Wishes)
        least, most = known["min_psnr"].bounds or (0, 0)
        if self.min_psnr is not None and not least <= self.min_psnr <= most:
            said = f"decibels from {least} to {most}, which is fp32 itself"
            raise TightfitError(f"min_psnr must be {said}, not {self.min_psnr:g}")
        if self.cache_every is not None and self.cache_every not in range(1, MOST_CACHED + 1):
            said = f"a whole number from 1 to {MOST_CACHED}, of how many steps one is taken in full"
            raise TightfitError(f"cache_every must be {said}, not {self.cache_every!r}")
        for name in ("compile", "cuda_graphs"):
            if not isinstance(value := getattr(self, name), bool):  # "no" would be true
                raise TightfitError(f"{name} must be true or false, not {value!r}")
        for name, words in ((name, of.choices) for name, of in known.items() if of.choices):
            if (value := getattr(self, name)) not in ("auto", *words):
                raise TightfitError(f"unknown {name} '{value}': choose auto, {', '.join(words)}")
