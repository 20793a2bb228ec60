"""ControlNets: pictures that the painting follows, each read in every step by a network beside the
denoiser."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..adapters.header import Stamp, contents, located, stamp
from ..errors import TightfitError
from ..fields import option, plain
from ..files import WEIGHTS_BYTES, open_regular
from ..models.families.controlnet import CONTROLNETS, MOST
from ..models.families.family import FEATURE, RESIDUAL, Extent, Role
from ..models.families.t2i_adapter import T2I_ADAPTERS
from ..models.layouts import controlnet, library, optimum
from ..models.spec import Component, ModelSpec
from ..recent import Recent
from .condition import Arrays, Call, Condition, Steering
from .image import PANEL, size_of
from .input_pictures import RESIZES, Picture, open_picture
from .preprocess import PREPROCESSORS, luminance

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..request import Job

_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_GIVE = "give one by --control PICTURE:model=FILE"
_MOST_WEIGHT = 10
_SOFTER = 0.825  # from one answer to the one before it, of 13: A1111's
_READ: Recent[Component] = Recent(16)
_CONTROLLED: Recent[Component | None] = Recent(16)
DEFAULT = "default"
"""What a picture's text calls a ControlNet that is not named."""
CONTROL = "control"
"""The option, and what it is in a picture's text: a list of texts."""


def _alike(count: int) -> list[float]:
    return [1.0] * count


def _softly(count: int) -> list[float]:
    return [_SOFTER ** (12 - place) for place in range(count)]


def _rising(count: int) -> list[float]:
    """From a tenth to one, as diffusers' guess mode has it."""
    return [10 ** (place / (count - 1) - 1) for place in range(count)]


@dataclass(frozen=True)
class Mode:
    """What the answers weigh, from the input to the middle; and whether rows without the prompt get them,
    too. `a1111` is what A1111 calls it."""

    weights: Any
    everywhere: bool
    a1111: str


MODES = {
    "balanced": Mode(_alike, True, "Balanced"),
    "prompt": Mode(_softly, True, "My prompt is more important"),
    "control": Mode(_softly, False, "ControlNet is more important"),
    "guess": Mode(_rising, False, "ControlNet is more important"),
}
RESIZE_MODES = {"resize": "Just Resize", "crop": "Crop and Resize", "fill": "Resize and Fill"}
MODULES = {
    "soft": "softedge", "invert": "invert (from white bg & black line)", "tile": "tile_resample",
    "luminance": "recolor_luminance",
}  # fmt: skip


