"""Measure which layers hurt most when they are quantised, and give these more bits, within a budget.

The U-Net paints a few images with diffusers' own pipeline. The mean of x xᵀ over each layer's inputs x is
kept. From it follow codes whose errors cancel (kernels/gptq.py), and the error of every format in the layer's
answers. The U-Net's inputs and answer are kept for some steps. With these each layer is quantised alone, and
the error in the predicted noise is measured.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.formats import FORMATS, dequantise
from ..kernels.quantise import quantise
from ..kernels.recipe import LEAST, recipe
from ..runtime.backends.torch import loading as weights
from ..runtime.backends.torch import networks
from ..runtime.models import schedulers
from ..runtime.models.tokenizer import tokenizer_of
from ..runtime.placement import Placement
from .torch_model import Scheme, energy

if TYPE_CHECKING:
    from ..runtime.models.spec import ModelSpec

# One for each kind of image that people ask for. None is from emoji's training, whose prompts are one or two
# words.
PROMPTS = (
    "a portrait photo of an old fisherman, natural light", "a red heart",
    "a lighthouse on a cliff at dusk, oil painting", "a bowl of ramen, studio photo",
    "an astronaut riding a horse", "a cosy kitchen with plants, watercolour",
    "a city street at night in the rain", "a golden retriever puppy in the grass",
    "a castle in the clouds, fantasy art", "a smiling woman in a yellow raincoat",
    "a vintage car, black and white photograph", "an owl, pencil sketch", "a mountain lake at sunrise",
    "a robot reading a book", "a bouquet of sunflowers", "a pizza",
)  # fmt: skip
# None: 16 bits.
LADDER = {
    "int8": ("int8", "int8-g64", None),
    "int4": ("int4-g64", "int4-g32", "int8", "int8-g64", None),
}
BITS = {"int8": 8.15, "int4": 5.0}  # per value of the U-Net, on average
MOST_BITS = {"int8": 12, "int4": 8}  # with more, the precision's name would mislead
_ROWS = 4096  # the most of a layer's inputs that one call adds to its moment
_STATES = 8  # calls of the U-Net that layers are judged by
_PLAINLY = Placement("torch", "fp32", "fp32", "resident", "sdpa", "whole")


@dataclass(frozen=True)
class State:
    """One call of the U-Net and its answer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    answer: Tensor


