"""A model as ONNX in Optimum's layout: a folder for each network, with its graph and, beside it, its weights.

`tightfit export MODEL --to onnx --precision fp16 -o DIR` comes here. One network at a time is traced without
its weights (onnx_networks.py), changed (onnx_graph.py), given its weights tensor by tensor, and checked
against torch (onnx_check.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from ..kernels.formats import FORMATS, dequantise
from ..kernels.quantise import quantise
from ..runtime.files import sha256
from ..runtime.models.families.family import Role
from ..runtime.models.families.networks import adding_residuals
from ..runtime.models.layouts.optimum import CONTROLLED, GRAPH
from . import onnx_check, onnx_graph, onnx_networks
from .folder import appearing, copy_the_rest, described
from .torch_model import VERSION, Scheme, Tensors, read

if TYPE_CHECKING:
    from ..runtime.models.spec import Component, ModelSpec
    from ..runtime.models.tensors import Tensor

COMPUTES = {"fp32": torch.float32, "fp16": torch.float16}
DATA = f"{GRAPH}_data"
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
_TYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Job:
    """What to export: a file for each of `networks`, and of `controls`, which are ControlNets beside them.
    They compute in `compute`, those of a role in `wide` in fp32.

    `renamed` gives today's name of a stored tensor, among the names that are expected. `release` returns
    freed memory to the system. `tell` is called with a network, an action, and how many weights of how many
    are done.
    """

    networks: Sequence[Component]
    controls: Sequence[Component]
    compute: str
    wide: frozenset[Role]
    renamed: Callable[[str, Any], str]
    release: Callable[[], object]
    tell: Callable[[str, str, int, int], object]

    def dtype(self, role: Role) -> torch.dtype:
        return COMPUTES["fp32" if role in self.wide else self.compute]


def write(
    spec: ModelSpec,
    target: Path,
    tensors: Mapping[str, Tensors],
    schemes: Mapping[str, Scheme],
    job: Job,
    manifest: Mapping[str, Any],
) -> None:
    """Write the model to `target`, which must not exist. `tensors` and `schemes` are by stored folder.

    Raises TightfitError for a network that no graph can be made of, before anything is traced, ValueError for
    weights that do not fit, and onnx_check.DepartureError for a network whose answers
    are not torch's.
    """
    for component in job.networks:
        onnx_networks.check(spec, component)
    folders: dict[str, list[str]] = {}  # by the stored one that they come from
    for component in job.networks:
        folders.setdefault(component.network.folder, []).append(component.name)
    with appearing(target) as folder, described(spec) as source:
        copy_the_rest(source, folder, folders, folders)
        written = {}
        controls = [_adding(net) for net in job.controls]
        beside = spec.with_components(controls)
        for component in (*job.networks, *controls):
            origin, is_control = component.network.folder, component.role is Role.CONTROL
            subject = onnx_networks.subject(beside if is_control else spec, component)
            stored = _stored(subject, tensors[origin], schemes[origin].formats, job.renamed)
            network = _Writing(folder / subject.name, stored, schemes[origin], job)
            if is_control:
                _write_config(network.folder, component)
            written[subject.name] = network.write(subject)
            if controls and component.role is Role.DENOISER:
                again = onnx_networks.subject(spec, _adding(component))
                network.write_again(again, written[subject.name])
        versions = {library: version(library) for library in _LIBRARIES}
        text = {
            "version": VERSION,
            **manifest,
            "compute": job.compute,
            "opset": onnx_networks.OPSET,
            "versions": versions,
            "components": written,
        }
        (folder / "tightfit.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """A weight in the source, one tensor or the parts of a quantised one, and the format to store it in."""

    tensors: Mapping[str, Tensor]
    form: str | None
    layer: str


def _stored(
    subject: onnx_networks.Subject,
    tensors: Tensors,
    formats: Mapping[str, str],
    renamed: Callable[[str, Any], str],
) -> dict[str, Stored]:
    """The weights of the subject's module, by its names for them."""
    expected = {name: parameter.shape for name, parameter in subject.module.named_parameters()}
    weights: dict[str, dict[str, Tensor]] = {}
    layers = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        part = leaf if layer in formats and leaf in ("packed", "scale", "zero") else ""
        key = renamed(f"{layer}.weight" if part else name, expected)
        if key in expected:
            weights.setdefault(key, {})[part] = tensor
            layers[key] = layer
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{subject.name} lacks {len(missing)} weights, such as {missing[0]}")
    for key, parts in weights.items():
        shape = parts[""].shape if "" in parts else None
        if shape and _squeezed(shape) != _squeezed(expected[key]):
            raise ValueError(
                f"{subject.name} has {layers[key]} as {list(shape)}, its config says {list(expected[key])}"
            )
    named = ((key, formats.get(layers[key]) if key.endswith(".weight") else None) for key in expected)
    return {key: Stored(weights[key], form, layers[key]) for key, form in named}


