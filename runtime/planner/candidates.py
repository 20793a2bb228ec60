"""Every way to run a request: engines, precisions, residencies, attentions, tilings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from ..backends import engine
from ..errors import TightfitError
from ..machine.hardware import Hardware
from ..machine.providers import CPU_PROVIDER, PACKAGES, PROVIDERS, provider_name, provider_problems
from ..models.spec import Component, ModelSpec
from ..placement import ATTENTIONS, CFG, DYNAMIC, QUANTISED, RESIDENCIES, STORED, TILINGS, Placement
from ..request import Request, guided
from .wishes import Wishes


def ways(hardware: Hardware, spec: ModelSpec, request: Request, wishes: Wishes) -> Iterator[tuple[str, dict[str, Placement]]]:
    modes = _options(wishes.cfg, CFG) if guided(spec, request) else ("batched",)
    seen = set()
    for engines in _engines(spec, wishes):
        graph = spec.components["unet"].graph if engines["unet"] == "onnx" else None
        tiled = graph is None or engines["vae_decoder"] == "torch"
        axes = (
            _of_graph(spec, wishes) if graph else _precisions(hardware, spec, wishes),
            _options(wishes.residency, RESIDENCIES if graph is None else RESIDENCIES[:2]),
            _options(wishes.attention, ATTENTIONS if tiled else ATTENTIONS[:1]),
            _options(wishes.tiling, TILINGS if tiled else TILINGS[:1]),
            modes,
        )
        for (precision, compute), residency, attention, tiling, cfg in product(*axes):
            choice = {"residency": residency, "attention": attention, "tiling": tiling}
            placements = {
                name: _on_onnx(hardware, spec, name, wishes, choice)
                if engine == "onnx"
                else _on_torch(hardware, spec, name, (precision, compute), choice)
                for name, engine in engines.items()
            }
            key = (cfg, *placements.values())
            if key not in seen:
                seen.add(key)
                yield cfg, placements


def _options(asked: str, known: Sequence[str]) -> Sequence[str]:
    return known if asked == "auto" else (asked,)


def _engines(spec: ModelSpec, wishes: Wishes) -> Iterator[dict[str, str]]:
    """Which engine runs each component, of those that can read it; the text encoders are run by one."""
    there = {name: _runnable(spec, component) for name, component in spec.components.items()}
    asked = wishes.backend if wishes.backend != "auto" else "onnx" if wishes.provider != "auto" else None
    if asked and not any(asked in engines for engines in there.values()):
        how = "export it with --to onnx" if asked == "onnx" else f"use {spec.source or 'the model'}, from which it was exported"
        if why := next((component.unreadable for component in spec.components.values() if component.unreadable), ""):
            how = f"{why}; or {how}"
        option = "--backend" if wishes.backend != "auto" else "--provider"
        raise TightfitError(f"{spec.name} has no weights that {asked} reads: {how}, or leave out {option}")
    of_kind: dict[str, tuple[str, ...]] = {}
    for name, engines in there.items():
        kind, own = name.removesuffix("_2"), (asked,) if asked and asked in engines else engines
        of_kind[kind] = tuple(each for each in of_kind.get(kind, own) if each in own) or own
    for chosen in product(*of_kind.values()):
        by_kind = dict(zip(of_kind, chosen, strict=True))
        picked = {name: by_kind[name.removesuffix("_2")] for name in there}
        yield {name: engine if engine in there[name] else there[name][0] for name, engine in picked.items()}


def _runnable(spec: ModelSpec, component: Component) -> tuple[str, ...]:
    """The engines that can run a component; a graph that ONNX Runtime cannot is passed over where torch has weights too."""
    if "onnx" not in component.engines:
        return component.engines
    try:
        engine("onnx").check(spec, component)
    except TightfitError:
        if not component.tensors:
            raise
        return ("torch",)
    return component.engines


def _on_torch(hardware: Hardware, spec: ModelSpec, name: str, kind: tuple[str, str], choice: Mapping[str, str]) -> Placement:
    vae, (precision, compute) = name == "vae_decoder", kind
    if precision == DYNAMIC and name != "unet":
        precision = "int8"  # a strip of a VAE would have another scale than the next; text encoders have little to gain
    computes = vae_compute(hardware, spec, compute) if vae else compute
    return Placement(
        "torch",
        precision if precision in QUANTISED else computes,
        computes,
        # a VAE is a hundredth of a U-Net: nothing to gain
        "staged" if vae and choice["residency"] == "streamed" else choice["residency"],
        choice["attention"] if name in ("unet", "vae_decoder") else "sdpa",
        choice["tiling"] if vae else "whole",
    )


def _on_onnx(hardware: Hardware, spec: ModelSpec, name: str, wishes: Wishes, choice: Mapping[str, str]) -> Placement:
    graph = spec.components[name].graph
    assert graph
    own = name == "unet"  # what is asked for is of the U-Net; the engine says that it cannot stream, or slice
    return Placement(
        "onnx",
        graph.precision,
        graph.compute,
        choice["residency"] if own or choice["residency"] != "streamed" else "staged",
        choice["attention"] if own else "sdpa",
        choice["tiling"] if name == "vae_decoder" and wishes.tiling != "auto" else "whole",
        chosen_provider(hardware, wishes.provider),
    )


def chosen_provider(hardware: Hardware, asked: str) -> str:
    """The execution provider that is asked for, by its name or the start of that; or the best that is here."""
    there = hardware.onnx_providers()
    if asked == "auto":
        return next((each for each in PROVIDERS[hardware.device] if each in there), CPU_PROVIDER)
    known = {provider_name(each): each for names in PROVIDERS.values() for each in names}  # none that sends the model elsewhere
    short = provider_name(asked).replace("directml", "dml")
    if known.get(short) not in there:
        usable = ", ".join(name for name, each in known.items() if each in there)
        cure = f"choose {usable}" if usable else "it is not installed, pip install 'tightfit[cpu]' or [gpu]"
        if hardware.providers is None and (why := provider_problems().get(known.get(short, ""))):
            raise TightfitError(f"ONNX Runtime's provider '{asked}' does not run here ({why}): {cure}")
        if short in map(provider_name, there):
            raise TightfitError(f"tightfit does not run on ONNX Runtime's provider '{asked}': {cure}")
        fits = hardware.providers is None and known.get(short) in PROVIDERS[hardware.device]  # this machine, and its kind of device
        if usable and fits and short in PACKAGES and (short != "dml" or sys.platform == "win32"):
            cure = f"pip install onnxruntime-{PACKAGES[short]} in place of onnxruntime, or {cure}"
        raise TightfitError(f"ONNX Runtime has no provider '{asked}' for {hardware.name}: {cure}")
    return known[short]


def _of_graph(spec: ModelSpec, wishes: Wishes) -> list[tuple[str, str]]:
    """The one way that the U-Net's graph has its weights, if that is what is asked for."""
    unet, origin = spec.components["unet"], spec.source or "the model"
    graph = unet.graph
    assert graph
    for name, asked, has in (("precision", wishes.precision, graph.precision), ("compute", wishes.compute, graph.compute)):
        if asked not in ("auto", has):
            if wishes.backend == "auto" and unet.tensors:
                return []  # torch can do it
            again = f"use {origin}, from which it was exported"
            if asked in ("fp32", "fp16", *STORED):
                options = f"{graph.precision} --compute {asked}" if name == "compute" and graph.precision in STORED else asked
                again = f"export {origin} with --to onnx --precision {options}"
            raise TightfitError(f"{graph.file} has {name} {has}, not {asked}: choose --{name} auto, or {again}")
    return [(graph.precision, graph.compute)]


