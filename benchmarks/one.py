"""One plan, run in this process, which was made for it: reads a job from standard input, prints what it
measured as JSON.

A job is {"plan", "model", "options": fields of Request, "pictures": [[prompt, seed] …], "folder"}. One step
of the first picture is painted before anything is timed; then each is painted, timed, and saved in the folder
by its seed.
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


def main() -> None:
    job = json.load(sys.stdin)
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
        # It went on with another.
        if (result.plan.placements, result.plan.cfg) != (plan.placements, plan.cfg):
            return {"outcome": "out of memory", "why": " ".join(result.notices)}
    for (_, seed), result in zip(job["pictures"], results, strict=True):
        result.images[0].save(folder / f"{seed}.png")
    energy = None if before is None or after is None else (after - before) / len(results)
    return {"outcome": "ok", "why": "", "warmup_seconds": warmup.seconds, "joules": energy, **told(results)}


def told(results: list[Result]) -> dict[str, Any]:
    """Seconds of each picture, whole and by stage, and the most bytes of any."""
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
    """What NVIDIA's driver says the card has used so far; None where it does not tell."""
    found = driver(device, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000)
    return None if isinstance(found, str) else found


if __name__ == "__main__":
    main()
