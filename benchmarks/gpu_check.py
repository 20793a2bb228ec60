"""Everything only a GPU can tell, in one command of under nine minutes:

    pip install --no-deps --no-build-isolation -e . && python -m tightfit.benchmarks.gpu_check

In sections, the most wanted first, each with a time after which it is left: the GPU tests; plans of a full-size random SD 1.5 in
fp16, each once, with the allocator capped at the least of 2, 4, 6 and 8 GB that it fits, predicted beside measured; our fp16 beside
diffusers' best in the same process; the kernels that take the most time; single layers (layers.py); the same of 8 and 4 bits, and
of ONNX Runtime if it has a provider for the device; a full-size random SDXL; diffusers with its U-Net compiled. Each section is a
line of gpu_check.jsonl under $OUT, else in benchmarks/results, as soon as it is done; one that fails says so, and the next begins.
`--tiny --device cpu` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .. import Hardware, Pipeline, Plan, Request, TightfitError, Wishes, inspect, load, plan
from ..export import random_model
from ..runtime.errors import first_line
from ..runtime.hardware import CPU_PROVIDER
from . import layers
from .record import envelope, record

CAPS = (2, 4, 6, 8)  # decimal gigabytes, as cards are sold
Row = dict[str, Any]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--tiny", action="store_true", help="tiny models, to rehearse this script")
    parse.add_argument("--steps", type=int, default=10)
    args = parse.parse_args()
    envelope("")  # what every line needs, before anything takes time
    request = Request("a red heart", seed=0, num_inference_steps=args.steps, scheduler="euler")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), args.device, args.tiny, request)
        sections: dict[str, tuple[float, Callable[[], Iterator[Row]]]] = {
            "tests": (100, check.tests),
            "fp16 under caps": (110, lambda: check.capped(check.plain(), check.half)),
            "speed": (50, lambda: check.speed(check.plain(), ["diffusers", check.half])),
            "kernels": (20, check.kernels),
            "layers": (30, lambda: iter(layers.rows(args.device, layers.SHAPES[-1:] if args.tiny else layers.SHAPES))),
            "few bits": (110, check.quantised),
            "ONNX Runtime": (60, check.onnx),
            "SDXL": (70, lambda: check.capped(check.written("sdxl"), check.half, every=False)),
            "compiled": (90, lambda: check.speed(check.plain(), ["diffusers", "diffusers, U-Net compiled", check.half])),
        }
        begun, failed, lines = time.perf_counter(), 0, list[str]()
        for name, (seconds, section) in sections.items():
            rows = list(within(seconds, section, begun))
            failed += any("failed" in row for row in rows)
            record("gpu_check", {"section": name, "rows": rows})
            lines += [f"{name}: {line}" for line in summary(rows)]
            print(f"{time.perf_counter() - begun:.0f} s: {name}", flush=True)
    print(*lines, sep="\n")
    sys.exit(1 if failed else 0)


LIMIT = 540  # seconds; no section is begun that might end later


def within(seconds: float, section: Callable[[], Iterator[Row]], begun: float) -> Iterator[Row]:
    """The rows of a section until its time is over; what it raises is a row, and goes to standard error."""
    start = time.perf_counter()
    if start - begun + seconds > LIMIT:
        yield {"left": "for want of time"}
        return
    try:
        for row in section():
            yield row
            if time.perf_counter() - start > seconds:
                yield {"left": f"after {time.perf_counter() - start:.0f} s"}
                return
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {first_line(error)}"}


def summary(rows: list[Row]) -> list[str]:
    """What fits on one screen: plans under a cap in a line for each model, with the worst of them; the rest as it is."""
    lines = []
    for (cap, model), group in groupby((row for row in rows if "cap" in row), key=lambda row: (row["cap"], row["model"])):
        own = list(group)
        ran = [row for row in own if "error" in row]
        worst = max((row["error"] for row in ran), key=abs, default=0.0)
        over = sum(not row["held"] for row in ran)
        count = f"{len(ran)} plans ran, {len(own) - len(ran)} failed"
        lines.append(f"{cap} {model}: {count}, {over} above the cap, worst prediction {worst:+.1%}")
        lines += [f"{row['plan']}: {row['failed']}" for row in own if "failed" in row]
    rest = [row for row in rows if "cap" not in row]
    return lines + ["  ".join(f"{name} {value}" for name, value in row.items()) for row in rest]


class Check:
    """What sections share: models written into `folder` when they are first wanted, the device and what to paint."""

    def __init__(self, folder: Path, device: str, tiny: bool, request: Request) -> None:
        self.folder, self.device, self.tiny, self.request = folder, device, tiny, request
        self.half = "fp16" if device == "cuda" else "bf16"

    def plain(self) -> str:
        return self.written("sd1")

    def written(self, family: str) -> str:
        """A model of random weights in fp16."""
        model = self.folder / family
        if not model.exists():
            random_model.write(family, model, tiny=self.tiny, precision="fp16")
        return str(model)

    def exported(self, *options: str) -> str:
        model = self.folder / "-".join(options)
        if not model.exists():
            command = [sys.executable, "-m", "tightfit", "export", self.plain(), "--precision", *options, "-o", str(model)]
            subprocess.run(command, check=True)
        return str(model)

    def tests(self) -> Iterator[Row]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parents[1] / "tests")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=300)
        print(done.stdout, flush=True)
        counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
        what = {"failed": "the GPU tests"} if done.returncode else {}
        yield {name: counts.get(name, 0) for name in ("passed", "skipped")} | {"exit code": done.returncode} | what

    def capped(self, model: str, precision: str, every: bool = True) -> Iterator[Row]:
        """Each plan that fits some cap, under the least of them; if not every, under each cap the fastest of each residency."""
        hardware, spec, seen = Hardware.detect(self.device), inspect(model), set[str]()
        for gigabytes in CAPS:
            wishes = Wishes(precision=precision, budget=int(gigabytes * 1e9))
            fitting = [each for each in plan(hardware, spec, self._short(), wishes) if each.fits]
            if not every:
                fitting = list({p.placements["unet"].residency: p for p in reversed(fitting)}.values())
            for one in (one for one in fitting if one.summary() not in seen):
                seen.add(one.summary())
                head: Row = {"cap": f"{gigabytes} GB", "model": f"{Path(model).name} {precision}", "plan": one.summary()}
                yield head | self._ran(Pipeline(spec, hardware, wishes, one), one, gigabytes * 10**9)

    def _short(self) -> Request:
        """Two steps take as much memory as any number."""
        return Request(self.request.prompt, seed=0, num_inference_steps=2, scheduler="euler")

    def _ran(self, pipeline: Pipeline, one: Plan, cap: int) -> Row:
        """Predicted and measured bytes and seconds; bytes of each stage in pairs."""
        told = one.predicted
        try:
            with pipeline as pipe:
                result = pipe.generate(self._short())
        except TightfitError as error:
            return {"predicted": told.peak_bytes, "failed": str(error)}
        took = result.peak_bytes
        return {
            "predicted": told.peak_bytes,
            "measured": took,
            "error": told.peak_bytes / took - 1 if took else 0.0,
            "held": took + told.context_bytes <= cap,
            "stages": {name: (told.stages[name], result.stages[name].peak_bytes) for name in told.stages},
            "seconds": (round(told.seconds, 3), round(result.seconds, 3)),
            "notices": result.notices,
        }

    def quantised(self) -> Iterator[Row]:
        """In 8 and 4 bits: under caps, and beside fp16."""
        int8, int4 = self.exported("int8"), self.exported("int4")
        kinds = [(int8, "int8"), (int4, "int4")]
        if "int8" in Hardware.detect(self.device).rates:
            kinds.append((int8, "int8-dynamic"))
        yield from self.speed(self.plain(), [self.half, *kinds])
        for model, precision in kinds:
            yield from self.capped(model, precision, every=False)

    def onnx(self) -> Iterator[Row]:
        """On ONNX Runtime, if it computes on this device."""
        if self.device != "cpu" and all(each == CPU_PROVIDER for each in Hardware.detect(self.device).onnx_providers()):
            yield {"left": "onnxruntime has no provider for this device: onnxruntime-gpu is not here"}
            return
        graph = self.exported("fp16", "--to", "onnx")
        yield from self.speed(self.plain(), [self.half, (graph, "auto")])
        yield from self.capped(graph, "auto", every=False)

    def speed(self, model: str, names: list[Any]) -> Iterator[Row]:
        """Seconds of a warm run, each contender's best of two turns of two, a run before each turn not counted: diffusers as its
        documentation makes it fastest, and ours in a precision, or (model, precision)."""
        best: dict[str, float] = {}
        with ExitStack() as stack:
            runs: dict[str, Callable[[], Any]] = {}
            for name in names:
                if str(name).startswith("diffusers"):
                    runs[name] = partial(diffusers_best(model, self.device, "compiled" in name), self.request)
                    continue
                own, precision = (model, name) if isinstance(name, str) else name
                pipe = stack.enter_context(load(own, device=self.device, residency="resident", precision=precision))
                runs[f"{Path(own).name} {precision}"] = partial(pipe.generate, self.request)
            for _ in range(2):
                for name, run in runs.items():
                    run()
                    for _ in range(2):
                        start = time.perf_counter()
                        run()
                        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        first = next(iter(best))
        for name, seconds in best.items():
            yield {"pipeline": name, "seconds": round(seconds, 3), f"of {first}": round(seconds / best[first], 3)}

    def kernels(self) -> Iterator[Row]:
        """The ten kernels (on a CPU: operators) that take the most time of a picture, and their shares."""
        from torch.profiler import ProfilerActivity, profile

        gpu = self.device == "cuda"
        with load(self.plain(), device=self.device, residency="resident", precision=self.half) as pipe:
            pipe.generate(self._short())
            with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
                pipe.generate(self._short())
        field = "self_device_time_total" if gpu else "self_cpu_time_total"
        found = sorted(((getattr(each, field), each.key) for each in seen.key_averages()), reverse=True)
        total = sum(time for time, _ in found) or 1
        yield from ({"kernel": name[:60], "share": f"{time / total:.1%}"} for time, name in found[:10])


def diffusers_best(model: str, device: str, compiled: bool) -> Callable[[Request], Any]:
    """diffusers as its documentation makes it fastest: channels last, SDPA (its default), projections fused, its U-Net compiled if
    so (in torch.compile's own mode: max-autotune tries for minutes)."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    theirs: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.fuse_qkv_projections()
    theirs.unet.to(memory_format=torch.channels_last)
    if compiled:
        theirs.unet = torch.compile(theirs.unet, fullgraph=True)
    return lambda request: theirs(request.prompt, num_inference_steps=request.num_inference_steps)


if __name__ == "__main__":
    main()
