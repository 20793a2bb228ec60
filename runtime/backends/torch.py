"""The torch engine: modules of diffusers and transformers, filled tensor by tensor from safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import TightfitError
from ..memory import ProcessPeak
from ..plan import Placement
from ..spec import Component, ModelSpec, Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Forward = Callable[..., tuple[torch.Tensor, ...]]


class CudaPeak:
    """Most bytes the caching allocator has reserved on the current CUDA device."""

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        return torch.cuda.max_memory_reserved()


class TorchBackend:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def peak(self) -> CudaPeak | ProcessPeak:
        return CudaPeak() if self.device.type == "cuda" else ProcessPeak()

    def load(self, spec: ModelSpec, component: Component, placement: Placement) -> TorchSession:
        """Build the module without memory, then fill it: beside the weights only one converted tensor is alive."""
        dtype = DTYPES[placement.precision]
        build, forward = _kind(spec, component)
        try:
            with torch.device("meta"):
                module = build(component)
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise TightfitError(
                f"{component.folder / 'config.json'} describes no model that can be built: {_first_line(error)}"
            ) from None
        _fill(module, component, dtype, self.device)
        return TorchSession(module.eval().requires_grad_(False), forward, dtype, self.device)


class TorchSession:
    """A module, called with arrays by way of `forward`, which knows their names."""

    def __init__(self, module: torch.nn.Module, forward: Forward, dtype: torch.dtype, device: torch.device) -> None:
        self.module: torch.nn.Module | None = module
        self.forward, self.dtype, self.device = forward, dtype, device

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        return tuple(out.float().cpu().numpy() for out in self.forward(self.module, **tensors))

    def close(self) -> None:
        self.module = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """Floating-point arrays in the session's precision; the timestep, a scalar, and token ids as they are."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor.to(self.dtype) if array.ndim and tensor.is_floating_point() else tensor


def _encode(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SD 1.x and 2.x: the last layer, normalised."""
    return (module(tokens).last_hidden_state,)


def _encode_sdxl(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SDXL: the layer before the last, without the final norm, and the projection where the model has one."""
    out = module(tokens, output_hidden_states=True)
    return (out.hidden_states[-2], out.text_embeds) if "text_embeds" in out else (out.hidden_states[-2],)


def _predict(module: Any, sample, timestep, hidden, time_condition=None, **added: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return module(sample, timestep, hidden, timestep_cond=time_condition, added_cond_kwargs=added or None, return_dict=False)[:1]


def _decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (module["decoder"](module["post_quant_conv"](latents)),)


def _build_text_encoder(component: Component) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    names = component.config.get("architectures") or ["CLIPTextModel"]
    if names[0] not in kinds:
        raise TightfitError(f"{component.folder} holds a {names[0]}: tightfit runs {' and '.join(kinds)}")
    return kinds[names[0]](CLIPTextConfig.from_dict(dict(component.config)))


def _build_unet(component: Component) -> torch.nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_config(dict(component.config))
    return unet


def _build_decoder(component: Component) -> torch.nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    whole: Any = AutoencoderKL.from_config(dict(component.config))
    return torch.nn.ModuleDict({"decoder": whole.decoder, "post_quant_conv": whole.post_quant_conv or torch.nn.Identity()})


def _kind(spec: ModelSpec, component: Component) -> tuple[Callable[[Component], torch.nn.Module], Forward]:
    if component.name == "unet":
        return _build_unet, _predict
    if component.name == "vae_decoder":
        return _build_decoder, _decode
    return _build_text_encoder, _encode_sdxl if spec.family == "sdxl" else _encode


def _fill(module: torch.nn.Module, component: Component, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the meta tensors of `module` by the file's, converted one at a time."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    names = {_current_name(name, expected): name for name in component.tensors}
    _check(component, expected, names)
    loaded = {name: _read(component.tensors[names[name]], dtype, device).reshape(shape) for name, shape in expected.items()}
    module.load_state_dict(loaded, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise TightfitError(f"{component.name} needs the buffer {name}, which this version cannot fill")
            module.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)


def _read(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor, flat, converted. Read, not mapped: a mapped file stays in memory beside the converted weights, which
    took 1002 MB for 500 MB of fp16 as bf16."""
    if tensor.dtype not in STORED:
        raise TightfitError(f"{tensor.file} holds {tensor.dtype} weights, which plain models have not: use the original model")
    stored = torch.empty(tensor.stored_bytes, dtype=torch.uint8)
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            if stream.readinto(stored.numpy().data) != tensor.stored_bytes:
                raise TightfitError(f"{tensor.file} was cut short while it was read: copy or download it again")
    except OSError as error:
        raise TightfitError(f"{tensor.file} cannot be read ({error.strerror}): copy or download it again") from None
    return stored.view(STORED[tensor.dtype]).to(device, dtype)


def _current_name(stored: str, expected: Mapping[str, torch.Size]) -> str:
    """A tensor's name as today's libraries spell it: text models lost a prefix, VAE attention got new words."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        if ".attentions." in stored and old in stored:
            stored = stored.replace(old, new)
    if stored not in expected:
        for other in (stored.removeprefix("text_model."), f"text_model.{stored}"):
            if other in expected:
                return other
    return stored


def _check(component: Component, expected: Mapping[str, torch.Size], names: Mapping[str, str]) -> None:
    where = f"the weights of {component.folder.name} in {component.folder.parent}"
    cure = "files of different models were mixed, or one was renamed; copy or download the model again"
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected and not name.endswith("position_ids")]
    if missing or unknown:
        parts = [f"lack {len(missing)}, such as {missing[0]}"] * bool(missing)
        parts += [f"have {len(unknown)} that its config does not know, such as {unknown[0]}"] * bool(unknown)
        raise TightfitError(f"{where} {' and '.join(parts)}: {cure}")
    for name, shape in expected.items():
        if component.tensors[names[name]].count != shape.numel():
            got = list(component.tensors[names[name]].shape)
            raise TightfitError(f"{where} have {name} of shape {got}, its config says {list(shape)}: {cure}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
