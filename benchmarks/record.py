"""One line of JSON per measurement, with everything needed to repeat it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from .. import __version__
from ..runtime.files import cache_folder
from ..runtime.machine.hardware import Hardware
from ..runtime.versions import installed

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "bitsandbytes",
)


def envelope(command: str, hardware: Hardware | None = None) -> dict[str, Any]:
    """What is needed to repeat a measurement: date, command, machine and versions."""
    import torch

    machine = hardware or Hardware.detect()
    facts = {"device": machine.device, "name": machine.name, "bytes": machine.total_bytes}
    versions = {"python": sys.version.split()[0], "tightfit": own_version()} | {
        name: known for name in PACKAGES if (known := installed(name))
    }
    return {
        "date": date.today().isoformat(),
        "command": command,
        "hardware": facts | {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
    }


def own_version() -> str:
    """tightfit's version; in a checkout also its commit."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return __version__
    command_line = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command_line, capture_output=True, text=True, check=False).stdout.strip()
    return f"{__version__}+{commit}" if commit else __version__


def command() -> str:
    """The running command, as typed in the folder that holds its models."""
    program = Path(sys.argv[0])
    module = program.parent.name if program.stem == "__main__" else program.stem
    return typed(["python", "-m", f"tightfit.benchmarks.{module}", *sys.argv[1:]])


# A path that starts at a root or leaves the folder, alone or after an option's "=".
_PLACE = re.compile(r"(?:(?<==)|^)(?:/|~|[A-Za-z]:[\\/]|\.\.?[\\/]).*?([^\\/]+)[\\/]?$")


def typed(arguments: Sequence[str]) -> str:
    """A command with bare names of files and folders: where they are on this machine concerns nobody else."""
    return shlex.join(",".join(map(named, argument.split(","))) for argument in arguments)


def named(model: str) -> str:
    """Bare name of what may be a local path: `../sdxl:512` becomes `sdxl:512`. A hub id stays as it is."""
    return _PLACE.sub(r"\1", model)


def record(name: str, results: Any, setup: dict[str, Any] | None = None, rehearsal: bool = False) -> Path:
    """Append `results` to `name`.jsonl and return that file: under $OUT if set, else in benchmarks/results/,
    or in the cache folder for a `rehearsal`. `setup` is the envelope if another process measured."""
    line = (setup or envelope(command())) | {"results": results}
    usual = cache_folder() / "rehearsals" if rehearsal else Path(__file__).parent / "results"
    folder = Path(os.environ.get("OUT") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return file
