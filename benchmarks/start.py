"""From a command to its result, as a ratio to `python -c "import torch"`: what a person waits for before, and
after, the work itself. Whole processes, in turns.

    python -m tightfit.benchmarks.start [MODEL]     # that plans; emoji paints
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.models.hub import BUILT_IN
from .record import named, record

ROUNDS = 5
PAINTED = ("a red heart", "--seed", "0", "--overwrite", "--json")
HELP, IMPORT, TORCH = "tightfit --help", "import tightfit", "import torch"
PAINT, PLAN, THEIRS = 'tightfit "a red heart"', "tightfit plan", "diffusers"
PLANNED, CONNECTED = f"{PAINT} --plan FILE", f"{PAINT} --connect URL"
PROCESS = "process"
DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
seed = torch.Generator().manual_seed(0)
pipe("a red heart", num_inference_steps=20, generator=seed).images[0].save(sys.argv[2])
"""


TIGHTFIT = [sys.executable, "-m", "tightfit"]


def commands(model: str, work: Path, url: str) -> dict[str, list[str]]:
    """What is started, by its name in the table. A server is at `url`."""
    tightfit, saved = TIGHTFIT, str(work / "plan.json")
    seconds([*tightfit, "plan", "--save", saved])
    return {
        TORCH: [sys.executable, "-c", "import torch"],
        IMPORT: [sys.executable, "-c", "import tightfit"],
        HELP: [*tightfit, "--help"],
        PLAN: [*tightfit, "plan", "--model", model],
        PAINT: [*tightfit, *PAINTED, "-o", str(work / "ours.png")],
        PLANNED: [*tightfit, *PAINTED, "--plan", saved, "-o", str(work / "planned.png")],
        CONNECTED: [*tightfit, *PAINTED, "--connect", url, "-o", str(work / "connected.png")],
        THEIRS: [sys.executable, "-c", DIFFUSERS, str(BUILT_IN["emoji"]), str(work / "theirs.png")],
    }


@contextmanager
def server(work: Path) -> Iterator[str]:
    """The address of one that runs until the end."""
    serve = [*TIGHTFIT, "serve", "--port", "0", "--state", str(work / "state")]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        try:
            yield re.findall(r"http://[\w.:]+", process.stdout.readline())[0]
        finally:
            process.terminate()


def seconds(command: list[str]) -> float:
    """Of a process, from its start until it has ended. Bytecode is written in the first, as for any user."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def measure(model: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each command: the median of its seconds, and its ratio to importing torch. One round goes
    before, after which files are in memory, and dry runs in the cache folder."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as url:
        every = commands(model, Path(folder), url)
        taken: dict[str, list[float]] = {name: [] for name in every}
        for number in range(rounds + 1):
            for name, command in every.items():
                took = seconds(command)
                if number:
                    taken[name].append(took)
        medians = {name: statistics.median(some) for name, some in taken.items()}
        rows = [
            {"what": name, "seconds": round(some, 3), "ratio": round(some / medians[TORCH], 2)}
            for name, some in medians.items()
        ]
        process = subprocess.run(every[PAINT], check=True, capture_output=True, text=True)
    measured = json.loads(process.stdout)["measured"]
    return [*rows, {"what": PROCESS, "bytes": measured["process_bytes"] - measured["peak_bytes"]}]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "emoji"
    rows = measure(model)
    for row in rows:
        print(row)
    record("start", {"model": named(model), "rows": rows})


if __name__ == "__main__":
    main()