@dataclass(frozen=True)
class Control:
    """A picture to follow, and how. `model`: the ControlNet, a file, a folder or a name in folders of models;
    None: the model's own, or the only one there that fits it. weight: of its answers. start and end: of the
    steps, in which part it acts. mode: one of MODES. preprocess: one of PREPROCESSORS. resize: as of an
    image."""

    picture: Picture
    model: str | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    preprocess: str = "none"
    resize: str = "resize"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path | None):
            raise TightfitError(
                f"a ControlNet is a folder, a file or a name, not {type(self.model).__name__}: "
                "name its folder or file"
            )
        if self.model is not None:  # of a file, where it is, whatever folder this is in when it is read again
            path = Path(str(self.model)).expanduser()
            name = str(path.absolute()) if library.exists(str(path)) else str(self.model)
            object.__setattr__(self, "model", name)
        bounds = {"weight": (-_MOST_WEIGHT, _MOST_WEIGHT), "start": (0, 1), "end": (0, 1)}
        for name, (least, most) in bounds.items():
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise TightfitError(
                    f"{name} of a control must be a number from {least} to {most}, not {value!r}"
                )
        if self.start >= self.end:
            raise TightfitError(
                f"start {self.start:g} of a control must be below end {self.end:g}: leave the control out, "
                "or let it act in some steps"
            )
        for name, known in (("mode", MODES), ("preprocess", PREPROCESSORS), ("resize", RESIZES)):
            if getattr(self, name) not in known:
                raise TightfitError(
                    f"{name} of a control must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )

    def acting(self, calls: int) -> range:
        """Of so many calls, from 0, those that lie between start and end, as diffusers counts them."""
        within = [n for n in range(calls) if n / calls >= self.start and (n + 1) / calls <= self.end]
        if not within:
            raise TightfitError(
                f"a control from {self.start:g} to {self.end:g} acts in none of {calls} calls of the U-Net: "
                "let it act for longer, or ask for more steps"
            )
        return range(within[0], within[-1] + 1)

    def pixels(self, job: Job, component: Component) -> np.ndarray:
        """(1, channels, height, width) in 0..1, as the network reads it; of a picture that is painted in
        part, that part."""
        import numpy as np

        part = next((each for each in job.conditions if getattr(each, "padding", None) is not None), None)
        fitted = np.asarray(self._inside(part, job) if part else self._fitted(job.width, job.height))
        made = PREPROCESSORS[self.preprocess](fitted)
        if component.network.inputs(job.spec, Extent(1, job.height, job.width))["picture"][1] == 1:
            made = luminance(made)[..., :1]
        return np.ascontiguousarray(made.astype(np.float32).transpose(2, 0, 1)[None] / 255)

    def _fitted(self, width: int, height: int) -> Image.Image:
        return self.picture.fitted(width, height, self.resize)

    def _inside(self, part: Any, job: Job) -> Image.Image:
        """The part that is painted of `part`, a condition, laid over the whole of its picture."""
        from .pasting import Place

        return Place(part, job).inside(self._fitted(part.image.width, part.image.height))

    def said(self) -> str:
        """As it is typed, but for the picture: numbers in all their digits."""
        values = {name: getattr(self, name) for name in _DEFAULTS}
        changed = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        return ":".join(["", *(f"{name}={value}" for name, value in changed.items())])

    def a1111(self, name: str) -> str:
        """As A1111's extension writes it, with a model that is called so."""
        fields = {
            "Module": MODULES.get(self.preprocess, self.preprocess),
            "Model": name,
            "Weight": f"{self.weight:g}",
            "Resize Mode": RESIZE_MODES[self.resize],
            "Guidance Start": f"{self.start:g}",
            "Guidance End": f"{self.end:g}",
            "Pixel Perfect": "True",
            "Control Mode": MODES[self.mode].a1111,
        }
        return ", ".join(f"{name}: {value}" for name, value in fields.items())


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Control) if f.name != "picture"}
_NUMBERS = ("weight", "start", "end")
_KEY = re.compile(rf":(?=(?:{'|'.join(_DEFAULTS)})=)")


@dataclass(frozen=True)
class Options:
    """What asks for pictures to follow. In Python, in diffusers' words, each value may be a list."""

    control: list[str] | None = option(  # noqa: RUF009
        None, "Follow; FILE:weight=0.8.", "FILE", panel=PANEL, carried=True
    )
    control_image: Any = None
    controlnet: Any = None
    controlnet_conditioning_scale: Any = option(None, bounds=(-_MOST_WEIGHT, _MOST_WEIGHT))  # noqa: RUF009
    control_guidance_start: Any = option(None, bounds=(0, 1))  # noqa: RUF009
    control_guidance_end: Any = option(None, bounds=(0, 1))  # noqa: RUF009
    control_mode: Any = option(None, choices=tuple(MODES))  # noqa: RUF009
    control_preprocess: Any = option(None, choices=tuple(PREPROCESSORS))  # noqa: RUF009
    control_resize: Any = option(None, choices=RESIZES)  # noqa: RUF009
    guess_mode: Any = None
    models_dirs: Any = None


# diffusers' words, and ours for what it has not, by the fields that they are.
WORDS = {
    "controlnet": "model", "controlnet_conditioning_scale": "weight", "control_guidance_start": "start",
    "control_guidance_end": "end", "control_mode": "mode", "control_preprocess": "preprocess",
    "control_resize": "resize",
}  # fmt: skip


