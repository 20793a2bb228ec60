"""Networks that enlarge pictures, in files as they are shared: RRDBNet (ESRGAN, Real-ESRGAN and what was
trained from them) and SRVGGNetCompact, recognised by names and shapes of their tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TightfitError
from ..files import readable
from .families.family import Extent, GraphNames, Network, Role, Shape
from .layouts import foreign
from .layouts.library import Kind, exists
from .layouts.safetensors import read_file
from .tensors import Tensor

if TYPE_CHECKING:
    import numpy as np

    from .spec import Component, ModelSpec

_READ = "RRDBNet (ESRGAN, Real-ESRGAN) and SRVGGNetCompact are read"
_MOST_FEATURES, _MOST_SCALE = 1024, 16
_MOST_LAYERS = {"blocks": 64, "convolutions": 128}  # published ones have 6 to 23, and 16 or 32
_COMPUTES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
# Layers' names in files of ESRGAN's authors, before and after they renamed them, and Real-ESRGAN's. The first
# ones number the layers after the trunk (_renamed).
_RENAMED = (
    (r"model\.0", "conv_first"),
    (r"model\.1\.sub\.(\d+)\.RDB([123])\.conv([1-5])\.0", r"body.\1.rdb\2.conv\3"),
    (r"model\.1\.sub\.\d+", "conv_body"),
    (r"RRDB_trunk\.(\d+)\.RDB([123])\.conv([1-5])", r"body.\1.rdb\2.conv\3"),
    (r"trunk_conv", "conv_body"),
    (r"upconv(\d)", r"conv_up\1"),
    (r"HRconv", "conv_hr"),
)
_RRDB = re.compile(r"(?:conv_(?:first|body|up\d|hr|last)|body\.\d+\.rdb[123]\.conv[1-5])\.(?:weight|bias)")
_SRVGG = re.compile(r"body\.\d+\.(?:weight|bias)")
_NUMBERED = re.compile(r"model\.(\d{1,2})\.(weight|bias)")
# How names begin, or end, that only these have.
_OTHERS = (
    (r"(?:.*\.)?conv1x1\.weight$", "ESRGAN+"),
    (r"layers\.\d+\.residual_group\.overlap_attn\.", "HAT"),
    (r"layers\.\d+\.residual_group\.blocks\.\d+\.attn\.logit_scale$", "Swin2SR"),
    (r"layers\.\d+\.residual_group\.blocks\.\d+\.attn\.", "SwinIR"),
    (r"layers\.\d+\.residual_group\.layers\.\d+\.attn_", "ATD"),
    (r"layers\.\d+\.blocks\.\d+\.(?:attn\.attns|adaptive)", "DAT"),
    (r"residual_layer\.\d+\.residual_layer\.", "OmniSR"),
    (r"block_\d\.c1_r\.", "SPAN"),
    (r"unet1\.conv1\.", "Real-CUGAN"),
    (r"feats\.\d+\.(?:lk|dccm|spatial)", "PLKSR"),
    (r"(?:encoder_level\d|patch_embed\.proj)\.", "Restormer or another transformer"),
)


# A1111's names of networks, by those of the files that it downloads (its modules/realesrgan_model.py and
# esrgan_model.py). It calls any other by its file.
_A1111 = {
    "RealESRGAN_x4plus": "R-ESRGAN 4x+",
    "RealESRGAN_x4plus_anime_6B": "R-ESRGAN 4x+ Anime6B",
    "RealESRGAN_x2plus": "R-ESRGAN 2x+",
    "realesr-general-x4v3": "R-ESRGAN General 4xV3",
    "realesr-general-wdn-x4v3": "R-ESRGAN General WDN 4xV3",
    "realesr-animevideov3": "R-ESRGAN AnimeVideo",
}
_FILES = {name.lower(): file for file, name in _A1111.items()}


def file_of(name: str) -> str:
    """What the file of an upscaler is called, also of A1111's name for it: "R-ESRGAN 4x+"."""
    return _FILES.get(" ".join(name.lower().split()), name)


def a1111_name(file: str) -> str:
    """What A1111 calls the network in a file of this name, without ending."""
    return _A1111.get(file, file)


