"""A network as an ONNX graph without its weights: traced on torch's meta device, so that tracing SD 1.5 takes
no more memory than tracing a toy. Inputs, outputs and folders are named as Optimum names them, so that either
can run what the other wrote.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ..runtime.files import read_json

OPSET = 23  # the first with Attention; GroupNormalization is since 21
_AUTO = torch.export.Dim.AUTO


@dataclass(frozen=True)
class Network:
    """One ONNX file: its folder, the diffusers or transformers `module`, and the function of its submodules
    that is exported.

    `inputs` give each input's shape, with names for the sides that vary; whole numbers where `integers` has
    its name. `outputs` name the answers. `sides` are lengths of those sides that it is traced with, `checked`
    others that it can be called with.
    """

    folder: str
    module: nn.Module
    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    sides: Mapping[str, int]
    checked: tuple[Mapping[str, int], ...]
    integers: frozenset[str] = frozenset()

    def arguments(
        self, sides: Mapping[str, int], dtype: torch.dtype, device: str, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random inputs whose varying sides are as given, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, shape in self.inputs.items():
            shape = tuple(sides[side] if isinstance(side, str) else side for side in shape)
            if device == "meta":
                made[name] = torch.empty(
                    shape, dtype=torch.int64 if name in self.integers else dtype, device=device
                )
            elif name in self.integers:
                most = getattr(self.module.config, "vocab_size", 1000)
                made[name] = torch.randint(0, most, shape, generator=generator)
            else:
                made[name] = torch.randn(shape, generator=generator).to(dtype)
                if name in ("timestep", "time_ids"):  # which a network reads as counts
                    made[name] = made[name].abs() * 100
        return made


class Wrapped(nn.Module):
    """A module whose forward takes the inputs in their order, as torch.export wants it. Weights are called
    `m.` and their name."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.m, self._call, self._names = network.module, network.call, tuple(network.inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._call(self.m, **dict(zip(self._names, tensors, strict=True)))


PREFIX = "m."
_LATENT = {"batch_size": 2, "height": 16, "width": 24}
_OTHER_LATENT = {"batch_size": 1, "height": 32, "width": 16}
# diffusers' U-Net tells its upsamplers the size of the skip connection only where a side does not halve
# evenly, and doubles else. Traced with odd sides its graph always has the size, which is twice the side where
# that is even: the same values either way.
_ODD = {"batch_size": 2, "height": 17, "width": 25}
_UNEVEN = {"batch_size": 1, "height": 20, "width": 15}  # 20, 10, 5, 3 and 15, 8, 4, 2


def networks(model: Path, folders: Mapping[str, Path]) -> Iterator[Network]:
    """What a Stable Diffusion model of diffusers' layout is made of, each built without memory when it is its
    turn."""
    sdxl = (model / "text_encoder_2").is_dir()
    for folder, config in folders.items():
        make = {"unet": _unet, "vae_decoder": _decoder, "vae_encoder": _encoder}.get(folder)
        with torch.device("meta"):
            network = make(config) if make else _text_encoder(folder, config, sdxl)
        yield network


