"""LoRA and its kin in one safetensors file: kohya's, LyCORIS's, diffusers', PEFT's and OneTrainer's."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import TightfitError
from ..fields import plain
from ..files import WEIGHTS_BYTES, open_regular, parsed, read_json, shortened
from ..models.families import reads_texts
from ..models.families.family import Role
from ..models.layouts import foreign
from ..models.layouts.scales import FLOATS
from ..models.layouts.transformer_names import Place
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from .changes import Added, Change, Decomposed, Hadamard, Kronecker, LowRank, Scaled
from .header import Stamp, a1111_hash, contents, exists, located, stamp
from .names import Places, split

_NUMBERS = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "U8": "<B",
    "I8": "<b",
    "BOOL": "<?",
}
# Files of these names in a folder, which is what diffusers and PEFT write.
IN_FOLDERS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
_STRONGEST = 1000  # of weights, either way
_NAMED = 3  # keys that fit nothing: so many are named
# How adapters that make a model paint in few steps are called, and the scheduler that they were made for.
_FAST = (
    (re.compile(r"\blcm\b|latent.consistency"), "an LCM", "--scheduler lcm --steps 4 --guidance-scale 1"),
    (re.compile(r"\bdmd2\b"), "DMD2", "--scheduler lcm --steps 4 --guidance-scale 1"),
    (re.compile(r"\blightning\b"), "Lightning", "--scheduler euler --steps {} --guidance-scale 1"),
    (re.compile(r"\bhyper\b"), "Hyper-SD", "--scheduler ddim --steps {} --guidance-scale 1"),
)
_STEPS = re.compile(r"(\d{1,2})[ _-]?steps?\b")
# Layers by how they begin in files for models of other kinds.
_FOREIGN = (
    (re.compile(r"double_stream_mod|to_qkv_mlp_proj|ff(_context)?[._]linear_"), "Flux.2"),
    (re.compile(r"(img|txt)_mod|modulation[._]lin|proj_mlp"), "Flux.1"),
    (re.compile(r"(double|single)_blocks|single_transformer_blocks"), "Flux"),
    (re.compile(r"joint_blocks|lora_te3|text_encoder_3"), "SD 3"),
    (re.compile(r"lora_transformer|transformer[._]transformer_blocks"), "a diffusion transformer"),
)
_OF_TEXT = re.compile(r"(base_model\.model\.)?(lora_|lycoris_)?(te\d?_|text_encoders?[._\d])")
_READS = re.compile(r"attn2[._](processor[._])?to_[kv]$")  # what of a U-Net reads texts
_PATTERNS = "alpha_pattern"
_ALONE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias", "up_bias": "bias"}


@dataclass(frozen=True)
class Lora:
    """One file, and how strongly it acts on the denoiser (`weight`) and on text encoders (`text_weight`).

    stamp: the file's size and time when it was named; a file that was written again is another adapter.
    """

    option: ClassVar = "lora"

    file: Path
    weight: float
    text_weight: float
    stamp: Stamp

    @classmethod
    def claims(cls, keys: Collection[str]) -> bool:
        return any(split(key) for key in keys if not key.endswith(".weight")) or any(
            (parts := split(key)) and parts[1] in ("up", "down") for key in keys
        )

    @classmethod
    def read(cls, path: str | Path, weight: float = 1.0, text_weight: float | None = None) -> Lora:
        """The adapter in a file that `claims`."""
        file = located(path, IN_FOLDERS)
        weights = plain(weight), plain(weight if text_weight is None else text_weight)
        if not all(isinstance(value, int | float) and abs(value) <= _STRONGEST for value in weights):
            raise TightfitError(
                f"the weight of {file.name} must be a number from -{_STRONGEST} to {_STRONGEST}, "
                f"not {weights}"
            )
        return cls(file, float(weights[0]), float(weights[1]), stamp(file))

    @property
    def name(self) -> str:
        """As it is written after --lora."""
        text = "" if self.text_weight == self.weight else f":{self.text_weight!r}"
        return f"{self.file}:{self.weight!r}{text}"

    @property
    def title(self) -> str:
        """As people call it."""
        return self.file.parent.name if self.file.name in IN_FOLDERS else self.file.stem

    def a1111(self) -> tuple[str, str]:
        """What A1111 writes for it into a prompt, and between its hashes, '' where the file is gone."""
        text, weight = self.text_weight, self.weight
        words = f"{weight:g}" if text == weight else f"{text:g}:{weight:g}"
        digest = ""
        with suppress(OSError, TightfitError):  # else a picture that is painted would be lost
            digest = f"{self.title}: {a1111_hash(self.file, self.stamp)}"
        return f"<lora:{self.title}:{words}>", digest

    @property
    def _layers(self) -> _Layers:
        return _layers(self.file, self.stamp)

    def apply(self, spec: ModelSpec) -> ModelSpec:
        layers, places = self._layers, Places(spec)
        changed = {name: dict(component.tensors) for name, component in spec.components.items()}
        placed = {layer: place for layer in layers.by_name if (place := places.find(layer))}
        repeated, fitting = _repeated(placed, layers.by_name), set[str]()
        for layer, (component, place) in placed.items():
            self._check_width(spec, layer, component, place)
            paths = repeated.get(layer, frozenset())
            with suppress(ValueError):
                if self._change(layer, component, place, changed[component.name], paths):
                    fitting.add(layer)
        twice = {layer for layer, paths in repeated.items() if paths.issuperset(placed[layer][1].paths)}
        self._check_model(spec, placed, fitting)
        components = {
            name: component
            if changed[name] == component.tensors
            else replace(component, tensors=changed[name])
            for name, component in spec.components.items()
        }
        notes = self._notes(fitting, twice)
        return replace(spec, components=components, notes=(*spec.notes, *notes))

    def _change(
        self,
        layer: str,
        component: Component,
        place: Place,
        tensors: dict[str, Tensor],
        left_out: Collection[str],
    ) -> bool:
        """Patch one layer's tensors but those of the paths `left_out`, and say whether there is anything to
        patch. ValueError where a shape does not fit, before anything is patched."""
        contents, paths = self._layers, place.paths
        stored = contents.by_name[layer]
        strength = self.text_weight if component.role is Role.TEXT else self.weight
        patches: list[tuple[str, Change]] = []
        target = tensors.get(_leaf_at(paths[0], "weight", tensors))
        change = _of_weight(contents, layer, stored, strength, target)
        if change:
            patches.append(("weight", change))
        for kind, leaf in _ALONE.items():
            if kind in stored:
                scale = contents.scale(layer, stored) if kind == "up_bias" else 1.0
                added = Added(contents.parts(stored, kind), strength * scale)
                patches.append((leaf, added))
        parts = [
            (path, _leaf_at(path, leaf, tensors), part)
            for leaf, patch in patches
            for path, part in zip(paths, _parts(patch, place, leaf, tensors), strict=True)
        ]
        for path, name, part in parts if strength else ():
            if path not in left_out:
                tensors[name] = replace(tensors[name], patches=(*tensors[name].patches, part))
        return bool(patches)

    def _check_width(self, spec: ModelSpec, layer: str, component: Component, place: Place) -> None:
        """Raise TightfitError if it is what reads texts in a U-Net, of another width."""
        if "cross_attention_dim" in component.config and place.paths[0].endswith(
            ("attn2.to_k", "attn2.to_v")
        ):
            width = self._layers.inputs(layer)
            if width and width != spec.text_width:
                raise self._other_family(spec, f"is for {reads_texts(width)}")

    def _check_model(
        self, spec: ModelSpec, placed: Mapping[str, tuple[Component, Place]], fitting: Collection[str]
    ) -> None:
        """Raise TightfitError if less than half of the layers are this model's, those of texts aside: of two
        transformers of one width some layers have one shape."""
        of_text = {layer for layer in self._layers.by_name if _OF_TEXT.match(layer)}
        layers = self._layers.by_name.keys() - of_text
        if not fitting or 2 * len(layers.intersection(fitting)) < len(layers):
            raise self._for_others(spec, placed.keys())

    def _for_others(self, spec: ModelSpec, placed: Set[str]) -> TightfitError:
        if not spec.denoiser.tensors:
            return TightfitError(
                f"{self.title} changes weights, and {spec.name} is here as ONNX only: "
                "use the model that it was exported from"
            )
        layers = [*self._layers.by_name, *self._layers.unknown]
        reading = (layer for layer in self._layers.by_name if _READS.search(layer))
        width = next(filter(None, map(self._layers.inputs, reading)), None)
        for pattern, kind in _FOREIGN:  # before widths: SD 3.5 has an attn2, too, which reads no texts
            if of_kind := [*filter(pattern.search, layers)]:
                here = not placed.isdisjoint(of_kind)
                other = "a larger or a smaller model, or another with such layers"
                return self._other_family(spec, f"is for {other if here else kind}")
        if width:
            return self._other_family(spec, f"is for {reads_texts(width)}")
        example = f"such as {layers[0][:80]}" if layers else "as it holds nothing"
        return self._other_family(spec, f"fits nothing of the model, {example}")

    def _other_family(self, spec: ModelSpec, what: str) -> TightfitError:
        family = f"{spec.design.title or spec.family}, with texts {spec.text_width} wide"
        return TightfitError(f"{self.title} {what}; {spec.name} is {family}: take an adapter made for that")

    def _notes(self, fitting: Collection[str], repeated: Collection[str]) -> Iterator[str]:
        by_name = self._layers.by_name
        left = [*self._layers.unknown]
        left += (key for layer in by_name if layer not in fitting for key in by_name[layer].values())
        twice = sum(len(by_name[layer]) for layer in repeated)
        count = len(self._layers.unknown) + sum(map(len, by_name.values()))
        if twice:
            yield f"{self.title}: {twice} of {count} keys are of layers that it has under another name too"
        if left:
            more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            names = ", ".join(key[:80] for key in left[:_NAMED])
            yield f"{self.title}: {len(left)} of {count} keys fit nothing and do nothing: {names}{more}"
        words = " ".join([self.title, *map(str, self._layers.words)]).lower()
        spaced = re.sub(r"[_\W]+", " ", words)
        for pattern, kind, options in _FAST:
            if pattern.search(spaced):
                steps = match[1] if (match := _STEPS.search(words)) else "4"
                yield f"{self.title} seems to be {kind} adapter, made for {options.format(steps)}"
                return


@dataclass(frozen=True)
class _Layers:
    """What a file holds: its tensors, which keys each layer has by what they store, the numbers among them,
    keys of no known form, what PEFT's config says, and words that say what it is."""

    tensors: Mapping[str, Tensor]
    by_name: Mapping[str, Mapping[str, str]]
    numbers: Mapping[str, float]
    unknown: tuple[str, ...]
    config: Mapping[str, Any]
    words: tuple[str, ...]

    def parts(self, stored: Mapping[str, str], *kinds: str) -> tuple[Tensor, ...]:
        return tuple(self.tensors[stored[kind]] for kind in kinds if kind in stored)

    def scale(self, layer: str, stored: Mapping[str, str]) -> float:
        """alpha / rank; 1 without an alpha or a rank. Raises TightfitError for one that no fp64 can hold."""
        scale = self._scale(layer, stored)
        if not math.isfinite(scale * _STRONGEST):
            raise broken(self.tensors[next(iter(stored.values()))].file, f"the alpha of {layer}")
        return scale

    def _scale(self, layer: str, stored: Mapping[str, str]) -> float:
        thin = "down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"
        rank = next((self.tensors[stored[kind]].shape[0] for kind in thin if kind in stored), None)
        if not rank:
            return 1.0
        if {"up", "middle"} <= stored.keys():
            rank = self.tensors[stored["up"]].shape[1]
        if "alpha" in stored:
            return self.numbers[stored["alpha"]] / rank
        alpha, root = self._of_peft(layer)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)

    def _of_peft(self, layer: str) -> tuple[float | None, bool]:
        """A layer's alpha by PEFT's config, if there is one, and whether it is for the rank's root."""
        begin = layer.partition(".")[0]

        def setting(name: str, default: Any = None) -> Any:
            return self.config.get(f"{begin}.{name}", self.config.get(name, default))

        alpha, patterns = setting("lora_alpha", setting("alpha")), setting(_PATTERNS)
        if patterns:
            ends = (layer[place:] for place in range(len(layer)) if place == 0 or layer[place - 1] == ".")
            alpha = min((patterns[end] for end in ends if end in patterns), default=(0, alpha))[1]
        return alpha if type(alpha) in (int, float) else None, setting("use_rslora") is True

    def inputs(self, layer: str) -> int | None:
        """Input channels of the layer that an adapter was made for, where its form says."""
        stored = self.by_name[layer]
        for kind in ("down", "hada_w1_b", "diff"):
            if kind in stored and len(shape := self.tensors[stored[kind]].shape) > 1:
                return shape[1]
        return None


