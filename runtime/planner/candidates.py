"""Every way to run a request: engines, precisions, residencies, attentions, tilings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..backends import engine, graph_engine
from ..errors import TightfitError
from ..machine.hardware import Hardware
from ..machine.providers import CPU_PROVIDER, PACKAGES, PROVIDERS, provider_name, provider_problems
from ..models.families.family import STEPPING, Role
from ..models.spec import Component, ModelSpec
from ..placement import ATTENTIONS, CFG, DYNAMIC, GRAPHS, QUANTISED, RESIDENCIES, STORED, TILINGS, Placement
from ..request import Job
from .wishes import Wishes


@dataclass(frozen=True)
class _Choice:
    """What a candidate decides for the U-Net; the other networks follow it as far as they can."""

    precision: str
    compute: str
    residency: str
    attention: str
    tiling: str


def ways(hardware: Hardware, job: Job, wishes: Wishes) -> Iterator[tuple[str, dict[str, Placement]]]:
    """Every candidate once: its kind of guidance, and the placement of each component. Each that decodes
    previews, which torch does beside torch alone, comes without that, too."""
    spec, modes = job.spec, _modes(job, wishes)
    seen = set()
    for engines in _engines(spec, wishes):
        for choice, cfg in product(_choices(hardware, spec, wishes, engines), modes):
            placements = {
                name: _on_onnx(hardware, spec, name, wishes, choice, engine)
                if engine in GRAPHS
                else replace(_on_torch(hardware, spec, name, choice), backend=engine)
                for name, engine in engines.items()
            }
            unet = spec.denoiser.name
            faster = {"compiled": wishes.compile, "captured": wishes.cuda_graphs}
            placements[unet] = replace(placements[unet], **faster)
            mapped = without_previews(spec, placements)
            # ONNX Runtime's bytes are the process's growth, in which torch's are another's: 104 MiB of 68.
            for way in (mapped,) if engines[spec.denoiser.name] in GRAPHS else (placements, mapped):
                key = (cfg, *way.values())
                if key not in seen:
                    seen.add(key)
                    yield cfg, way


def _modes(job: Job, wishes: Wishes) -> Sequence[str]:
    """Kinds of guidance. Raises TightfitError for one that was asked for and texts that go into no call
    together."""
    modes = _options(wishes.cfg, CFG) if job.branches > 1 else ("batched",)
    if job.prompting.is_even:
        return modes
    if wishes.cfg == "batched":
        raise TightfitError(
            f"{job.spec.name} reads prompt and negative prompt in calls of their own, as one is longer: "
            "leave out cfg"
        )
    return modes[-1:]


def without_previews(spec: ModelSpec, placements: Mapping[str, Placement]) -> dict[str, Placement]:
    """The same without the decoder of previews, which are mapped then."""
    return {
        name: placement
        for name, placement in placements.items()
        if spec.components[name].role is not Role.PREVIEW
    }


def with_previews(
    hardware: Hardware, spec: ModelSpec, placements: Mapping[str, Placement]
) -> dict[str, Placement]:
    """The same with the decoder of previews, if the model has one, as the denoiser's placement decides."""
    unet = placements[spec.denoiser.name]
    if unet.backend in GRAPHS:
        return dict(placements)
    choice = _Choice(unet.precision, unet.compute, unet.residency, unet.attention, "whole")
    decoders = [part.name for part in spec.of_role(Role.PREVIEW)]
    return {**placements, **{name: _on_torch(hardware, spec, name, choice) for name in decoders}}


def _choices(
    hardware: Hardware, spec: ModelSpec, wishes: Wishes, engines: dict[str, str]
) -> Iterator[_Choice]:
    """What there is to decide, where these engines run the components. A graph has its weights in one
    precision and its own attention, and does not stream."""
    on = engines[spec.denoiser.name]
    graph = on in GRAPHS
    tiles = not graph or engines[spec.decoder.name] not in GRAPHS
    axes = (
        _of_graph(hardware, spec, wishes, on) if graph else _precisions(hardware, spec, wishes),
        _options(wishes.residency, RESIDENCIES[:2] if graph else RESIDENCIES),
        _options(wishes.attention, ATTENTIONS if tiles else ATTENTIONS[:1]),
        _options(wishes.tiling, TILINGS if tiles else TILINGS[:1]),
    )
    for (precision, compute), residency, attention, tiling in product(*axes):
        yield _Choice(precision, compute, residency, attention, tiling)


