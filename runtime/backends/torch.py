"""The torch engine: modules of diffusers and transformers, filled tensor by tensor from safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import TightfitError, explained, first_line
from ..files import Tensor
from ..memory import ProcessPeak, release
from ..plan import Placement
from ..spec import Component, ModelSpec

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

    def check(self, component: Component) -> None:
        _stored(component, _build(component))

    def load(self, spec: ModelSpec, component: Component, placement: Placement) -> TorchSession:
        """Build the module without memory, then fill it: beside the weights one buffer for the largest tensor is alive."""
        dtype = DTYPES[placement.precision]
        module = _build(component)
        with _memory_errors_explained():
            _fill(module, component, dtype, self.device)
        return TorchSession(module.eval().requires_grad_(False), _forward(spec, component), dtype, self.device)


class TorchSession:
    """A module, called with arrays by way of `forward`, which knows their names."""

    def __init__(self, module: torch.nn.Module, forward: Forward, dtype: torch.dtype, device: torch.device) -> None:
        self.module: torch.nn.Module | None = module
        self.forward, self.dtype, self.device = forward, dtype, device

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.module is None:
            raise TightfitError("the pipeline was closed while it was painting")
        with _memory_errors_explained():
            tensors = {name: self._tensor(array) for name, array in arrays.items()}
            return tuple(out.float().cpu().numpy() for out in self.forward(self.module, **tensors))

    def close(self) -> None:
        self.module = None
        _empty_cache(self.device)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """Floating-point arrays in the session's precision; the timestep, a scalar, and token ids as they are."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor.to(self.dtype) if array.ndim and tensor.is_floating_point() else tensor


@contextmanager
def _memory_errors_explained() -> Iterator[None]:
    """torch has a class for CUDA's own; MPS, cuBLAS and the CPU only say so in their text."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        cure = "make the picture smaller, choose fp16 or bf16, or close what else uses the memory"
        raise TightfitError(f"out of memory ({first_line(error)}): {cure}") from error


def _empty_cache(device: torch.device) -> None:
    """Give memory that was freed back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        release()


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


def _forward(spec: ModelSpec, component: Component) -> Forward:
    if component.name == "unet":
        return _predict
    if component.name == "vae_decoder":
        return _decode
    return _encode_sdxl if spec.family == "sdxl" else _encode


def _build(component: Component) -> torch.nn.Module:
    """The component's module on the meta device: shapes and no memory."""
    build = {"unet": _build_unet, "vae_decoder": _build_decoder}.get(component.name, _build_text_encoder)
    config = component.folder / "config.json"
    with explained(f"{config} describes no model that can be built", "copy or download it again"), torch.device("meta"):
        return build(component)


def _build_text_encoder(component: Component) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    names = component.config.get("architectures") or ["CLIPTextModel"]
    if names[0] not in kinds:
        raise TightfitError(f"{component.folder} holds a {names[0]}: tightfit runs {' and '.join(kinds)}")
    return kinds[names[0]](CLIPTextConfig.from_dict(dict(component.config)))


def _build_unet(component: Component) -> torch.nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if component.config.get("class_embed_type") is not None:
        raise TightfitError(f"{component.folder} wants class embeddings (unCLIP): tightfit runs text-to-image models")
    unet: Any = UNet2DConditionModel.from_config(dict(component.config))
    return unet


def _build_decoder(component: Component) -> torch.nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    whole: Any = AutoencoderKL.from_config(dict(component.config))
    return torch.nn.ModuleDict({"decoder": whole.decoder, "post_quant_conv": whole.post_quant_conv or torch.nn.Identity()})


def _fill(module: torch.nn.Module, component: Component, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the meta tensors of `module` by the files', converted one at a time."""
    stored = _stored(component, module)
    scratch = torch.empty(max(tensor.stored_bytes for tensor in stored.values()), dtype=torch.uint8)
    weights = {n: _read(stored[n], scratch, dtype, device).reshape(t.shape) for n, t in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise TightfitError(f"{component.name} needs the buffer {name}, which this version cannot fill")
            module.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)


def _read(tensor: Tensor, scratch: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor, flat, converted by way of `scratch` (uint8, at least its stored bytes).

    Read, not mapped: a mapped file stays in memory beside the converted weights, 1002 MB for 500 MB of fp16 as bf16. And
    by way of one buffer, as freeing one for each tensor left holes in the heap that came to the same in every other run.
    """
    stored = scratch[: tensor.stored_bytes]
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            if stream.readinto(stored.numpy().data) != tensor.stored_bytes:
                raise TightfitError(f"{tensor.file} was cut short while it was read: copy or download it again")
    except OSError as error:
        raise TightfitError(f"{tensor.file} cannot be read ({error.strerror}): copy or download it again") from None
    return stored.view(STORED[tensor.dtype]).to(device, dtype, copy=True)


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


def _stored(component: Component, module: torch.nn.Module) -> dict[str, Tensor]:
    """For each tensor of `module` the one in the component's files; they are all there and of the right shape.

    Tensors that the module does not know are left alone, as diffusers and transformers leave them.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    stored = {_current_name(name, expected): tensor for name, tensor in component.tensors.items()}
    where = f"the weights of {component.folder.name} in {component.folder.parent}"
    cure = "files of different models were mixed, or one was renamed; copy or download the model again"
    if missing := [name for name in expected if name not in stored]:
        unknown = [name for name in stored if name not in expected]
        instead = f", but have {unknown[0]}" if unknown else ""
        raise TightfitError(f"{where} lack {len(missing)}, such as {missing[0]}{instead}: {cure}")
    for name, shape in expected.items():
        tensor = stored[name]
        if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:  # (C, C, 1, 1) is (C, C)
            raise TightfitError(f"{where} have {name} of shape {list(tensor.shape)}, its config says {list(shape)}: {cure}")
        if tensor.dtype not in STORED:
            raise TightfitError(f"{where} have {name} as {tensor.dtype}, which plain models have not: use the original model")
    return stored
