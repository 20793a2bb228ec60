"""`tightfit export`: arguments become a scheme for each network's weights, and one of the exporters writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..runtime import interrupts
from ..runtime.cli.output import progress_bar, say
from ..runtime.errors import TightfitError, explained, first_line, printable
from ..runtime.files import read_json
from ..runtime.machine.providers import CPU_PROVIDER, PROVIDERS, providers
from ..runtime.models.layouts.safetensors import all_tensors
from ..runtime.placement import BACKENDS, DYNAMIC, STORED, Placement
from ..runtime.units import shown

if TYPE_CHECKING:
    from ..runtime.models.spec import ModelSpec
    from .torch_model import Scheme, Tensors

_KNOWN = {"torch": STORED, "onnx": ("fp32", "fp16", *STORED)}

app = typer.Typer()


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="emoji, a folder or a hub id.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder that is not there yet.", metavar="DIR")],
    precision: Annotated[str, typer.Option(help="int8 or int4; with --to onnx fp32 and fp16 too.", metavar="NAME")],
    to: Annotated[str, typer.Option(help=f"{' or '.join(BACKENDS)}.", metavar="ENGINE")] = "torch",
    compute: Annotated[str, typer.Option(help="With --to onnx: what int8 and int4 compute in.", metavar="NAME")] = "auto",
    calibrate: Annotated[int, typer.Option(help="Paint N prompts to find which layers need more bits.", metavar="N")] = 0,
    bits: Annotated[float | None, typer.Option(help="With --calibrate: of a U-Net weight on average.", metavar="B")] = None,
    steps: Annotated[int | None, typer.Option(help="With --calibrate: steps of each picture; default: 20.", metavar="N")] = None,
    size: Annotated[int | None, typer.Option(help="With --calibrate: pixels; default: model's.", metavar="N")] = None,
) -> None:
    """Write a model with its weights in 8 or 4 bits, or as ONNX, to be run from then on with --model DIR."""
    from ..runtime.models.hub import inspect

    _check(precision, to, compute, calibrate, (bits, steps, size))
    if output.exists() or output.is_symlink():
        raise TightfitError(f"{output} is there already: name a folder that is not")
    spec = inspect(model)
    if without := [name for name, component in spec.components.items() if not component.tensors]:
        raise TightfitError(f"{model} has its {without[0]} as ONNX only: export the model that it was made from")
    if spec.precision and (to == "torch" or calibrate or spec.precision != precision):
        raise TightfitError(f"{model} is stored in {spec.precision} already: export the original")
    tensors = {component.folder.name: all_tensors(component.folder) for component in spec.components.values()}
    _check_weights(spec, tensors["vae"])
    schemes = _schemes(spec, precision, tensors)
    interrupts.tidily()
    if calibrate:
        schemes["unet"] = _calibrated(spec, precision, tensors["unet"], calibrate, (bits, steps, size))
    manifest = {"source": spec.name, "tightfit": __version__, "precision": precision, "defaults": dict(spec.defaults)}
    with _failures_explained(model, output):
        if to == "torch":
            from . import torch_model as quantised

            quantised.write(spec.folder, output, tensors, schemes, manifest, partial(say, err=True))
        else:
            _to_onnx(spec, output, tensors, schemes, manifest, compute)
    total = sum(file.stat().st_size for pattern in ("*.safetensors", "*.onnx*") for file in output.rglob(pattern))
    say(f"{output} · {precision} · {shown(total)}")


def _check(precision: str, to: str, compute: str, calibrate: int, effort: tuple[float | None, ...]) -> None:
    if precision == DYNAMIC:
        elsewhere = "; ONNX Runtime has no such way, leave out --to onnx" if to == "onnx" else ""
        raise TightfitError(
            f"{DYNAMIC} is a way to run weights in int8: export --precision int8, and run that with {DYNAMIC}{elsewhere}"
        )
    if precision not in _KNOWN.get(to, ()):
        ways = "; ".join(f"--to {engine} in {', '.join(names)}" for engine, names in _KNOWN.items())
        raise TightfitError(f"this version exports {ways}, not --to {to} in {precision}")
    if compute not in ("auto", "fp32", "fp16") or (compute != "auto" and (to == "torch" or precision not in STORED)):
        raise TightfitError("--compute is fp32 or fp16, and of --to onnx in int8 or int4: leave it out")
    if calibrate and precision not in STORED:
        raise TightfitError(f"a calibration is of {' or '.join(STORED)}: leave out --calibrate")
    if not calibrate and any(each is not None for each in effort):
        raise TightfitError("--bits, --steps and --size are of a calibration: add --calibrate 8")
    if calibrate < 0 or (effort[1] is not None and effort[1] < 1):
        raise TightfitError("--calibrate counts from 0 up, --steps from 1")


def _check_weights(spec: ModelSpec, vae: Tensors) -> None:
    """The tensors are those that the configs build, so that what is written can be read again; the encoder of the VAE too."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from ..runtime.backends.torch import loading as weights
    from ..runtime.backends.torch import networks

    compute = spec.precision or "fp32"
    as_stored = Placement("torch", compute, "fp32", "resident", "sdpa", "whole")
    for component in spec.components.values():
        weights.match(component, networks.build(component, as_stored, "cpu"))
    if not spec.precision and any(name.startswith("encoder.") for name in vae):
        decoder = spec.components["vae_decoder"]
        with torch.device("meta"):
            whole: Any = AutoencoderKL.from_config(dict(decoder.config))
        weights.match(replace(decoder, tensors=vae), whole)