def _options(asked: str, known: Sequence[str]) -> Sequence[str]:
    return known if asked == "auto" else (asked,)


def _engines(spec: ModelSpec, wishes: Wishes) -> Iterator[dict[str, str]]:
    """Which engine runs each component, of those that can read it. All text encoders are run by one, where
    one can."""
    runnable = {name: _runnable(spec, component) for name, component in spec.components.items()}
    asked = _asked_engine(wishes)
    if asked in _IN_PLACE_OF:
        swapped = {_IN_PLACE_OF[asked]: asked}
        runnable = {name: tuple(swapped.get(e, e) for e in engines) for name, engines in runnable.items()}
    role = {name: component.role for name, component in spec.components.items()}
    painting = (engines for name, engines in runnable.items() if role[name] is not Role.PREVIEW)
    if asked and not any(asked in engines for engines in painting):
        raise _without_weights(spec, wishes, asked)
    options: dict[Role, tuple[str, ...]] = {}
    for name, engines in runnable.items():
        choices = (asked,) if asked and asked in engines else engines
        shared = tuple(engine for engine in options.get(role[name], choices) if engine in choices)
        options[role[name]] = shared or choices
    for chosen in product(*options.values()):
        of_role = dict(zip(options, chosen, strict=True))
        picked = {name: of_role[role[name]] for name in runnable}
        yield {
            name: engine if engine in runnable[name] else runnable[name][0] for name, engine in picked.items()
        }


# Never a candidate unless it is asked for. bitsandbytes is torch, but for some layers.
_IN_PLACE_OF = {"bitsandbytes": "torch", "openvino": "onnx"}


def _asked_engine(wishes: Wishes) -> str | None:
    """The engine that was asked for, if any: a provider is ONNX Runtime's."""
    if wishes.backend != "auto":
        return wishes.backend
    return "onnx" if wishes.provider != "auto" else None


def _without_weights(spec: ModelSpec, wishes: Wishes, asked: str) -> TightfitError:
    """The error for an engine that can read no component of the model."""
    cure = f"use {spec.source or 'the model'}, from which it was exported"
    if asked in GRAPHS:
        cure = "export it with --to onnx"
    if why := next(
        (component.unreadable for component in spec.components.values() if component.unreadable), ""
    ):
        cure = f"{why}; or {cure}"
    option = "--backend" if wishes.backend != "auto" else "--provider"
    if asked in GRAPHS and not spec.denoiser.network.tracing:
        return TightfitError(
            f"{spec.name} cannot be exported to ONNX, which {asked} runs: leave out {option}"
        )
    return TightfitError(f"{spec.name} has no weights that {asked} reads: {cure}, or leave out {option}")


def _runnable(spec: ModelSpec, component: Component) -> tuple[str, ...]:
    """The engines that can run a component; a graph that ONNX Runtime cannot is passed over where torch has
    weights too."""
    if "onnx" not in component.engines:
        return component.engines
    try:
        engine("onnx").check(spec, component)
    except TightfitError:
        if not component.tensors:
            raise
        return ("torch",)
    return component.engines


