"""Machines from the tables in profiles/, which need not be present, and what cards of one class share."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from .hardware import (
    _AMD,
    CUDA_CONTEXT,
    DESKTOP,
    GIB,
    METAL_SHARE,
    ROCM_CONTEXT,
    SYSTEM,
    Hardware,
    half_is_broken,
    workspaces_of,
)
from .process import PROCESS
from .providers import CPU_PROVIDER, PROVIDERS

PROFILES = Path(__file__).parents[2] / "profiles"
CLASSES = PROFILES / "classes.toml"  # not a card: what the cards of a class share


# The host's time to issue one operator to a GPU: the fastest published steps, divided by the operators of a
# U-Net in diffusers (698 of SD 1.5's, 1708 of SDXL's). 35 us on an RTX 4090, 46 on an A100, at most 49 on an
# H100 (benchmarks/published.toml).
OPERATOR_SECONDS = 4e-5


def cards() -> tuple[str, ...]:
    """The names that `profile` takes, sorted."""
    return tuple(sorted(file.stem for file in PROFILES.glob("*.toml") if file != CLASSES))


def profile(name: str) -> Hardware:
    """The card or machine of `profiles/NAME.toml`, with a desktop running on it. Raises TightfitError for an
    unknown name."""
    if name.lower() not in cards():
        # rtx-3060 is sold with two sizes of memory.
        same = [card for card in cards() if name and card.startswith(name.lower())]
        close = same or get_close_matches(name.lower(), cards(), 1)
        meant = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise TightfitError(f"unknown hardware '{name}'{meant}: choose {', '.join(cards())}")
    data = read_profile(PROFILES / f"{name.lower()}.toml")
    total, unified, device = int(data["memory_gib"] * GIB), data["unified"], data["device"]
    of_amd = device == "cuda" and "capability" not in data  # torch calls AMD's cards cuda too
    context = (
        PROCESS
        if device == "cpu"
        else 0
        if unified and device == "mps"
        else ROCM_CONTEXT
        if of_amd
        else CUDA_CONTEXT
    )
    reserved = SYSTEM if unified else DESKTOP
    rates = {precision: teraflops * 1e12 for precision, teraflops in data["tflops"].items()}
    gpu, capability = device != "cpu", tuple(data["capability"]) if "capability" in data else None
    halves = () if not gpu or half_is_broken(data["name"], capability) else ("fp16", "bf16")
    missing = _AMD if device == "cuda" and not of_amd else {"CUDAExecutionProvider"}
    listed = (*(provider for provider in PROVIDERS[device] if gpu and provider not in missing), CPU_PROVIDER)
    made = Hardware(
        providers=listed,
        device=device,
        name=data["name"],
        total_bytes=total,
        free_bytes=int(total * METAL_SHARE) if device == "mps" else total - reserved,
        precisions=(*(p for p in halves if p in rates), "fp32"),
        capability=capability,
        rates=with_int8(rates, tuple(data.get("capability", ()))),
        bandwidth=data["bandwidth_gb_s"] * 1e9,
        bus=data["bus_gb_s"] * 1e9,
        host_bytes=total - reserved if unified else 12 * GIB,
        context_bytes=context,
        workspaces=workspaces_of(capability, of_amd) if device == "cuda" else (),
        fused_attention=data["fused_attention"],
        unified=unified,
        notes=(
            f"assumes that the system holds {SYSTEM / GIB:.0f} GiB of the memory"
            if unified
            else "assumes that a desktop holds 0.5 GB of the card, and that 12 GiB of host memory are free",
        ),
    )
    return with_origin(with_efficiency(made, data))


def read_profile(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return tomllib.load(stream)


@functools.cache
def _classes() -> tuple[dict[str, Any], ...]:
    return tuple(read_profile(CLASSES)["classes"])


def card_class(name: str, capability: tuple[int, int] | None) -> dict[str, Any]:
    """What NVIDIA's cards of this class share, from profiles/classes.toml; empty if no run of one is
    published."""
    broken = half_is_broken(name, capability)
    same = (entry for entry in _classes() if capability and list(capability) == entry["capability"])
    return next((entry for entry in same if entry.get("half_is_broken", False) == broken), {})


def with_efficiency(made: Hardware, card: Mapping[str, Any] | None) -> Hardware:
    """`made` with the share of its rates that published runs reach on it or on cards of its class. `card` is
    its profile."""
    efficiency = card_class(made.name, made.capability).get("efficiency", {}) | (card or {}).get(
        "efficiency", {}
    )
    rates = "the maker's rates" if card else "rates estimated from its multiprocessors and clock"
    how = "scaled by published runs of such cards" if efficiency else "so they are a lower bound"
    issue_seconds = 0.0 if made.device == "cpu" else OPERATOR_SECONDS
    return replace(
        made, efficiency=efficiency, operator_seconds=issue_seconds, seconds_from=f"{rates}, {how}"
    )


def with_origin(made: Hardware) -> Hardware:
    """`made` with a note about what its seconds rest on."""
    return replace(made, notes=(f"seconds come from {made.seconds_from}", *made.notes))


def with_int8(rates: Mapping[str, float], capability: tuple[int, ...] | None) -> Mapping[str, float]:
    """`rates` with int8 where tightfit can use it, on tensor cores since Ampere (kernels/triton_int8.py).
    Without a known rate it is twice fp16's (NVIDIA's GA102 whitepaper, version 2)."""
    able = capability is not None and capability >= (8, 0)
    all_rates = {"int8": 2 * rates["fp16"], **rates} if able else rates
    return {kind: rate for kind, rate in all_rates.items() if able or kind != "int8"}