class Calibration:
    """A U-Net (diffusers' module), the moments of its layers' inputs, and states to judge it by."""

    def __init__(
        self, unet: nn.Module, paint: Callable[[str], object], prompts: int, tell: Callable[[str], object]
    ) -> None:
        """`paint` paints a prompt with `unet`. Half of the states are held out to measure the result."""
        self.unet, self.tell = unet, tell
        self.layers: dict[str, Any] = {
            path: part
            for path, part in unet.named_modules()
            if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.numel() >= LEAST
        }
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._calls: list[State] = []
        hooks = [part.register_forward_pre_hook(self._watch(path)) for path, part in self.layers.items()]
        hooks.append(unet.register_forward_hook(self._keep, with_kwargs=True))
        for prompt in PROMPTS[:prompts]:
            paint(prompt)
            tell(f"calibrating: painted '{prompt}'")
        for hook in hooks:
            hook.remove()
        self.moments = {path: total / count for path, (total, count) in self._sums.items()}
        stride = max(1, len(self._calls) // (2 * _STATES))
        self.states, self.held_out = self._calls[::stride][0::2], self._calls[::stride][1::2]

    def _watch(self, path: str) -> Callable[[nn.Module, Any], None]:
        def add(layer: nn.Module, args: Any) -> None:
            x = args[0].detach()
            x = (x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                return
            x = x[:: -(-len(x) // _ROWS)].float()
            total, count = self._sums.get(path, (torch.zeros(()), 0))
            self._sums[path] = total + (x.T @ x).cpu(), count + len(x)

        return add

    def _keep(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._calls.append(State(args, kwargs, out[0]))

    def snr(self, states: list[State]) -> float:
        """Decibels of the states' answers against the error of the U-Net's present answers."""
        signal = noise = 0.0
        for state in states:
            wrong = self.unet(*state.args, **state.kwargs)[0] - state.answer
            signal, noise = signal + energy(state.answer), noise + energy(wrong)
        return 10 * math.log10(signal / noise) if noise else math.inf

    def rounded(self, path: str, form: str | None) -> Tensor:
        """A layer's weight as a format stores it; None is 16 bits."""
        weight = self.layers[path].weight.detach()
        if form is None:
            return weight.half().to(weight.dtype)
        parts = quantise(weight.cpu(), FORMATS[form], self.moments.get(path))
        return dequantise(parts, FORMATS[form], weight.shape).to(weight)

    def damage(self, precision: str) -> dict[str, dict[str | None, float]]:
        """The share of the predicted noise that each layer in each format gets wrong.

        Measured for the lowest format. Other formats are in proportion to the errors of the layer's answers.
        """
        shares: dict[str, dict[str | None, float]] = {}
        began = time.perf_counter()
        for i, (path, layer) in enumerate(self.layers.items()):
            weight, forms = layer.weight.data, LADDER[precision]
            versions = {form: self.rounded(path, form) for form in forms}
            errors = {form: self._answer_error(path, version - weight) for form, version in versions.items()}
            layer.weight.data = versions[forms[0]]
            share = 10 ** (-self.snr(self.states) / 10)
            layer.weight.data = weight
            shares[path] = {
                form: share * error / max(errors[forms[0]], 1e-30) for form, error in errors.items()
            }
            if i % 25 == 24:
                left = (time.perf_counter() - began) / (i + 1) * (len(self.layers) - i - 1) / 60
                self.tell(
                    f"calibrating: {i + 1} of {len(self.layers)} layers measured, {left:.0f} minutes left"
                )
        return shares

    def _answer_error(self, path: str, wrong: Tensor) -> float:
        """E|ΔW x|²: each tap's weights times the moment of the inputs."""
        rows = (
            wrong.float().cpu() if wrong.ndim == 2 else wrong.float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
        )
        moment = self.moments.get(path)
        return energy(rows) if moment is None else ((rows @ moment) * rows).sum(dtype=torch.float64).item()

    def scheme(self, precision: str, bits: float) -> Scheme:
        """More bits for the layers that need them most, up to `bits` per value on average. Measured on the
        states that were held out."""
        damage = self.damage(precision)
        shapes = {path: tuple(layer.weight.shape) for path, layer in self.layers.items()}
        values = sum(parameter.numel() for parameter in self.unet.parameters())
        rest = values - sum(math.prod(shape) for shape in shapes.values())
        chosen = allocate(damage, shapes, LADDER[precision], bits * values / 8 - 2 * rest)
        formats = {path: form for path, form in chosen.items() if form}
        default = {path: recipe(precision, path, shape) for path, shape in shapes.items()}
        measured = {"snr": {"calibrated": self._snr_of(chosen), "recipe": self._snr_of(default)}}
        lowest = {path: shares[LADDER[precision][0]] for path, shares in damage.items()}
        worst = heapq.nlargest(10, lowest, key=lambda path: lowest[path] / math.prod(shapes[path]))
        measured |= {
            "worst": {path: {"share": lowest[path], "kept": chosen[path] or "16 bits"} for path in worst}
        }
        return Scheme(formats, self.moments, measured)

    def _snr_of(self, formats: Mapping[str, str | None]) -> float:
        """Of the whole U-Net in these formats, in decibels, on the states that were held out."""
        kept = {path: layer.weight.data for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.weight.data = self.rounded(path, formats[path])
        snr = self.snr(self.held_out)
        for path, layer in self.layers.items():
            layer.weight.data = kept[path]
        return round(snr, 2)


def least_bits(layers: Mapping[str, tuple[int, ...]], tensors: Iterable[Any], precision: str) -> float:
    """Bits per value on average with every layer in the lowest format. What is too small to quantise takes
    16."""
    lowest, values = LADDER[precision][0], sum(tensor.count for tensor in tensors)
    large = [shape for shape in layers.values() if math.prod(shape) >= LEAST]
    rest = values - sum(map(math.prod, large))
    return 8 * (sum(_bytes(lowest, shape) for shape in large) + 2 * rest) / values


def allocate(
    damage: Mapping[str, Mapping[str | None, float]],
    shapes: Mapping[str, tuple[int, ...]],
    ladder: tuple[str | None, ...],
    room: float,
) -> dict[str, str | None]:
    """The format of each layer. All take at most `room` bytes, unless the lowest formats take more.

    Greedy: of all steps to a larger format that fit, take the one that removes the most damage per byte,
    until none fits.
    """
    cost = {path: {form: _bytes(form, shape) for form in ladder} for path, shape in shapes.items()}
    chosen: dict[str, str | None] = {
        path: min(ladder, key=lambda form, path=path: cost[path][form]) for path in shapes
    }
    room -= sum(cost[path][form] for path, form in chosen.items())
    while True:
        steps = (
            ((damage[path][now] - damage[path][form]) / (cost[path][form] - cost[path][now]), path, form)
            for path, now in chosen.items()
            for form in ladder
            if 0 < cost[path][form] - cost[path][now] <= room and damage[path][form] < damage[path][now]
        )
        best = max(steps, key=lambda step: step[0], default=None)
        if best is None:
            return chosen
        _, path, form = best
        room -= cost[path][form] - cost[path][chosen[path]]
        chosen[path] = form


def _bytes(form: str | None, shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape) if form is None else FORMATS[form].bytes(shape)


@dataclass(frozen=True)
class Effort:
    """How much to paint, and how many bits per value to spend. `size` None is the model's own."""

    prompts: int
    steps: int
    size: int | None
    guidance: float
    bits: float


def pipeline(spec: ModelSpec, steps: int) -> Any:
    """diffusers' pipeline for the family, in fp32 on the CPU. It paints latents; its VAE has no weights.

    It is made of classes named here, not by DiffusionPipeline.from_pretrained. Before diffusers 0.38 that ran
    Python code of the folder if model_index.json named some, and it opens a safety checker's pickle.
    """
    import diffusers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    parts: dict[str, Any] = {"scheduler": schedulers.make(schedulers.default(spec), spec, steps)}
    with torch.device("meta"):
        parts[spec.denoiser.network.folder] = UNet2DConditionModel.from_config(dict(spec.unet))
        vae: Any = AutoencoderKL.from_config(dict(spec.vae))
        for encoder in spec.text_encoders:
            parts[encoder.network.folder] = networks.build(encoder, _PLAINLY, "cpu")
    # No page of it is touched, so that it takes no memory.
    parts[spec.decoder.network.folder] = vae.to_empty(device="cpu")
    for component in (spec.denoiser, *spec.text_encoders):
        module = parts[component.network.folder].eval().requires_grad_(False)
        weights.fill(module, weights.match(component, module), torch.float32, torch.device("cpu"))
    for encoder in spec.text_encoders:
        parts[encoder.network.tokenizer] = tokenizer_of(spec, encoder)
    if len(spec.text_encoders) > 1:
        return diffusers.StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=spec.force_zeros, add_watermarker=False
        )
    kind: Any = (
        diffusers.LatentConsistencyModelPipeline
        if spec.latent_consistency
        else diffusers.StableDiffusionPipeline
    )
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.inference_mode()
def calibrated(spec: ModelSpec, precision: str, effort: Effort, tell: Callable[[str], object]) -> Scheme:
    """The scheme for the U-Net of the model, measured by running it in fp32. Raises TightfitError for a
    broken model."""
    from diffusers.utils import logging as of_diffusers

    of_diffusers.set_verbosity_error()
    pipe = pipeline(spec, effort.steps)
    pipe.set_progress_bar_config(disable=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device)
    unet = pipe.unet

    def paint(prompt: str) -> None:
        generator = torch.Generator("cpu").manual_seed(len(prompt))
        options = {
            "num_inference_steps": effort.steps,
            "guidance_scale": effort.guidance,
            "height": effort.size,
            "width": effort.size,
        }
        pipe(prompt, **options, output_type="latent", generator=generator)

    return Calibration(unet, paint, effort.prompts, tell).scheme(precision, effort.bits)