def _on_torch(hardware: Hardware, spec: ModelSpec, name: str, choice: _Choice) -> Placement:
    component, precision, residency = spec.components[name], choice.precision, choice.residency
    role = component.role
    if role is Role.PREVIEW:  # a thousandth of a U-Net: nothing to gain by fewer bits
        residency = "resident" if residency == "resident" else "staged"
        return Placement("torch", choice.compute, choice.compute, residency, "sdpa", "whole")
    vae = role in (Role.ENCODER, Role.DECODER)
    if precision == DYNAMIC and role not in STEPPING:
        # a strip of a VAE would have another scale than the next; text encoders have little to gain
        precision = "int8"
    # A VAE is a hundredth of a U-Net: nothing to gain. A network beside a model that was exported in 8 or 4
    # bits is quantised as it is loaded, and such weights cannot stream.
    beside = role is Role.CONTROL and precision in QUANTISED and component.formats is None
    residency = "staged" if residency == "streamed" and (vae or beside) else residency
    compute = role_compute(hardware, spec, role, choice.compute)
    return Placement(
        backend="torch",
        precision=precision if precision in QUANTISED else compute,
        compute=compute,
        residency=residency,
        attention="sdpa" if role is Role.TEXT else choice.attention,
        tiling=choice.tiling if component.network.in_strips else "whole",
    )


def _on_onnx(
    hardware: Hardware, spec: ModelSpec, name: str, wishes: Wishes, choice: _Choice, on: str = "onnx"
) -> Placement:
    """Of an engine that runs graphs."""
    graph, role, engine = spec.components[name].graph, spec.components[name].role, graph_engine(on)
    assert graph
    pairs = engine.arithmetics(graph, hardware)
    precision, compute = next((pair for pair in pairs if pair[1] == choice.compute), pairs[-1])
    placement = Placement(
        backend=on,
        precision=precision,
        compute=compute,
        residency="staged" if choice.residency == "streamed" else choice.residency,
        attention="sdpa",
        tiling=choice.tiling if role is Role.DECODER and wishes.tiling != "auto" else "whole",
        provider=chosen_provider(hardware, wishes.provider) if engine.has_providers else "",
    )
    # What is asked for is of the U-Net; the engine says that it cannot stream, or slice.
    if role is Role.DENOISER:
        return replace(placement, residency=choice.residency, attention=choice.attention)
    return placement


def chosen_provider(hardware: Hardware, asked: str) -> str:
    """The execution provider that is asked for, by its name or the start of that; or the best that is
    here."""
    present = hardware.onnx_providers()
    if asked == "auto":
        return next(
            (provider for provider in PROVIDERS[hardware.device] if provider in present), CPU_PROVIDER
        )
    provider = _providers_by_name().get(_short(asked))
    if provider is None or provider not in present:
        raise _without_provider(hardware, asked)
    return provider


def _providers_by_name() -> dict[str, str]:
    """None of these sends the model to another machine."""
    return {provider_name(provider): provider for providers in PROVIDERS.values() for provider in providers}


def _short(asked: str) -> str:
    return provider_name(asked).replace("directml", "dml")


def _without_provider(hardware: Hardware, asked: str) -> TightfitError:
    """The error for a provider that is not here, does not run here, or is none of ours."""
    known, present, short = _providers_by_name(), hardware.onnx_providers(), _short(asked)
    usable = ", ".join(name for name, provider in known.items() if provider in present)
    cure = f"choose {usable}" if usable else "it is not installed, pip install 'tightfit[cpu]' or [gpu]"
    this_machine = hardware.providers is None
    if this_machine and (why := provider_problems().get(known.get(short, ""))):
        return TightfitError(f"ONNX Runtime's provider '{asked}' does not run here ({why}): {cure}")
    if short in map(provider_name, present):
        return TightfitError(f"tightfit does not run on ONNX Runtime's provider '{asked}': {cure}")
    if usable and this_machine and _installable(hardware, short):
        cure = f"pip install onnxruntime-{PACKAGES[short]} in place of onnxruntime, or {cure}"
    return TightfitError(f"ONNX Runtime has no provider '{asked}' for {hardware.name}: {cure}")


def _installable(hardware: Hardware, short: str) -> bool:
    """Whether a package has this provider, for this system and this kind of device."""
    of_device = _providers_by_name().get(short) in PROVIDERS[hardware.device]
    return of_device and short in PACKAGES and (short != "dml" or sys.platform == "win32")


