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
from .family import SHARED, Extent, GraphNames, Network, Role, Shape, Tracing
from .flow import shifted
from .networks import one_answer
from .parts import is_traced
from .sdxl import SDXL, encode_and_pool, last_but_one, skip_but_read_all
from .t5 import text_encoder
from .wide_vae import SD3_RGB, OfWideVae, wide_vae

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

_TEXT_TOKENS = 256  # of T5's, to which each text is padded, or cut; as many zeros without T5

# --------------------------------------------------------------------------------------- the text encoders


def _answers(outputs: Sequence[str]) -> list[str]:
    pooled = "text_embeds" if "text_embeds" in outputs else "pooler_output"
    if pooled not in outputs:
        raise ValueError(pooled)
    return [last_but_one(outputs), pooled]


# CLIP-L's projection is the identity as published, and in Stability's files there is none.
_CLIPS = tuple(
    replace(
        network,
        call=encode_and_pool,
        skip=skip_but_read_all,
        graph=replace(network.graph, answers=_answers),
    )
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


def _build_traced(component: Component) -> Any:
    """With the table of places, as Optimum's graphs have it."""
    import torch

    module, config = _build_denoiser(component), component.config
    side, width = config["pos_embed_max_size"], config["num_attention_heads"] * config["attention_head_dim"]
    table = torch.nn.Parameter(torch.empty(1, side**2, width))
    module.pos_embed.register_parameter("pos_embed", table)
    return module


class _Joint:
    """The attention of a picture's tokens to themselves and, if there are any, to those of the text, which
    attend to the same."""

    _attention_backend = None  # as diffusers' own processors call it

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        """(batch, tokens, width) of each. There is no mask."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        picture, text = hidden_states, encoder_hidden_states
        count, heads = picture.shape[1], (attn.heads, attn.inner_dim // attn.heads)
        own = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        rows: list[tuple[Any, _Layers]] = [(picture, own)]
        if text is not None:
            added = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)
            rows.append((text, (*added, (attn.add_v_proj, None))))
        qkv = _qkv(rows, heads)
        answer = dispatch_attention_fn(*qkv, backend=self._attention_backend).flatten(2)
        del qkv
        of_picture = attn.to_out[0](answer[:, :count])
        if text is None:
            return of_picture
        of_text = answer[:, count:]
        return of_picture, of_text if attn.context_pre_only else attn.to_add_out(of_text)


_Layers = Sequence[tuple[Any, Any]]  # a linear and a norm, or None, for each of queries, keys and values


def _qkv(rows: Sequence[tuple[Any, _Layers]], heads: tuple[int, int]) -> Sequence[Any]:
    """Queries, keys and values of all tokens, (batch, tokens, heads, a head's width)."""
    import torch

    def made(row: tuple[Any, _Layers], number: int) -> Any:
        states, (linear, norm) = row[0], row[1][number]
        heads_of = linear(states).unflatten(-1, heads)
        return heads_of if norm is None else norm(heads_of)

    if is_traced():
        return [torch.cat([made(row, number) for row in rows], 1) for number in range(3)]
    first, length = rows[0][0], sum(states.shape[1] for states, _ in rows)
    qkv, start = first.new_empty(len(first), length, 3, *heads), 0
    for row in rows:
        some = slice(start, start := start + row[0].shape[1])
        for number in range(3):
            qkv[:, some, number] = made(row, number)
    return qkv.unbind(2)


def _predict(
    module: Any,
    sample: Any,
    timestep: Any,
    hidden: Any,
    pooled: Any,
    shared_places: Any = None,
    skipped: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    """Of latents (batch, channels, height, width), as diffusers' transformer does. Without places a module
    that is traced takes those of its table."""
    patch, channels = module.config.patch_size, sample.shape[1]
    patches = module.pos_embed["proj"](sample)
    batch, _, rows, columns = patches.shape
    if shared_places is None:
        shared_places = _cropped(module, rows, columns)
    picture = patches.flatten(2).transpose(1, 2) + shared_places
    del patches
    time = module.time_text_embed(timestep.expand(batch), pooled)
    text = module.context_embedder(hidden)
    for number, block in enumerate(module.transformer_blocks):
        if number not in skipped:
            text, picture = block(picture, text, time)
    predicted = module.proj_out(module.norm_out(picture, time))
    predicted = predicted.view(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return (predicted.reshape(batch, -1, rows * patch, columns * patch)[:, :channels],)


def _cropped(module: Any, rows: int, columns: int) -> Any:
    """(1, tokens, width): the middle of the table, whose rows are looked up one by one, so that ONNX Runtime
    reads no more of it."""
    import torch

    side, device = module.config.pos_embed_max_size, module.pos_embed.pos_embed.device
    down = (side - rows) // 2 + torch.arange(rows, device=device)
    across = (side - columns) // 2 + torch.arange(columns, device=device)
    return module.pos_embed.pos_embed.index_select(1, (down[:, None] * side + across).flatten())


def _taken(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """As a graph takes them: a timestep for each row, and no places, of which it has the table."""
    import numpy as np

    rows = arrays["sample"].shape[:1]
    taken = {**arrays, "timestep": np.broadcast_to(arrays["timestep"], rows)}
    taken.pop(_PLACES, None)
    return taken


_TRANSFORMER = Network(
    name="transformer",
    folder="transformer",
    role=Role.DENOISER,
    listed=r"diffusers SD3Transformer2DModel|optimum\S* ORT\w+",
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
    graph=GraphNames(
        needed=frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"}),
        answers=one_answer("out_hidden_states"),
        sides=(
            ("hidden_states", 4, 1, "in_channels"),
            ("encoder_hidden_states", 3, 2, "joint_attention_dim"),
            ("pooled_projections", 2, 1, "pooled_projection_dim"),
        ),
        names={"sample": "hidden_states", "hidden": "encoder_hidden_states", "pooled": "pooled_projections"},
        takes=_taken,
    ),
    tracing=Tracing(
        sides={
            "sample": ("batch_size", "", "height", "width"),
            "timestep": ("batch_size",),
            "hidden": ("batch_size", "", ""),
            "pooled": ("batch_size", ""),
        },
        outputs=lambda _: ("out_hidden_states",),
        size={"batch_size": 2, "height": 16, "width": 24},
        checked=({"batch_size": 1, "height": 32, "width": 16},),
        counts=frozenset({"timestep"}),
        exact=frozenset({"timestep"}),
        multiples={"height": 2, "width": 2},
        build=_build_traced,
    ),
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
        is_placed = spec.denoiser.graph or (table and table.shape == (1, side * side, width))
        if config["caption_projection_dim"] != width or not is_placed:
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
        patch, table = job.spec.latents.multiple, job.spec.denoiser.tensors.get(_TABLE)
        rows, columns = job.height // patch, job.width // patch
        return {
            "hidden": np.concatenate([hidden, *texts], 1),
            "pooled": np.concatenate([pooled for _, pooled in clips], -1),
            # a graph has the table itself
            **({_PLACES: _middle(table, config["pos_embed_max_size"], rows, columns)} if table else {}),
        }


class SD3(SD3WithoutT5):
    name = "sd3"
    networks = (*_CLIPS, _T5, _TRANSFORMER, _DECODER)

    def claims(self, source: Source) -> bool:
        return _T5.folder in source.listed and super().claims(source)


_WITH_T5 = SD3()
