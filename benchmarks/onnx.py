"""ONNX: predicted against measured memory, and ONNX Runtime's pictures against torch's.

    python -m tightfit.benchmarks.onnx predicted WORK/fp32:256 WORK/int4:512 …
    python -m tightfit.benchmarks.onnx predicted WORK/fp32:512 --backend openvino
    python -m tightfit.benchmarks.onnx pictures WORK emoji:128x128 emoji:160x96 tiny_sd2:128x64 …

`predicted` runs each plan of folders written by `tightfit export --to onnx`, each in its own process.
`pictures` exports each model to WORK in each precision and compares with torch's pictures from the same
weights. For Optimum see benchmarks/peers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from .. import Request, load
from ..runtime.placement import CFG, GRAPHS
from ..runtime.units import shown
from .metrics import MOST_PSNR, psnr
from .record import named, record

KINDS = ("fp32", "fp16", "int8", "int4")
Row = dict[str, Any]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parse.add_subparsers(dest="kind", required=True)
    command = kinds.add_parser("predicted")
    command.add_argument("models", nargs="+", metavar="FOLDER:SIZE")
    command.add_argument("--backend", choices=GRAPHS, default="onnx")
    painted = kinds.add_parser("pictures")
    painted.add_argument("work", type=Path)
    painted.add_argument("models", nargs="+", metavar="MODEL:WIDTHxHEIGHT")
    args = parse.parse_args()
    rows = (
        predicted(args.models, args.backend) if args.kind == "predicted" else pictures(args.work, args.models)
    )
    engine = {"backend": args.backend} if args.kind == "predicted" else {}
    record("onnx", {"kind": args.kind, **engine, "rows": list(rows)})


def predicted(models: list[str], backend: str) -> Iterator[Row]:
    """Every way to run each model at each size. The largest stage counts, as for a plan."""
    errors, precisions = [], ("auto",) if backend == "onnx" else ("bf16", "fp32")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for model, precision, residency, cfg in product(models, precisions, ("staged", "resident"), CFG):
            row = processes.apply(run, (model, backend, precision, residency, cfg))
            predicted_bytes, took = max(row["predicted"].values()), max(row["measured"].values())
            errors.append(predicted_bytes / took - 1)
            print(
                *(model, precision, residency, cfg, shown(predicted_bytes), shown(took)),
                f"{errors[-1]:+.1%}",
                flush=True,
            )
            how = f"{residency} {cfg}" if precision == "auto" else f"{precision} {residency} {cfg}"
            yield {"what": f"{named(model)} {how}", "error": errors[-1], **row}
    sizes = sorted(map(abs, errors))
    print(f"{len(sizes)} plans: median {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")
    yield {
        "what": "summary",
        "plans": len(sizes),
        "median_error": statistics.median(sizes),
        "worst_error": sizes[-1],
    }


def run(model: str, backend: str, precision: str, residency: str, cfg: str) -> Row:
    """One picture of one step, in a process that has painted nothing before."""
    folder, _, size = model.rpartition(":")
    request = Request("a red heart", None, int(size), int(size), 1, 5.0, 0, "euler")
    how: dict[str, Any] = {"backend": backend, "precision": precision, "residency": residency, "cfg": cfg}
    with load(folder, device="cpu", requests=1, **how) as pipe:
        result = pipe.generate(request)
    predicted_bytes = result.plan.predicted
    measured = {name: stage.peak_bytes for name, stage in result.stages.items() if name != "prepare"}
    seconds = {"predicted_seconds": predicted_bytes.seconds, "run_seconds": result.seconds}
    return {
        "measured": measured,
        "predicted": dict(predicted_bytes.stages),
        "process_bytes": result.process_bytes,
        **seconds,
    }


def pictures(work: Path, models: list[str]) -> Iterator[Row]:
    """The same seed on both engines. torch computes in fp32, with weights in fp32 or quantised the same
    way."""
    work.mkdir(exist_ok=True)
    for text, kind in product(models, KINDS):
        model, _, size = text.rpartition(":")
        width, height = map(int, size.split("x"))
        folder = work.absolute() / f"{Path(model).name}-{kind}"
        wishes: dict[str, Any] = (
            {"precision": kind, "compute": "fp32"} if kind.startswith("int") else {"precision": "fp32"}
        )
        if not folder.exists():
            options = [
                "--to",
                "onnx",
                "--precision",
                kind,
                *(["--compute", "fp32"] if kind.startswith("int") else []),
            ]
            subprocess.run(
                [sys.executable, "-m", "tightfit", "export", model, *options, "-o", str(folder)], check=True
            )
        with load(model, device="cpu", **wishes) as torchs, load(str(folder), device="cpu") as ours:
            for scheduler in ("ddim", "euler", "dpmpp_2m_karras"):
                request = {
                    "seed": 0,
                    "num_inference_steps": 8,
                    "scheduler": scheduler,
                    "width": width,
                    "height": height,
                }
                decibels = min(
                    psnr(ours("a red heart", **request), torchs("a red heart", **request)), MOST_PSNR
                )
                print(f"{text} {kind} {scheduler}: {decibels:.1f} dB", flush=True)
                yield {"what": f"{named(text)} {kind} {scheduler}", "psnr": decibels}


if __name__ == "__main__":
    main()
