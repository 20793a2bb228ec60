"""ONNX: what exporting and running takes beside Optimum, and what was predicted of running beside what it took.

    python -m tightfit.benchmarks.onnx peers sd15 WORK --optimum VENV/bin/python
    python -m tightfit.benchmarks.onnx predicted WORK/fp32:256 WORK/int4:512 …
    python -m tightfit.benchmarks.onnx pictures WORK emoji:128x128 emoji:160x96 tiny_sd2:128x64 …

`peers` exports the diffusers folder to WORK (what is there already is not exported again) and paints one picture with each: ours,
Optimum's own folder, that folder in tightfit, and ours in Optimum. VENV has optimum-onnx 0.1.0, diffusers 0.36.0, transformers
4.57.5 and onnxruntime 1.31.1. Each runs in a process of its own, which tells its largest resident bytes at its end. `pictures`
exports each model in each precision and compares what ONNX Runtime paints with what torch paints from the same values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from .. import load
from ..runtime.memory import shown
from ..runtime.plan import CFG
from .metrics import psnr
from .record import record

_COMMAND = "from tightfit.runtime.cli import main; main()"
KINDS = ("fp32", "fp16", "int8", "int4")
# Whatever is run, its peak and its seconds are printed last.
_PEAK = """
import re, sys, time, json
start = time.perf_counter()
try:
    {program}
finally:
    text = open("/proc/self/status").read()
    figures = {{"peak_bytes": int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024, "seconds": time.perf_counter() - start}}
    print(json.dumps(figures | globals().get("more", {{}})))
"""
_TIGHTFIT = """
    sys.argv = ["tightfit", *{arguments!r}]
    from tightfit.runtime.cli import main
    main()
"""
_OPTIMUM_EXPORT = """
    sys.argv = ["optimum-cli", "export", "onnx", "--model", {model!r}, "--task", "text-to-image", {folder!r}]
    from optimum.commands.optimum_cli import main
    main()
"""
_OPTIMUM = """
    import torch
    from diffusers import EulerDiscreteScheduler
    from optimum.onnxruntime import ORTDiffusionPipeline
    pipe = ORTDiffusionPipeline.from_pretrained({folder!r})
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    steps, run = [], pipe.unet.forward
    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = run(*args, **kwargs)
        steps.append(time.perf_counter() - began)
        return out
    pipe.unet.forward = timed
    image = pipe("a red heart", num_inference_steps={steps}, height={size}, width={size}, guidance_scale=5.0,
                 generator=torch.Generator().manual_seed(0)).images[0]
    image.save({picture!r})
    more = {{"step_seconds": min(steps)}}
