"""Everything that only a GPU can show, in one command with a time limit:

    python -m tightfit.benchmarks.gpu_check --limit 360

On a machine with PyTorch and Triton but no network, bring the missing wheels (at least diffusers; perhaps
rich, typer, psutil and pytest). On a machine with a network, in the checkout,

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
        -d .whl diffusers

with .whl listed in .git/info/exclude; then on the other machine, in the checkout,

    pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    ln -s "$PWD" /tmp/site/tightfit
    # instead of installing it, for which setuptools may be too old (77 is needed)
    PYTHONPATH=/tmp/site python -m tightfit.benchmarks.gpu_check --limit 360

Sections, the most important first: the probe (gpu_probe.py); a full-size random SD 1.5 in fp16 by eight
different plans, under caps of 2 to 8 GB; against diffusers' best; in int8, int4 and integer arithmetic; norms
in one kernel; channels last and fused projections; calls as CUDA graphs; the GPU tests; kernels and single
layers; SDXL; how much of streaming is hidden; blocks compiled, and diffusers compiled; ONNX Runtime. Each
section has its own process and time limit. One that fails, hangs or crashes does not stop the others, and its
rows so far are kept. Models are written once, by other processes during the probe and the tests. Pictures are
compared with fp32's, bytes with the driver's count, so close other programs that use the card. One screen
shows what was wrong, worst first; everything is in gpu_check.jsonl under $OUT, else in benchmarks/results.
`--tiny --device cpu` rehearses it anywhere and writes to the cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import first_line
from ..runtime.machine.hardware import Hardware
from .gpu_report import faults, screen
from .record import command, envelope, record

LEAST = 15  # seconds below which a section is not started
QUIET = 20  # seconds before models are written: the probe times copies from host memory first
# Seconds to wait for models when their section has ended; after that, the section that needs one writes it.
WAIT = 60
Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One part of the check, ended after `seconds`. Models named in `meanwhile` are written while it runs."""

    name: str
    seconds: float
    meanwhile: tuple[str, ...] = ()


def sections(half: str) -> tuple[Section, ...]:
    few_bits = ("sd1", "sd1-int8", "sd1-int4", "tiny-sd1-int8", "tiny-sd1-int4")
    return (
        Section("probe", 90, few_bits),
        Section(f"{half} under caps", 60),
        Section("speed", 50),
        Section("few bits", 100),
        Section("norms", 30),
        Section("layouts", 30),
        Section("graphs", 30),
        Section("GPU tests", 60, ("sdxl",)),
        Section("kernels and layers", 60),
        Section("SDXL", 80),
        Section("overlap", 30),
        Section("blocks compiled", 90),
        Section("compiled", 90),
        Section("ONNX Runtime", 60),
    )


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--limit", type=float, default=360, help="seconds for all of it")
    parse.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parse.add_argument("--tiny", action="store_true", help="tiny models, to rehearse this script")
    parse.add_argument("--steps", type=int, default=10)
    parse.add_argument("--section", help="one alone, by its name")
    parse.add_argument("--models", nargs="*", default=[], help=argparse.SUPPRESS)
    parse.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parse.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.device == "cuda" and not gpu_is_here():
        parse.error("no cuda device is here: --tiny --device cpu rehearses it")
    sys.exit(within(args) if args.rows else every(args))


def gpu_is_here() -> bool:
    """Asked in another process: a context in this one would count as used memory."""
    question = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def every(args: argparse.Namespace) -> int:
    """Run every section in turn, or the one asked for. Returns 1 if something was wrong, else 0; being slow
    is not wrong."""
    begun, results, file = time.perf_counter(), dict[str, list[Row]](), None
    last_setup: Row = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for section in sections("fp16" if args.device == "cuda" else "bf16"):
            if args.section not in (None, section.name):
                continue
            left = args.limit - (time.perf_counter() - begun)
            setup, rows = (
                _section(section, args, Path(folder), left)
                if left > LEAST
                else ({}, [{"left": "for want of time"}])
            )
            results[section.name] = rows
            last_setup = (
                setup or last_setup or envelope("", Hardware(args.device, "unknown", 0, 0, ("fp32",)))
            )
            setup, rehearsal = last_setup | {"command": command()}, args.tiny or args.device == "cpu"
            file = record("gpu_check", {"section": section.name, "rows": rows}, setup, rehearsal)
            print(
                f"{time.perf_counter() - begun:4.0f} s: {section.name}, {len(rows)} rows",
                file=sys.stderr,
                flush=True,
            )
    if not results:
        print(
            f"no section is called '{args.section}': "
            f"choose {', '.join(part.name for part in sections('fp16'))}"
        )
        return 2
    versions = last_setup["versions"]
    version_texts = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "cuda", "diffusers", "transformers")
        if name in versions
    )
    print(f"{last_setup['hardware']['name']}: {version_texts}", *screen(results), sep="\n")
    print(f"everything in {file}, in {time.perf_counter() - begun:.0f} s")
    return int(any(fault.kind != "slower" for fault in faults(results)))