def _of_graph(hardware: Hardware, spec: ModelSpec, wishes: Wishes, on: str) -> list[tuple[str, str]]:
    """The precisions of the U-Net's graph and of its arithmetic that are asked for, of those that the engine
    has."""
    graph = spec.denoiser.graph
    assert graph
    pairs = graph_engine(on).arithmetics(graph, hardware)
    for option, known in zip(("precision", "compute"), zip(*pairs, strict=True), strict=True):
        if getattr(wishes, option) not in ("auto", *known):
            if wishes.backend == "auto" and spec.denoiser.tensors:
                return []  # torch can do it
            raise _without_arithmetic(hardware, spec, wishes, on, option)
    return [
        pair
        for pair in pairs
        if wishes.precision in ("auto", pair[0]) and wishes.compute in ("auto", pair[1])
    ]


def _without_arithmetic(
    hardware: Hardware, spec: ModelSpec, wishes: Wishes, on: str, option: str
) -> TightfitError:
    """The error for a precision, or what is computed in, that an engine has not of the U-Net's graph."""
    graph, engine, asked = spec.denoiser.graph, graph_engine(on), getattr(wishes, option)
    assert graph
    if engine.converts and graph.precision not in STORED:
        known = " or ".join(compute for _, compute in engine.arithmetics(graph, hardware))
        return TightfitError(
            f"{engine.title} runs {graph.file} in {known} on {hardware.name}, not in {asked}: "
            f"leave out --{option} {asked}, or --backend {on}"
        )
    cure = _exported_again(spec, graph.precision, option, asked)
    return TightfitError(
        f"{graph.file} has {option} {getattr(graph, option)}, not {asked}: choose --{option} auto, or {cure}"
    )


def _exported_again(spec: ModelSpec, precision: str, option: str, asked: str) -> str:
    """How to have a graph with what was asked for, where there is one with weights in `precision`."""
    origin = spec.source or "the model"
    if asked not in ("fp32", "fp16", *STORED):
        return f"use {origin}, from which it was exported"
    options = f"{precision} --compute {asked}" if option == "compute" and precision in STORED else asked
    return f"export {origin} with --to onnx --precision {options}"


def _precisions(hardware: Hardware, spec: ModelSpec, wishes: Wishes) -> list[tuple[str, str]]:
    """What weights may be held in, and what is computed in: quantised weights in what the device prefers,
    unless told."""
    pairs = []
    for precision in _held_in(hardware, spec, wishes):
        preferred = computes(hardware, spec)[0] if precision in QUANTISED else precision
        compute = preferred if wishes.compute == "auto" else wishes.compute
        if precision in (*QUANTISED, compute):
            pairs.append((precision, compute))
    return pairs


def _held_in(hardware: Hardware, spec: ModelSpec, wishes: Wishes) -> tuple[str, ...]:
    """The precisions that weights may be held in."""
    known = of_stored(spec.precision) if spec.precision else (*computes(hardware, spec), *QUANTISED)
    if wishes.precision == "auto":
        # int8-dynamic on GPUs, where its kernels are yet to be timed, has to be asked for
        timed = hardware.device == "cpu" and "int8" in hardware.rates
        return tuple(precision for precision in known if timed or precision != DYNAMIC)
    if spec.precision and wishes.precision not in known:
        cure = f"leave out --precision {wishes.precision}, or use the original"
        raise TightfitError(f"{spec.name} is stored in {spec.precision}: {cure}")
    return (wishes.precision,)


def of_stored(precision: str) -> tuple[str, ...]:
    """What a model that is stored in int8 or int4 can run in."""
    return (precision, DYNAMIC) if precision == "int8" else (precision,)


def role_compute(hardware: Hardware, spec: ModelSpec, role: Role, precision: str) -> str:
    """What a network of that role computes in where `precision` is asked for."""
    if precision == "fp16" and role in spec.design.overflows_in_half(spec):
        return "bf16" if "bf16" in hardware.precisions else "fp32"
    return precision


def computes(hardware: Hardware, spec: ModelSpec) -> tuple[str, ...]:
    """What to compute in where nothing is asked for, the preferred one first."""
    known = hardware.precisions
    is_wide = spec.design.needs_range and "bf16" in known
    return tuple(precision for precision in known if precision != "fp16") if is_wide else known
