"""The first minute on a GPU: settles what reading sources could not. Each doubt is a function, each answer a
row.

    python -m tightfit.benchmarks.gpu_probe

Needs no model: the pictures come from tiny random ones in a temporary folder. A doubt that fails is a row,
and the next one begins. `--device cpu` rehearses what a CPU can; the others are reported as skipped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import Hardware, Request, load
from ..export import random_model
from ..kernels import dequantise, int8
from ..kernels.formats import FORMATS, Format
from ..kernels.formats import dequantise as reference
from ..kernels.quantise import quantise
from ..runtime.backends.torch import quantised
from ..runtime.errors import first_line
from .gpu_card import MIB, Card
from .metrics import MOST_PSNR, psnr
from .record import record

Row = dict[str, Any]
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
NAMES = {HALF: "fp16", BF16: "bf16", FULL: "fp32"}
# Decibels below which a picture is wrong. On tiny models, reordered fp32 sums give over 70, TF32 56 to 62, a
# stale or missing weight under 20: the tests' 50 tells them apart. fp16 gives 40 to 60 there, bf16 30 to 49
# (planner.PSNR has the worst of emoji's). int8 and int4: the worst of a trained model, 51 and 33, less 21,
# because random weights have no shape that rounding could follow.
FLOORS = {"fp32": 50.0, "fp16": 35.0, "bf16": 25.0, "int8": 30.0, "int8-dynamic": 30.0, "int4": 12.0}
# Error of a value rounded twice (torch's path), relative to the largest; of a sum, ‖off‖ / ‖right‖.
ROUNDED = {FULL: 1e-5, HALF: 2e-3, BF16: 1.6e-2}
SUMMED = {FULL: 1e-4, HALF: 5e-3, BF16: 3e-2}
INTEGER = 2e-2  # integer products: oneDNN's codes may be off by two in 16 bits

# Input (batch, channels, height, width), output channels, dtype: the VAE's widest and the U-Net's at 512x512.
CONVOLUTIONS = (
    ((1, 128, 512, 512), 128, HALF),
    ((1, 256, 512, 512), 128, HALF),
    ((1, 512, 256, 256), 512, HALF),
    ((2, 320, 64, 64), 320, HALF),
    ((2, 2560, 16, 16), 1280, HALF),
    ((2, 1280, 8, 8), 1280, HALF),
    ((1, 256, 512, 512), 128, BF16),
    ((1, 256, 512, 512), 128, FULL),
)
HEADS = ((40, 4096, 8), (80, 1024, 8), (160, 256, 8), (64, 4096, 10), (512, 4096, 1))  # width, tokens, heads
UNPACKED = (1280, 1280, 3, 3)
WEIGHTS = ((320, 320, 3, 3), (96, 4, 3, 3), (33, 70, 1, 1), (1280, 768), (5, 7))
# Batch, channels, height, width, output channels, kernel side, stride, padding: usual shapes and odd ones.
LAYERS = (
    (2, 320, 32, 32, 320, 3, 1, 1),
    (2, 64, 32, 32, 64, 3, 2, 1),
    (1, 7, 9, 11, 5, 3, 1, 1),
    (1, 64, 8, 8, 40, 1, 1, 0),
    (2, 70, 15, 17, 33, 3, 2, 0),
)
LINEARS = ((2, 77, 768, 320), (1, 5, 7, 3), (2, 300, 320, 64))  # batch, tokens, inputs, outputs
PINNED = (1, 16, 64, 256, 1024, 2048)  # MiB


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", default="cuda", type=device_here)
    results, begun = list[Row](), time.perf_counter()
    device = parse.parse_args().device
    for row in rows(device):
        results.append(row)
        print(
            f"{time.perf_counter() - begun:6.1f} s",
            *(f"{name} {value}" for name, value in row.items()),
            sep="  ",
            flush=True,
        )
    record("gpu_probe", results, rehearsal=device == "cpu")


def device_here(device: str) -> str:
    """The device if it is available; else argparse says why not."""
    if device not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{device!r} is neither cuda nor cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no cuda device is here: --device cpu rehearses it")
    return device


def rows(device: str) -> Iterator[Row]:
    """Rows of every doubt, in order: bytes first, while the process is bare."""
    card = Card(device)
    for doubt, only_gpu in DOUBTS:
        name = doubt.__name__.replace("_", " ")
        if only_gpu and not card.is_gpu:
            yield {"doubt": name, "skipped": "needs a GPU"}
            continue
        try:
            yield from ({"doubt": name} | row for row in doubt(card))
        except Exception as error:  # the next doubt may still be answered
            traceback.print_exc()
            yield {"doubt": name, "failed": f"{type(error).__name__}: {first_line(error)[:200]}"}


def versions(card: Card) -> Iterator[Row]:
    yield {name: _version(name) for name in ("torch", "triton", "transformers", "diffusers", "setuptools")}
    if card.is_gpu:
        yield {
            "card": card.torch.get_device_name(),
            "capability": card.torch.get_device_capability(),
            "built for": card.torch.get_arch_list(),
            "cuDNN": torch.backends.cudnn.version(),
            "allocator": card.torch.get_allocator_backend(),
            "pinned memory can be given back": hasattr(torch._C, "_host_emptyCache"),
            "cuBLAS's workspaces can be": hasattr(torch._C, "_cuda_clearCublasWorkspaces"),
        }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def context_and_workspaces(card: Card) -> Iterator[Row]:
    """Bytes taken outside torch's allocator, bare and as libraries are loaded, and bytes that each kind of
    product keeps inside it."""
    bare = card.outside()
    x, bias = (
        torch.randn(512, 512, device=card.device, dtype=HALF),
        torch.zeros(512, device=card.device, dtype=HALF),
    )
    products = {
        "matmul": lambda: x @ x,
        "linear with bias": lambda: functional.linear(x, x, bias),
        "bmm": lambda: torch.bmm(x[None], x[None]),
        "fp32 matmul": lambda: x.float() @ x.float(),
    }
    kept, start = {}, card.torch.memory_allocated()
    for name, run in products.items():
        before = card.torch.memory_allocated()
        run()
        card.clear()
        kept[name] = card.torch.memory_allocated() - before
        yield {"kept after": name, "MiB": kept[name] / MIB}
    after_products = card.outside()
    weight = torch.randn(8, 512, 3, 3, device=card.device, dtype=HALF)
    functional.conv2d(x.view(1, 512, 16, 32), weight)
    card.clear()
    after_convolution, kept_all = card.outside(), card.torch.memory_allocated() - start - weight.nbytes
    predicted = Hardware.detect(card.device)
    readings = {
        "bare MiB": bare / MIB,
        "after products MiB": after_products / MIB,
        "after a convolution MiB": after_convolution / MIB,
    }
    yield {
        "what": "the context, and others",
        **readings,
        **_compared(predicted.context_bytes, after_convolution),
    }
    yield {"what": "workspaces that libraries keep", **_compared(sum(predicted.workspaces), kept_all)}


def _compared(predicted: int, measured: int) -> Row:
    return {
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1 if measured else 0.0,
    }


@torch.inference_mode()
def cudnn_workspaces(card: Card) -> Iterator[Row]:
    for (shape, out, dtype), last in product(CONVOLUTIONS, (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(shape, device=card.device, dtype=dtype).contiguous(memory_format=layout)
        weight = torch.randn(out, shape[1], 3, 3, device=card.device, dtype=dtype).contiguous(
            memory_format=layout
        )
        run = partial(functional.conv2d, x, weight, padding=1)
        used, answer = card.most(run)
        answer_bytes, moved = answer.nbytes, x.nbytes + weight.nbytes + answer.nbytes
        del answer
        yield {
            "convolution": f"{shape} > {out} {NAMES[dtype]} {'NHWC' if last else 'NCHW'}",
            "workspace MiB": round((used - answer_bytes) / MIB, 1),
            "in, out and weight MiB": round(moved / MIB, 1),
            "ms": round(card.milliseconds(run), 3),
        }


@torch.inference_mode()
def attention(card: Card) -> Iterator[Row]:
    """SDPA by head width: which kernel torch chose, its memory, whether it is right."""
    dtype = HALF if card.is_gpu else BF16
    for width, tokens, heads in HEADS if card.is_gpu else ((40, 64, 2), (512, 64, 1)):
        q, k, v = (
            torch.randn(2, tokens, heads, width, device=card.device, dtype=dtype).transpose(1, 2)
            for _ in range(3)
        )
        run = partial(functional.scaled_dot_product_attention, q, k, v)
        row: Row = {"kernel": f"attention of {tokens} tokens, heads of {width}"}
        start = time.perf_counter()
        used, answer = card.most(run) if card.is_gpu else (0, run())
        row["first ms"] = round(1e3 * (time.perf_counter() - start), 1)
        query, key, value = (
            tensor[:1].float() for tensor in (q, k, v)
        )  # all scores of both would be 2.5 GiB
        right = (query @ key.transpose(-1, -2) * width**-0.5).softmax(-1) @ value
        row |= _judged([off(answer[:1], right)], SUMMED[dtype])
        if card.is_gpu:
            row |= {
                "beside its answer MiB": round((used - answer.nbytes) / MIB, 2),
                "ms": round(card.milliseconds(run), 3),
                "choice": int(torch._fused_sdp_choice(q, k, v)),
                "strides": answer.stride(),
            }
        yield row


def off(answer: Tensor, right: Tensor) -> float:
    """‖answer - right‖ / ‖right‖; NaN and infinity pass through."""
    right = right.double()
    return float((answer.to(right.device).double() - right).norm() / right.norm())


def _judged(errors: Sequence[float], bound: float) -> Row:
    """NaN counts as wrong, and as the worst."""
    worst = max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)
    wrong = sum(not error <= bound for error in errors)
    return {"cases": len(errors), "wrong": wrong, "worst": float(f"{worst:.2g}"), "bound": bound}


def unpacking(card: Card) -> Iterator[Row]:
    """Dequantisation in GB/s read and written: the Triton kernel beside torch's operators."""
    shape = UNPACKED
    for name in ("int8", "int4-g64", "nf4-g64"):
        form = FORMATS[name]
        parts = _on(quantise(torch.randn(shape) * 0.05, form), card)
        out = torch.empty(shape[0], shape[1] * 9, device=card.device, dtype=HALF)
        moved = form.bytes(shape) + out.nbytes
        for variant, run in unpackers(card).items():
            took = card.milliseconds(partial(run, out, parts, form, 9, True), 10)
            yield {"unpacked": f"{name} by {variant}", "GB/s": round(moved / took / 1e6, 1)}


