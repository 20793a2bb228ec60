"""ControlNets of the families of Stable Diffusion: half a U-Net, which reads a picture beside the latents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import is_count, is_text, is_truth, many
from .family import FEATURE, KEPT, RESIDUAL, Extent, GraphNames, Network, Role, Shape
from .networks import UNET, residuals, residuals_of
from .step_cache import control

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..spec import Component, ModelSpec

MOST = 8  # ControlNets of one request
_FIELDS = {
    "conditioning_channels": is_count,
    "conditioning_embedding_out_channels": many(is_count),
    "controlnet_conditioning_channel_order": is_text,
    "global_pool_conditions": is_truth,
}
_DEFAULTS = {
    **{name: value for name, value in UNET.defaults.items() if name not in ("out_channels", "sample_size")},
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}


def _inputs(name: str, spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    """What the U-Net is called with, but for the guidance that distilled ones are told; the picture; how much
    each answer weighs in each row; and the answers of the ControlNet before it, to add to."""
    added, config = residuals(spec, extent._replace(cache="")), spec.components[name].config
    is_first = spec.of_role(Role.CONTROL)[0].name == name
    others = ("time_condition", KEPT, FEATURE, *([RESIDUAL] if is_first else []))
    shapes = spec.denoiser.network.inputs(spec, extent)
    return {name: shape for name, shape in shapes.items() if not name.startswith(others)} | {
        "sample": (extent.batch, config["in_channels"], *spec.latent_shape(extent)[1:]),
        # Without the tokens of pictures.
        "hidden": (extent.batch, extent.chunks * spec.text_length, spec.text_width),
        "picture": (1, config["conditioning_channels"], extent.height, extent.width),
        "scales": (extent.batch, len(added)),
    }


def _build(component: Component) -> Any:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    if component.config.get("class_embed_type") is not None:
        raise TightfitError(f"{component.folder} wants class embeddings: tightfit runs ControlNets of SD")
    network: Any = ControlNetModel.from_config(dict(component.config))
    return network


def _answer(
    module: Any, sample: Any, timestep: Any, hidden: Any, picture: Any, scales: Any, **added: Any
) -> tuple[Any, ...]:
    """What is added to the U-Net's skip connections, and last to its middle."""
    before = [added.pop(name) for name in [*added] if name.startswith(RESIDUAL)]
    down, middle = module(
        sample, timestep, hidden, controlnet_cond=picture, added_cond_kwargs=added or None, return_dict=False
    )
    answers = [each * scales[:, place, None, None, None] for place, each in enumerate([*down, middle])]
    return tuple(other + each for other, each in zip(before, answers, strict=True)) if before else (*answers,)


def _names(count: int) -> list[str]:
    """Of so many answers in a graph: diffusers'."""
    return [*(f"down_block_res_sample_{number}" for number in range(count - 1)), "mid_block_res_sample"]


def _answers(outputs: Sequence[str]) -> list[str]:
    names = _names(len(outputs))
    if missing := {*names} - {*outputs}:
        raise ValueError(min(missing))
    return names


def _outputs(component: Component) -> tuple[str, ...]:
    return tuple(_names(len(residuals_of(component.config, {"batch_size": 1, "height": 1, "width": 1}))))


def _picture(config: Mapping[str, Any], size: Mapping[str, int]) -> dict[str, Shape]:
    """Its sides are halved between the layers that read it, to be those of the latents."""
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    sides = factor * size["height"], factor * size["width"]
    return {"picture": (1, config["conditioning_channels"], *sides)}


_GRAPH = GraphNames(
    needed=UNET.graph.needed | {"controlnet_cond", "conditioning_scale"},
    answers=_answers,
    optional=frozenset({"text_embeds", "time_ids"}),
    sides=(*UNET.graph.sides, ("controlnet_cond", 4, 1, "conditioning_channels")),
    names={"hidden": "encoder_hidden_states", "picture": "controlnet_cond", "scales": "conditioning_scale"},
)
assert UNET.tracing
_TRACING = replace(
    UNET.tracing,
    sides={
        **UNET.tracing.sides,
        "picture": ("", "", "picture_height", "picture_width"),
        "scales": ("batch_size", ""),
    },
    outputs=_outputs,
    following=_picture,
)


def _network(number: int) -> Network:
    name = "controlnet" if number == 1 else f"controlnet_{number}"
    return replace(
        UNET,
        name=name,
        folder=name,
        role=Role.CONTROL,
        listed=r"diffusers ControlNetModel",
        fields={**UNET.fields, **_FIELDS},
        defaults=_DEFAULTS,
        inputs=partial(_inputs, name),
        build=_build,
        call=_answer,
        call_cached=partial(control, _answer),
        graph=_GRAPH,
        tracing=_TRACING,
        adds=residuals,
    )


CONTROLNETS = tuple(_network(number) for number in range(1, MOST + 1))
