"""What a safetensors file is that is no checkpoint of SD 1.x, SD 2.x or SDXL: named by its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import TightfitError
from .. import cures
from .library import Kind

_INSIDE = "model.diffusion_model."
_IN = r"(?:model\.diffusion_model\.|transformer\.|diffusion_model\.)?"
# How names begin that only these have. Of several, the first is what the file is: Chroma has Flux's too.
_MODELS = (
    (r"model\.diffusion_model\.(?:input|output)_blocks\.\d+\.\d+\.time_", "Stable Video Diffusion"),
    (r"(?:noise_augmentor|embedder)\.", "SD 2.1 unCLIP"),
    (r"edm_(?:mean|std)$", "Playground v2.5"),
    (r"edm_vpred\.", "CosXL"),
    (r"cc_projection\.", "Zero-1-to-3"),
    (r"(?:model\.diffusion_model\.label_emb\.weight$|low_scale_model\.)", "SD's x4 upscaler"),
    (rf"{_IN}joint_blocks\.", "a part of SD 3's transformer"),
    (rf"{_IN}early_stream_modulations\.", "Flux 3"),
    (rf"{_IN}distilled_guidance_layer\.", "Chroma"),
    (rf"{_IN}txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (rf"{_IN}double_blocks\.\d+\.img_attn\.", "a part of Flux's transformer"),
    (rf"{_IN}(?:double_layers|cond_seq_linear)\b", "AuraFlow"),
    (rf"{_IN}double_stream_blocks\.", "HiDream"),
    (rf"{_IN}layers\.\d+\.adaLN_modulation\.0\.", "a part of Z-Image's transformer"),
    (rf"{_IN}cap_embedder\.", "Lumina 2"),
    (rf"{_IN}(?:transformer_blocks\.\d+\.img_mod|txt_in\.text_norm)\.", "Qwen-Image"),
    (rf"{_IN}txtfusion\.", "Krea 2"),
    (rf"{_IN}patchify_proj\.", "LTX-Video"),
    (rf"{_IN}head\.modulation$", "Wan"),
    (rf"{_IN}blocks\.\d+\.attn\.qkv_x\.", "Mochi"),
    (rf"{_IN}blocks\.\d+\.cross_attn\.(?:q|kv)_linear\.", "Sana or PixArt"),
    (rf"{_IN}(?:extra_embedder|mlp_t5)\.", "Hunyuan-DiT"),
    (r"net\.(?:x_embedder|blocks)\.", "Cosmos"),
    (rf"{_IN}(?:clip_\w*mapper|down_blocks\.\d+\.\d+\.channelwise)\.", "Stable Cascade"),
)
_BESIDE = "name the model that it is for"
_CONTROL = f"{_BESIDE}, and this by --control PICTURE:model=FILE"
_WORD, _VAE = f"{_BESIDE}, and this by --embedding", f"{_BESIDE}, and this by --vae"
_TEXTS = f"{_BESIDE}, and this by --text-encoder"
UNET = f"{_BESIDE}, and this by --unet (--model MODEL --unet FILE)"
_PARTS = (
    (r"(?:.*\.)?motion_modules\.", "a motion module of AnimateDiff", _BESIDE, None),
    (
        r"(?:control_model|zero_convs|input_hint_block|controlnet_\w+)\.",
        "a ControlNet",
        _CONTROL,
        Kind.CONTROLNET,
    ),
    (r"(?:adapter\.)?body\.\d+\.(?:resnets|block1|in_conv)\.", "a T2I-Adapter", _CONTROL, Kind.CONTROLNET),
    (
        r"(?:image_proj|ip_adapter)\.",
        "an IP-Adapter",
        f"{_BESIDE}, and this by --ip-adapter",
        Kind.IP_ADAPTER,
    ),
    (
        r"(?:emb_params|clip_[lg]|string_to_param\b.*)$",
        "an embedding (textual inversion)",
        _WORD,
        Kind.EMBEDDING,
    ),
    (
        r"(?:model\.\d+\.sub\.|RRDB_trunk\.|body\.\d+\.(?:rdb\d\.|weight$))",
        "an upscaler",
        "tightfit upscale PICTURE --model FILE takes it",
        Kind.UPSCALER,
    ),
    (r"(?:(?:taesd_)?(?:encoder|decoder)\.(?:layers\.)?)?\d+\.", "a tiny autoencoder", _VAE, Kind.VAE),
    (r"(?:encoder|decoder)\.(?:conv_in|mid|mid_block)\.", "a VAE alone", _VAE, Kind.VAE),
    (
        r"(?:text_model\.(?:embeddings|encoder)|transformer\.resblocks|(?:encoder|enc)\.(?:block|blk)\.\d+)\.",
        "a text encoder alone",
        _TEXTS,
        Kind.TEXT_ENCODER,
    ),
    (
        r"(?:model\.layers\.\d+\.self_attn|blk\.\d+\.attn_q)\.",
        "a language model",
        _TEXTS,
        Kind.TEXT_ENCODER,
    ),
    (r"(?:input_blocks|output_blocks|(?:down|up)_blocks)\.\d+\.", "a U-Net alone", UNET, Kind.UNET),
)
OURS = "of files tightfit runs SD 1.x, SD 2.x, SDXL, SD 3.5, Flux.1, Flux.2 klein and Z-Image"
_WORDS = (
    *((pattern, f"is {name}: {OURS}") for pattern, name in _MODELS),
    *((pattern, f"is {name}, which is no whole model: {cure}") for pattern, name, cure, _ in _PARTS),
)
_ANY = re.compile("|".join(f"({pattern})" for pattern, _ in _WORDS))


def kind_of(names: Iterable[str]) -> Kind | None:
    """What a file is for that is a part of a model or an addition to one; None for other files."""
    names = frozenset(names)
    if cures.is_adapter(names):
        return Kind.LORA
    part = _part(names)
    return part[-1] if part else None


def what(names: Iterable[str]) -> tuple[str, str] | None:
    """What a part of a model or an addition to one is, and how it is given; None for other files."""
    names = frozenset(names)
    if cures.is_adapter(names):
        return "a LoRA", f"{_BESIDE}, and this by --lora"
    part = _part(names)
    return part[1:3] if part else None


def _part(names: frozenset[str]) -> tuple[str, str, str, Kind | None] | None:
    """The row of _PARTS that a file is of, None for other files."""
    number = _first(names) - len(_MODELS) - 1
    return _PARTS[number] if number >= 0 else None


def _first(names: frozenset[str]) -> int:
    """The number of the first row of _WORDS that fits a name, from 1; 0 for none. A U-Net alone may have its
    names in a checkpoint."""
    found = [match.lastindex for name in names if (match := _ANY.match(name))]
    if not found and all(name.startswith(_INSIDE) for name in names):
        found = [match.lastindex for name in names if (match := _ANY.match(name.removeprefix(_INSIDE)))]
    return min(filter(None, found), default=0)


def check(file: Path, names: Iterable[str]) -> None:
    """Raise TightfitError for a file of another family, or that is no whole model, with what it is."""
    names = frozenset(names)
    if cures.is_adapter(names):
        raise TightfitError(
            f"{file} is a LoRA, an addition to a model: name the model itself, and this by --lora"
        )
    if first := _first(names):
        raise TightfitError(f"{file} {_WORDS[first - 1][1]}")