def _squeezed(shape: Sequence[int]) -> list[int]:
    """The shape of a 1x1 convolution that is a linear today."""
    return list(shape[:2]) if tuple(shape[2:]) == (1, 1) else list(shape)


def _adding(component: Component) -> Component:
    return replace(component, network=adding_residuals(component.network, component.config))


def _write_config(folder: Path, component: Component) -> None:
    folder.mkdir()
    config = {"_class_name": "ControlNetModel", **component.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class _Drawn:
    """A graph without its weights: the program that it was traced from, how quantised weights are stored, and
    the names of those that are stored as (in, out)."""

    model: ir.Model
    program: torch.export.ExportedProgram
    layouts: Mapping[str, onnx_graph.Layout]
    turned: set[str]


@dataclass(frozen=True)
class _Writing:
    """Writes one network's files. `places` are where its weights are, once they are written."""

    folder: Path
    stored: Mapping[str, Stored]
    scheme: Scheme
    job: Job
    places: dict[str, ir.ExternalTensor] = field(default_factory=dict)

    def write(self, subject: onnx_networks.Subject) -> dict[str, Any]:
        """Write the graph and its weights. Returns the network's entry for the manifest."""
        self.folder.mkdir(exist_ok=True)
        drawn = self._drawn(subject)
        with Data(self.folder / DATA) as data:
            self._write_weights(subject, drawn, data)
        error = self._save(subject, drawn, GRAPH)
        files = {DATA: data.digest.hexdigest(), GRAPH: sha256(self.folder / GRAPH)}
        size, total = sum((self.folder / file).stat().st_size for file in files), len(self.stored)
        self._tell_error(subject, f"{size / 1e9:.3f} GB, ", error, total)
        return {
            "formats": {weight.layer: weight.form for weight in self.stored.values() if weight.form},
            "sha256": files,
            "error": error,
            "measured": dict(self.scheme.measured),
        }

    def write_again(self, subject: onnx_networks.Subject, entry: dict[str, Any]) -> None:
        """Write the network with more inputs, which reads the same weights, and add it to its `entry`."""
        drawn = self._drawn(subject)
        for name, place in self.places.items():
            value = drawn.model.graph.initializers.get(name)
            if value is None or (value.shape, value.dtype) != (place.shape, place.dtype):
                raise onnx_graph.GraphError(f"{name} is another weight in {CONTROLLED}")
            value.const_value = place
        self._fill(subject, drawn)
        error = self._save(subject, drawn, CONTROLLED)
        entry["sha256"][CONTROLLED] = sha256(self.folder / CONTROLLED)
        entry["error"] = max(entry["error"], error)
        self._tell_error(subject, "with ControlNets, ", error, len(self.stored))

    def _dtype(self, subject: onnx_networks.Subject) -> torch.dtype:
        return self.job.dtype(subject.component.role)

    def _drawn(self, subject: onnx_networks.Subject) -> _Drawn:
        self.job.tell(subject.name, "tracing", 0, len(self.stored))
        dtype, shapes = self._dtype(subject), _shapes(subject)
        model, program = onnx_networks.trace(subject, dtype)
        onnx_graph.cast_concatenated(model.graph)
        onnx_graph.merge_heads(model.graph)
        layouts = {
            name: onnx_graph.quantise_weight(
                model.graph, onnx_networks.PREFIX + name, FORMATS[weight.form], shapes[name], _TYPES[dtype]
            )
            for name, weight in self.stored.items()
            if weight.form
        }
        return _Drawn(model, program, layouts, onnx_graph.transposed_weights(model.graph))

    def _write_weights(self, subject: onnx_networks.Subject, drawn: _Drawn, data: Data) -> None:
        for number, name in enumerate(self.stored):
            self.job.tell(subject.name, "writing", number, len(self.stored))
            values, arrays = self._arrays(subject, drawn, name)
            named = onnx_networks.PREFIX + name
            if named in drawn.turned:
                arrays = {"": np.ascontiguousarray(arrays[""].T)}
            for part, array in arrays.items():
                value = drawn.model.graph.initializers[named + (f"_{part}" if part else "")]
                self.places[str(value.name)] = data.add(value, array)
            _fill(subject.module, name, values)

    def _arrays(
        self, subject: onnx_networks.Subject, drawn: _Drawn, name: str
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        shape, layout = _shapes(subject)[name], drawn.layouts.get(name)
        return _arrays(self.stored[name], shape, self.scheme, self._dtype(subject), layout)

    def _fill(self, subject: onnx_networks.Subject, drawn: _Drawn) -> None:
        for name in self.stored:
            _fill(subject.module, name, self._arrays(subject, drawn, name)[0])

    def _save(self, subject: onnx_networks.Subject, drawn: _Drawn, name: str) -> float:
        """Write the graph, and check it against the subject's module, which has its weights. Returns the
        error."""
        file, total = self.folder / name, len(self.stored)
        _save(drawn.model, file)
        self.job.tell(subject.name, "checking", total, total)
        room = onnx_check.Room(lambda: self._fill(subject, drawn), self.job.release)
        return onnx_check.check(file, subject, drawn.program, self._dtype(subject), room)

    def _tell_error(self, subject: onnx_networks.Subject, what: str, error: float, total: int) -> None:
        self.job.tell(
            subject.name, f"{what}relative error {error:.1e} beside torch with the same values", total, -1
        )


def _shapes(subject: onnx_networks.Subject) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in subject.module.named_parameters()}


def _arrays(
    stored: Stored,
    shape: tuple[int, ...],
    scheme: Scheme,
    dtype: torch.dtype,
    layout: onnx_graph.Layout | None,
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The weight as it will be read, in fp32, and the arrays that it is stored in."""
    if layout is None:
        values = read(stored.tensors[""]).to(dtype).view(shape)
        if not values.isfinite().all():
            raise ValueError(f"{stored.layer} has values that are not finite in {dtype}")
        return values.float(), {"": values.contiguous().numpy()}
    form = layout.form
    if "packed" in stored.tensors:
        parts = {name: read(tensor) for name, tensor in stored.tensors.items()}
    else:
        parts = quantise(read(stored.tensors[""]).view(shape), form, scheme.moments.get(stored.layer))
    return dequantise(parts, form, shape).contiguous(), layout.stored(parts)


def _fill(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)


class Data:
    """The file of a network's weights. Each large one begins on a page, so that it can be mapped."""

    _PAGE = 4096

    def __init__(self, path: Path) -> None:
        self.path, self.digest, self._end = path, hashlib.sha256(), 0
        self._stream = path.open("wb")

    def add(self, value: ir.Value, array: np.ndarray) -> ir.ExternalTensor:
        """Write the values of an initializer, and have it refer to them. Returns their place."""
        gap = -self._end % self._PAGE if array.nbytes >= self._PAGE else -self._end % 64
        assert value.shape is not None and value.dtype is not None
        if array.nbytes != math.ceil(math.prod(int(side) for side in value.shape) * value.dtype.itemsize):  # pyright: ignore
            raise ValueError(f"{value.name} of {value.shape} cannot be stored in {array.nbytes} bytes")
        for piece in (bytes(gap), array.reshape(-1).view(np.uint8).data):
            self._stream.write(piece)
            self.digest.update(piece)
        self._end += gap + array.nbytes
        place = value.const_value = ir.ExternalTensor(
            self.path.name,
            self._end - array.nbytes,
            array.nbytes,
            value.dtype,
            shape=value.shape,
            name=str(value.name),
        )
        return place

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _save(model: ir.Model, path: Path) -> None:
    """Write the graph without the exporter's remarks on each node. These hold paths of this machine, and are
    most of the file."""
    model.producer_name, model.producer_version = "tightfit", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    path.write_bytes(ir.to_proto(model).SerializeToString())
