"""One line of JSON per measurement, with all that is needed to repeat it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.hardware import Hardware

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
OPTIONAL = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "bitsandbytes")


def _there() -> Iterator[str]:
    for package in OPTIONAL:
        with suppress(PackageNotFoundError):
            version(package)
            yield package


def envelope(command: str, device: str = "auto") -> dict[str, Any]:
    """What is needed to repeat a measurement: the day, the command, the machine and the versions."""
    hardware = Hardware.detect(device)
    return {
        "date": date.today().isoformat(),
        "command": command,
        "hardware": {"device": hardware.device, "name": hardware.name, "cores": os.cpu_count(), "bytes": hardware.total_bytes},
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in (*PACKAGES, *_there())}},
    }


def record(name: str, results: Any) -> Path:
    """Append `results` to `name`.jsonl under $OUT, else in benchmarks/results/, and return that file."""
    program = Path(sys.argv[0])
    module = program.parent.name if program.stem == "__main__" else program.stem
    line = envelope(shlex.join(["python", "-m", f"tightfit.benchmarks.{module}", *sys.argv[1:]])) | {"results": results}
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return file