@dataclass(frozen=True)
class ControlNets(Condition):
    """Follow pictures. `models_dirs` are folders in which models are looked for by name. `places` are where
    the ControlNets are, and `names` what pictures call them, both decided by `resolved`."""

    controls: tuple[Control, ...]
    models_dirs: tuple[Path, ...] = ()
    places: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()

    networks: ClassVar = (*CONTROLNETS, *T2I_ADAPTERS)
    options: ClassVar = Options
    limited: ClassVar = (CONTROL, "control_image", "controlnet")

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> ControlNets | None:
        named = {name: given[name] for name in WORDS if given.get(name) is not None}
        controls = [*map(typed, given.get(CONTROL) or ()), *_in_python(given, named)]
        if not controls:
            return None
        return cls(tuple(controls), _folders(given.get("models_dirs") or ()))

    def __post_init__(self) -> None:
        if len(self.controls) > MOST:
            raise TightfitError(
                f"{len(self.controls)} controls are asked for, and a request has at most {MOST}: name fewer"
            )

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:
        return size_of(self.controls[0].picture, spec)

    def said(self) -> dict[str, Any]:
        return {CONTROL: [control.said() for control in self.controls]}

    def a1111(self) -> dict[str, Any]:
        named = zip(self.controls, self.names, strict=True)
        return {f"ControlNet {number}": control.a1111(name) for number, (control, name) in enumerate(named)}

    def resolved(self, spec: ModelSpec) -> ControlNets:
        """Nothing is looked for later: a file that vanishes meanwhile takes no finished picture with it."""
        if not spec.denoiser.tensors and not _controlled(spec):
            raise TightfitError(
                f"the U-Net of {spec.name} is here as ONNX alone, which follows no picture: "
                "export the model again with --control, or use the model that it was made from"
            )
        places = tuple(self._path(control, spec) for control in self.controls)
        names = map(_shown_name, self.controls, places)
        return replace(self, places=places, names=tuple(names))

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        spec.check_takes(CONTROL)
        nets = tuple(_component(place, number, spec) for number, place in enumerate(self.places))
        controlled = _controlled(spec) if any(net.role is Role.CONTROL for net in nets) else None
        adapter = next((net for net in nets if net.role is not Role.CONTROL), None)
        if adapter and not spec.denoiser.tensors:
            raise TightfitError(
                f"{adapter.folder} is a T2I-Adapter, and the U-Net of {spec.name} is here as ONNX alone, "
                "which follows ControlNets: take one of these, or use the model that it was made from"
            )
        return (*nets, controlled) if controlled else nets

    def _path(self, control: Control, spec: ModelSpec) -> Path:
        if control.model is not None:
            return _place(library.located(control.model, library.Kind.CONTROLNET, self.models_dirs))
        return controlnet.built_in(spec) or self._only(spec)

    def _only(self, spec: ModelSpec) -> Path:
        """The one in the folders of models that fits this model. Raises TightfitError for none, or two."""
        entries = library.scan(library.folders(self.models_dirs)).entries
        names = {e.name: e.path for e in entries if e.shelf is library.Kind.CONTROLNET and not e.is_pickle}
        fitting = [name for name, path in names.items() if _fits(path, spec)]
        if len(fitting) == 1:
            return names[fitting[0]]
        there = f"several do ({', '.join(fitting[:5])})" if fitting else "none in a folder of models does"
        raise TightfitError(f"which ControlNet is for {spec.name} is not said, and {there}: {_GIVE}")

    def acting(self, name: str, calls: int) -> range | None:
        pairs = zip(CONTROLNETS, self.controls, strict=False)
        return next((control.acting(calls) for network, control in pairs if network.name == name), None)

    def varies(self, job: Job) -> bool:
        calls, nets = job.scheduled_calls, job.spec.of_role(Role.CONTROL)
        on_one_branch = any(not MODES[control.mode].everywhere for control in self.controls) or any(
            net.config.get("global_pool_conditions") for net in nets
        )
        return on_one_branch or any(len(control.acting(calls)) < calls for control in self.controls)

    def prepare(self, job: Job, call: Call) -> Steering:
        return Controlled(self, job, call)


def again(said: Sequence[str], texts: Sequence[str], source: object) -> list[str]:
    """What is typed, and besides what a picture said of its controls, one after the other. Raises
    TightfitError where pictures lack."""
    if len(texts) < len(said):
        count = "a picture" if len(said) == 1 else f"{len(said)} pictures"
        raise TightfitError(
            f"{source} was painted after {count} it does not carry: give each by --control, in their order"
        )
    parts = [_KEY.split(text) for text in texts]
    before = [_KEY.split(text)[1:] for text in said] + [[]] * (len(texts) - len(said))
    return [":".join([path, *old, *new]) for (path, *new), old in zip(parts, before, strict=True)]


def typed(text: str) -> Control:
    """What PICTURE:key=value:… means; of a key that is there twice the second counts."""
    path, *pairs = _KEY.split(text)
    values: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    for name in _NUMBERS:
        if name in values:
            try:
                values[name] = float(values[name])
            except ValueError:
                raise TightfitError(f"{name} of --control must be a number, not {values[name]!r}") from None
    if not library.exists(path) and (unknown := re.search(r":(\w+)=", path)):
        raise TightfitError(
            f"--control has no {unknown[1]}: it takes a picture, then {', '.join(_DEFAULTS)}, as :weight=0.8"
        )
    before, _, rest = path.rpartition(":")
    if before and not library.exists(path) and library.exists(before):
        raise TightfitError(f"--control takes keys after colons, as :weight=0.8, not ':{rest[:40]}'")
    return Control(open_picture(path), **values)


