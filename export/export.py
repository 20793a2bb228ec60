"""Decides all of an export before anything is written: precision, engine, a scheme for the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..runtime import adapters as kinds_of_adapters
from ..runtime import interrupts
from ..runtime.conditions.controlnet import MOST, opened
from ..runtime.errors import TightfitError, first_line
from ..runtime.fields import described
from ..runtime.files import read_json
from ..runtime.machine.providers import CPU_PROVIDER, PROVIDERS, providers
from ..runtime.models.families.tiny import TINY_DECODER
from ..runtime.models.reading import read_source
from ..runtime.placement import DYNAMIC, STORED, Placement
from ..runtime.request import Request

if TYPE_CHECKING:
    from ..runtime.adapters import Adapter
    from ..runtime.models.families.family import Network
    from ..runtime.models.spec import Component, ModelSpec
    from .calibrate import Effort
    from .torch_model import Scheme, Tensors

PRECISIONS = {"torch": STORED, "onnx": ("fp32", "fp16", *STORED)}
"""Precisions of each engine's exports."""


@dataclass(frozen=True)
class Options:
    """Options of an export besides its precision and engine.

    compute: with "onnx", arithmetic for int8 and int4 weights. calibrate: prompts to paint, to find the
    layers that need more bits. bits: per U-Net weight on average. steps and size: of each image. adapters:
    LoRAs, or another U-Net, that the weights are written with; of a file another VAE and text encoders too.
    control: with "onnx", ControlNets that are exported beside the model, in its precision; its U-Net then
    has a second graph, which follows any.
    """

    compute: str = "auto"
    calibrate: int = 0
    bits: float | None = None
    steps: int | None = None
    size: int | None = None
    adapters: Sequence[Adapter] = ()
    control: Sequence[str | Path] = ()

    def check(self, precision: str, to: str) -> None:
        """Raise TightfitError for options that no model can be exported with."""
        if precision == DYNAMIC:
            elsewhere = "; ONNX Runtime has no such way, leave out --to onnx" if to == "onnx" else ""
            cure = f"export --precision int8, and run that with {DYNAMIC}{elsewhere}"
            raise TightfitError(f"{DYNAMIC} is a way to run weights in int8: {cure}")
        if precision not in PRECISIONS.get(to, ()):
            ways = "; ".join(f"--to {engine} in {', '.join(names)}" for engine, names in PRECISIONS.items())
            raise TightfitError(f"this version exports {ways}, not --to {to} in {precision}")
        decides = to == "onnx" and precision in STORED
        if self.compute not in (("auto", "fp32", "fp16") if decides else ("auto",)):
            raise TightfitError("--compute is fp32 or fp16, and of --to onnx in int8 or int4: leave it out")
        if isinstance(self.control, str | Path) or not all(isinstance(n, str | Path) for n in self.control):
            raise TightfitError(
                f"control must be a list of ControlNets, not {self.control!r}: name each there"
            )
        if self.control and to != "onnx":
            raise TightfitError(
                "--control is of --to onnx: leave it out, as a ControlNet is quantised when it is loaded"
            )
        if len(self.control) > MOST:
            raise TightfitError(f"--control names {len(self.control)} ControlNets, and at most {MOST} can be")
        self._check_calibration(precision)

    def _check_calibration(self, precision: str) -> None:
        for name in ("calibrate", "steps", "size"):  # typer has seen to it on the command line
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TightfitError(f"{name} must be a whole number, not {value!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, float | int | None):
            raise TightfitError(f"bits must be a number, not {self.bits!r}")
        if self.calibrate and precision not in STORED:
            raise TightfitError(f"a calibration is of {' or '.join(STORED)}: leave out --calibrate")
        if not self.calibrate and any(value is not None for value in (self.bits, self.steps, self.size)):
            raise TightfitError("--bits, --steps and --size are of a calibration: add --calibrate 8")
        if self.calibrate < 0:
            raise TightfitError(f"--calibrate must be 0 or more, not {self.calibrate}")
        least, most = described(Request)["num_inference_steps"].bounds or (1, 1)
        if self.steps is not None and not least <= self.steps <= most:
            raise TightfitError(f"--steps must be from {least} to {most}, not {self.steps}")


@dataclass(frozen=True)
class Listener:
    """Called while an export runs.

    line: with a line of text. progress: with a network, an action, and how many weights of how many are done.
    A negative number of weights means that the network is finished.
    """

    line: Callable[[str], object] = lambda _: None
    progress: Callable[[str, str, int, int], object] = lambda *_: None


def export_model(
    model: str | Path,
    output: str | Path,
    precision: str,
    to: str = "torch",
    listener: Listener | None = None,
    **options: Any,
) -> Path:
    """Write a model with its weights in 8 or 4 bits, or as ONNX. Returns the folder, which `load` runs.

    model: emoji, a folder or a hub id. output: a folder that does not exist yet. precision: int8 or int4, and
    with `to="onnx"` also fp32 or fp16. Options are the fields of export.export.Options: compute, calibrate
    (prompts to paint, to find the layers that need more bits), bits, steps, size, adapters (LoRAs that the
    weights are written with), control (ControlNets beside it, with `to="onnx"`). `listener` is called with
    the progress. Nothing is left half-written. Raises TightfitError.
    """
    known = [field.name for field in fields(Options)]
    if unknown := [name for name in options if name not in known]:
        raise TightfitError(f"unknown option '{unknown[0]}': choose {', '.join(known)}")
    target, chosen, listener = Path(output), Options(**options), listener or Listener()
    chosen.check(precision, to)
    if target.exists() or target.is_symlink():
        raise TightfitError(f"{target} is there already: name a folder that is not")
    export = _read(str(model), precision, to, chosen)
    for note in export.spec.notes:
        listener.line(note)
    interrupts.tidily()
    effort = _effort(export, chosen) if chosen.calibrate else None
    _check_weights(export)
    if effort:
        export = _calibrated(export, effort, listener)
    with _failures_explained(str(model), target):
        if to == "torch":
            _to_torch(export, target, listener)
        else:
            _to_onnx(export, target, chosen.compute, listener)
    return target


@dataclass(frozen=True)
class _Export:
    """A model that can be exported. Tensors, and schemes for their weights, are by stored folder."""

    spec: ModelSpec
    precision: str
    tensors: Mapping[str, Tensors]
    schemes: Mapping[str, Scheme]
    adapters: Sequence[Adapter] = ()
    controls: Sequence[Component] = ()

    def networks(self) -> Iterator[Component]:
        """Those that a picture needs, and before the one whose folder they share, those that it may need."""
        for component in self.spec.components.values():
            folder = component.network.folder
            for network in self.spec.design.on_demand:
                if network.folder == folder:
                    yield _picked(component, network, self.tensors[folder], self.schemes[folder])
            yield component

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "source": self.spec.name,
            "tightfit": __version__,
            "precision": self.precision,
            "defaults": dict(self.spec.defaults),
            **({"adapters": names} if (names := kinds_of_adapters.by_option(self.adapters)) else {}),
        }