def _inputs(_: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {"raw": (1, 3, extent.height, extent.width)}


def _build(component: Component) -> Any:
    from ...kernels.upscalers import RRDBNet, SRVGGNetCompact

    sides = {name: value for name, value in component.config.items() if name not in ("architecture", "scale")}
    if component.config["architecture"] == "SRVGGNetCompact":
        return SRVGGNetCompact(**sides, scale=component.config["scale"])
    return RRDBNet(**sides)


def _enlarge(module: Any, raw: Any, tiled: bool) -> tuple[Any, ...]:
    from ...kernels.upscalers import enlarge

    try:
        return (enlarge(module, raw, tiled),)
    except FloatingPointError:
        compute = _COMPUTES[str(next(module.parameters()).dtype)]
        damaged = "copy or download the upscaler again, its weights may be damaged"
        cure = damaged if compute == "fp32" else "try --precision fp32"
        raise TightfitError(f"the enlarged picture overflowed in {compute}: {cure}") from None


UPSCALER = Network(
    name="upscaler",
    folder="upscaler",
    role=Role.ENCODER,
    listed="",
    fields={},
    defaults={},
    layers=lambda _: {},
    decided_by={},
    inputs=_inputs,
    build=_build,
    call=functools.partial(_enlarge, tiled=False),
    graph=GraphNames(needed=frozenset(), answers=list),
    in_strips=True,
    call_in_strips=functools.partial(_enlarge, tiled=True),
)


def read_upscaler(file: str | Path) -> Component:
    """The network in a file; the same object until the file is written again. Raises TightfitError for what
    is no upscaler that is read."""
    path = Path(file).expanduser().absolute()
    if not exists(path):
        raise TightfitError(f"{path} does not exist: name a .safetensors file, or its folder by --models-dir")
    with readable(path):
        status = path.stat()
        return _read(path, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _read(path: Path, stamp: tuple[int, int]) -> Component:  # noqa: ARG001
    from .spec import Component

    stored = _renamed(read_file(path)[0])
    try:
        config = _config(stored)
    except (KeyError, IndexError, ValueError):
        raise _no_upscaler(path, stored) from None
    if config["channels"] != 3:
        raise TightfitError(f"{path} is for pictures of {config['channels']} channels: name one for colours")
    return Component(UPSCALER, path, config, stored)


class _Alone:
    """In place of a family, of a model that is an upscaler alone."""

    name = UPSCALER.name


def alone(component: Component) -> ModelSpec:
    """A model of this network and nothing else, as engines are asked about models."""
    from .spec import ModelSpec

    design: Any = _Alone()
    networks = {component.name: component}
    return ModelSpec(component.folder.stem, component.folder, design, networks, scheduler={}, defaults={})


def enlarged(
    component: Component, call: Callable[..., tuple[np.ndarray, ...]], picture: np.ndarray
) -> np.ndarray:
    """(1, 3, h, w) uint8 → (1, 3, scale * h, scale * w) uint8, by a condition's `call`."""
    (larger,) = call(component.name, raw=picture)
    return larger


def described(component: Component) -> str:
    """In words: 'RRDBNet ×4'."""
    return f"{component.config['architecture']} ×{component.config['scale']}"


def _no_upscaler(path: Path, names: Mapping[str, Tensor]) -> TightfitError:
    for pattern, other in _OTHERS:
        if any(re.match(pattern, name) for name in names):
            return TightfitError(f"{path} is an upscaler of the architecture {other}: {_READ}")
    if foreign.kind_of(names) is not Kind.UPSCALER:  # which would be told to come here
        if known := foreign.what(names):
            return TightfitError(f"{path} is {known[0]}, no upscaler: {_READ}")
        try:
            foreign.check(path, names)
        except TightfitError as error:
            return error
    return TightfitError(f"{path} is no upscaler that is known here: {_READ}")


def _renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the layers' names of Real-ESRGAN."""
    after = sorted({int(match[1]) for name in stored if (match := _NUMBERED.fullmatch(name))} - {0})
    *ups, hidden, last = after if len(after) > 1 else (0, 0)
    numbered = {number: f"conv_up{count}" for count, number in enumerate(ups, 1)}
    numbered |= {hidden: "conv_hr", last: "conv_last"} if last else {}
    return {_name(name, numbered): tensor for name, tensor in stored.items()}


def _name(name: str, numbered: Mapping[int, str]) -> str:
    if (match := _NUMBERED.fullmatch(name)) and int(match[1]) in numbered:
        return f"{numbered[int(match[1])]}.{match[2]}"
    layer, _, leaf = name.rpartition(".")
    for pattern, ours in _RENAMED:
        if match := re.fullmatch(pattern, layer):
            return f"{match.expand(ours)}.{leaf}"
    return name


def _config(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """KeyError, IndexError or ValueError for what is neither."""
    if all(map(_SRVGG.fullmatch, stored)):
        return _of_srvgg(stored)
    if all(map(_RRDB.fullmatch, stored)):
        return _of_rrdb(stored)
    raise ValueError("names that neither has")


def _of_rrdb(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    features, read, *_ = stored["conv_first.weight"].shape
    channels = stored["conv_last.weight"].shape[0]
    doublings = sum(re.fullmatch(r"conv_up\d\.weight", name) is not None for name in stored)
    blocks = {name.split(".")[1] for name in stored if name.startswith("body.")}
    unshuffle = [channels * unit**2 for unit in (1, 2, 3, 4)].index(read) + 1
    config = {
        "channels": channels,
        "features": features,
        "growth": stored["body.0.rdb1.conv1.weight"].shape[0],
        "blocks": len(blocks),
        "doublings": doublings,
        "unshuffle": unshuffle,
    }
    scale, rest = divmod(2**doublings, unshuffle)
    return _checked({"architecture": "RRDBNet", "scale": 0 if rest else scale, **config})


def _of_srvgg(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    weights = [
        tensor for name, tensor in stored.items() if name.endswith("weight") and len(tensor.shape) == 4
    ]
    features, channels, *_ = stored["body.0.weight"].shape
    last = 2 * len(weights) - 2  # between two convolutions is an activation, with a slope for each channel
    out = stored[f"body.{last}.weight"].shape[0]
    scale = [channels * side**2 for side in range(1, _MOST_SCALE + 1)].index(out) + 1
    config = {"channels": channels, "features": features, "convolutions": len(weights) - 2}
    return _checked({"architecture": "SRVGGNetCompact", "scale": scale, **config})


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    sizes = (config["features"], config.get("growth", 1), config["scale"], config["channels"])
    if not all(0 < size <= _MOST_FEATURES for size in sizes) or config["scale"] > _MOST_SCALE:
        raise ValueError("an impossible size")
    if any(config.get(name, 0) > most for name, most in _MOST_LAYERS.items()):
        raise ValueError("more layers than are built")
    return config
