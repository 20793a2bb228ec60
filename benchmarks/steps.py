"""Seconds of one U-Net call by several programs, in turns in one process, beside the first of them.

    python -m tightfit.benchmarks.steps sd15 sd15-int8:int8-dynamic sd15-int4 sd15:fp32
    python -m tightfit.benchmarks.steps openvino-fp16:bf16:converted sd15:bf16 onnx-fp32:bf16:openvino

A contender is MODEL[:PRECISION[:PROGRAM]]. Programs are our engines (torch, onnx, openvino) and peers:
`diffusers`, and `converted`, OpenVINO's own conversion that `tightfit.benchmarks.peers --make` writes. The
precision `packed` is fp32 with weights in oneDNN's order.

A host's speed may change by two within minutes, so calls are compared with their neighbours in time: a round
is the first contender's call, then the others', and each of these is divided by the geometric mean of the
first one's calls before and after. Rounds in which other processes took part of the cores are left out. Of
the rest the ratio is the median, its spread the quartiles. `error` is the relative difference of a
contender's answer from the first one's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .. import inspect
from ..runtime.backends import backend
from ..runtime.errors import TightfitError
from ..runtime.machine.hardware import Hardware
from ..runtime.machine.providers import CPU_PROVIDER
from ..runtime.models.spec import ModelSpec
from ..runtime.placement import COMPUTES, GRAPHS, PRECISIONS, Placement
from ..runtime.units import shown
from .peers.programs import quiet_openvino
from .record import named, record

Arrays = dict[str, Any]
Call = Callable[[], np.ndarray]
Row = dict[str, Any]
PEERS = ("diffusers", "converted")
PROGRAMS = ("torch", *GRAPHS, *PEERS)
KINDS = (*PRECISIONS, "packed")
# Share of the cores that other processes have in a round that counts.
_QUIET = 0.05
# Without AMX: oneDNN's own variable, which OpenVINO obeys, and torch's products do.
ISA = "ONEDNN_MAX_CPU_ISA"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("contenders", nargs="+", type=contender, metavar="MODEL[:PRECISION[:PROGRAM]]")
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--rounds", type=int, default=6)
    parse.add_argument("--device", default="auto")
    parse.add_argument("--attention", default="sdpa", help="of our torch engine")
    parse.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no further round after as many"
    )
    args = parse.parse_args()
    if args.size < 64 or args.size % 64:
        parse.error(f"--size is a multiple of 64, not {args.size}")
    began, hardware = time.perf_counter(), Hardware.detect(args.device)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for who in args.contenders:
        title, calls[title], rows[title] = loaded(who, hardware, args)
    answers = {title: np.asarray(call(), np.float32) for title, call in calls.items()}
    seconds: dict[str, list[float]] = {title: [] for title in calls}
    others: dict[str, list[float]] = {title: [] for title in calls}
    first = next(iter(calls))

    def turn(title: str) -> None:
        took, share = timed(calls[title])
        seconds[title].append(took)
        others[title].append(share)
        print(f"{title}: {took:.2f} s{f', others {share:.0%}' if share > _QUIET else ''}", flush=True)

    for number in range(args.rounds):
        if number and time.perf_counter() - began > args.seconds:
            break
        for title in calls:
            turn(title)
    turn(first)
    for title, row in rows.items():
        row |= {"seconds": seconds[title], "others": others[title]}
        row |= {"error": relative(answers[title], answers[first])}
        row |= {"ratios": beside(row, rows[first])} if title != first else {}
        print(line(title, row, first), flush=True)
    setup = {"size": args.size, "attention": args.attention, "first": first, "isa": os.environ.get(ISA, "")}
    record("steps", setup | {"rounds": len(seconds[first]) - 1, "rows": rows})


def contender(text: str) -> tuple[str, str, str]:
    """Model, precision and program; argparse reports what is wrong with any other text."""
    model, precision, program, *_ = [*text.split(":"), "", ""]
    kinds = ("fp32", "bf16") if program in PEERS else ("", *KINDS)
    for what, word, known in (("program", program, ("", *PROGRAMS)), ("precision", precision, kinds)):
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {word!r}: choose {', '.join(filter(None, known))}"
            )
    if program != "converted":
        try:
            inspect(model)
        except TightfitError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    elif not Path(model, "unet.xml").is_file():
        raise argparse.ArgumentTypeError(
            f"{model} has no unet.xml: python -m tightfit.benchmarks.peers writes it"
        )
    return model, precision, program


def loaded(who: tuple[str, str, str], hardware: Hardware, args: Any) -> tuple[str, Call, Row]:
    """A contender's name in tables, its call, and what is known of it."""
    model, precision, program = who
    if program == "converted":
        call, row = converted(model, precision, args.size), {}
    elif program == "diffusers":
        call, row = by_diffusers(inspect(model), precision, args.size), {}
    else:
        precision, call, row = ours(inspect(model), precision, program or "torch", hardware, args)
    whose = {"converted": "OpenVINO", "diffusers": "diffusers"}.get(program, "tightfit")
    by = {"onnx": ", ONNX", "openvino": ", OpenVINO"}.get(program, "")
    precision = "fp32, packed" if precision == "packed" else precision
    return f"{whose} {precision}{by}", call, {"model": named(model), **row}


