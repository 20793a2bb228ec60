"""SDXL: two text encoders, read side by side, a pooled text and the picture's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from .family import Extent, Family, Role, Shape
from .networks import DECODER, ENCODER, TEXT_ENCODER, TEXT_TRACING, UNET, text_outputs, unet_inputs
from .stable_diffusion import check_parts, default_steps, guidance_input, unknown_conditioning

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec


_LIKED, _DISLIKED = 6.0, 2.5
_SKIPPED = "clip_skip"  # of a config: how many layers from the end are read


def _encode(module: Any, tokens: Any) -> tuple[Any, ...]:
    """The layer before the last, without the final norm, and the projection where the model has one."""
    out = module(tokens, output_hidden_states=True)
    states = out.hidden_states[-getattr(module.config, _SKIPPED, 2)]
    return (states, out.text_embeds) if "text_embeds" in out else (states,)


def encode_and_pool(module: Any, tokens: Any) -> tuple[Any, ...]:
    """The layer before the last, without the final norm, and the pooled text, projected where the model has
    such a layer."""
    out = module(tokens, output_hidden_states=True)
    states = out.hidden_states[-getattr(module.config, _SKIPPED, 2)]
    return states, out.text_embeds if "text_embeds" in out else out.pooler_output


def _skip(component: Component, count: int) -> Component:
    """Of the first the layers are left out that are not read. The second reads all, for the pooled text."""
    from ..clip_skip import without_layers

    if count > 2 and "WithProjection" not in str(component.config.get("architectures")):
        return without_layers(component, count - 2)
    return skip_but_read_all(component, count)


def skip_but_read_all(component: Component, count: int) -> Component:
    """A text encoder whose last layers are read for the pooled text alone."""
    from ..clip_skip import check

    if count <= 2:  # as Forge: SDXL reads the layer before the last anyway
        return component
    check(component, count - 1)
    return replace(component, config={**component.config, _SKIPPED: count}, graph=None)


def _answers(outputs: Sequence[str]) -> list[str]:
    return [last_but_one(outputs), *(["text_embeds"] if "text_embeds" in outputs else [])]


def last_but_one(outputs: Sequence[str]) -> str:
    """Of the states before and after each layer that a graph answers. Raises ValueError without them."""
    states = [name for name in outputs if name.startswith("hidden_states.")]
    if len(states) < 2:
        raise ValueError("hidden_states.0 and so on")
    return f"hidden_states.{len(states) - 2}"


def _inputs(spec: ModelSpec, extent: Extent) -> Mapping[str, Shape]:
    pooled, count = spec.text_encoders[-1].setting("projection_dim"), 5 if judges(spec) else 6
    added = {"text_embeds": (extent.batch, pooled), "time_ids": (extent.batch, count)}
    return {**unet_inputs(spec, extent), **added}


def judges(spec: ModelSpec) -> bool:
    """Whether the U-Net reads how much a picture is liked, in place of the size that is wanted: diffusers'
    requires_aesthetics_score. It has five numbers then, not six."""
    added, width = (
        spec.unet.get(name) or 0
        for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    return width > 0 and added == spec.text_encoders[-1].setting("projection_dim") + 5 * width


def _outputs(component: Component) -> tuple[str, ...]:
    """The states before and after each layer too."""
    states = component.config["num_hidden_layers"] + 1
    return (*text_outputs(component), *(f"hidden_states.{number}" for number in range(states)))


_FIRST = replace(
    TEXT_ENCODER,
    call=_encode,
    skip=_skip,
    graph=replace(TEXT_ENCODER.graph, answers=_answers),
    tracing=replace(TEXT_TRACING, outputs=_outputs),
)
_SECOND = replace(
    _FIRST,
    name="text_encoder_2",
    folder="text_encoder_2",
    tokenizer="tokenizer_2",
    adapted_as=("text_encoders_clip_g_transformer_",),
)


class SDXL(Family):
    name, title, reads = "sdxl", "SDXL", 2048
    networks = (_FIRST, _SECOND, replace(UNET, inputs=_inputs), DECODER)
    on_demand = (ENCODER,)
    first_step_is_known = True
    tiny_decoder = r"taesdxl"
    # As SD 1.x's. Timothy Alexis Vass, "Explaining the SDXL latent space", has it in 0..255, and diffusers'
    # documentation (Apache-2.0), using-diffusers/callback.md.
    latent_rgb = tuple(
        tuple(value / 127.5 for value in (*channels, constant - 127.5))
        for channels, constant in (
            ((60, -60, 25, -70), 150),
            ((60, -5, 15, -50), 140),
            ((60, 10, -5, -35), 130),
        )
    )
    # Sabour et al. 2024, "Align Your Steps".
    align_your_steps = 14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029

    def claims(self, source: Source) -> bool:
        return _SECOND.folder in source.listed

    def check(self, spec: ModelSpec) -> None:
        check_parts(spec)
        if (embedding := spec.unet.get("addition_embed_type")) != "text_time":
            raise unknown_conditioning(spec, embedding)

    def default_guidance(self, spec: ModelSpec) -> float:
        return 8.5 if spec.consistent else 5.0

    def default_steps(self, spec: ModelSpec) -> int:
        return default_steps(spec)

    def is_distilled(self, spec: ModelSpec) -> bool:
        return bool(spec.guidance_width)

    def latent_affine(self, spec: ModelSpec) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """With the VAE's latents_std and latents_mean, if it has them, which diffusers reads in SDXL
        alone."""
        vae = spec.decoder
        mean, deviation = (vae.setting(field) for field in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            channels = vae.setting("latent_channels")
            deviation, mean = (1.0,) * channels, (0.0,) * channels
        return tuple(deviation), vae.setting("scaling_factor"), tuple(mean)

    def overflows_in_half(self, spec: ModelSpec) -> frozenset[Role]:
        """Both halves of its VAE, unless it is one that was published with force_upcast off."""
        return frozenset([Role.ENCODER, Role.DECODER] if spec.vae.get("force_upcast", True) else [])

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        import numpy as np

        pooled = encoded[-1][1:]
        if not pooled:
            raise TightfitError(
                "text_encoder_2 has no projection, which SDXL needs: copy or download the model again"
            )
        hidden, text = np.concatenate([first for first, *_ in encoded], axis=-1), pooled[0]
        size = (job.height, job.width)
        if job.branches > 1 and job.negative_prompt is None and job.spec.force_zeros:
            hidden[0] = text[0] = 0
        last = [[score] for score in _scores(job, len(text))] if judges(job.spec) else [size] * len(text)
        sizes = np.array([[*size, 0, 0, *more] for more in last], np.float32)
        return {"hidden": hidden, "text_embeds": text, "time_ids": sizes} | guidance_input(job)


def _scores(job: Job, count: int) -> list[float]:
    """How much each row's picture is liked, as diffusers has it."""
    unguided = job.branches > 1
    return [_DISLIKED] * unguided + [_LIKED] * (count - unguided)


class SDXLRefiner(SDXL):
    """It goes on from what SDXL has painted, and reads texts by the second text encoder alone."""

    name, title, reads = "sdxl-refiner", "SDXL's refiner", 1280
    networks = (_SECOND, *SDXL.networks[2:])

    def claims(self, source: Source) -> bool:
        return _SECOND.folder in source.listed and _FIRST.folder not in source.listed
