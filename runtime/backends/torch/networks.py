"""A model's networks as torch modules (diffusers' and transformers', with our attention and strips), and how
each is called."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch

from ....kernels import attention, onednn
from ....kernels.formats import FORMATS
from ....kernels.recipe import recipe
from ...errors import TightfitError, explained
from ...models.families.family import Role
from ...models.spec import Component
from ...models.tensors import Patch
from ...placement import DYNAMIC, QUANTISED, Placement
from . import packed, quantised
from .adapted import Adapted
from .engine import packs
from .patches import (
    FEED_BYTES,
    GPU_FEED_BYTES,
    PACKED_FEED_BYTES,
    Processor,
    activate,
    dispatched,
    feed_forward,
    never_narrow,
    to_maps,
    with_words,
)
from .vae import decode_strips, encode_strips

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NF4 = "nf4-b64"  # of kernels/formats.py, what bitsandbytes multiplies by
Forward = Callable[..., tuple[torch.Tensor, ...]]


def build(component: Component, placement: Placement, device: str) -> torch.nn.Module:
    """The component's module on the meta device: shapes without memory, built as the placement computes it on
    `device`."""
    with (
        explained(
            f"{component.config_file} describes no model that can be built", "copy or download it again"
        ),
        torch.device("meta"),
    ):
        module = component.network.build(component).eval().requires_grad_(False)
    strides = {path: part.stride[1] for path, part in module.named_modules() if type(part) is torch.nn.Conv2d}
    # Strips use each weight many times.
    formats, used_often = (
        _formats(component, module, placement.precision),
        component.network.in_strips,
    )
    kinds = {}
    if placement.backend == "bitsandbytes" and component.role is Role.DENOISER:
        formats, kinds = _in_nf4(module, formats), {_NF4: quantised.LinearNF4}
    quantised.quantise_layers(
        module, formats, device, used_often, dynamic=placement.precision == DYNAMIC, kinds=kinds
    )
    feed_bytes = FEED_BYTES if device == "cpu" else GPU_FEED_BYTES
    if device == "cpu" and packs(component, placement):
        packed.pack_layers(module)
        feed_bytes = PACKED_FEED_BYTES
    for path, stride in strides.items():
        if stride > 1 and device == "cpu" and onednn.has_tiles():
            layer = module.get_submodule(path)
            layer.forward = never_narrow(layer.forward, stride)
    _adapt(component, module)
    if component.words:
        _teach(component, module)
    maps_last = device == "cpu" and channels_last(module)
    processor = Processor(attention.VARIANTS[placement.attention])
    for part in [*module.modules()]:
        activate(part)
        if type(part).__name__ == "FeedForward" and hasattr(part, "net"):
            part.forward = feed_forward(part, feed_bytes)
        if hasattr(own := getattr(part, "processor", None), "_attention_backend"):
            own._attention_backend = dispatched(placement.attention)  # pyright: ignore[reportOptionalMemberAccess]
        elif hasattr(part, "set_processor"):
            part.set_processor(processor)  # pyright: ignore[reportCallIssue]
        if maps_last and type(part).__name__ == "Transformer2DModel":
            part._get_output_for_continuous_inputs = to_maps(part)
    return module


def channels_last(module: torch.nn.Module) -> bool:
    """Whether its convolutions get inputs with channels last on a CPU."""
    return bool(quantised.workspace(module).layers or packed.packed_layers(module))


def has_own_attention(module: torch.nn.Module) -> bool:
    """Whether `build` has put one of kernels/attention.py into the module; transformers' encoders have their
    own."""
    processors = (getattr(part, "processor", None) for part in module.modules())
    return any(
        isinstance(one, Processor) or getattr(one, "_attention_backend", None) is not None
        for one in processors
    )


def _in_nf4(module: torch.nn.Module, formats: Mapping[str, str]) -> dict[str, str]:
    """The formats with that of bitsandbytes for the linears whose rows are whole groups."""
    group = FORMATS[_NF4].group
    linears = (path for path, part in module.named_modules() if type(part) is torch.nn.Linear)
    whole = (path for path in linears if module.get_submodule(path).in_features % group == 0)  # pyright: ignore[reportOperatorIssue]
    return {**formats, **{path: _NF4 for path in whole if path in formats}}


def _teach(component: Component, module: torch.nn.Module) -> None:
    """Give the layer that looks up tokens the vectors of the words that the component was taught."""
    name, size = component.network.vocabulary, component.setting("vocab_size")
    layer = next(part for path, part in module.named_modules() if path.rpartition(".")[2] == name)
    vectors = [
        torch.nn.Parameter(torch.empty(word.shape, device="meta"), False) for word in component.words.values()
    ]
    layer.words = torch.nn.ParameterList(vectors)
    layer.forward = with_words(layer, layer.forward, size)


def _formats(component: Component, module: torch.nn.Module, precision: str) -> dict[str, str]:
    """The format of each quantised layer, by path: as stored in the files, or as it will be after loading."""
    paths: dict[str, Any] = {
        path: part for path, part in module.named_modules() if type(part) in quantised.KINDS
    }
    if component.formats is not None:
        renamed = (current_name(path, paths) for path in component.formats)
        return dict(zip(renamed, component.formats.values(), strict=True))
    if precision not in QUANTISED:
        return {}
    kind = "int8" if precision == DYNAMIC else precision
    least = component.network.least_bits
    # int8-dynamic needs one scale for each output channel
    stored = {} if precision == DYNAMIC else _stored_as(component, paths)
    chosen = {
        path: recipe(kind, path, layer.weight.shape, least, stored.get(path, ""))
        for path, layer in paths.items()
    }
    changed = _changed(component, paths)  # rows of an embedding are dequantised, never all of it
    plain = {
        path for path, layer in paths.items() if path in changed and isinstance(layer, torch.nn.Embedding)
    }
    return {path: name for path, name in chosen.items() if name and path not in plain}


def _stored_as(component: Component, paths: Container[str]) -> dict[str, str]:
    """The formats of kernels/formats.py in which files have layers' weights, by the layers' paths."""
    return {
        current_name(name.removesuffix(".weight"), paths): tensor.form
        for name, tensor in component.tensors.items()
        if tensor.form and name.endswith(".weight")
    }


def _changed(component: Component, paths: Container[str]) -> dict[str, tuple[Patch, ...]]:
    """The patches of each layer's weight, by its path."""
    return {
        current_name(name.rpartition(".")[0], paths): patches
        for name, tensor in component.tensors.items()
        if (patches := tuple(patch for patch in tensor.patches if not patch.decodes))
        and name.endswith((".weight", ".packed"))
    }


