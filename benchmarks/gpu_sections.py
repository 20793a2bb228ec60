"""What gpu_check runs, a section at a time, each in a process of its own: gpu_check.py says which, and
gpu_report.py what is wrong.

Rows name what ran (plan, pipeline, kernel, picture, doubt) and have figures by these names: `predicted` and
`measured` bytes, `error` of the prediction, `used` bytes of the card under a `cap` and whether that `held`,
`decibels` beside another picture and the `floor` below which they are wrong, `failed` and why.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch

from .. import Hardware, Pipeline, Plan, Request, TightfitError, Wishes, inspect, load, plan
from ..export import random_model
from ..runtime.errors import first_line
from ..runtime.machine.providers import CPU_PROVIDER
from . import gpu_probe, layers
from .gpu_card import Card
from .gpu_probe import beside

CAPS = (2, 4, 6, 8)  # decimal gigabytes, as cards are sold
MOST = 8  # plans that are run of one model
Row = dict[str, Any]


class Check:
    """What sections share: models in `folder`, written when they are first wanted, the device and what to
    paint.

    A model is named FAMILY or FAMILY-PRECISION, as sd1-int4, after `tiny-` if it is to be tiny, as all are if
    `tiny`.
    """

    def __init__(self, folder: Path, device: str, tiny: bool, steps: int) -> None:
        self.folder, self.device, self.tiny = folder, device, tiny
        self.card = Card(device)
        self.half = "fp16" if self.card.is_gpu else "bf16"
        # diffusers' own scale, so that its pictures are the same
        self.request = Request(
            "a red heart", seed=0, num_inference_steps=steps, scheduler="euler", guidance_scale=7.5
        )
        # two steps take as much memory as any number
        self.short = Request(
            "a red heart", seed=0, num_inference_steps=2, scheduler="euler", guidance_scale=7.5
        )

    def sections(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """By name; the order of gpu_check is its own."""
        compiled = ["diffusers", "diffusers, U-Net compiled", ("sd1", self.half)]
        streamed = ("sd1", self.half, "streamed", "1500MB")  # alone, as torch's cap is the whole process's
        return {
            "probe": lambda: gpu_probe.rows(self.device),
            f"{self.half} under caps": lambda: self.capped([("sd1", self.half)], self.full),
            "speed": lambda: chain(self.speed(["diffusers", ("sd1", self.half)]), self.speed([streamed])),
            "few bits": self.few_bits,
            "GPU tests": self.tests,
            "kernels and layers": self.kernels,
            "SDXL": lambda: self.capped([("sdxl", self.half)], self.full, 4),
            "compiled": lambda: self.speed(compiled),
            "ONNX Runtime": self.onnx,
        }

    def written(self, name: str) -> str:
        """The folder of a model of random weights in fp16, or of it exported."""
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
        """The picture that others are held against, and its name: in fp32, by whatever plan is the
        fastest."""
        with load(self.written(model), device=self.device, precision="fp32") as pipe:
            return pipe.generate(self.short).images[0], f"fp32 on the {self.device}"

    def capped(
        self, models: Sequence[tuple[str, str]], right: Callable[[str], tuple[Any, str]], most: int = MOST
    ) -> Iterator[Row]:
        """For each (model, precision) the plans that differ most, under the least cap that each fits: bytes
        as predicted, as torch counted them and as the card says; and each picture beside `right`'s."""
        hardware = Hardware.detect(self.device)
        for name, precision in models:
            spec, picture, what = inspect(self.written(name)), None, ""
            try:
                picture, what = right(name)
            except TightfitError as error:
                yield {"plan": f"{name} to compare with", "failed": str(error)}
            fitting = dict[str, tuple[int, Plan]]()
            for gigabytes in CAPS:
                wishes = Wishes(precision=precision, budget=gigabytes * 10**9)
                for one in plan(hardware, spec, self.short, wishes):
                    if one.fits:
                        fitting.setdefault(repr((one.cfg, one.placements)), (gigabytes, one))
            for gigabytes, one in differing(list(fitting.values()), most):
                wishes = Wishes(precision=precision, budget=gigabytes * 10**9)
                head: Row = {"plan": f"{name} {one.summary()}, {gigabytes} GB", "cap": gigabytes * 10**9}
                row, painted = self.ran(Pipeline(spec, hardware, wishes, one), one, gigabytes * 10**9)
                if painted is None:
                    yield head | row
                    continue
                if picture is None:
                    picture, what = painted, f"the first {precision}"
                yield head | row | beside([painted], picture, one.precision, f"{name} {precision}", what)

    def ran(self, pipeline: Pipeline, one: Plan, cap: int) -> tuple[Row, Any]:
        """Bytes and seconds, predicted and measured, those of each stage in pairs; and the picture, None if
        there is none."""
        told = one.predicted
        # Outside of what is caught: a card that a kernel broke answers nothing more in this process.
        self.card.clear()
        try:
            with self.card.watched() as seen, pipeline as pipe:
                result = pipe.generate(self.short)
        except TightfitError as error:
            return {"failed": str(error)}, None
        except Exception as error:  # a fault of ours, which the other plans may not have
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {first_line(error)}"}, None
        stages = {name: (told.stages[name], result.stages[name].peak_bytes) for name in told.stages}
        return {
            "predicted": told.peak_bytes,
            "measured": result.peak_bytes,
            "error": told.peak_bytes / result.peak_bytes - 1 if result.peak_bytes else 0.0,
            "context": (told.context_bytes, seen.outside),
            "used": seen.used,
            "held": seen.used <= cap,
            "stages": stages,
            "seconds": (round(told.seconds, 3), round(result.seconds, 3)),
            "notices": result.notices,
        }, result.images[0]

    def few_bits(self) -> Iterator[Row]:
        """8 and 4 bits, and whole numbers: seconds and decibels beside 16 bits; tiny ones beside the CPU's;
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
        """The same codes, computing in fp32 on the CPU: what is left is what the device computes
        otherwise."""
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
        """Seconds of a warm run, each contender's best of two turns of two, a run before each turn not
        counted, and its picture beside the first one's. A contender is diffusers, as its documentation makes
        it fastest, or ours: model, precision, and unless it is resident, residency and budget."""
        runs, pictures, plans = dict[str, Callable[[], Any]](), dict[str, Any](), dict[str, Plan | None]()
        self.card.clear()
        with ExitStack() as stack:
            for each in contenders:
                name = called(each)
                try:
                    run, plans[name] = self._contender(each, stack)
                    start = time.perf_counter()
                    pictures[name] = run()
                    runs[name] = run
                except Exception as error:  # whatever diffusers raises; the others are still worth their time
                    traceback.print_exc()
                    yield {"pipeline": name, "failed": f"{type(error).__name__}: {first_line(error)}"}
                    self.card.clear()
                    continue
                row: Row = {"pipeline": name, "first run s": round(time.perf_counter() - start, 3)}
                if (first := next(iter(pictures))) != name:
                    own = plans[name]
                    row |= beside(
                        [pictures[name]], pictures[first], own.precision if own else self.half, name, first
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
            told = {"predicted s": round(own.predicted.seconds, 3)} if (own := plans[name]) else {}
            yield {
                "pipeline": name,
                "seconds": round(seconds, 3),
                **told,
                "times": round(seconds / best[first], 3),
                "of": first,
            }

    def _contender(self, each: Any, stack: ExitStack) -> tuple[Callable[[], Any], Plan | None]:
        """What paints, and by which plan, if it is ours."""
        if isinstance(each, str):
            return partial(
                diffusers_best(self.written("sd1"), self.device, "compiled" in each), self.request
            ), None
        name, precision, *rest = each
        how: dict[str, Any] = dict(
            zip(("residency", "budget"), rest or ["resident"], strict=False), precision=precision
        )
        pipe = stack.enter_context(load(self.written(name), device=self.device, **how))
        return lambda: pipe.generate(self.request).images[0], pipe.plans(self.request)[0]

    def tests(self) -> Iterator[Row]:
        """The tests that need a GPU, and no other file: whatever else they import takes time."""
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
            what: int(count)
            for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)
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
        """The ten kernels (on a CPU: operators) that take the most time of a picture, and their shares; then
        single layers."""
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.card.is_gpu else ProfilerActivity.CPU
        with load(self.written("sd1"), device=self.device, residency="resident", precision=self.half) as pipe:
            pipe.generate(self.short)
            with profile(activities=[activity]) as seen:
                pipe.generate(self.short)
        field = "self_device_time_total" if self.card.is_gpu else "self_cpu_time_total"
        found = sorted(((getattr(each, field), each.key) for each in seen.key_averages()), reverse=True)
        total = sum(took for took, _ in found) or 1
        yield from ({"takes time": name[:60], "share": round(took / total, 3)} for took, name in found[:10])
        yield from layers.rows(self.device, layers.SHAPES[-1:] if self.tiny else layers.SHAPES)

    def onnx(self) -> Iterator[Row]:
        """On ONNX Runtime, if it computes on this device."""
        if self.card.is_gpu and all(
            each == CPU_PROVIDER for each in Hardware.detect(self.device).onnx_providers()
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
    model, precision, *rest = contender
    return " ".join([model, *([] if model.endswith(f"-{precision}") else [precision]), *rest[:1]])


def differing(plans: Sequence[tuple[int, Plan]], most: int) -> list[tuple[int, Plan]]:
    """So many of the (cap, plan) that as many pairs of choices as can be are among them, each the one that
    adds the most."""
    pairs = []
    for cap, one in plans:
        unet, vae = one.placements["unet"], one.placements["vae_decoder"]
        choices = (
            cap,
            unet.residency,
            unet.kept_bytes > 0,
            unet.attention,
            unet.compute,
            vae.tiling,
            vae.residency,
            one.cfg,
        )
        pairs.append(set(combinations(enumerate(choices), 2)))
    chosen, seen = list[int](), set[Any]()
    while len(chosen) < min(most, len(plans)):
        best = max((i for i in range(len(plans)) if i not in chosen), key=lambda i: len(pairs[i] - seen))
        chosen.append(best)
        seen |= pairs[best]
    return [plans[i] for i in chosen]


def diffusers_best(model: str, device: str, compiled: bool) -> Callable[[Request], Any]:
    """diffusers as its documentation makes it fastest: channels last, SDPA (its default), projections fused,
    its U-Net compiled if so (in torch.compile's own mode: max-autotune tries for minutes)."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    theirs: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.fuse_qkv_projections()
    theirs.unet.to(memory_format=torch.channels_last)
    if compiled:
        theirs.unet = torch.compile(theirs.unet, fullgraph=True)

    def paint(request: Request) -> Any:
        generator = torch.Generator("cpu").manual_seed(request.seed or 0)
        steps, scale = request.num_inference_steps, request.guidance_scale
        return theirs(
            request.prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator
        ).images[0]

    return paint
