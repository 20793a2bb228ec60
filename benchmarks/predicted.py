"""Predicted against measured peaks, stage by stage, for every attention, tiling, CFG mode and residency.

    python -m tightfit.benchmarks.predicted emoji:128 sd15:256 --precision bf16

MODEL:SIZE is emoji or a diffusers folder, and pixels; `python -m tightfit.export.random_model sd1 DIR` makes
a full-size one. Each combination paints once to warm up, if something stays loaded, and once under torch's
profiler, which sees every allocation of torch's CPU allocator: an independent count of live bytes. On CUDA
the measure is torch's `max_memory_reserved`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .. import Pipeline, Request, Wishes, inspect
from ..runtime.backends.torch.quantised import workspace
from ..runtime.machine.hardware import Hardware
from ..runtime.placement import ATTENTIONS, CFG, RESIDENCIES, STAGES, TILINGS
from ..runtime.units import shown
from .record import named, record

Row = dict[str, Any]


def mark(stage: str) -> record_function:
    """Marks a pipeline's stage in a profile."""
    return record_function(f"tightfit {stage}")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+", metavar="MODEL:SIZE")
    parse.add_argument("--precision", default="bf16")
    parse.add_argument("--device", default="auto")
    parse.add_argument("--residency", choices=RESIDENCIES)
    args = parse.parse_args()
    hardware = Hardware.detect(args.device)
    rows = [row for text in args.models for row in model(text, args, hardware)]
    errors = sorted(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    summary = {"combinations": len(rows) // len(STAGES), "stages": len(rows)}
    summary |= {"median_error": statistics.median(errors), "worst_error": errors[-1]}
    print(*(f"{name}: {value}" for name, value in summary.items()), sep="\n")
    record("predicted", summary | {"rows": rows})


def model(text: str, args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    name, _, side = text.rpartition(":")
    spec = inspect(name)
    request = Request("a red heart", None, int(side), int(side), 1, 5.0, 0, "euler")
    residencies = (args.residency,) if args.residency else RESIDENCIES
    for residency, attention, tiling, cfg in product(residencies, ATTENTIONS, TILINGS, CFG):
        choices: Row = {"residency": residency, "attention": attention, "tiling": tiling, "cfg": cfg}
        with Pipeline(spec, hardware, Wishes(precision=args.precision, **choices), on_stage=mark) as pipe:
            if residency == "resident":
                pipe.generate(request)
            yield from combination(pipe, request, {"model": named(text), **choices})


def combination(pipe: Pipeline, request: Request, names: Row) -> Iterator[Row]:
    """A row per stage. The profiler starts and stops with the stages; its count starts at what is held."""
    predicted = pipe.plans(request)[0].predicted.stages
    held = sum(_bytes(session.module) for *_, session in pipe.loaded.sessions.values())  # pyright: ignore[reportAttributeAccessIssue]
    measured, seen = {}, None
    cpu = pipe.hardware.device == "cpu"
    if cpu:
        seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
    result = None
    for event in pipe.run(request):
        result = event.result
    if seen:
        seen.__exit__(None, None, None)
        measured = _by_stage(seen, held)
    assert result
    for stage in STAGES:
        count = measured.get(stage, result.stages[stage].peak_bytes)
        row = names | {"stage": stage, "predicted": predicted[stage], "measured": count}
        row["counted"] = result.stages[stage].peak_bytes
        error = predicted[stage] / count - 1
        words = [str(names[key]) for key in ("model", "residency", "attention", "tiling", "cfg")]
        print(*words, stage, shown(predicted[stage]), shown(count), f"{error:+.2%}", flush=True)
        yield row


def _bytes(module: torch.nn.Module) -> int:
    return sum(
        tensor.nbytes for tensor in (*module.parameters(), *module.buffers(), workspace(module).buffer)
    )


def _by_stage(seen: profile, held: int) -> dict[str, int]:
    """Peak live bytes per stage, from the profiler's events and the marks between them."""
    now, stage = held, ""
    most: dict[str, int] = dict.fromkeys(STAGES, 0)
    results: Any = seen.profiler
    for event in sorted(results.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name().startswith("tightfit "):
            stage = event.name().removeprefix("tightfit ")
            if stage in most:
                most[stage] = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            if stage in most:
                most[stage] = max(most[stage], now)
    return most


if __name__ == "__main__":
    main()
