"""SD 3.5: two of CLIP's text encoders and T5 read the text, and a transformer of joint blocks takes the noise
out of a picture's patches of 2x2 latents beside the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import MOST_LAYERS, Check, is_count, is_layers, many, or_none, whole
from ..cures import of_mixed
from ..tensors import Tensor
from .family import NO_GRAPH, SHARED, Extent, Network, Role, Shape
from .flow import shifted
from .sdxl import SDXL, encode_and_pool, skip_but_read_all
from .t5 import text_encoder
from .wide_vae import SD3_RGB, OfWideVae, wide_vae

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

_TEXT_TOKENS = 256  # of T5's, to which each text is padded, or cut; as many zeros without T5

# --------------------------------------------------------------------------------------- the text encoders

# CLIP-L's projection is the identity as published, and in Stability's files there is none.
_CLIPS = tuple(
    replace(network, call=encode_and_pool, skip=skip_but_read_all, graph=NO_GRAPH, tracing=None)
    for network in SDXL.networks[:2]
)
_T5 = text_encoder("_3", _TEXT_TOKENS)

# -------------------------------------------------------------------------------------------- the denoiser

_TABLE = "pos_embed.pos_embed"
_PLACES = f"{SHARED}places"
_COUNTS = (
    "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip
_FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_COUNTS, is_count),
    "sample_size": is_count,
    "out_channels": or_none(is_count),
    "num_layers": whole(1, MOST_LAYERS),
    "dual_attention_layers": lambda value: value in ((), []) or many(is_layers, MOST_LAYERS)(value),
    "qk_norm": lambda value: value in (None, "rms_norm"),
}
# What diffusers takes where a config leaves them out.
_DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def _inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    """Raises TightfitError for a picture that is larger than the table of places."""
    config, (_, height, width) = spec.denoiser.config, spec.latent_shape(extent)
    patch, side = config["patch_size"], config["pos_embed_max_size"]
    if max(height, width) > patch * side:
        raise TightfitError(
            f"{spec.name} knows places of pictures up to {side * spec.latents.multiple} pixels a side, "
            f"not {extent.width}x{extent.height}: paint a smaller one"
        )
    tokens = height // patch * (width // patch)
    return {
        "sample": (extent.batch, *spec.latent_shape(extent)),
        "timestep": (),
        "hidden": (extent.batch, spec.text_length + _TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled": (extent.batch, config["pooled_projection_dim"]),
        _PLACES: (1, tokens, config["num_attention_heads"] * config["attention_head_dim"]),
    }


def _build_denoiser(component: Component) -> Any:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from torch import nn

    config = {name: component.config[name] for name in _FIELDS}
    module: Any = SD3Transformer2DModel(**config)
    # Without the table of places, of which a call is handed what it needs.
    module.pos_embed = nn.ModuleDict({"proj": module.pos_embed.proj})
    for block in module.transformer_blocks:
        for attention in filter(None, (block.attn, block.attn2)):
            attention.set_processor(_Joint())
    return module


class _Joint:
    """The attention of a picture's tokens to themselves and, if there are any, to those of the text, which
    attend to the same."""

    _attention_backend = None  # as diffusers' own processors call it

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        """(batch, tokens, width) of each. There is no mask."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        picture, text = hidden_states, encoder_hidden_states
        batch, count, _width = picture.shape
        length = count + (0 if text is None else text.shape[1])
        qkv = picture.new_empty(batch, length, 3, attn.heads, attn.inner_dim // attn.heads)
        norms = attn.norm_q, attn.norm_k, None
        _fill(qkv[:, :count], picture, (attn.to_q, attn.to_k, attn.to_v), norms)
        if text is not None:
            norms = attn.norm_added_q, attn.norm_added_k, None
            _fill(qkv[:, count:], text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), norms)
        answer = dispatch_attention_fn(*qkv.unbind(2), backend=self._attention_backend).flatten(2)
        del qkv
        of_picture = attn.to_out[0](answer[:, :count])
        if text is None:
            return of_picture
        of_text = answer[:, count:]
        return of_picture, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def _fill(qkv: Any, states: Any, linears: Sequence[Any], norms: Sequence[Any]) -> None:
    """Queries, keys and values of some tokens, (batch, tokens, 3, heads, a head's width)."""
    for number, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        made = linear(states).unflatten(-1, qkv.shape[-2:])
        qkv[:, :, number] = made if norm is None else norm(made)