def _schemes(spec: ModelSpec, precision: str, tensors: Mapping[str, Tensors]) -> dict[str, Scheme]:
    """As the model is stored, if it is quantised already; else what the recipe says."""
    from .torch_model import Scheme, default_scheme

    if spec.precision:
        written = read_json(spec.folder / "tightfit.json")["components"]  # as inspect understood it
        return {name: Scheme(written.get(name, {}).get("formats", {})) for name in tensors}
    plain = precision not in STORED
    return {name: Scheme({}) if plain else default_scheme(name, each, precision) for name, each in tensors.items()}


def _calibrated(
    spec: ModelSpec, precision: str, tensors: Tensors, prompts: int, wanted: tuple[float | None, int | None, int | None]
) -> Scheme:
    from . import calibrate as calibration
    from .torch_model import layers

    bits, steps, size = wanted
    least = calibration.least_bits(layers(tensors), spec.components["unet"].tensors.values(), precision)
    most = calibration.MOST_BITS[precision]
    if bits is not None and not least <= bits <= most:
        raise TightfitError(
            f"--bits must be from {math.ceil(least * 100) / 100} to {most} for this model in {precision}, not {bits:g}"
        )
    side = 8 * spec.downsampling
    if size is not None and (size < side or size % side):
        raise TightfitError(f"--size must be a multiple of {side} pixels, not {size}")
    effort = calibration.Effort(prompts, steps or 20, size, spec.default_guidance, max(least, bits or calibration.BITS[precision]))
    with explained(f"{spec.name} cannot be run by diffusers", "copy or download it again, or leave out --calibrate"):
        return calibration.calibrated(spec, precision, effort, partial(say, err=True))


def _to_onnx(
    spec: ModelSpec,
    output: Path,
    tensors: Mapping[str, Tensors],
    schemes: Mapping[str, Scheme],
    manifest: Mapping[str, Any],
    compute: str,
) -> None:
    precision = manifest["precision"]
    try:
        from torch.onnx import OnnxExporterError

        from . import onnx_model as onnx
        from .onnx_check import DepartureError
        from .onnx_graph import GraphError
    except ImportError as error:
        raise TightfitError(f"{error.name} is needed to export to ONNX: pip install 'tightfit[cpu]', or [gpu]") from None
    from ..runtime.backends.torch.networks import current_name
    from ..runtime.machine.process import release

    on_gpu = ({each for names in PROVIDERS.values() for each in names} - {CPU_PROVIDER}) & {*providers()}
    preferred = "fp16" if on_gpu else "fp32"  # ONNX Runtime has no fp16 arithmetic on a CPU
    compute = precision if precision not in STORED else preferred if compute == "auto" else compute
    upcast = spec.family == "sdxl" and spec.vae.get("force_upcast", True)
    wide = frozenset(["vae_encoder", "vae_decoder"] if upcast else [])
    try:
        with _progress() as tell:
            job = onnx.Job(compute, wide, current_name, release, tell)
            onnx.write(spec.folder, output, tensors, schemes, job, manifest)
    except (DepartureError, GraphError, OnnxExporterError) as error:
        raise TightfitError(f"{output} was not written: {first_line(error)}; please report it with the model's name") from error


@contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar for the network that is being written; a line for each that is done."""
    with progress_bar(24) as bar:
        task = bar.add_task("", total=1)

        def tell(network: str, what: str, done: int, total: int) -> None:
            if total < 0:
                bar.console.print(printable(f"{network}: {what}"), markup=False, emoji=False, soft_wrap=True)
            else:
                bar.update(task, description=f"{network}: {what}", completed=done, total=total)

        yield tell


@contextmanager
def _failures_explained(model: str, output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TightfitError(
            f"{output} was not written ({error.strerror or error}): name another place, or make room there"
        ) from None
    except ValueError as error:
        raise TightfitError(f"{output} was not written, {first_line(error)}: copy or download {model} again") from None
