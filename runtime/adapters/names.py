"""Names in adapters' files, in kohya's, SGM's, Black Forest Labs', diffusers', PEFT's and OneTrainer's
spelling: of layers, and of what is stored for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..models.families.family import Role
from ..models.layouts.renames import z_image_layers
from ..models.layouts.transformer_names import OWN_NAMES, Place
from ..models.spec import Component, ModelSpec

# What is stored for a layer, by how its key ends.
_ENDS = {
    "up": r"(?:[._]lora(?:_linear_layer)?[._]|(?<=_lora[12])\.)up\.weight|\.lora_B(?:\.\w+)?\.weight",
    "down": r"(?:[._]lora(?:_linear_layer)?[._]|(?<=_lora[12])\.)down\.weight|\.lora_A(?:\.\w+)?\.weight",
    "middle": r"\.lora_mid\.weight",
    "up_bias": r"\.lora_up\.bias|\.lora_B(?:\.\w+)?\.bias",
    "length": r"\.lora_magnitude_vector(?:\.\w+){0,2}",
    "": r"\.(?:alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
    r"|on_input|weight|diff|diff_b|w_norm|b_norm)",
}
_END = {kind: re.compile(rf"(?P<layer>.+?)(?:{end})$") for kind, end in _ENDS.items()}
_LONGEST = 500  # characters of a key that is looked at
_OUTER = re.compile(r"(?:base_model_model_|diffusion_model_|model_|lora_|lycoris_)+")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.?(.*)"
)


def split(key: str) -> tuple[str, str] | None:
    """The layer that a key names, as the file spells it, and what is stored of it; None for other keys."""
    if len(key) > _LONGEST:
        return None
    for kind, end in _END.items():
        if match := end.match(key):
            return match["layer"], kind or key.rpartition(".")[2]
    return None


class Places:
    """The layers of a model by the names that adapters' files have for them."""

    def __init__(self, spec: ModelSpec) -> None:
        self._layers: list[tuple[Component, tuple[str, ...], Mapping[str, Place]]] = []
        texts = 0
        for component in spec.components.values():
            texts += component.role is Role.TEXT
            prefixes = _prefixes(component, texts)
            if prefixes:
                self._layers.append((component, prefixes, _aliases(component)))

    def find(self, layer: str) -> tuple[Component, Place] | None:
        """The component and the place of a layer there, as that component's own files spell it."""
        name = _squashed(layer.replace(".processor", ""))
        name = name[match.end() :] if (match := _OUTER.match(name)) else name
        named = [entry for entry in self._layers if name.startswith(entry[1])]
        for component, prefixes, aliases in named or self._layers:
            prefix = max((each for each in prefixes if name.startswith(each)), key=len, default="")
            for known in (name.removeprefix(prefix), name):  # some layers are called as the prefix
                if place := aliases.get(_bare(known)):
                    return component, place
        return None


def _prefixes(component: Component, number: int) -> tuple[str, ...]:
    """With which a file's names of this component's layers begin; `number` counts text encoders."""
    own = f"{component.network.folder}_"
    if component.role is Role.DENOISER:
        return own, "unet_"
    if component.role is Role.TEXT:
        numbered = (f"te{number}_", "te_") if number == 1 else (f"te{number}_",)
        return own, *numbered, *component.network.adapted_as
    return ()


def _aliases(component: Component) -> dict[str, Place]:
    paths = {name.rpartition(".")[0] for name in component.tensors}
    spelled = {_bare(_squashed(path)): Place((path,)) for path in paths if path}
    for path in paths:
        if path.endswith("to_out.0"):  # the processors of diffusers 0.1x
            spelled.setdefault(_bare(_squashed(path))[: -len("_0")], Place((path,)))
    if component.role is Role.DENOISER:
        theirs = {name: Place((path,)) for name, path in _sgm(paths, component.config)}
        theirs |= {name: Place(parts) for name, parts in z_image_layers(paths).items()}
        for names in OWN_NAMES:
            theirs |= names.layers(paths)
        spelled = {_squashed(name): place for name, place in theirs.items()} | spelled
    return spelled


def _squashed(name: str) -> str:
    return name.replace(".", "_")


def _bare(name: str) -> str:
    return name.removeprefix("text_model_")


def _sgm(paths: Iterable[str], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name that Stability's code has for each layer of a U-Net, which counts blocks through."""
    paths, layers = list(paths), config.get("layers_per_block")
    attends = {
        match[2] for path in paths if (match := _BLOCK.match(path)) and match[1] + match[3] == "upattentions"
    }
    for path in paths:
        match = _BLOCK.fullmatch(path)
        if path in _SGM_ENDS:
            yield _SGM_ENDS[path], path
        elif match and isinstance(layers, int):
            yield _sgm_block(match, layers + 1, match[2] in attends), path


def _sgm_block(match: re.Match[str], span: int, attends: bool) -> str:
    """`span` of Stability's blocks are one of diffusers', on the way down its downsampler included."""
    side, block, kind, number, rest = match.groups()
    inner = 1 if kind == "attentions" else 0
    if kind == "resnets":
        head, _, tail = rest.partition(".")
        rest = ".".join(filter(None, (_RESNET.get(head, head), tail)))
    if side == "mid":
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{rest}"
    first = int(block or 0) * span
    if kind == "downsamplers":
        return f"input_blocks.{first + span}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + span - 1}.{2 if attends else 1}.conv"
    if side == "down":
        return f"input_blocks.{first + int(number) + 1}.{inner}.{rest}"
    return f"output_blocks.{first + int(number)}.{inner}.{rest}"
