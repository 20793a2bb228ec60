"""What gpu_check runs: each section in its own process. gpu_check.py lists them; gpu_report.py finds the
faults.

Rows name what ran (plan, pipeline, kernel, picture, doubt). Their figures: `predicted` and `measured` bytes,
`error` of the prediction, `used` bytes of the card under a `cap` and whether that `held`, `decibels` against
another picture and the `floor` below which they are wrong, `failed` and why.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch

from .. import Hardware, Pipeline, Plan, Request, TightfitError, Wishes, inspect, load, plan
from ..export import random_model
from ..runtime.backends.torch.backend import TorchBackend
from ..runtime.costs.latency import compiling_seconds
from ..runtime.errors import first_line
from ..runtime.machine.providers import CPU_PROVIDER
from ..runtime.models.families.family import Extent
from ..runtime.placement import Placement
from . import gpu_fast, gpu_probe, layers
from .gpu_card import Card
from .gpu_probe import beside
from .steps import noise

CAPS = (2, 4, 6, 8)  # decimal gigabytes, as cards are sold
MOST = 8  # plans run per model
Row = dict[str, Any]


class Check:
    """What sections share: models in `folder`, written on first use, the device and the request.

    A model is named FAMILY or FAMILY-PRECISION, such as sd1-int4, with the prefix `tiny-` for a tiny one;
    `tiny` makes all of them tiny.
    """

    def __init__(self, folder: Path, device: str, tiny: bool, steps: int) -> None:
        self.folder, self.device, self.tiny = folder, device, tiny
        self.card = Card(device)
        self.half = "fp16" if self.card.is_gpu else "bf16"
        # diffusers' default scale, so that its pictures are the same
        self.request = Request(
            "a red heart", seed=0, num_inference_steps=steps, scheduler="euler", guidance_scale=7.5
        )
        # two steps need as much memory as any number
        self.short = Request(
            "a red heart", seed=0, num_inference_steps=2, scheduler="euler", guidance_scale=7.5
        )

    def sections(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """Sections by name; gpu_check decides the order."""
        compiled = ["diffusers", "diffusers, U-Net compiled", ("sd1", self.half)]
        streamed = ("sd1", self.half, "streamed", "1500MB")  # alone, since torch's cap is per process
        return {
            "probe": lambda: gpu_probe.rows(self.device),
            f"{self.half} under caps": lambda: self.capped([("sd1", self.half)], self.full),
            "speed": lambda: chain(self.speed(["diffusers", ("sd1", self.half)]), self.speed([streamed])),
            "few bits": self.few_bits,
            "norms": lambda: gpu_fast.norms(self.card),
            "layouts": lambda: self.fast("layouts"),
            "graphs": lambda: self.fast("graphs"),
            "GPU tests": self.tests,
            "kernels and layers": self.kernels,
            "SDXL": lambda: self.capped([("sdxl", self.half)], self.full, 4),
            "overlap": lambda: self.fast("overlap"),
            "blocks compiled": lambda: self.fast("blocks compiled"),
            "compiled": lambda: self.speed(compiled),
            "ONNX Runtime": self.onnx,
        }

    def written(self, name: str) -> str:
        """The folder of a model with random weights in fp16, or of an export of it."""
        if self.tiny and not name.startswith("tiny-"):
            name = f"tiny-{name}"
        if (model := self.folder / name).exists():
            return str(model)
        plain, _, form = name.removeprefix("tiny-").partition("-")
        if not form:
            random_model.write(plain, model, tiny=name.startswith("tiny-"), precision="fp16")
            return str(model)
        source = self.written(name.removesuffix(f"-{form}"))
        to = ["fp16", "--to", "onnx"] if form == "onnx" else [form]
        command = [sys.executable, "-m", "tightfit", "export", source, "--precision", *to, "-o", str(model)]
        subprocess.run(command, check=True)
        return str(model)

    def models(self, names: Sequence[str]) -> Iterator[Row]:
        for name in names:
            start = time.perf_counter()
            self.written(name)
            yield {"model": name, "written in s": round(time.perf_counter() - start, 1)}

    def full(self, model: str) -> tuple[Any, str]:
        """The picture that others are compared with, and its name: in fp32, by the fastest plan."""
        with load(self.written(model), device=self.device, precision="fp32") as pipe:
            return pipe.generate(self.short).images[0], f"fp32 on the {self.device}"

    def capped(
        self, models: Sequence[tuple[str, str]], right: Callable[[str], tuple[Any, str]], most: int = MOST
    ) -> Iterator[Row]:
        """For each (model, precision), the most different plans, each under the smallest cap that it fits.
        Bytes as predicted, as torch counted them and by the card's count; each picture against `right`'s."""
        hardware = Hardware.detect(self.device)
        for name, precision in models:
            spec, picture, reference_name = inspect(self.written(name)), None, ""
            try:
                picture, reference_name = right(name)
            except TightfitError as error:
                yield {"plan": f"{name} to compare with", "failed": str(error)}
            fitting = dict[str, tuple[int, Plan]]()
            for gigabytes in CAPS:
                wishes = Wishes(precision=precision, budget=gigabytes * 10**9)
                for candidate in plan(hardware, spec, self.short, wishes):
                    if candidate.fits:
                        fitting.setdefault(
                            repr((candidate.cfg, candidate.placements)), (gigabytes, candidate)
                        )
            for gigabytes, candidate in differing(list(fitting.values()), most):
                wishes = Wishes(precision=precision, budget=gigabytes * 10**9)
                head: Row = {
                    "plan": f"{name} {candidate.summary()}, {gigabytes} GB",
                    "cap": gigabytes * 10**9,
                }
                row, painted = self.ran(
                    Pipeline(spec, hardware, wishes, candidate), candidate, gigabytes * 10**9
                )
                if painted is None:
                    yield head | row
                    continue
                if picture is None:
                    picture, reference_name = painted, f"the first {precision}"
                yield (
                    head
                    | row
                    | beside([painted], picture, candidate.precision, f"{name} {precision}", reference_name)
                )

    def ran(self, pipeline: Pipeline, candidate: Plan, cap: int) -> tuple[Row, Any]:
        """Bytes and seconds, (predicted, measured) per stage; and the picture, None if there is none."""
        predicted = candidate.predicted
        # Not caught: once a kernel broke the card, it answers nothing more in this process.
        self.card.clear()
        try:
            with self.card.watched() as seen, pipeline as pipe:
                result = pipe.generate(self.short)
        except TightfitError as error:
            return {"failed": str(error)}, None
        except Exception as error:  # a fault of ours that other plans may not have
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {first_line(error)}"}, None
        stages = {name: (predicted.stages[name], result.stages[name].peak_bytes) for name in predicted.stages}
        return {
            "predicted": predicted.peak_bytes,
            "measured": result.peak_bytes,
            "error": predicted.peak_bytes / result.peak_bytes - 1 if result.peak_bytes else 0.0,
            "context": (predicted.context_bytes, seen.outside),
            "used": seen.used,
            "held": seen.used <= cap,
            "stages": stages,
            "seconds": (round(predicted.seconds, 3), round(result.seconds, 3)),
            "notices": result.notices,
        }, result.images[0]

    def few_bits(self) -> Iterator[Row]:
        """8 and 4 bits, and integers: seconds and decibels against 16 bits; tiny models against the CPU;
        under caps."""
        kinds = [("sd1-int8", "int8"), ("sd1-int4", "int4")]
        if "int8" in Hardware.detect(self.device).rates:
            kinds.insert(1, ("sd1-int8", "int8-dynamic"))
        yield from self.speed([("sd1", self.half), *kinds])
        for name, precision in kinds:
            yield from self._beside_cpu(f"tiny-{name}", precision)
        plain = self.full("sd1")
        yield from self.capped(kinds, lambda _: plain, 3)

    def _beside_cpu(self, name: str, precision: str) -> Iterator[Row]:
        """The same codes, computed in fp32 on the CPU: any difference is the device's arithmetic."""
        with load(
            self.written(name), device="cpu", precision=precision.partition("-")[0], compute="fp32"
        ) as pipe:
            right = pipe.generate(self.short).images[0]
        for residency in (
            ("resident",)
            if precision == "int8-dynamic" and not self.card.is_gpu
            else ("resident", "streamed")
        ):
            with load(
                self.written(name),
                device=self.device,
                precision=precision,
                compute=self.half,
                residency=residency,
            ) as pipe:
                painted = [pipe.generate(self.short).images[0] for _ in range(2)]
            floor = precision if precision == "int8-dynamic" else self.half
            yield beside(
                painted,
                right,
                floor,
                f"{name} {residency} {precision} in {self.half}",
                "its codes in fp32 on the CPU",
            )

    def speed(self, contenders: Sequence[Any]) -> Iterator[Row]:
        """Seconds per warm run, the best of two turns of two for each contender, each turn after an untimed
        run; and its picture against the first contender's. A contender is diffusers, set up as its
        documentation makes it fastest, or ours: model, precision, and optionally residency and budget."""
        runs, pictures, plans = dict[str, Callable[[], Any]](), dict[str, Any](), dict[str, Plan | None]()
        self.card.clear()
        with ExitStack() as stack:
            for contender in contenders:
                name = called(contender)
                try:
                    run, plans[name] = self._contender(contender, stack)
                    start = time.perf_counter()
                    pictures[name] = run()
                    runs[name] = run
                except Exception as error:  # whatever diffusers raises; the others still run
                    traceback.print_exc()
                    yield {"pipeline": name, "failed": f"{type(error).__name__}: {first_line(error)}"}
                    self.card.clear()
                    continue
                row: Row = {"pipeline": name, "first run s": round(time.perf_counter() - start, 3)}
                if (first := next(iter(pictures))) != name:
                    chosen = plans[name]
                    row |= beside(
                        [pictures[name]],
                        pictures[first],
                        chosen.precision if chosen else self.half,
                        name,
                        first,
                    )
                yield row
            best = dict.fromkeys(runs, float("inf"))
            for name, run in [*runs.items()] * 2:
                run()
                for _ in range(2):
                    start = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - start)
        for name, seconds in best.items():
            first = next(iter(best))
            prediction = (
                {"predicted s": round(chosen.predicted.seconds, 3)} if (chosen := plans[name]) else {}
            )
            yield {
                "pipeline": name,
                "seconds": round(seconds, 3),
                **prediction,
                "times": round(seconds / best[first], 3),
                "of": first,
            }

    def _contender(self, contender: Any, stack: ExitStack) -> tuple[Callable[[], Any], Plan | None]:
        """What paints, and its plan if it is ours."""
        if isinstance(contender, str):
            return partial(
                diffusers_best(self.written("sd1"), self.device, "compiled" in contender), self.request
            ), None
        name, precision, *how_placed = contender
        how: dict[str, Any] = dict(
            zip(("residency", "budget"), how_placed or ["resident"], strict=False), precision=precision
        )
        pipe = stack.enter_context(load(self.written(name), device=self.device, **how))
        return lambda: pipe.generate(self.request).images[0], pipe.plans(self.request)[0]

    def tests(self) -> Iterator[Row]:
        """The tests marked gpu; other files are not collected, because importing them takes time."""
        root = Path(__file__).parents[1] / "tests"
        files = [
            str(file)
            for file in sorted(root.rglob("test_*.py"))
            if "mark.gpu" in file.read_text(encoding="utf-8")
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rf",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
            *files,
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(done.stdout, flush=True)
        counts = {
            outcome: int(count)
            for count, outcome in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)
        }
        for name, why in re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", done.stdout, re.M):
            yield {"test": Path(name).name, "failed": why or "see the log"}
        yield {"tests": "those marked gpu", **counts}
        if done.returncode and "failed" not in counts and "errors" not in counts:
            raise RuntimeError(
                f"pytest ended with {done.returncode}: "
                f"{(done.stdout.strip() or 'it said nothing').splitlines()[-1]}"
            )

    def kernels(self) -> Iterator[Row]:
        """The ten kernels (on a CPU: operators) that take most of a picture's time, with their shares; then
        single layers."""
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.card.is_gpu else ProfilerActivity.CPU
        with load(self.written("sd1"), device=self.device, residency="resident", precision=self.half) as pipe:
            pipe.generate(self.short)
            with profile(activities=[activity]) as seen:
                pipe.generate(self.short)
        field = "self_device_time_total" if self.card.is_gpu else "self_cpu_time_total"
        kernels = sorted(
            ((getattr(kernel, field), kernel.key) for kernel in seen.key_averages()), reverse=True
        )
        total = sum(took for took, _ in kernels) or 1
        yield from ({"takes time": name[:60], "share": round(took / total, 3)} for took, name in kernels[:10])
        yield from layers.rows(self.device, layers.SHAPES[-1:] if self.tiny else layers.SHAPES)

    def fast(self, path: str) -> Iterator[Row]:
        """One of gpu_fast.py's paths of the U-Net, resident in 16 bits; on a CPU in fp32, as torch's compiler
        takes no weights that are packed for oneDNN."""
        spec, hardware = inspect(self.written("sd1")), Hardware.detect(self.device)
        backend, unet = TorchBackend(self.device), spec.denoiser
        kind = self.half if self.card.is_gpu else "fp32"
        placement = Placement("torch", kind, kind, "resident", "sdpa", "whole")
        size = spec.native_size[0]
        session, arrays = backend.load(unet, placement), noise(spec, 2, size)
        if path == "graphs":
            how = replace(placement, captured=True)
            if why := backend.refuses(spec, unet, how, hardware, Extent(2, size, size)):
                yield {"pipeline": "CUDA graph", "skipped": why}
                return
            graph_bytes = backend.footprint(spec, unet, how, hardware, Extent(2, size, size)).kept
            yield from gpu_fast.graphs(self.card, session, backend.load(unet, how), arrays, graph_bytes)
        elif path == "layouts":
            yield from gpu_fast.layouts(self.card, session, arrays)
        elif path == "overlap":
            streamed = backend.load(unet, replace(placement, residency="streamed"))
            moved_bytes = session.dtype.itemsize * sum(tensor.count for tensor in unet.tensors.values())
            yield from gpu_fast.overlap(self.card, session, streamed, arrays, moved_bytes)
        else:
            how = replace(placement, compiled=True)
            if why := backend.refuses(spec, unet, how, hardware, Extent(2, size, size)):
                yield {"pipeline": "blocks compiled", "skipped": why}
                return
            kinds = backend.footprint(spec, unet, how, hardware, Extent(2, size, size)).trace.kinds
            seconds = compiling_seconds(hardware.device, kinds)
            yield from gpu_fast.compiled(self.card, session, backend.load(unet, how), arrays, seconds)

    def onnx(self) -> Iterator[Row]:
        """ONNX Runtime, if it has a provider for this device."""
        if self.card.is_gpu and all(
            provider == CPU_PROVIDER for provider in Hardware.detect(self.device).onnx_providers()
        ):
            yield {"skipped": "onnxruntime has no provider for this device: onnxruntime-gpu is not here"}
            return
        yield from self.speed([("sd1", self.half), ("sd1-onnx", "auto")])
        plain = self.full("sd1")
        yield from self.capped([("sd1-onnx", "auto")], lambda _: plain, 3)


