"""A transformer that takes noise out, alone in a file, as it is published for ComfyUI: the text encoder and
the VAE lie in files of their own, which are found in the folders of models or named.

Which model it is, and its config, are told from names and shapes. What no shape tells is the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import TightfitError
from ...files import SINGLE
from ..families.family import Network
from ..spec import Component
from ..tensors import Tensor
from . import renames
from .library import Kind, near
from .scales import scaled
from .single_file import Config, Shapes, Tensors, vae_config
from .transformer_names import KLEIN
from .weights import read_file

_BEFORE = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
_IN_CHECKPOINT = re.compile(r"text_encoders\.\w+\.transformer\.")  # of ComfyUI, with all networks inside
_BEFORE_VAE = ("first_stage_model.", "vae.", "")
_BASE = r"(?:^|[\W_])base(?:[\W_]|$)"
_PATCH = 4  # latents that are one of the transformer's
TOKENIZER = "tokenizer"
_QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"


class SplitLayout:
    def claims(self, path: Path) -> bool:
        return path.suffix.lower() in SINGLE and path.is_file() and any(_told(read_file(path)[0]))

    def read(self, path: Path) -> SplitFile:
        return SplitFile(path, *next(_told(read_file(path)[0])))


@dataclass(frozen=True)
class Published:
    """A transformer as it is published, alone in a file.

    names: by a tensor that it alone has, how its names become diffusers'. config: of its tensors. reads: the
    text encoder's width. beside: what the VAE's config has. vae: how its file is called. base: what is in the
    names of files with the model that was not distilled, which no tensor says. settings, scheduler: the
    model's, by whether it was.
    """

    names: Mapping[str, Callable[[Tensors], dict[str, Tensor]]]
    config: Callable[[Tensors], Config]
    reads: Callable[[Config], int]
    beside: Callable[[Config], Config]
    vae: str
    pipeline: str
    base: re.Pattern[str]
    settings: Callable[[bool], Mapping[str, Any]]
    scheduler: Callable[[bool], Mapping[str, Any]]


# ------------------------------------------------------------------------------ networks by diffusers' names


def transformer(tensors: Tensors) -> dict[str, Tensor]:
    """One that is published alone, empty for a file of another network."""
    return next((named for _, named in _told(tensors)), {})


def _told(tensors: Tensors) -> Iterator[tuple[Published, dict[str, Tensor]]]:
    """Which one it is, and its tensors; nothing for a file of another network."""
    for start in _BEFORE:
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        for kind in PUBLISHED:
            for mark, renamed in kind.names.items():
                if mark in own:
                    yield kind, renamed(scaled(own))


def text_encoder(tensors: Tensors) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors of Qwen3, both empty for a file of another network."""
    inside = {name[found.end() :]: tensors[name] for name in tensors if (found := _IN_CHECKPOINT.match(name))}
    named = renames.llama_cpp(tensors) if "token_embd.weight" in tensors else scaled(inside or tensors)
    if _QUERY_NORM not in named:
        return {}, {}
    shapes, layer = Shapes(named), "model.layers.0"
    vocabulary, width = (shapes.side("model.embed_tokens.weight", side) for side in (0, 1))
    head = shapes.side(_QUERY_NORM)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tokenizer_class": "Qwen2Tokenizer",
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes.side(f"{layer}.mlp.gate_proj.weight"),
        "num_hidden_layers": shapes.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": shapes.side(f"{layer}.self_attn.q_proj.weight") // max(1, head),
        "num_key_value_heads": shapes.side(f"{layer}.self_attn.k_proj.weight") // max(1, head),
        "head_dim": head,
    }
    return config, named


