"""T2I-Adapters of the families of Stable Diffusion: small networks that read a picture once for all steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checks import MOST_LAYERS, is_count, many, whole
from .controlnet import MOST
from .family import FEATURE, Extent, Network, Shape
from .networks import ENCODER

if TYPE_CHECKING:
    from ..spec import Component, ModelSpec

PLAIN, XL = "full_adapter", "full_adapter_xl"  # diffusers' words
_FIELDS = {
    "in_channels": whole(1, 4),
    "channels": many(is_count),
    "num_res_blocks": whole(1, MOST_LAYERS),
    "downscale_factor": whole(1, 64),
    "adapter_type": lambda value: value in (PLAIN, XL),
}
_DEFAULTS = {
    "in_channels": 3,
    "channels": (320, 640, 1280, 1280),
    "num_res_blocks": 2,
    "downscale_factor": 8,
    "adapter_type": PLAIN,
}


def _layers(config: Mapping[str, Any]) -> dict[str, int]:
    # Of four tensors each, where layers of others have six or more.
    return {"num_res_blocks": config["num_res_blocks"] * len(config["channels"]) * 2 // 3}


def _inputs(name: str, spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {"picture": (1, spec.components[name].config["in_channels"], extent.height, extent.width)}


def _features(name: str, spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    """One for each of the U-Net's blocks; of SDXL the last is for its middle."""
    config = spec.components[name].config
    halved = [0, 0, 1, 1] if config["adapter_type"] == XL else range(len(config["channels"]))
    sides = [[-(-side // (config["downscale_factor"] * 2**by)) for side in extent[1:3]] for by in halved]
    pairs = zip(config["channels"], sides, strict=True)
    return {f"{FEATURE}{n}": (1, channels, *size) for n, (channels, size) in enumerate(pairs)}


def _build(component: Component) -> Any:
    from diffusers.models.adapter import T2IAdapter

    adapter: Any = T2IAdapter.from_config(dict(component.config))
    return adapter


def _read(module: Any, picture: Any) -> tuple[Any, ...]:
    return tuple(module(picture))


def _network(number: int) -> Network:
    name = "t2i_adapter" if number == 1 else f"t2i_adapter_{number}"
    return replace(
        ENCODER,
        name=name,
        folder=name,
        listed=r"diffusers T2IAdapter",
        fields=_FIELDS,
        defaults=_DEFAULTS,
        layers=_layers,
        decided_by={},
        inputs=partial(_inputs, name),
        build=_build,
        call=_read,
        prefixes=("",),
        in_strips=False,
        tracing=None,
        adds=partial(_features, name),
    )


T2I_ADAPTERS = tuple(_network(number) for number in range(1, MOST + 1))
