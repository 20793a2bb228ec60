"""What each refinement of quantisation is worth on emoji: pictures of models with rounded weights, run in
fp32.

    python -m tightfit.benchmarks.ablation WORK [NAME…]

Every variant rounds all components (text encoder, U-Net and VAE), each weight of 4096 values or more. WORK is
the folder of emoji's training. 200 of its labels are painted in 20 steps, one seed each, and compared with
the unrounded model's pictures.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import Request, inspect
from ..export import calibrate
from ..kernels import formats
from ..kernels.formats import FORMATS, dequantise
from ..kernels.quantise import quantise
from ..kernels.recipe import LEAST, recipe
from ..runtime.models.families.family import Network, Role
from .metrics import summary
from .quality import labelled, paint
from .record import record

# (network, layer, weight) → (rounded weight, bytes).
Rounding = Callable[[Network, str, torch.Tensor], tuple[torch.Tensor, float]]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("work", type=Path)
    parse.add_argument("names", nargs="*")
    parse.add_argument("--labels", type=int, default=200)
    args = parse.parse_args()
    jobs, judge = labelled(args.work, args.labels)
    requests = [Request(label, seed=seed, num_inference_steps=20) for label, seed in jobs]
    exact = paint("emoji:fp32:fp32", requests)
    print("fp32", {"match": judge(exact)}, flush=True)
    for name, make in VARIANTS.items():
        if args.names and name not in args.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bits = rounded_model(Path(folder) / "emoji", make())
            pictures = paint(f"{folder}/emoji:fp32:fp32", requests)
        row = {"unet_bits": round(bits, 3), **summary(pictures, exact), "match": judge(pictures)}
        print(name, row, flush=True)
        # Recorded one by one: all of them take half an hour.
        record("ablation", {"variant": name, "pictures": len(requests), **row})


def rounded_model(target: Path, rounding: Rounding) -> float:
    """Copy emoji with its weights rounded, in fp32. Returns the bits per U-Net value, counting what stays in
    16 bits."""
    spec = inspect("emoji")
    shutil.copytree(spec.folder, target)
    networks, bits = {part.network.folder: part.network for part in spec.components.values()}, 0.0
    for file in target.rglob("*.safetensors"):
        network, weights, total, count = networks[file.parent.name], load_file(file), 0.0, 0
        for name, weight in weights.items():
            layer, value, size = name.removesuffix(".weight"), weight.float(), 2.0 * weight.numel()
            if name != layer and weight.ndim in (2, 4) and weight.numel() >= LEAST:
                value, size = rounding(network, layer, value)
            weights[name], total, count = value.contiguous(), total + size, count + weight.numel()
        save_file(weights, file)
        bits = 8 * total / count if network.role is Role.DENOISER else bits
    return bits


def in_format(
    name: str | None, weight: torch.Tensor, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    if name is None:
        return weight.half().float(), 2.0 * weight.numel()
    form = FORMATS[name]
    return dequantise(quantise(weight, form, moment), form, weight.shape), form.bytes(weight.shape)


def everywhere(name: str) -> Rounding:
    return lambda _, __, weight: in_format(name, weight)


def by_recipe(precision: str) -> Rounding:
    return lambda network, layer, weight: in_format(
        recipe(precision, layer, weight.shape, network.least_bits), weight
    )


def round_to_nearest() -> Rounding:
    """int4 in groups of 64 with a fractional zero: neither fitted nor in sixteenths."""

    def rounding(_: Network, __: str, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        form, rows = FORMATS["int4-g64"], FORMATS["int4-g64"].rows(weight).clone()
        for channels, _groups, size in form.spans(rows.shape[-1]):
            x = rows[..., channels].unflatten(-1, (-1, size))
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            step = (high - low).clamp_min(1e-12) / 15
            x.copy_((x / step - low / step).round() * step + low)
        return formats.from_rows(rows.flatten(1), weight.shape), form.bytes(weight.shape)

    return rounding


def calibrated(
    precision: str, bits: float, feedback: bool = True, formats_too: bool = True
) -> Callable[[], Rounding]:
    """What `export --calibrate 8 --bits` stores; optionally without error feedback, or with the recipe's
    formats."""

    def make() -> Rounding:
        effort = calibrate.Effort(8, 20, None, bits)
        scheme = calibrate.calibrated(inspect("emoji"), precision, effort, lambda _: None)

        def rounding(network: Network, layer: str, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
            name = recipe(precision, layer, weight.shape, network.least_bits)
            calibrates = network.role is Role.DENOISER
            if calibrates and formats_too:
                name = scheme.formats.get(layer)
            moment = scheme.moments.get(layer) if calibrates and feedback else None
            return in_format(name, weight, moment)

        return rounding

    return make


def low_rank(rank: int) -> Rounding:
    """int4 in groups of 64 for the remainder after the largest singular directions, which are kept in fp16
    (SVDQuant, arXiv 2411.05007)."""

    def rounding(_: Network, __: str, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        flat = weight.flatten(1)
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        most = min(rank, len(s))
        large = ((u[:, :most] * s[:most]).half().float() @ v[:most].half().float()).view_as(weight)
        rounded, size = in_format("int4-g64", weight - large)
        return large + rounded, size + 2.0 * most * (flat.shape[0] + flat.shape[1])

    return rounding


def bitsandbytes(kind: str) -> Rounding:
    """What bitsandbytes quantises: only linears, in NF4 or int8; the others stay in fp16."""

    def rounding(_: Network, layer: str, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        if weight.ndim != 2 or layer.endswith("_embedding"):
            return in_format(None, weight)
        if kind == "nf4":
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
            return functional.dequantize_4bit(
                packed, state
            ).float(), weight.numel() / 2 + 4 * state.absmax.numel()
        # LLM.int8()'s weights: absmax per output channel.
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale, weight.numel() + 4.0 * len(weight)

    return rounding


VARIANTS: Mapping[str, Callable[[], Rounding]] = {
    "int8 of each output channel": lambda: everywhere("int8"),
    "int8 recipe: delicate layers in groups of 64": lambda: by_recipe("int8"),
    "int8 calibrated, 8.15 bits": calibrated("int8", 8.15),
    "int4 round to nearest, groups of 64": round_to_nearest,
    "int4 fitted, groups of 64": lambda: everywhere("int4-g64"),
    "int4 fitted, groups of 32": lambda: everywhere("int4-g32"),
    "NF4, groups of 64": lambda: everywhere("nf4-g64"),
    "int4 fitted + fp16 of rank 8": lambda: low_rank(8),
    "int4 recipe: delicate layers and VAE int8": lambda: by_recipe("int4"),
    "int4 recipe + error feedback": calibrated("int4", 4.7, formats_too=False),
    "int4 formats by sensitivity, 5.0 bits": calibrated("int4", 5.0, feedback=False),
    "int4 calibrated (both), 4.5 bits": calibrated("int4", 4.5),
    "int4 calibrated (both), 4.65 bits": calibrated("int4", 4.65),
    "int4 calibrated (both), 5.0 bits": calibrated("int4", 5.0),
    "bitsandbytes NF4 (linears only)": lambda: bitsandbytes("nf4"),
    "bitsandbytes int8 (linears only)": lambda: bitsandbytes("int8"),
}


if __name__ == "__main__":
    main()