def unpackers(card: Card) -> Mapping[str, Callable[..., None]]:
    """The available ways to dequantise a weight."""

    def plain(out: Tensor, parts: Mapping[str, Tensor], form: Format, taps: int, taps_last: bool) -> None:
        dequantise.dequantise_torch(
            out, parts["packed"], parts["scale"], parts.get(form.offset), None, form, taps, taps_last
        )

    def by_triton(out: Tensor, parts: Mapping[str, Tensor], form: Format, taps: int, taps_last: bool) -> None:
        from ..kernels.triton_weights import dequantise_triton

        arguments = (
            parts["packed"],
            parts["scale"],
            parts.get(form.offset),
            form,
            taps,
            out.shape[1] // taps,
            taps_last,
        )
        dequantise_triton(out, *arguments)

    has_triton = card.is_gpu and dequantise.triton_runs(
        torch.device(card.device, card.torch.current_device())
    )
    return {"Triton": by_triton, "torch": plain} if has_triton else {"torch": plain}


def _on(parts: Mapping[str, Tensor], card: Card) -> dict[str, Tensor]:
    return {name: part.to(card.device) for name, part in parts.items()}


def weights_unpacked_right(card: Card) -> Iterator[Row]:
    """Every format and kind of shape, in torch's order of taps and in ours, into memory filled with NaN. fp16
    first."""
    generator = torch.Generator().manual_seed(0)
    for dtype, (name, form), (variant, run) in product(
        (HALF, FULL, BF16), FORMATS.items(), unpackers(card).items()
    ):
        errors = []
        for shape, taps_last in product(WEIGHTS, (True, False)):
            if not taps_last and (dtype != HALF or len(shape) == 2):
                continue  # one kernel more to compile, in an order that only CPUs use
            weight = torch.randn(shape, generator=generator) * 0.05
            parts = quantise(weight, form)
            right = reference(parts, form, shape)
            taps, row = form.taps(shape), right[0].numel()
            out = torch.full((shape[0], row), float("nan"), device=card.device, dtype=dtype)
            run(out, _on(parts, card), form, taps, taps_last)
            ordered = right if taps_last or taps == 1 else right.permute(0, 2, 3, 1)
            errors.append(float((out.float().cpu() - ordered.flatten(1)).abs().max() / right.abs().max()))
        yield {
            "kernel": f"unpacking {name} by {variant} in {NAMES[dtype]}",
            **_judged(errors, ROUNDED[dtype]),
        }