def _in_python(given: Mapping[str, Any], named: Mapping[str, Any]) -> list[Control]:
    """Those of diffusers' words."""
    pictures, guesses = given.get("control_image"), bool(given.get("guess_mode"))
    if not isinstance(pictures, list | tuple):
        pictures = [] if pictures is None else [pictures]
    asked = [*named, *["guess_mode"] * guesses]
    if asked and not pictures:
        raise TightfitError(f"{asked[0]} is of a picture to follow: give it by control_image")
    if guesses and "control_mode" in named:
        raise TightfitError("guess_mode and control_mode both say what the answers weigh: give one of them")
    values = {WORDS[name]: _for_each(name, value, len(pictures)) for name, value in named.items()}
    if guesses:
        values["mode"] = ["guess"] * len(pictures)
    return [
        Control(open_picture(picture), **{name: of_each[place] for name, of_each in values.items()})
        for place, picture in enumerate(pictures)
    ]


def _for_each(name: str, value: Any, count: int) -> Sequence[Any]:
    values = value if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise TightfitError(f"{name} has {len(values)} values for {count} pictures: give one for each")
    return values


def _folders(given: Any) -> tuple[Path, ...]:
    folders = [given] if isinstance(given, str | Path) else given
    if not isinstance(folders, list | tuple) or not all(isinstance(folder, str | Path) for folder in folders):
        raise TightfitError(f"models_dirs are folders of models, not {given!r}: name each in a list")
    return tuple(map(Path, folders))


def _place(name: str) -> Path:
    """The file that is meant, or the folder of a ControlNet."""
    path = Path(name).expanduser()
    for folder in (path, path / "controlnet"):
        if (folder / "config.json").is_file():
            return folder.absolute()
    return located(name, _FILES)


@functools.lru_cache(maxsize=32)
def _short_hash(file: Path, stamp: Stamp) -> str:  # noqa: ARG001
    """A1111's old one, of 64 KiB in the middle of a file."""
    with open_regular(file, WEIGHTS_BYTES) as stream:
        stream.seek(2**20)
        return hashlib.sha256(stream.read(2**16)).hexdigest()[:8]


def _shown_name(control: Control, place: Path) -> str:
    """A ControlNet's name, and its hash if it is a file that can be read, as A1111 shows them."""
    if control.model is None:
        return DEFAULT
    return titled(place)


def titled(place: Path) -> str:
    """A ControlNet's name as A1111 lists it."""
    with suppress(OSError, TightfitError):  # which is said where the whole file is read
        return f"{place.stem} [{_short_hash(place, stamp(place))}]" if place.is_file() else place.name
    return place.stem


def _component(path: Path, number: int, spec: ModelSpec) -> Component:
    """The network there, as that of a request's control of this number: the same object as long as its files
    are not written again."""
    files = sorted(path.iterdir())[:100] if path.is_dir() else [path]
    stamps: tuple[Stamp, ...] = tuple(map(stamp, files))
    return _READ.get((number, path, stamps), lambda: _opened(path, number, spec), spec)


def _opened(path: Path, number: int, spec: ModelSpec) -> Component:
    networks = CONTROLNETS[number], T2I_ADAPTERS[number]
    if path.is_dir():
        return controlnet.of_folder(path, networks, spec)
    return controlnet.of_file(path, contents(path, stamp(path))[0], networks, spec)


def opened(name: str, number: int, spec: ModelSpec) -> Component:
    """The ControlNet that is called so, to be exported with the model as its ControlNet of this number.
    Raises TightfitError for what is none, or for another model."""
    found = library.located(name, library.Kind.CONTROLNET, ())
    net = _component(_place(found), number, spec)
    if net.role is not Role.CONTROL:
        raise TightfitError(f"{net.folder} is a T2I-Adapter, which has no ONNX layout: export a ControlNet")
    if not net.tensors or net.formats is not None:
        there = "in 8 or 4 bits already" if net.tensors else "here as ONNX only"
        raise TightfitError(f"{net.folder} is {there}: export the ControlNet that it was made from")
    return net