def ours(
    spec: ModelSpec, precision: str, program: str, hardware: Hardware, args: Any
) -> tuple[str, Call, Row]:
    """By one of our engines; also the precision, where none is said."""
    engine, unet = backend(program, hardware.device), spec.denoiser
    kind = precision or (unet.graph or spec).precision or hardware.precisions[0]
    weights = "fp32" if kind == "packed" else kind
    compute = weights if weights in COMPUTES else unet.graph.compute if unet.graph else hardware.precisions[0]
    how = (
        (args.attention if program == "torch" else "sdpa"),
        "whole",
        CPU_PROVIDER if program == "onnx" else "",
    )
    placement = Placement(program, weights, compute, "resident", *how, packed=kind == "packed")
    session, arrays = engine.load(unet, placement), noise(spec, 2, args.size)
    sizes = {"stored_bytes": unet.stored_bytes, "held_bytes": engine.meter.bytes()}
    return kind, lambda: session(**arrays)[0], sizes if program == "torch" else {}


def by_diffusers(spec: ModelSpec, precision: str, size: int) -> Call:
    """Its U-Net as it is loaded."""
    import torch
    from diffusers import UNet2DConditionModel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    unet: Any = UNet2DConditionModel.from_pretrained(spec.denoiser.folder, torch_dtype=dtype)
    x, t, hidden = (torch.from_numpy(array).to(dtype) for array in noise(spec, 2, size).values())

    def call() -> np.ndarray:
        with torch.inference_mode():
            return unet(x, t, hidden, return_dict=False)[0].float().numpy()

    return call


def converted(folder: str, precision: str, size: int) -> Call:
    """As benchmarks/peers runs it: compiled for one shape."""
    ov = quiet_openvino()
    from ..runtime.backends.openvino.compiled import HINTS

    core = ov.Core()
    network = core.read_model(Path(folder) / "unet.xml")
    width = core.read_model(Path(folder) / "text_encoder.xml").outputs[0].get_partial_shape()[-1].get_length()
    shapes = (2, 4, size // 8, size // 8), (), (2, 77, width)
    network.reshape(dict(zip(network.inputs, map(ov.PartialShape, shapes), strict=True)))
    options = {"INFERENCE_NUM_THREADS": os.cpu_count(), "INFERENCE_PRECISION_HINT": HINTS[precision]}
    compiled = core.compile_model(network, "CPU", options)
    arrays = [*drawn(dict(zip(("sample", "timestep", "hidden"), shapes, strict=True))).values()]
    return lambda: compiled(arrays)[0]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the share of the cores that other processes had meanwhile."""
    start, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    call()
    seconds = time.perf_counter() - start
    of_others = _busy_seconds() - busy - (time.process_time() - own)
    return round(seconds, 3), round(max(0.0, of_others) / (seconds * (os.cpu_count() or 1)), 3)


def _busy_seconds() -> float:
    """Of all processes on all cores."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def beside(row: Row, first: Row) -> list[float]:
    """Each call's seconds by the geometric mean of the first contender's before and after it, of the rounds
    that nothing disturbed; of all if there are not three."""
    seconds, others = first["seconds"], first["others"]
    around = list(zip(row["seconds"], seconds[:-1], seconds[1:], strict=True))
    disturbed = map(max, row["others"], others[:-1], others[1:])
    quiet = [pair for pair, most in zip(around, disturbed, strict=True) if most <= _QUIET]
    chosen = quiet if len(quiet) > 2 else around
    return [round(mine / (before * after) ** 0.5, 3) for mine, before, after in chosen]


def relative(answer: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(answer - right) / np.linalg.norm(right))


def middle(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high


def line(title: str, row: Row, first: str) -> str:
    sizes = [f"{name.removesuffix('_bytes')} {shown(row[name])}" for name in row if name.endswith("_bytes")]
    parts = [", ".join(sizes), f"at best {min(row['seconds'])} s"]
    if "ratios" in row:
        low, median, high = middle(row["ratios"])
        parts += [
            f"{median:.2f} of {first}'s ({low:.2f} to {high:.2f})",
            f"answers differ by {row['error']:.1e}",
        ]
    return f"{title}: {'; '.join(filter(None, parts))}"


def noise(spec: ModelSpec, batch: int, size: int) -> Arrays:
    """Inputs of a U-Net in the middle of a picture: reproducible noise in place of latents and texts."""
    return drawn(spec.inputs(spec.denoiser, batch, size, size))


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    random = np.random.default_rng(0)
    arrays = {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    return arrays | {"timestep": np.array(500, np.float32)}


if __name__ == "__main__":
    main()
