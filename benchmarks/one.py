"""Runs one plan in this process, started for it: reads a job from standard input, prints measurements as
JSON.

A job is {"plan", "model", "options": fields of Request, "pictures": [[prompt, seed] …], "folder"}. One
untimed step of the first picture comes first; then each picture is painted, timed, and saved in the folder by
its seed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import Plan, Request, Result, TightfitError, load
from ..runtime.errors import OutOfMemoryError, first_line
from ..runtime.machine.detect import driver
from ..runtime.texts import TEXTS


def main() -> None:
    job = json.load(sys.stdin)
    TEXTS.keep(False)  # else the first picture of a text would do more than the others
    try:
        answer = run(job)
    except (OutOfMemoryError, MemoryError) as error:
        answer = {"outcome": "out of memory", "why": first_line(error)}
    except TightfitError as error:
        answer = {"outcome": "failed", "why": str(error)}
    print(json.dumps(answer))


def run(job: dict[str, Any]) -> dict[str, Any]:
    plan, folder = Plan.from_json(json.dumps(job["plan"])), Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    requests = [Request(prompt, seed=seed, **job["options"]) for prompt, seed in job["pictures"]]
    with load(job["model"], device=plan.device, plan=plan, local_files_only=True) as pipe:
        warmup = pipe.generate(replace(requests[0], num_inference_steps=1))
        before, results = joules(plan.device), []
        for request in requests:
            results.append(pipe.generate(request))
        after = joules(plan.device)
    for result in (warmup, *results):
        # The run stepped down to another plan.
        if (result.plan.placements, result.plan.cfg) != (plan.placements, plan.cfg):
            return {"outcome": "out of memory", "why": " ".join(result.notices)}
    for (_, seed), result in zip(job["pictures"], results, strict=True):
        result.images[0].save(folder / f"{seed}.png")
    energy = None if before is None or after is None else (after - before) / len(results)
    return {"outcome": "ok", "why": "", "warmup_seconds": warmup.seconds, "joules": energy, **row_of(results)}


def row_of(results: list[Result]) -> dict[str, Any]:
    """Seconds per picture, in total and by stage, and peak bytes over all pictures."""
    stages = {
        name: {
            "seconds": [result.stages[name].seconds for result in results],
            "load_seconds": [result.stages[name].load_seconds for result in results],
            "peak_bytes": max(result.stages[name].peak_bytes for result in results),
            "process_bytes": max(result.stages[name].process_bytes for result in results),
        }
        for name in results[0].stages
    }
    return {
        "seconds": [result.seconds for result in results],
        "peak_bytes": max(result.peak_bytes for result in results),
        "process_bytes": max(result.process_bytes for result in results),
        "stages": stages,
        "notices": sorted({notice for result in results for notice in result.notices}),
    }


def joules(device: str) -> float | None:
    """Energy used by the card so far, by NVIDIA's driver; None if it does not say."""
    energy = driver(device, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000)
    return None if isinstance(energy, str) else energy


if __name__ == "__main__":
    main()