def _predict(
    module: Any,
    sample: Any,
    timestep: Any,
    hidden: Any,
    pooled: Any,
    shared_places: Any,
    skipped: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    """Of latents (batch, channels, height, width), as diffusers' transformer does."""
    patch, (batch, channels, height, width) = module.config.patch_size, sample.shape
    rows, columns = height // patch, width // patch
    picture = module.pos_embed["proj"](sample).flatten(2).transpose(1, 2) + shared_places
    time = module.time_text_embed(timestep.expand(batch), pooled)
    text = module.context_embedder(hidden)
    for number, block in enumerate(module.transformer_blocks):
        if number not in skipped:
            text, picture = block(picture, text, time)
    predicted = module.proj_out(module.norm_out(picture, time))
    predicted = predicted.view(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return (predicted.reshape(batch, -1, height, width)[:, :channels],)


_TRANSFORMER = Network(
    name="transformer",
    folder="transformer",
    role=Role.DENOISER,
    listed=r"diffusers SD3Transformer2DModel",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    layers=lambda config: {"num_layers": config["num_layers"]},
    decided_by={
        r"transformer_blocks\.\d+\.attn2\.": "dual_attention_layers",
        r"transformer_blocks\.\d+\.attn\.norm_": "qk_norm",
        r"transformer_blocks\.": "num_layers",
    },
    inputs=_inputs,
    build=_build_denoiser,
    call=_predict,
    skips_layers=True,
)


def _middle(table: Tensor, side: int, rows: int, columns: int) -> np.ndarray:
    """(1, tokens, width) in fp32: the middle of a square table, of which no more is read."""
    import numpy as np

    width, top, left = table.shape[-1], (side - rows) // 2, (side - columns) // 2
    starts = (((top + row) * side + left) * width for row in range(rows))
    return np.concatenate([table.floats(start, columns * width) for start in starts]).reshape(1, -1, width)


# ------------------------------------------------------------------------------------------------- the VAE

_DECODER, _ENCODER = wide_vae(scale=1.5305, shift=0.0609)

# ---------------------------------------------------------------------------------------------- the family


class SD3WithoutT5(OfWideVae):
    """As published, but for T5, which the model was trained to do without now and then."""

    name, title, reads = "sd3-without-t5", "SD 3.5", 4096
    networks = (*_CLIPS, _TRANSFORMER, _DECODER)
    on_demand = (_ENCODER,)
    takes = frozenset({"lora", "text_encoder", "unet", "vae"})
    tiny_decoder, latent_rgb = "taesd3", SD3_RGB

    @property
    def fuller(self) -> SD3:
        return _WITH_T5

    def claims(self, source: Source) -> bool:
        return source.config(_TRANSFORMER).get("_class_name") == "SD3Transformer2DModel"

    def check(self, spec: ModelSpec) -> None:
        config, folder = spec.denoiser.config, spec.folder
        super().check(spec)
        width, side = (
            config["num_attention_heads"] * config["attention_head_dim"],
            config["pos_embed_max_size"],
        )
        table = spec.denoiser.tensors.get(_TABLE)
        if config["caption_projection_dim"] != width or not table or table.shape != (1, side * side, width):
            raise TightfitError(
                f"{folder} has a transformer whose blocks, text and table of places are not of one width: "
                "copy or download it again"
            )
        clips, channels = spec.text_encoders[:2], spec.latents.channels
        pooled = sum(clip.setting("projection_dim") for clip in clips)
        wide = sum(clip.config["hidden_size"] for clip in clips)
        reads = config["joint_attention_dim"]
        of_t5 = [t5.config["d_model"] for t5 in spec.text_encoders[2:]]
        if (
            (config["pooled_projection_dim"], config["in_channels"]) != (pooled, channels)
            or config["out_channels"] not in (None, channels)
            or wide > reads
            or any(one != reads for one in of_t5)
        ):
            raise of_mixed(
                f"{folder} has text encoders {wide} wide{''.join(f', {one} wide' for one in of_t5)}, pooled "
                f"{pooled}, and latents of {channels} channels, and a transformer for {reads}, "
                f"{config['pooled_projection_dim']} and {config['in_channels']}"
            )
        if "CLIPTextModelWithProjection" not in (clip := clips[1]).config["architectures"]:
            raise TightfitError(
                f"{clip.folder} has no projection, which SD 3.5 needs: copy or download the model again"
            )

    def text_width(self, spec: ModelSpec) -> int:
        """CLIP's texts are padded to T5's width, and come before them."""
        return spec.denoiser.config["joint_attention_dim"]

    def reads_plainly(self, spec: ModelSpec) -> bool:
        """All of a text's tokens see one another, so that none may come twice, nor be weighed."""
        return True

    def default_guidance(self, spec: ModelSpec) -> float:
        return 4.5

    def default_steps(self, spec: ModelSpec) -> int:
        return 28

    def patch(self, spec: ModelSpec) -> int:
        return spec.denoiser.config["patch_size"]

    def levels(self, spec: ModelSpec, size: tuple[int, int], steps: int) -> np.ndarray | None:
        """From 1 down to the least that the model was trained with, as its scheduler has them: that one is
        shifted twice."""
        import numpy as np

        if spec.scheduler.get("use_dynamic_shifting"):
            return None
        count = spec.scheduler.get("num_train_timesteps", 1000)
        least = float(shifted(np.array(1 / count, np.float32), spec.scheduler, 0.0))
        return shifted(np.linspace(count, least * count, steps) / count, spec.scheduler, 0.0).astype(
            np.float32
        )

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        import numpy as np

        clips, others = encoded[:2], encoded[2:]
        config = job.spec.denoiser.config
        hidden = np.concatenate([states for states, _ in clips], -1)
        rows, _, width = hidden.shape
        hidden = np.pad(hidden, ((0, 0), (0, 0), (0, config["joint_attention_dim"] - width)))
        texts = [states for (states,) in others] or [
            np.zeros((rows, _TEXT_TOKENS, hidden.shape[-1]), np.float32)
        ]
        patch, table = job.spec.latents.multiple, job.spec.denoiser.tensors[_TABLE]
        places = _middle(table, config["pos_embed_max_size"], job.height // patch, job.width // patch)
        return {
            "hidden": np.concatenate([hidden, *texts], 1),
            "pooled": np.concatenate([pooled for _, pooled in clips], -1),
            _PLACES: places,
        }


class SD3(SD3WithoutT5):
    name = "sd3"
    networks = (*_CLIPS, _T5, _TRANSFORMER, _DECODER)

    def claims(self, source: Source) -> bool:
        return _T5.folder in source.listed and super().claims(source)


_WITH_T5 = SD3()