def _adapt(component: Component, module: torch.nn.Module) -> None:
    """Give quantised layers what adapters change in them. Raises TightfitError for what cannot be
    changed."""
    layers = quantised.quantised_layers(module)
    for path, patches in _changed(component, layers).items() if component.patches else ():
        if (layer := layers.get(path)) is None:  # a plain weight, changed as it is read
            continue
        unfit = next((patch for patch in patches if not patch.fits(layer.shape)), None)
        if unfit or isinstance(layer, quantised.Embedding):
            file = (unfit or patches[0]).tensors[0].file
            raise TightfitError(
                f"{file.name} does not fit {path}, which is quantised: "
                "use the model that this one was made from"
            )
        layer.adapted = Adapted(patches, layer.shape)


def current_name(stored: str, expected: Container[str]) -> str:
    """A tensor's or layer's name in today's libraries: text models lost a prefix, VAE attention was
    renamed. One that is of no layer is the weight of one here, so that it can stream."""
    for old, new in (
        (".query", ".to_q"),
        (".key", ".to_k"),
        (".value", ".to_v"),
        (".proj_attn", ".to_out.0"),
    ):
        if ".attentions." in stored and f"{old}." in f"{stored}.":
            stored = f"{stored}.".replace(f"{old}.", f"{new}.")[:-1]
    if stored not in expected:
        for name in (stored.removeprefix("text_model."), f"text_model.{stored}", f"{stored}.weight"):
            if name in expected:
                return name
    return stored


def forward(component: Component, placement: Placement, cache: str = "") -> Forward:
    """How to call the component's module with the tensors that `Session` names; `cache` as of an Extent."""
    if cache:
        assert component.network.call_cached
        return component.network.call_cached
    if placement.tiling == "whole":
        return component.network.call
    if component.network.call_in_strips:
        return component.network.call_in_strips
    return encode_strips if component.role is Role.ENCODER else decode_strips