def _section(section: Section, args: argparse.Namespace, folder: Path, left: float) -> tuple[Row, list[Row]]:
    """A section's envelope and rows, with `left` seconds for everything still to come."""
    command_line = [
        sys.executable,
        "-m",
        "tightfit.benchmarks.gpu_check",
        "--device",
        args.device,
        "--steps",
        str(args.steps),
    ]
    command_line += ["--folder", str(folder), *(["--tiny"] if args.tiny else [])]
    file, start = folder / f"{section.name.replace(' ', '-')}.jsonl", time.perf_counter()
    writer = None
    if section.meanwhile:
        models = folder / f"models-{file.name}"
        writer = Apart(
            [*command_line, "--section", "models", "--rows", str(models), "--models", *section.meanwhile],
            models,
        )
    try:
        # a single section gets all the time; a CPU only rehearses
        seconds = left if args.section else section.seconds * (1 if args.device == "cuda" else 2)
        rows = Apart([*command_line, "--section", section.name, "--rows", str(file)], file).rows(
            seconds, left
        )
    except BaseException:
        if writer:
            writer.end()
        raise
    if writer:
        rows += [{"what": "models"} | row for row in writer.rows(WAIT, left - (time.perf_counter() - start))]
    setup = next((row["setup"] for row in rows if "setup" in row), {})
    return setup, [row for row in rows if "setup" not in row]


class Apart:
    """A command in its own process that writes rows to `file`, one JSON a line; its output goes to a log
    beside it."""

    def __init__(self, call: Sequence[str], file: Path) -> None:
        self.file, self.log = file, file.with_suffix(".log")
        with self.log.open("wb") as stream:
            how: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(call, env=_environment(call), **how)

    def rows(self, seconds: float, left: float) -> list[Row]:
        """Its rows, once it ended or was ended, after `seconds` or with no time `left`. A last row says what
        went wrong."""
        try:
            code: int | None = self.process.wait(max(0.0, min(seconds, left)))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.end()
        rows = list(_read(self.file))
        if code is None:
            rows.append(
                {"failed": f"ended after {seconds:.0f} s"}
                if seconds <= left
                else {"left": "when the time was over"}
            )
        elif code and not any("failed" in row for row in rows[-1:]):
            died = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            output = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            rows.append({"failed": f"{died}: {output[-1][:200]}" if output else died})
        if any("failed" in row for row in rows):
            rows.append({"log": self.log.read_text(encoding="utf-8", errors="replace")[-4000:]})
        return rows

    def end(self) -> None:
        """End it and everything it started."""
        with suppress(ProcessLookupError, PermissionError):  # already gone, or on macOS not yet reaped
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


def _environment(call: Iterable[str]) -> dict[str, str]:
    """Models are written with half the cores, so that the section being measured has the others."""
    few = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))} if "models" in call else {}
    return {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **few}


def _read(file: Path) -> Iterable[Row]:
    """Complete lines only: a process may have ended in the middle of one."""
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def within(args: argparse.Namespace) -> int:
    """One section in this process. Rows are written as they come; an exception becomes the last one."""
    from .gpu_sections import Check

    begun = time.perf_counter()
    with args.rows.open("a", encoding="utf-8") as stream:
        try:
            check = Check(args.folder, args.device, args.tiny, args.steps)
            write(stream, {"setup": envelope(command(), check.card.name())})
            if args.section == "models" and check.card.is_gpu:
                time.sleep(QUIET)
            made = check.models(args.models) if args.section == "models" else check.sections()[args.section]()
            for row in made:
                write(stream, row | {"at": round(time.perf_counter() - begun, 1)})
        except Exception as error:
            traceback.print_exc()
            write(stream, {"failed": f"{type(error).__name__}: {first_line(error)}"})
            return 1
    return 0


def write(stream: Any, row: Row) -> None:
    stream.write(json.dumps(row, default=str) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
