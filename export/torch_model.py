"""A model with its weights in 8 or 4 bits, in the layout of a diffusers folder. It is written tensor by
tensor, whole or not at all.

`tightfit export MODEL --to torch --precision int4 -o DIR` comes here. The recipe (kernels/recipe.py) or a
calibration (calibrate.py) chooses the format of each layer. tightfit.json records it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.formats import FORMATS, Format, dequantise
from ..kernels.quantise import quantise
from ..kernels.recipe import recipe
from ..runtime.backends.torch.loading import read_into
from ..runtime.files import sha256
from ..runtime.models.families.family import Network, Role
from .folder import appearing, copy_the_rest, described
from .safetensors_file import NAMES, SafetensorsFile

if TYPE_CHECKING:
    from ..runtime.models.spec import ModelSpec
    from ..runtime.models.tensors import Tensor

VERSION = 1
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_FLOATS = {name: dtype for name, dtype in _DTYPES.items() if dtype.is_floating_point}
Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Scheme:
    """How one component is stored: the format of each quantised layer, and the moments of layers' inputs that
    are known.

    `measured` goes into the manifest unchanged.
    """

    formats: Mapping[str, str]
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A component's entry in the manifest: formats by layer, stored bits per value of the original, decibels
    of the quantised weights against their errors, and the sha256 of each file."""

    formats: Mapping[str, str]
    bits: float
    weight_snr: float | None
    sha256: Mapping[str, str]
    measured: Mapping[str, Any]


def default_scheme(network: Network, tensors: Tensors, precision: str) -> Scheme:
    """The recipe's choice, by names and shapes."""
    return Scheme(
        {
            layer: form
            for layer, shape in layers(tensors).items()
            if (form := recipe(precision, layer, shape, network.least_bits))
        }
    )


def layers(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights that could be quantised, by layer."""
    weights = (
        (name.removesuffix(".weight"), tensor) for name, tensor in tensors.items() if name.endswith(".weight")
    )
    return {
        layer: tensor.shape for layer, tensor in weights if _is_float(tensor) and len(tensor.shape) in (2, 4)
    }


def write(
    spec: ModelSpec,
    target: Path,
    tensors: Mapping[str, Tensors],
    schemes: Mapping[str, Scheme],
    manifest: Mapping[str, Any],
    tell: Callable[[str], object] = print,
) -> dict[str, Written]:
    """Write the model to `target`, which must not exist. `tensors` and `schemes` are by stored folder.

    Other files of a diffusers folder are copied. The manifest gets an entry for each component.
    """
    with appearing(target) as folder, described(spec) as source:
        copy_the_rest(source, folder, tensors)
        written = {}
        for component in spec.components.values():
            name = component.network.folder
            written[name] = _component(folder / name, component.role, tensors[name], schemes[name])
            snr = written[name].weight_snr
            tell(
                f"{name}: {written[name].bits:.2f} bits a weight"
                + ("" if snr is None else f", its weights {snr:.1f} dB")
            )
        text = {
            "version": VERSION,
            **manifest,
            "components": {name: asdict(entry) for name, entry in written.items()},
        }
        (folder / "tightfit.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return written


def _component(folder: Path, role: Role, tensors: Tensors, scheme: Scheme) -> Written:
    promised: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    # Positions of a text, which are integers, need not be stored.
    plain = {key: tensor for key, tensor in tensors.items() if _is_float(tensor)}
    for key, tensor in plain.items():
        layer = key.removesuffix(".weight")
        if layer in scheme.formats and key != layer:
            parts = FORMATS[scheme.formats[layer]].parts(tensor.shape)
            promised |= {f"{layer}.{part}": promise for part, promise in parts.items()}
        else:
            promised[key] = (_halved(tensor), tensor.shape)
    # As transformers calls it, or diffusers.
    file = folder / f"{'' if role is Role.TEXT else 'diffusion_pytorch_'}model.safetensors"
    signal = noise = 0.0
    with SafetensorsFile(file, promised) as out:
        for key, tensor in plain.items():
            layer, values = key.removesuffix(".weight"), read(tensor)
            if layer not in scheme.formats or key == layer:
                out.write(key, values.to(_halved(tensor)))
                continue
            form = FORMATS[scheme.formats[layer]]
            parts = quantise(values, form, scheme.moments.get(layer))
            signal, noise = signal + energy(values), noise + _error(values, parts, form)
            for part, made in parts.items():
                out.write(f"{layer}.{part}", made)
    bits = (
        8
        * sum(dtype.itemsize * math.prod(shape) for dtype, shape in promised.values())
        / sum(t.count for t in plain.values())
    )
    snr = round(10 * math.log10(signal / noise), 2) if noise else None
    return Written(
        dict(scheme.formats), round(bits, 3), snr, {file.name: sha256(file)}, dict(scheme.measured)
    )


def read(tensor: Tensor) -> torch.Tensor:
    """One stored tensor, in fp32 where it is changed as it is read."""
    changed = tensor.patches or tensor.encoding
    values = torch.empty(tensor.shape, dtype=torch.float32 if changed else _DTYPES[tensor.dtype])
    room = 0 if tensor.as_stored else tensor.stored_bytes
    read_into(values, tensor, torch.empty(room, dtype=torch.uint8))
    return values


def _is_float(tensor: Tensor) -> bool:
    return bool(tensor.encoding) or tensor.dtype in _FLOATS


def _halved(tensor: Tensor) -> torch.dtype:
    """Unquantised values are stored in 16 bits, bf16 if they were bf16."""
    return torch.bfloat16 if tensor.dtype == "BF16" else torch.float16


_ROWS = 512  # output channels compared at a time, so that no weight is copied whole


def energy(values: torch.Tensor) -> float:
    """The sum of squares."""
    return sum(part.float().square().sum(dtype=torch.float64).item() for part in values.split(_ROWS))


def _error(values: torch.Tensor, parts: Mapping[str, torch.Tensor], form: Format) -> float:
    """The sum of squared errors of the stored parts."""
    total = 0.0
    for start in range(0, len(values), _ROWS):
        some = values[start : start + _ROWS]
        made = dequantise(
            {name: part[start : start + _ROWS] for name, part in parts.items()}, form, some.shape
        )
        total += energy(made.sub_(some))
    return total