def vae(tensors: Tensors) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors of Flux.2's, or of one without convolutions around its latents, as Flux.1's;
    both empty for a file of another network."""
    for start in _BEFORE_VAE:
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        named = renames.vae(own) if "decoder.mid.block_1.norm1.weight" in own else own
        if "bn.running_mean" in named:
            return _of_flux2_vae(named), named
        if "decoder.conv_norm_out.weight" in named and "post_quant_conv.weight" not in named:
            return vae_config(named) | {"use_quant_conv": False, "use_post_quant_conv": False}, named
    return {}, {}


def _of_flux2_vae(tensors: Tensors) -> Config:
    """Some have a narrower decoder than the first."""
    config, shapes = vae_config(tensors), Shapes(tensors)
    down = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    blocks = shapes.count(r"encoder\.down_blocks\.(\d+)\.resnets\.")
    return {
        **config,
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [shapes.side(down.format(block)) for block in range(blocks)]
        or config["block_out_channels"],
        "decoder_block_out_channels": config["block_out_channels"],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _of_flux2(tensors: Tensors) -> Config:
    shapes = Shapes(tensors)
    width = shapes.side("x_embedder.weight")
    head = shapes.side("single_transformer_blocks.0.attn.norm_q.weight")
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": shapes.side("x_embedder.weight", 1),
        "out_channels": shapes.side("proj_out.weight"),
        "num_layers": shapes.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": shapes.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // max(1, head),
        "joint_attention_dim": shapes.side("context_embedder.weight", 1),
        "timestep_guidance_channels": shapes.side("time_guidance_embed.timestep_embedder.linear_1.weight", 1),
        "mlp_ratio": shapes.side("transformer_blocks.0.ff.linear_out.weight", 1) / max(1, width),
        "axes_dims_rope": [max(1, head // 4)] * 4,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _of_z_image(tensors: Tensors) -> Config:
    shapes, attention = Shapes(tensors), "layers.0.attention"
    width, head = shapes.side("cap_embedder.1.weight"), shapes.side(f"{attention}.norm_q.weight")
    reads_pictures = any(name.startswith("siglip_") for name in tensors)
    return {
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": shapes.side("all_x_embedder.2-1.weight", 1) // _PATCH,
        "dim": width,
        "n_layers": shapes.count(r"layers\.(\d+)\."),
        "n_refiner_layers": shapes.count(r"noise_refiner\.(\d+)\."),
        "n_heads": width // max(1, head),
        "n_kv_heads": shapes.side(f"{attention}.to_k.weight") // max(1, head),
        "cap_feat_dim": shapes.side("cap_embedder.1.weight", 1),
        "axes_dims": [max(1, head // 4), *[max(1, 3 * head // 8)] * 2],
        "siglip_feat_dim": shapes.side("siglip_embedder.1.weight", 1) if reads_pictures else None,
    }


_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_KLEIN = Published(
    names={
        "single_stream_modulation.lin.weight": KLEIN.renamed,
        "single_stream_modulation.linear.weight": dict,
    },
    config=_of_flux2,
    reads=lambda config: config["joint_attention_dim"] // 3,  # the states after three layers, side by side
    beside=lambda config: {
        "_class_name": "AutoencoderKLFlux2",
        "latent_channels": config["in_channels"] // _PATCH,
    },
    vae="flux2-vae.safetensors",
    pipeline="Flux2KleinPipeline",
    base=re.compile(_BASE, re.IGNORECASE),
    settings=lambda is_distilled: {"is_distilled": is_distilled},
    scheduler=lambda _: {
        **_FLOW,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "shift": 3.0,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    },
)
_Z_IMAGE = Published(
    names={"layers.0.adaLN_modulation.0.weight": renames.z_image},
    config=_of_z_image,
    reads=lambda config: config["cap_feat_dim"],
    beside=lambda config: {"_class_name": "AutoencoderKL", "latent_channels": config["in_channels"]},
    vae="ae.safetensors",
    pipeline="ZImagePipeline",
    base=re.compile(rf"{_BASE}|^(?!.*turbo).*z[-_ ]?image", re.IGNORECASE),
    settings=lambda _: {},
    scheduler=lambda is_distilled: {
        **_FLOW,
        "shift": 3.0 if is_distilled else 6.0,
        "use_dynamic_shifting": False,
    },
)
PUBLISHED = _KLEIN, _Z_IMAGE


# ---------------------------------------------------------------------------------- files beside


class _Part(NamedTuple):
    """A network of the model from a file beside: that, its config and tensors, or why there are none."""

    file: Path
    config: Config
    tensors: Tensors
    lacking: str = ""


_Reads = Callable[[Tensors], tuple[Config, dict[str, Tensor]]]


def _found(file: Path, kind: Kind, reads: _Reads, usual: Config, needs: str) -> _Part:
    """What is inside `file`, or the one file of a kind near it, whose config has what `usual` has, which the
    transformer needs."""
    fitting: list[_Part] = []
    unread = ""
    for path in _places(file, kind):
        try:
            stored = read_file(path)[0]
            is_beside = path == file or not transformer(stored)  # else it is another whole model's
            config, tensors = reads(stored) if is_beside else ({}, {})
        except TightfitError as error:  # of a file that nobody named: it may be of another model
            unread = unread or f" ({error})"
            continue
        if config and all(config[name] == usual[name] for name in usual):
            fitting.append(_Part(path, config, tensors))
            if path == file:
                break
    if len(fitting) == 1:
        return fitting[0]
    option = kind.name.lower().replace("_", "-")
    if not fitting:
        said = f"{file} is a denoiser alone, and {needs} is neither beside it nor in the folders of models"
        return _Part(file, usual, {}, f"{said}: name one by --{option} FILE{unread}")
    names = " and ".join(str(part.file) for part in fitting[:2])
    return _Part(file, usual, {}, f"{names} are both for {file}: name one by --{option} FILE")


def _places(file: Path, kind: Kind) -> Iterator[Path]:
    """Where a network may be: folders are looked through only if it is not in `file` itself."""
    yield file
    yield from near(file, kind)


def tokenizer_for(encoder: Path, *others: Path) -> tuple[Path, str]:
    """The folder of a text encoder's tokenizer: called as that or "tokenizer", beside its file or one of the
    others; and what to do where there is none."""
    places = [encoder.with_suffix(""), *(file.parent / TOKENIZER for file in (encoder, *others))]
    for place in places:
        if (place / "tokenizer.json").is_file() or (
            (place / "vocab.json").is_file() and (place / "merges.txt").is_file()
        ):
            return place, ""
    return places[0], (
        f"{encoder} has no tokenizer beside it: put tokenizer.json of its model, "
        f"such as Qwen/Qwen3-4B, into the folder {places[0]}"
    )


# --------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class SplitFile:
    """A Source: see layouts/__init__.py. `tensors` are the transformer's, by diffusers' names."""

    folder: Path
    kind: Published
    tensors: Tensors

    manifest = MappingProxyType({})
    sides = MappingProxyType({})

    @property
    def pipeline(self) -> str:
        return self.kind.pipeline

    @property
    def is_distilled(self) -> bool:
        return not self.kind.base.search(self.folder.stem)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.kind.settings(self.is_distilled)

    @property
    def listed(self) -> Mapping[str, Any]:
        return {name: part.tensors for name, part in self._parts.items() if part.tensors}

    @property
    def notes(self) -> tuple[str, ...]:
        kind = "distilled" if self.is_distilled else "the base model"
        own = f"{self.folder.name} is taken for {kind}, by its name: no tensor says it"
        beside = (
            part.file.name for part in self._parts.values() if part.tensors and part.file != self.folder
        )
        files = " and ".join(beside)
        return (own, *([f"beside {self.folder.name} were found {files}"] if files else []))

    @cached_property
    def _parts(self) -> Mapping[str, _Part]:
        """By the folder that each would have."""
        config = self.kind.config(self.tensors)
        width, of_vae = self.kind.reads(config), self.kind.beside(config)
        encoder = _found(
            self.folder,
            Kind.TEXT_ENCODER,
            text_encoder,
            {"hidden_size": width},
            f"its text encoder, a Qwen3 {width} wide (such as qwen_3_4b.safetensors),",
        )
        if encoder.tensors and (lacking := tokenizer_for(encoder.file, self.folder)[1]):
            encoder = encoder._replace(tensors={}, lacking=lacking)
        decoder = _found(
            self.folder,
            Kind.VAE,
            vae,
            of_vae,
            f"its VAE, of {of_vae['latent_channels']} channels ({self.kind.vae}),",
        )
        own = _Part(self.folder, config, self.tensors)
        return {"transformer": own, "text_encoder": encoder, "vae": decoder}

    def config(self, network: Network) -> Mapping[str, Any]:
        return self._parts[network.folder].config if network.folder in self._parts else {}

    def component(self, network: Network) -> Component:
        part = self._parts[network.folder]
        tensors = {k: t for k, t in self.whole(network).items() if k.startswith(network.prefixes)}
        config = {**network.defaults, **part.config}
        made = Component(network, part.file, config, tensors, unreadable=part.lacking)
        if not network.tokenizer:
            return made
        return replace(made, tokenizer=tokenizer_for(part.file, self.folder)[0])

    def whole(self, network: Network) -> Mapping[str, Tensor]:
        tensors = self._parts[network.folder].tensors
        return {name: tensor for name, tensor in tensors.items() if network.uses(name)}

    def scheduler(self) -> Mapping[str, Any]:
        return self.kind.scheduler(self.is_distilled)