def _read(model: str, precision: str, to: str, options: Options) -> _Export:
    from ..runtime.models.hub import inspect

    spec = inspect(model)
    if only := [name for name, component in spec.components.items() if component.engines == ("onnx",)]:
        cure = "export the model that it was made from"
        raise TightfitError(f"{model} has its {only[0]} as ONNX only: {cure}")
    if spec.precision and (to == "torch" or options.calibrate or spec.precision != precision):
        raise TightfitError(f"{model} is stored in {spec.precision} already: export the original")
    source, changed = read_source(spec.folder), _adapted(spec, options.adapters)
    tensors = {
        component.network.folder: source.whole(component.network)
        if component is spec.components.get(name)
        else _whole(changed, component)
        for name, component in changed.components.items()
    }
    schemes = _schemes(changed, precision, tensors)
    controls = tuple(opened(str(name), number, spec) for number, name in enumerate(options.control))
    for net in controls:
        folder = net.network.folder
        tensors[folder], schemes[folder] = net.tensors, _scheme(net.network, net.tensors, precision)
    return _Export(changed, precision, tensors, schemes, options.adapters, controls)


def _adapted(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    """The model that is written, which is whole. Raises TightfitError for adapters that change more than
    weights; other networks are held by exports of files alone, as a folder has configs of its own."""
    is_file = spec.folder.is_file()
    kinds = kinds_of_adapters.ADAPTERS
    kept = {kind.option for kind in kinds if kind.in_weights or (kind.is_network and is_file)}
    kinds_of_adapters.check(adapters)
    if beside := [adapter for adapter in adapters if adapter.option not in kept]:
        raise TightfitError(
            f"{beside[0].option} {beside[0].name} is not of the weights that are exported: "
            f"leave it out, and give it by --{beside[0].option.replace('_', '-')} when the export paints"
        )
    if adapters and spec.precision:
        raise TightfitError(
            f"{spec.name} is stored in {spec.precision}, and no weight is rounded twice: "
            f"export {spec.source or 'the original'} with its adapters"
        )
    changed = kinds_of_adapters.adapted(spec, adapters)
    kinds_of_adapters.check_whole(changed)
    if changed.decoder.network is TINY_DECODER:
        raise TightfitError(
            f"{changed.decoder.folder} is a tiny VAE: leave it out, and give it to the export by --vae "
            "when it paints"
        )
    return changed


def _whole(spec: ModelSpec, component: Component) -> Tensors:
    """Also what of its files not every picture needs, as a VAE's encoder."""
    beside = [network for network in spec.design.on_demand if network.folder == component.network.folder]
    return dict(component.tensors) | {
        name: tensor for network in beside for name, tensor in spec.on_demand(network).tensors.items()
    }


def _picked(component: Component, network: Network, tensors: Tensors, scheme: Scheme) -> Component:
    """Another network from the folder of `component`."""

    def its_own(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in names.items() if f"{name}.".startswith(network.prefixes)}

    formats = None if component.formats is None else its_own(scheme.formats)
    return replace(component, network=network, tensors=its_own(tensors), formats=formats)


def _check_weights(export: _Export) -> None:
    """Raise TightfitError unless the tensors are those that the configs build, so that what is written can be
    read again."""
    from ..runtime.backends.torch import loading as weights
    from ..runtime.backends.torch import networks

    compute = export.spec.precision or "fp32"
    as_stored = Placement("torch", compute, "fp32", "resident", "sdpa", "whole")
    beside = replace(as_stored, precision="fp32")
    placed = [(component, as_stored) for component in export.networks()]
    for component, placement in (*placed, *((net, beside) for net in export.controls)):
        if component.tensors:  # none of a VAE's encoder that was left out
            weights.match(component, networks.build(component, placement, "cpu"))


def _schemes(spec: ModelSpec, precision: str, tensors: Mapping[str, Tensors]) -> dict[str, Scheme]:
    """As the model is stored, if it is quantised already, otherwise the recipe's."""
    from .torch_model import Scheme

    if spec.precision:
        written = read_json(spec.folder / "tightfit.json")["components"]  # as inspect understood it
        return {name: Scheme(written.get(name, {}).get("formats", {})) for name in tensors}
    networks = {component.network.folder: component.network for component in spec.components.values()}
    return {name: _scheme(networks[name], stored, precision) for name, stored in tensors.items()}


def _scheme(network: Network, tensors: Tensors, precision: str) -> Scheme:
    """The recipe's, of weights that are not quantised."""
    from .torch_model import Scheme, default_scheme

    return default_scheme(network, tensors, precision) if precision in STORED else Scheme({})


def _effort(export: _Export, options: Options) -> Effort:
    """What a calibration is to do. Raises TightfitError for what it cannot, of this model."""
    from . import calibrate as calibration
    from .torch_model import layers

    spec, precision, bits, size = export.spec, export.precision, options.bits, options.size
    denoiser = spec.denoiser.network.folder
    values = spec.denoiser.tensors.values()
    least = calibration.least_bits(layers(export.tensors[denoiser]), values, precision)
    most = calibration.MOST_BITS[precision]
    if bits is not None and not least <= bits <= most:
        bounds = f"from {math.ceil(least * 100) / 100} to {most}"
        raise TightfitError(f"--bits must be {bounds} for this model in {precision}, not {bits:g}")
    side = spec.latents.multiple
    if size is not None and (size < side or size % side):
        raise TightfitError(f"--size must be a multiple of {side} pixels, from {side} up, not {size}")
    if options.calibrate > len(calibration.PROMPTS):
        raise TightfitError(
            f"--calibrate paints at most {len(calibration.PROMPTS)} prompts, not {options.calibrate}"
        )
    average = max(least, bits or calibration.BITS[precision])
    steps = options.steps or min(20, spec.default_steps)
    return calibration.Effort(options.calibrate, steps, size, average)


def _calibrated(export: _Export, effort: Effort, listener: Listener) -> _Export:
    """The same export with more bits for the layers of the denoiser that need them."""
    from .calibrate import calibrated

    denoiser = export.spec.denoiser.network.folder
    scheme = calibrated(export.spec, export.precision, effort, listener.line)
    return replace(export, schemes={**export.schemes, denoiser: scheme})


def _to_torch(export: _Export, target: Path, listener: Listener) -> None:
    from . import torch_model

    torch_model.write(export.spec, target, export.tensors, export.schemes, export.manifest, listener.line)


def _to_onnx(export: _Export, target: Path, compute: str, listener: Listener) -> None:
    try:
        from torch.onnx import OnnxExporterError

        from . import onnx_model as onnx
        from .onnx_check import DepartureError
        from .onnx_graph import GraphError
    except ImportError as error:
        cure = "pip install 'tightfit[cpu]', or [gpu]"
        raise TightfitError(f"{error.name} is needed to export to ONNX: {cure}") from None
    from ..runtime.backends.torch.networks import current_name
    from ..runtime.machine.process import release

    spec = export.spec
    computes, wide = _computes(export.precision, compute), spec.design.overflows_in_half(spec)
    networks = tuple(export.networks())
    job = onnx.Job(networks, export.controls, computes, wide, current_name, release, listener.progress)
    try:
        onnx.write(spec, target, export.tensors, export.schemes, job, export.manifest)
    except (DepartureError, GraphError, OnnxExporterError) as error:
        cause = f"{target} was not written: {first_line(error)}"
        raise TightfitError(f"{cause}; please report it with the model's name") from error


def _computes(precision: str, compute: str) -> str:
    """The arithmetic of an ONNX export's networks."""
    if precision not in STORED:
        return precision
    if compute != "auto":
        return compute
    of_gpus = {name for names in PROVIDERS.values() for name in names} - {CPU_PROVIDER}
    return "fp16" if of_gpus & {*providers()} else "fp32"  # ONNX Runtime has no fp16 arithmetic on CPUs


@contextmanager
def _failures_explained(model: str, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = f"{target} was not written ({error.strerror or error})"
        raise TightfitError(f"{cause}: name another place, or make room there") from None
    except ValueError as error:
        cause = f"{target} was not written, {first_line(error)}"
        raise TightfitError(f"{cause}: copy or download {model} again") from None