def called(contender: Any) -> str:
    """sd1 fp16, sd1-int8, sd1 fp16 streamed."""
    if isinstance(contender, str):
        return contender
    model, precision, *how_placed = contender
    return " ".join([model, *([] if model.endswith(f"-{precision}") else [precision]), *how_placed[:1]])


def differing(plans: Sequence[tuple[int, Plan]], most: int) -> list[tuple[int, Plan]]:
    """`most` of the (cap, plan) pairs, greedily chosen to cover as many pairs of choices as possible."""
    pairs = []
    for cap, candidate in plans:
        unet, vae = candidate.denoiser, candidate.decoder
        choices = (
            cap,
            unet.residency,
            unet.kept_bytes > 0,
            unet.attention,
            unet.compute,
            vae.tiling,
            vae.residency,
            candidate.cfg,
        )
        pairs.append(set(combinations(enumerate(choices), 2)))
    chosen, seen = list[int](), set[Any]()
    while len(chosen) < min(most, len(plans)):
        best = max((i for i in range(len(plans)) if i not in chosen), key=lambda i: len(pairs[i] - seen))
        chosen.append(best)
        seen |= pairs[best]
    return [plans[i] for i in chosen]


def diffusers_best(model: str, device: str, compiled: bool) -> Callable[[Request], Any]:
    """diffusers as its documentation makes it fastest: channels last, SDPA (its default), fused projections,
    and optionally a compiled U-Net (in torch.compile's default mode: max-autotune takes minutes)."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.fuse_qkv_projections()
    pipeline.unet.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, fullgraph=True)

    def paint(request: Request) -> Any:
        generator = torch.Generator("cpu").manual_seed(request.seed or 0)
        steps, scale = request.num_inference_steps, request.guidance_scale
        return pipeline(
            request.prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator
        ).images[0]

    return paint