@torch.inference_mode()
def products_at_once_right(card: Card) -> Iterator[Row]:
    """Triton's product for few rows, which dequantises inside the product."""
    from ..kernels.triton_weights import linear_triton

    if "Triton" not in unpackers(card):
        yield {"skipped": "Triton does not run here"}
        return
    generator = torch.Generator().manual_seed(0)
    for dtype, (name, form) in product((HALF, FULL, BF16), FORMATS.items()):
        errors = []
        for shape in ((1280, 768), (5, 7)) if dtype == HALF else ((5, 7),):
            parts = quantise(torch.randn(shape, generator=generator) * 0.05, form)
            x, bias = (
                torch.randn(side, generator=generator).to(card.device, dtype)
                for side in ((3, 20, shape[1]), shape[:1])
            )
            on = _on(parts, card)
            answer = linear_triton(x, on["packed"], on["scale"], on.get(form.offset), bias, form)
            right = functional.linear(
                x.double(), reference(parts, form, shape).to(card.device).double(), bias.double()
            )
            errors.append(off(answer, right))
        yield {"kernel": f"linear_triton {name} in {NAMES[dtype]}", **_judged(errors, SUMMED[dtype])}


@torch.inference_mode()
def layers_right(card: Card) -> Iterator[Row]:
    """Quantised layers as pipelines run them, against fp64 layers with the same weights; both memory
    layouts."""
    for dtype, name in product((HALF, FULL, BF16) if card.is_gpu else (BF16, FULL), FORMATS):
        errors = []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as in an fp32 session
            for cases in (_convolutions, _linears):
                errors += [off(made(x), right(x.double())) for made, right, x in cases(card, name, dtype)]
        yield {"kernel": f"layers in {name}, computing in {NAMES[dtype]}", **_judged(errors, SUMMED[dtype])}