def _controlled(spec: ModelSpec) -> Component | None:
    """The denoiser as ONNX that follows pictures: the same object for the same model."""
    return _CONTROLLED.get((), lambda: optimum.controlled(spec.denoiser), spec)


def _fits(path: Path, spec: ModelSpec) -> bool:
    try:
        return bool(_component(_place(str(path)), 0, spec))
    except TightfitError:
        return False


class Controlled(Steering):
    """Calls each ControlNet that acts before the denoiser, and hands on what it answers, which stays on the
    device: each adds to the answers of the one before it. T2I-Adapters are called once, and add up."""

    def __init__(self, condition: ControlNets, job: Job, call: Call) -> None:
        self._call, self._job = call, job
        self._nets: list[_Acting] = []
        self._adapters: list[tuple[range, list[np.ndarray]]] = []
        for number, control in enumerate(condition.controls):
            names = CONTROLNETS[number].name, T2I_ADAPTERS[number].name
            component = next(job.spec.components[name] for name in names if name in job.spec.components)
            acting = job.of_schedule(control.acting(job.scheduled_calls))
            picture = control.pixels(job, component)
            if component.role is Role.CONTROL:
                self._nets.append(_Acting(component, control, acting, picture))
            else:
                self._adapters.append((acting, _features(component, control, picture, job, call)))
        self._scales: dict[tuple[str, range], np.ndarray] = {}
        self._features: dict[tuple[int, ...], dict[str, np.ndarray]] = {(): {}}
        self._begin = self._now = 0

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:  # noqa: ARG002
        self._begin = self._now = call
        return latents

    def after(self, latents: np.ndarray, call: int) -> np.ndarray:
        self._now = call + 1
        return latents

    def beside(self, arrays: Arrays, rows: range) -> Mapping[str, Any]:
        given = {name: array for name, array in arrays.items() if name != "time_condition"}
        answers: dict[str, Any] = {}
        place = self._now - self._begin
        for net in self._nets:
            scales = self._weights(net, rows)
            if place in net.acting and scales.any():
                made = self._call(net.component.name, **given, picture=net.picture, scales=scales, **answers)
                answers = {f"{RESIDUAL}{number}": answer for number, answer in enumerate(made)}
        return {**answers, **self._summed(place)}

    def _summed(self, place: int) -> dict[str, np.ndarray]:
        """What the T2I-Adapters that act at this call add: the same arrays for the same ones."""
        which = tuple(n for n, (acting, _) in enumerate(self._adapters) if place in acting)
        if which not in self._features:
            parts = zip(*(self._adapters[n][1] for n in which), strict=True)
            sums: Any = map(sum, parts)
            self._features[which] = {f"{FEATURE}{n}": feature for n, feature in enumerate(sums)}
        return self._features[which]

    def _weights(self, net: _Acting, rows: range) -> np.ndarray:
        """(rows, answers): the same array for the same rows, so that it is sent once."""
        import numpy as np

        component, control = net.component, net.control
        if (component.name, rows) not in self._scales:
            job, mode = self._job, MODES[control.mode]
            inputs = job.spec.inputs(component, len(rows), job.height, job.width)
            pooled, count = component.config.get("global_pool_conditions"), inputs["scales"][-1]
            weights = _alike(count) if pooled and control.mode == "guess" else mode.weights(count)
            everywhere = mode.everywhere and not pooled
            shares = np.outer([float(everywhere or row in job.prompted) for row in rows], weights)
            self._scales[component.name, rows] = shares.astype(np.float32) * np.float32(control.weight)
        return self._scales[component.name, rows]


@dataclass(frozen=True)
class _Acting:
    """A ControlNet, and in which calls of the denoiser it acts."""

    component: Component
    control: Control
    acting: range
    picture: np.ndarray


def _features(
    component: Component, control: Control, picture: np.ndarray, job: Job, call: Call
) -> list[np.ndarray]:
    """What a T2I-Adapter adds in each block."""
    import numpy as np

    factor = component.config["downscale_factor"]
    if control.mode != "balanced":
        raise TightfitError(f"{component.folder} is a T2I-Adapter, which has no mode: leave mode out")
    if job.height % factor or job.width % factor:
        raise TightfitError(
            f"{component.folder} reads blocks of {factor} pixels: ask for sides of whole blocks"
        )
    return [np.float32(control.weight) * feature for feature in call(component.name, picture=picture)]
