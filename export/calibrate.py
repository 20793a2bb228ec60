"""Measure which layers hurt most when they are quantised, and give these more bits, within a budget.

The model paints a few images in fp32. The mean of x xᵀ over the inputs x of each layer of its denoiser is
kept. From it follow codes whose errors cancel (kernels/gptq.py), and the error of every format in the
layer's answers. The denoiser's inputs and answer are kept for some steps. With these each layer is quantised
alone, and the error in the prediction is measured.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.formats import FORMATS, dequantise
from ..kernels.quantise import quantise
from ..kernels.recipe import LEAST, recipe
from ..runtime.backends.torch.tf32 import tf32_off
from ..runtime.errors import TightfitError
from ..runtime.machine.hardware import Hardware
from ..runtime.pipeline import Pipeline
from ..runtime.planner.choose import NoneFitsError
from ..runtime.planner.wishes import Wishes
from ..runtime.request import Request, in_common, together
from ..runtime.units import shown
from .torch_model import Scheme, energy, layers

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
BITS = {"int8": 8.15, "int4": 5.0}  # per value of the denoiser, on average
MOST_BITS = {"int8": 12, "int4": 8}  # with more, the precision's name would mislead
_ROWS = 4096  # the most of a layer's inputs that one call adds to its moment
_STATES = 8  # calls of the denoiser that layers are judged by
# Inputs of wider layers are taken by so many channels, each part by itself: as one, the last layer of a
# single block of Flux.1 would have a moment of 0.9 GiB.
_WIDEST = 4096
# Of the widest layer's whole moment: that itself, and its factors while they are made (3.2, measured).
_COPIES = 4.2


@dataclass(frozen=True)
class State:
    """One call of the denoiser and its answer."""

    inputs: Mapping[str, Any]
    answer: Tensor


class Moments(Mapping[str, Tensor]):
    """The mean of x xᵀ (in, in) over the inputs x of each layer, zero between parts of wide inputs."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[list[Tensor], int]] = {}

    def add(self, path: str, x: Tensor) -> None:
        """`x`: (rows, in)."""
        parts = [(part.T @ part).cpu() for part in x.split(_WIDEST, 1)]
        sums, count = self._sums.get(path, (parts, 0))
        if count:
            for total, part in zip(sums, parts, strict=True):
                total += part
        self._sums[path] = sums, count + len(x)

    def __getitem__(self, path: str) -> Tensor:
        sums, count = self._sums[path]
        return torch.block_diag(*sums).div_(count)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


class Calibration:
    """A denoiser, the moments of its layers' inputs, and states to judge it by: those of the calls by
    `watched`, until `stop`."""

    def __init__(
        self, network: nn.Module, call: Callable[..., tuple[Any, ...]], tell: Callable[[str], object]
    ) -> None:
        """`call` takes the network and its inputs by name; it answers with the prediction first."""
        self.network, self.call, self.tell = network, call, tell
        self.layers: dict[str, Any] = {
            path: part
            for path, part in network.named_modules()
            if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.numel() >= LEAST
        }
        self.moments = Moments()
        self._calls: list[State] = []
        self._hooks = [
            part.register_forward_pre_hook(self._watch(path)) for path, part in self.layers.items()
        ]

    def watched(self, network: nn.Module, **inputs: Any) -> tuple[Any, ...]:
        """A call that is remembered."""
        answers = self.call(network, **inputs)
        self._calls.append(State(inputs, answers[0]))
        return answers

    def stop(self) -> None:
        """What was seen is all there is. Half of the states are held out to measure the result."""
        for hook in self._hooks:
            hook.remove()
        stride = max(1, len(self._calls) // (2 * _STATES))
        self.states = self._calls[::stride][0::2]
        self.held_out = self._calls[::stride][1::2] or self.states  # of one call

    def _watch(self, path: str) -> Callable[[nn.Module, Any], None]:
        def add(layer: nn.Module, args: Any) -> None:
            x = args[0].detach()
            x = (x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                return
            self.moments.add(path, x[:: -(-len(x) // _ROWS)].float())

        return add

    def snr(self, states: list[State]) -> float:
        """Decibels of the states' answers against the error of the denoiser's present answers."""
        signal = noise = 0.0
        for state in states:
            wrong = self.call(self.network, **state.inputs)[0] - state.answer
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
        """The share of the prediction that each layer in each format gets wrong.

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
        values = sum(parameter.numel() for parameter in self.network.parameters())
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
        """Of the whole denoiser in these formats, in decibels, on the states that were held out."""
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
    bits: float


@torch.inference_mode()
def calibrated(spec: ModelSpec, precision: str, effort: Effort, tell: Callable[[str], object]) -> Scheme:
    """The scheme for the denoiser of the model, measured by running it in fp32. Raises TightfitError for a
    broken model, and where there is no room for that."""
    side, steps, hardware = effort.size, effort.steps, _machine(spec)
    requests = (
        Request(prompt, width=side, height=side, num_inference_steps=steps, seed=len(prompt))
        for prompt in PROMPTS[: effort.prompts]
    )
    jobs = [request.resolve(spec) for request in requests]
    # Of one plan: a family whose texts vary in length is shown those that are as long as the first.
    job = together([one for one in jobs if in_common(one) == in_common(jobs[0])])
    wishes = Wishes(precision="fp32", residency="staged")
    with Pipeline(spec, hardware, wishes) as pipe, tf32_off(torch.device(hardware.device)):
        try:
            plan = pipe.plan(job)
        except NoneFitsError as error:
            raise TightfitError(
                f"--calibrate paints in fp32, and {error}; or leave out --calibrate"
            ) from None
        events = pipe.run(job)
        next(event for event in events if event.stage == "encode")
        session: Any = pipe.loaded.session(job.spec.denoiser, plan.denoiser)
        found = Calibration(session.module, session.forward, tell)
        session.forward = found.watched
        for engine in pipe.loaded.backends.values():
            engine.meter.limit(None)  # what is kept of the calls is beside what was planned
        for event in events:
            if event.step % job.steps_taken == 0:
                tell(f"calibrating: painted '{job.prompted_pictures[event.image].prompt}'")
            if event.step == event.steps:
                break
        if session.module is not found.network:
            raise TightfitError(
                "memory ran out while a calibration painted: make --size smaller, or leave it out"
            )
        found.stop()
        return found.scheme(precision, effort.bits)


def _machine(spec: ModelSpec) -> Hardware:
    """Where to paint: the GPU if the denoiser has room there in fp32, else the CPU. Raises TightfitError
    where the host has no room for what is kept."""
    weight_bytes = 4 * sum(tensor.count for tensor in spec.denoiser.tensors.values())
    host, best = Hardware.detect("cpu"), Hardware.detect()
    here = best if best.free_bytes > weight_bytes else host
    host_bytes = _moment_bytes(spec) + (weight_bytes if here.device == "cpu" else 0)
    if host_bytes > host.free_bytes:
        needs = (
            f"{shown(host_bytes)} of the host's memory for {spec.name}, and {shown(host.free_bytes)} are free"
        )
        raise TightfitError(f"--calibrate needs {needs}: leave it out")
    return here


def _moment_bytes(spec: ModelSpec) -> int:
    """What is kept of all layers, and what the widest takes at once as it is quantised."""
    widths = [shape[1] for shape in layers(spec.denoiser.tensors).values() if math.prod(shape) >= LEAST]
    kept = sum(4 * (width // _WIDEST * _WIDEST**2 + (width % _WIDEST) ** 2) for width in widths)
    return kept + int(4 * _COPIES * max(widths, default=0) ** 2)