def _convolutions(card: Card, name: str, dtype: torch.dtype) -> Iterator[tuple[Any, Any, Tensor]]:
    for batch, channels, height, width, out, side, stride, padding in LAYERS:
        layer = nn.Conv2d(channels, out, side, stride, padding).requires_grad_(False)
        made, right = _quantised(card, layer, name, dtype)
        for last in (False, True):
            x = torch.randn(batch, channels, height, width).to(card.device, dtype)
            yield made, right, x.contiguous(memory_format=torch.channels_last) if last else x


def _linears(card: Card, name: str, dtype: torch.dtype) -> Iterator[tuple[Any, Any, Tensor]]:
    for batch, tokens, inputs, outputs in LINEARS:
        made, right = _quantised(card, nn.Linear(inputs, outputs).requires_grad_(False), name, dtype)
        yield made, right, torch.randn(batch, tokens, inputs).to(card.device, dtype)


def _quantised(card: Card, layer: Any, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The layer with a quantised weight, and in fp64 with that weight dequantised."""
    weight, form = layer.weight.clone(), FORMATS[name]
    layer = layer.to(card.device, dtype)
    right = type(layer)(*_sides(layer), device=card.device, dtype=torch.float64).requires_grad_(False)
    right.weight.copy_(reference(quantise(weight, form), form, weight.shape))
    right.bias.copy_(layer.bias)
    return quantised.filled(layer, weight, name, card.device, dynamic=False), right


def _sides(layer: Any) -> tuple[Any, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding


@torch.inference_mode()
def whole_numbers_right(card: Card) -> Iterator[Row]:
    """int8 times int8, by Triton or oneDNN, against the plain version."""
    if "int8" not in Hardware.detect(card.device).rates or (card.is_gpu and "Triton" not in unpackers(card)):
        yield {"skipped": "this device multiplies no integers"}
        return
    for dtype in (HALF, FULL) if card.is_gpu else (BF16, FULL):
        errors = list(_whole_convolutions(card, dtype))
        yield {"kernel": f"integer convolutions in {NAMES[dtype]}", **_judged(errors, INTEGER)}
        errors = list(_whole_linears(card, dtype))
        yield {"kernel": f"integer linears in {NAMES[dtype]}", **_judged(errors, INTEGER)}


def _whole_convolutions(card: Card, dtype: torch.dtype) -> Iterator[float]:
    for batch, channels, height, width, out, side, stride, padding in LAYERS:
        parts = _on(quantise(torch.randn(out, channels, side, side), FORMATS["int8"]), card)
        scale, bias = parts["scale"], torch.randn(out).to(card.device, dtype)
        how: Any = ((side, side), (stride, stride), (padding, padding))
        for last in (False, True) if card.is_gpu else (True,):
            x = functional.silu(torch.randn(batch, channels, height, width)).to(card.device, dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            right = int8.conv2d_int8(x.float(), parts["packed"], scale, bias.float(), *how)
            if card.is_gpu:
                from ..kernels.triton_int8 import conv2d_int8_triton

                yield off(conv2d_int8_triton(x, parts["packed"], scale, bias, *how), right)
            else:
                ready = int8.pack_conv2d(parts["packed"], channels, *how)
                yield off(int8.conv2d_int8_onednn(x, ready, scale, bias, *how[1:]), right)


def _whole_linears(card: Card, dtype: torch.dtype) -> Iterator[float]:
    for batch, tokens, inputs, outputs in LINEARS:
        parts = _on(quantise(torch.randn(outputs, inputs), FORMATS["int8"]), card)
        x, bias = (
            torch.randn(batch, tokens, inputs).to(card.device, dtype),
            torch.randn(outputs).to(card.device, dtype),
        )
        right = int8.linear_int8(x.float(), parts["packed"], parts["scale"], bias.float())
        if card.is_gpu:
            from ..kernels.triton_int8 import linear_int8_triton

            yield off(linear_int8_triton(x, parts["packed"], parts["scale"], bias), right)
        else:
            yield off(
                int8.linear_int8_onednn(x, int8.pack_linear(parts["packed"]), parts["scale"], bias), right
            )


def pictures_right(card: Card) -> Iterator[Row]:
    """Tiny models in every residency, whole and tiled, each picture painted twice by one pipeline, against
    fp32 on the CPU."""
    request = Request("a cat", seed=1, num_inference_steps=3, scheduler="euler")
    precisions = ("fp32", "fp16" if card.is_gpu else "bf16")
    with tempfile.TemporaryDirectory() as folder:
        for family in ("sd1", "sdxl"):
            model = str(Path(folder) / family)
            random_model.write(family, Path(model), tiny=True, precision="fp16")
            with load(model, device="cpu", precision="fp32", residency="resident", attention="sdpa") as pipe:
                right = pipe.generate(request).images[0]
            for precision, residency in product(precisions, ("resident", "staged", "streamed")):
                tiling = "tiled" if residency == "staged" else "whole"
                wishes: dict[str, Any] = {"precision": precision, "residency": residency, "tiling": tiling}
                with load(model, device=card.device, **wishes) as pipe:
                    painted = [pipe.generate(request).images[0] for _ in range(2)]
                yield beside(
                    painted,
                    right,
                    precision,
                    f"tiny {family} {residency} {tiling} {precision}",
                    "fp32 on the CPU",
                )


def beside(pictures: Sequence[Any], right: Any, precision: str, name: str, reference_name: str) -> Row:
    """How far the worst picture is from the right one, and how far it may be."""
    decibels = min(min(psnr(picture, right), MOST_PSNR) for picture in pictures)
    return {
        "picture": name,
        "beside": reference_name,
        "decibels": round(decibels, 1),
        "floor": FLOORS[precision],
    }


def copies(card: Card) -> Iterator[Row]:
    """Seconds to pin, by size, and GB/s to the card from pinned and from pageable memory."""
    for size in PINNED:
        count = size * MIB
        target = torch.empty(count, dtype=torch.uint8, device=card.device)
        pageable = torch.ones(count, dtype=torch.uint8)
        slow = card.milliseconds(partial(target.copy_, pageable), 3)
        start = time.perf_counter()
        pinned = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        took = time.perf_counter() - start
        fast = card.milliseconds(partial(target.copy_, pinned, non_blocking=True), 3)
        rates = {"pinned GB/s": round(count / fast / 1e6, 2), "pageable GB/s": round(count / slow / 1e6, 2)}
        yield {"copied MiB": size, "pinning s": round(took, 4), **rates}
        del pinned, pageable, target
        if empty := getattr(torch._C, "_host_emptyCache", None):
            empty()


def caps_hold(card: Card) -> Iterator[Row]:
    """A convolution with hardly any room for cuDNN's workspace under torch's cap, and whether the cap
    holds."""
    x = torch.randn(1, 256, 128, 128, device=card.device, dtype=HALF)
    weight = torch.randn(256, 256, 3, 3, device=card.device, dtype=HALF)
    card.clear()
    total = card.torch.mem_get_info()[1]
    card.torch.set_per_process_memory_fraction((card.torch.memory_reserved() + x.nbytes + MIB) / total)
    try:
        refused = card.torch.memory_stats()["num_ooms"]
        outcome = "ran"
        try:
            functional.conv2d(x, weight, padding=1)
        except RuntimeError as error:
            outcome = f"{type(error).__name__}: {first_line(error)[:90]}"
        refused = card.torch.memory_stats()["num_ooms"] - refused
        yield {
            "what": "a convolution without room for a workspace",
            "said": outcome,
            "refused inside": refused,
        }
        try:
            torch.empty(2**27, device=card.device)
            yield {"failed": "torch's cap is not held: 512 MiB were given under one of less"}
        except torch.OutOfMemoryError:
            yield {"what": "torch's cap", "said": "held"}
    finally:
        card.torch.set_per_process_memory_fraction(1.0)


def context_at_the_end(card: Card) -> Iterator[Row]:
    card.clear()
    predicted = Hardware.detect(card.device).context_bytes
    yield {"what": "the context after every library, and others", **_compared(predicted, card.outside())}


# (doubt, needs a GPU)
DOUBTS: Sequence[tuple[Callable[[Card], Iterator[Row]], bool]] = (
    (versions, False),
    (context_and_workspaces, True),
    (copies, True),
    (cudnn_workspaces, True),
    (attention, False),
    (pictures_right, False),
    (unpacking, True),
    (weights_unpacked_right, False),
    (layers_right, False),
    (products_at_once_right, False),
    (whole_numbers_right, False),
    (caps_hold, True),
    (context_at_the_end, True),
)


if __name__ == "__main__":
    main()