def _precisions(hardware: Hardware, spec: ModelSpec, wishes: Wishes) -> list[tuple[str, str]]:
    """What weights may be held in, and what is computed in: quantised ones in what the device prefers, unless told."""
    known: tuple[str, ...] = (*hardware.precisions, *QUANTISED)
    if spec.precision:
        known = of_stored(spec.precision)
        if wishes.precision not in ("auto", *known):
            raise TightfitError(
                f"{spec.name} is stored in {spec.precision}: leave out --precision {wishes.precision}, or use the original"
            )
    found = []
    if hardware.device != "cpu" or "int8" not in hardware.rates:  # on GPUs its kernels are yet to be timed: when asked for
        known = tuple(each for each in known if each != DYNAMIC)
    for precision in known if wishes.precision == "auto" else (wishes.precision,):
        own = hardware.precisions[0] if precision in QUANTISED else precision
        compute = own if wishes.compute == "auto" else wishes.compute
        if precision in (*QUANTISED, compute):
            found.append((precision, compute))
    return found


def of_stored(precision: str) -> tuple[str, ...]:
    """What a model that is stored in int8 or int4 can run in."""
    return (precision, DYNAMIC) if precision == "int8" else (precision,)


def vae_compute(hardware: Hardware, spec: ModelSpec, precision: str) -> str:
    """SDXL's VAE overflows in fp16, unless it is one that was published with force_upcast off."""
    if precision == "fp16" and spec.family == "sdxl" and spec.vae.get("force_upcast", True):
        return "bf16" if "bf16" in hardware.precisions else "fp32"
    return precision