def trace(network: Network, dtype: torch.dtype) -> tuple[ir.Model, torch.export.ExportedProgram]:
    """The network's graph in `dtype`, whose weights are initializers without values; and the program it was
    made from."""
    import onnxscript.optimizer

    module = Wrapped(network).to(dtype).eval().requires_grad_(False)
    arguments = network.arguments(network.sides, dtype, "meta")
    moving = tuple(
        {i: _AUTO for i, side in enumerate(shape) if isinstance(side, str)}
        for shape in network.inputs.values()
    )
    with _quiet():
        program = torch.export.export(
            module, tuple(arguments.values()), dynamic_shapes={"tensors": moving}, strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            optimize=False,
            verbose=False,
        )
        assert onnx_program is not None
        model = onnx_program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # none is there, and the optimizer would look
        onnxscript.optimizer.optimize_ir(model)
    for value, shape in zip(model.graph.inputs, network.inputs.values(), strict=True):
        value.shape = ir.Shape(shape)
    return model, program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks: that torchvision is not installed, that weights have no values yet."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _unet(folder: Path) -> Network:
    from diffusers import UNet2DConditionModel

    module: Any = UNet2DConditionModel.from_config(_config(folder))
    config = module.config
    inputs: dict[str, tuple[str | int, ...]] = {
        "sample": ("batch_size", config.in_channels, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch_size", "sequence_length", config.cross_attention_dim),
    }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = ("batch_size", config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": ("batch_size", pooled), "time_ids": ("batch_size", 6)}
    checked = tuple(latent | {"sequence_length": 58} for latent in (_OTHER_LATENT, _UNEVEN))
    return Network("unet", module, _predict, inputs, ("out_sample",), _ODD | {"sequence_length": 77}, checked)


def _predict(
    m: Any, sample, timestep, encoder_hidden_states, timestep_cond=None, **added
) -> tuple[torch.Tensor, ...]:
    return m(
        sample,
        timestep,
        encoder_hidden_states,
        timestep_cond=timestep_cond,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[:1]


def _decoder(folder: Path) -> Network:
    from diffusers import AutoencoderKL

    module: Any = AutoencoderKL.from_config(_config(folder))
    module.encoder = module.quant_conv = None
    inputs = {"latent_sample": ("batch_size", module.config.latent_channels, "height", "width")}
    return Network("vae_decoder", module, _decode, inputs, ("sample",), _LATENT, (_OTHER_LATENT,))


def _decode(m: Any, latent_sample) -> tuple[torch.Tensor, ...]:
    return (m.decoder(latent_sample if m.post_quant_conv is None else m.post_quant_conv(latent_sample)),)


def _encoder(folder: Path) -> Network:
    from diffusers import AutoencoderKL

    module: Any = AutoencoderKL.from_config(_config(folder))
    module.decoder = module.post_quant_conv = None
    inputs = {"sample": ("batch_size", module.config.in_channels, "height", "width")}
    sides, checked = (
        {"batch_size": 2, "height": 128, "width": 192},
        {"batch_size": 1, "height": 256, "width": 128},
    )
    return Network("vae_encoder", module, _encode, inputs, ("latent_parameters",), sides, (checked,))


def _encode(m: Any, sample) -> tuple[torch.Tensor, ...]:
    moments = m.encoder(sample)
    return (moments if m.quant_conv is None else m.quant_conv(moments),)


def _text_encoder(folder: str, config: Path, sdxl: bool) -> Network:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = _config(config)
    # As in runtime/models/spec.py.
    listed = (read_json(config.parent / "model_index.json").get(config.name) or [""])[-1]
    kinds = [listed] if str(listed).startswith("CLIPTextModel") else settings.get("architectures") or ()
    projects = "CLIPTextModelWithProjection" in kinds
    module: Any = (CLIPTextModelWithProjection if projects else CLIPTextModel)(
        CLIPTextConfig.from_dict(settings)
    )
    for owner in module.modules():  # made on meta, they would have no values
        if "position_ids" in owner._buffers:
            owner.position_ids = None
    outputs = ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")
    if sdxl:
        outputs += tuple(f"hidden_states.{i}" for i in range(module.config.num_hidden_layers + 1))
    inputs = {"input_ids": ("batch_size", "sequence_length")}
    length = module.config.max_position_embeddings
    sides, checked = (
        {"batch_size": 2, "sequence_length": length},
        {"batch_size": 1, "sequence_length": round(length * 0.75)},
    )
    return Network(folder, module, _read(outputs), inputs, outputs, sides, (checked,), frozenset(inputs))


def _read(outputs: tuple[str, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(m: Any, input_ids) -> tuple[torch.Tensor, ...]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        out = m(input_ids, position_ids=positions, output_hidden_states=len(outputs) > 2)
        return (*(out[name] for name in outputs[:2]), *(out.hidden_states if len(outputs) > 2 else ()))

    return call