def _repeated(
    placed: Mapping[str, tuple[Component, Place]], stored: Mapping[str, Mapping[str, str]]
) -> dict[str, frozenset[str]]:
    """Layers that the file has under another name too, and which of their paths. Some trainers write one
    under two, and joined rows beside their parts, which are taken."""
    seen: set[tuple[str, str, str]] = set()
    repeated = {}
    for layer in sorted(placed, key=lambda one: len(placed[one][1].paths)):
        component, place = placed[layer]
        changed = {(component.name, path, kind) for path in place.paths for kind in stored[layer]}
        if again := changed & seen:
            repeated[layer] = frozenset(path for _, path, _ in again)
        seen |= changed
    return repeated


def _parts(change: Change, place: Place, leaf: str, tensors: Mapping[str, Tensor]) -> Sequence[Change]:
    """What a change of one layer does to each of those that have its rows. ValueError where one does not
    fit."""
    names = [_leaf_at(path, leaf, tensors) for path in place.paths]
    if not tensors.keys() >= {*names}:
        raise ValueError(f"no {leaf} there")
    rows = [(*tensors[name].shape, 0)[0] for name in names]
    if len(rows) == 1 and not place.turned:
        changes = [change]
    elif sum(rows) != change.sides[0]:  # parts of it are cut out of the file, whatever they are for
        raise ValueError("rows of other layers")
    elif place.turned:
        changes = [change.part(rows[0] // 2, rows[0])]
    else:
        starts = (sum(rows[:number]) for number in range(len(rows)))
        changes = [change.part(start, count) for start, count in zip(starts, rows, strict=True)]
    if not all(_fits(one, tensors[name], name) for one, name in zip(changes, names, strict=True)):
        raise ValueError("another shape")
    return changes


def _leaf_at(path: str, leaf: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of a layer's tensor. A weight may be quantised, whatever those beside it are."""
    name = f"{path}.{leaf}"
    return f"{path}.packed" if leaf == "weight" and name not in tensors else name


def _of_weight(
    contents: _Layers, layer: str, stored: Mapping[str, str], strength: float, target: Tensor | None
) -> Change | None:
    """What a layer's keys do to its weight, None for none. ValueError where they do not go together."""
    for kind, key in stored.items():
        if len(contents.tensors[key].shape) < _least_sides(kind):
            raise ValueError(f"{key} of too few sides")
    length = contents.parts(stored, "dora_scale", "length")
    scale = contents.scale(layer, stored) * (1.0 if length else strength)
    change = next((made for make in _FORMS if (made := make(contents, stored, scale))), None)
    if change is None or not length:
        return change
    rows = change.sides[0]
    by_rows = "length" in stored or length[0].shape[0] == rows
    if length[0].count != rows and by_rows:
        raise ValueError("lengths of other rows")
    whole = () if by_rows or target is None else (target,)
    if whole and (len(whole[0].shape) < 2 or length[0].count != whole[0].shape[1]):
        raise ValueError("lengths of other columns")
    return Decomposed((*change.tensors, *length, *whole), strength, change, by_rows)


def _least_sides(kind: str) -> int:
    """Of a tensor that stores this."""
    if kind in ("up", "down", "middle") or kind.startswith(("hada_", "lokr_")):
        return 2
    return 1 if kind in ("dora_scale", "length") else 0


def _low_rank(contents: _Layers, stored: Mapping[str, str], scale: float) -> Change | None:
    if not {"up", "down"} <= stored.keys():
        return None
    return LowRank(contents.parts(stored, "up", "down", "middle"), scale)


def _hadamard(contents: _Layers, stored: Mapping[str, str], scale: float) -> Change | None:
    kinds = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
    if not {*kinds} <= stored.keys():
        return None
    return Hadamard(contents.parts(stored, *kinds, "hada_t1", "hada_t2"), scale)


def _kronecker(contents: _Layers, stored: Mapping[str, str], scale: float) -> Change | None:
    first = contents.parts(stored, "lokr_w1") or contents.parts(stored, "lokr_w1_a", "lokr_w1_b")
    second = contents.parts(stored, "lokr_w2") or contents.parts(stored, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if not first or not second:
        return None
    return Kronecker((*first, *second), scale, len(first))


def _scaled(contents: _Layers, stored: Mapping[str, str], scale: float) -> Change | None:
    if not {"weight", "on_input"} <= stored.keys():
        return None
    return Scaled(contents.parts(stored, "weight"), scale, bool(contents.numbers[stored["on_input"]]))


_Form = Callable[[_Layers, Mapping[str, str], float], "Change | None"]
_FORMS: tuple[_Form, ...] = (_low_rank, _hadamard, _kronecker, _scaled)


def _fits(change: Change, tensor: Tensor, name: str) -> bool:
    """Whether a change is for a tensor of that shape; `packed` is a quantised weight."""
    if not name.endswith(".packed"):
        return bool(tensor.shape) and change.fits(tensor.shape)
    (rows, row), (count, columns) = change.sides, tensor.shape  # a byte for each value, or for two
    return rows in (0, count) and (not rows or row in (0, columns, 2 * columns, 2 * columns - 1))


@functools.lru_cache(maxsize=32)
def _layers(file: Path, stamp: Stamp) -> _Layers:
    tensors, said = contents(file, stamp)
    by_name: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        parts = split(key)
        if parts is None:
            unknown.append(key)
        elif parts[1] in by_name.setdefault(parts[0], {}):
            raise TightfitError(f"{file} holds two tensors of one meaning, such as {key}: take another copy")
        else:
            by_name[parts[0]][parts[1]] = key
    for layer, stored in list(by_name.items()):
        if stored.keys() == {"weight"}:  # of no adapter
            unknown.append(by_name.pop(layer)["weight"])
    numbers = _read_numbers(
        file,
        {
            key: tensors[key]
            for stored in by_name.values()
            for kind, key in stored.items()
            if kind in ("alpha", "on_input")
        },
    )
    for key in (key for stored in by_name.values() for key in stored.values() if key not in numbers):
        if tensors[key].dtype not in FLOATS:
            raise TightfitError(f"{file} holds {key} as {tensors[key].dtype}: take a copy in fp16 or fp32")
    words = tuple(
        said.get(key, "")[:200] for key in ("modelspec.title", "ss_output_name", "ss_training_comment")
    )
    return _Layers(tensors, by_name, numbers, tuple(unknown), _config(file, said), words)


def _read_numbers(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Single numbers, such as alphas, all read in one go."""
    numbers = {}
    with open_regular(file, WEIGHTS_BYTES) as stream:
        for key, tensor in tensors.items():
            if tensor.count != 1 or (tensor.dtype != "BF16" and tensor.dtype not in _NUMBERS):
                raise TightfitError(f"{file} holds {key}, which is no single number: take another copy")
            stream.seek(tensor.offset)
            raw = stream.read(tensor.stored_bytes)
            short = tensor.dtype == "BF16"  # the first half of an fp32 number
            numbers[key] = float(
                struct.unpack("<f" if short else _NUMBERS[tensor.dtype], b"\0\0" * short + raw)[0]
            )
            if not math.isfinite(numbers[key]):
                raise broken(file, key)
    return numbers


def broken(file: Path, key: str) -> TightfitError:
    return TightfitError(
        f"{file} holds values that are not finite, in {key}: take another copy, or another adapter"
    )


def _config(file: Path, said: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's, as it is beside its files, or as diffusers writes it into them. Each pattern has its place
    before its alpha, as the first that fits is taken."""
    beside = file.with_name("adapter_config.json")
    if file.name == IN_FOLDERS[1] and beside.exists():
        config = read_json(beside)
    else:
        try:
            config = parsed(said.get("lora_adapter_metadata", "{}").encode())
        except ValueError:
            config = {}
    found = config if isinstance(config, dict) else {}
    return {
        key: value if key.rpartition(".")[2] != _PATTERNS else _placed(value) for key, value in found.items()
    }


def _placed(patterns: Any) -> Mapping[str, tuple[int, Any]]:
    alphas = patterns.items() if isinstance(patterns, dict) else ()
    return {pattern: (place, alpha) for place, (pattern, alpha) in enumerate(alphas)}


def no_lora(file: Path, names: Iterable[str] = ()) -> TightfitError:
    if known := foreign.what(names):
        return TightfitError(f"{file} is {known[0]}, no LoRA: {known[1]}")
    return TightfitError(f"{file} is no LoRA or the like: a whole model is given by --model, a VAE by --vae")


_WEIGHT = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)


def written(text: str) -> Lora:
    """The adapter that FILE[:weight[:text_weight]] says."""
    path, weights = text, []
    while len(weights) < 2 and not exists(path) and (match := _WEIGHT.fullmatch(path)):
        path, weight = match.groups()
        try:
            weights.insert(0, float(weight))
        except ValueError:
            raise TightfitError(
                f"{shortened(weight)} in {shortened(text)} is no number: say FILE:0.8"
            ) from None
    file = located(path, IN_FOLDERS)
    stored, _ = contents(file, stamp(file))
    if not Lora.claims(stored):
        raise no_lora(file, stored)
    return Lora.read(file, *weights)