"""


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parse.add_subparsers(dest="kind", required=True)
    peer = kinds.add_parser("peers")
    peer.add_argument("model", type=Path)
    peer.add_argument("work", type=Path)
    peer.add_argument("--optimum", metavar="PYTHON", help="the interpreter of Optimum's environment")
    peer.add_argument("--size", type=int, default=512)
    peer.add_argument("--steps", type=int, default=3)
    each = kinds.add_parser("predicted")
    each.add_argument("models", nargs="+", metavar="FOLDER:SIZE")
    painted = kinds.add_parser("pictures")
    painted.add_argument("work", type=Path)
    painted.add_argument("models", nargs="+", metavar="MODEL:WIDTHxHEIGHT")
    args = parse.parse_args()
    rows = {"peers": peers, "predicted": predicted, "pictures": pictures}[args.kind](args)
    record("onnx", {"kind": args.kind, "rows": list(rows)})


def child(program: str, python: str = sys.executable) -> dict[str, Any]:
    done = subprocess.run([python, "-c", _PEAK.format(program=program.strip())], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def export(model: str, kind: str, folder: Path) -> dict[str, Any]:
    arguments = ["export", model, "--to", "onnx", "--precision", kind, "-o", str(folder)]
    return child(_TIGHTFIT.format(arguments=arguments + (["--compute", "fp32"] if kind.startswith("int") else [])))


def peers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    args.work.mkdir(exist_ok=True)
    source, folders = str(args.model.absolute()), {kind: args.work.absolute() / kind for kind in KINDS}
    for kind, folder in folders.items():
        if not folder.exists():
            yield told({"what": f"tightfit exports {kind}", **export(source, kind, folder)})
    optimums = args.work.absolute() / "optimum"
    if args.optimum and not optimums.exists():
        program = _OPTIMUM_EXPORT.format(model=source, folder=str(optimums))
        yield told({"what": "Optimum exports fp32", **child(program, args.optimum)})
    painted: dict[str, Path] = {}

    def ours(what: str, model: str, *more: str) -> dict[str, Any]:
        painted[what] = args.work / f"{what.replace(' ', '-')}.png"
        options = ["--model", model, "--steps", str(args.steps), "--width", str(args.size), "--height", str(args.size)]
        options += ["--scheduler", "euler", "--guidance-scale", "5", "--seed", "0", "--device", "cpu", *more]
        begun = time.perf_counter()
        command = [sys.executable, "-c", _COMMAND, "a red heart", *options, "--json", "-o", str(painted[what])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        details, plan = report["measured"]["details"], report["plan"]
        calls = args.steps * (2 if plan["cfg"] == "sequential" else 1)
        step = (details["denoise"]["seconds"] - details["denoise"]["load_seconds"]) / args.steps
        return {"what": what, "peak_bytes": report["measured"]["process_bytes"], "seconds": time.perf_counter() - begun,
                "step_seconds": step, "cfg": plan["cfg"], "calls": calls}  # fmt: skip

    def theirs(what: str, folder: Path) -> dict[str, Any]:
        painted[what] = args.work / f"{what.replace(' ', '-')}.png"
        figures = {"folder": str(folder), "steps": args.steps, "size": args.size, "picture": str(painted[what])}
        return {"what": what, **child(_OPTIMUM.format(**figures), args.optimum)}

    yield told(ours("torch fp32", source, "--precision", "fp32"))
    for kind, folder in folders.items():
        yield told(ours(f"tightfit {kind}", str(folder)))
    yield told(ours("tightfit fp32 sequential", str(folders["fp32"]), "--ram", "4.5GB"))
    if args.optimum:
        yield told(theirs("Optimum", optimums))
        yield told(ours("Optimum's folder in tightfit", str(optimums)))
        for kind in ("fp32", "fp16"):
            yield told(theirs(f"our {kind} in Optimum", folders[kind]))
    for kind in ("int8", "int4"):
        yield told(ours(f"torch {kind}", source, "--precision", kind, "--compute", "fp32"))
    for what in painted:
        other = f"torch {what.split()[1]}" if what in ("tightfit int8", "tightfit int4") else "torch fp32"
        if what == "Optimum's folder in tightfit":
            other = "Optimum"  # whose folder has the scheduler's defaults written out, among them other timesteps for Euler
        yield told({"what": f"{what} beside {other}", "psnr": psnr(Image.open(painted[what]), Image.open(painted[other]))})


def told(row: dict[str, Any]) -> dict[str, Any]:
    words = [shown(row["peak_bytes"])] if "peak_bytes" in row else []
    words += [f"{row['seconds']:.1f} s"] if "seconds" in row else []
    words += [f"{row['step_seconds']:.2f} s a step"] if "step_seconds" in row else []
    words += [f"{row['psnr']:.1f} dB"] if "psnr" in row else []
    words += [row["cfg"]] if "cfg" in row else []
    print(f"{row['what']:<36}", ", ".join(words) or row, flush=True)
    return row


_ONE = """
    import tightfit
    from tightfit.runtime.memory import shown
    with tightfit.load({folder!r}, device="cpu", residency={residency!r}, cfg={cfg!r}, requests=1) as pipe:
        request = dict(num_inference_steps=1, width={size}, height={size}, seed=0, guidance_scale=5.0, scheduler="euler")
        result = pipe.generate(tightfit.Request("a red heart", **request))
    stages = {{name: stage.peak_bytes for name, stage in result.stages.items() if name != "prepare"}}
    predicted = result.plan.predicted
    more = {{"measured": stages, "predicted": dict(predicted.stages), "process_bytes": result.process_bytes,
             "predicted_seconds": predicted.seconds, "run_seconds": result.seconds}}
"""


def pictures(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same seed on both engines; torch in fp32 with weights in fp32, or as they were quantised."""
    args.work.mkdir(exist_ok=True)
    for text, kind in product(args.models, KINDS):
        model, _, size = text.rpartition(":")
        width, height = map(int, size.split("x"))
        folder = args.work.absolute() / f"{Path(model).name}-{kind}"
        if not folder.exists():
            export(model, kind, folder)
        own: dict[str, Any] = {"precision": kind, "compute": "fp32"} if kind.startswith("int") else {"precision": "fp32"}
        with load(model, device="cpu", **own) as torchs, load(str(folder), device="cpu") as ours:
            for scheduler in ("ddim", "euler", "dpmpp_2m_karras"):
                request = {"seed": 0, "num_inference_steps": 8, "scheduler": scheduler, "width": width, "height": height}
                found = psnr(ours("a red heart", **request), torchs("a red heart", **request))
                yield told({"what": f"{text} {kind} {scheduler}", "psnr": found})


def predicted(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each way to run each model at each size; the largest stage is what a plan is held to."""
    errors = []
    for model, residency, cfg in product(args.models, ("staged", "resident"), CFG):
        folder, _, size = model.rpartition(":")
        row = child(_ONE.format(folder=folder, residency=residency, cfg=cfg, size=int(size)))
        told_peak, took = max(row["predicted"].values()), max(row["measured"].values())
        errors.append(told_peak / took - 1)
        print(model, residency, cfg, shown(told_peak), shown(took), f"{errors[-1]:+.1%}", flush=True)
        yield {"what": f"{model} {residency} {cfg}", "error": errors[-1], **row}
    sizes = sorted(map(abs, errors))
    print(f"{len(sizes)} plans: median {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")
    yield {"what": "summary", "plans": len(sizes), "median_error": statistics.median(sizes), "worst_error": sizes[-1]}


if __name__ == "__main__":
    main()
