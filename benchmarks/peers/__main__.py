"""Ours against diffusers, Optimum, OpenVINO and stable-diffusion.cpp: same weights, prompt, steps, size and
seed, in one command.

    python -m tightfit.benchmarks.peers MODEL WORK --rounds 2

MODEL is a diffusers folder. WORK gets the peers' environments, made once (compiling stable-diffusion.cpp
takes six minutes), and the exports, ours and Optimum's, each timed in its own process. Then each contender
paints one picture in its own process, one after another, repeated in rounds, so that a slow spell of the
machine slows all. Least seconds and most bytes count; decibels are against the contender whose picture it
should be. `--make` stops before painting; `--only` takes names of contenders, or beginnings of names. With
`--ask` a picture is given too, and diffusers and our torch engine alone take part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...runtime.errors import TightfitError
from ...runtime.machine.hardware import Hardware
from ...runtime.models.hub import inspect
from ...runtime.units import shown
from ..metrics import MOST_PSNR, psnr
from ..record import record

REFERENCE = "diffusers fp32"
ASKS = ("image", "inpainting", "control", "controls")
PROGRAMS = Path(__file__).with_name("programs.py")
OPTIMUM = (
    "torch==2.13.0",
    "diffusers==0.36.0",
    "transformers==4.57.5",
    "optimum-onnx==0.1.0",
    "onnxruntime==1.31.1",
)
# Installed beside ours, whose engine "openvino" then runs on the same version.
OPENVINO = ("openvino", "nncf")
SDCPP = ("stable-diffusion-cpp-python==0.4.7",)
# This processor's instructions, such as AVX-512, and llamafile's fast products.
BUILD = "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DCMAKE_BUILD_TYPE=Release"
Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """`engine` of programs.py runs `model`, a folder in WORK or "" for the original, in `precision` with
    `options`. `like` is the contender that paints the same picture from the same noise; "" if the noise
    differs."""

    name: str
    engine: str
    precision: str
    options: tuple[str, ...] = ()
    model: str = ""
    like: str = REFERENCE

    @property
    def takes_pictures(self) -> bool:
        """Whether it is run with more than a prompt here."""
        return self.engine in ("diffusers", "tightfit") and not self.model.startswith(("onnx", "optimum"))

    @property
    def needs_openvino(self) -> bool:
        return self.engine == "openvino" or "backend=openvino" in self.options


def contenders(device: str) -> list[Contender]:
    """What each program offers on this device for speed and for little memory."""
    flash = () if device == "cpu" else ("flash_attention",)
    chosen = [
        Contender("diffusers fp32", "diffusers", "fp32"),
        Contender("diffusers bf16", "diffusers", "bf16"),
        Contender("diffusers bf16, channels_last", "diffusers", "bf16", ("channels_last",)),
        Contender("diffusers bf16, slicing, tiling", "diffusers", "bf16", ("slicing", "tiling")),
        # Its exported scheduler has diffusers' defaults written out, among them other timesteps.
        Contender("Optimum fp32", "optimum", "fp32", (), "optimum", ""),
        Contender("Optimum fp32, our folder", "optimum", "fp32", (), "onnx-fp32"),
        *(
            Contender(f"OpenVINO {kind}", "openvino", kind, (), f"openvino-{of}")
            for kind, of in (("fp32", "fp16"), ("bf16", "fp16"), ("int8", "int8"))
            if device == "cpu"
        ),
        # On a CPU its flash attention makes a step three times as slow.
        *(Contender(f"sd.cpp {kind}", "sdcpp", kind, flash, "", "") for kind in ("f16", "q8_0", "q4_0")),
        Contender("sd.cpp q4_0, flash, tiling", "sdcpp", "q4_0", ("flash_attention", "tiling"), "", ""),
        Contender("tightfit fp32", "tightfit", "fp32"),
        Contender("tightfit fp32, Optimum's folder", "tightfit", "auto", (), "optimum", "Optimum fp32"),
        *(
            Contender(f"tightfit {kind}, ONNX", "tightfit", "auto", (), f"onnx-{kind}")
            for kind in ("fp32", "fp16", "int8", "int4")
        ),
        Contender("tightfit bf16", "tightfit", "bf16"),
        *(
            Contender(f"tightfit {kind}, OpenVINO", "tightfit", kind, ("backend=openvino",), "onnx-fp32")
            for kind in ("fp32", "bf16")
            if device == "cpu"
        ),
        Contender("tightfit int8", "tightfit", "int8", (), "int8"),
        Contender("tightfit int8-dynamic", "tightfit", "int8-dynamic", (), "int8"),
        Contender("tightfit int4", "tightfit", "int4", (), "int4"),
        Contender("tightfit int4, 1.2 GiB", "tightfit", "int4", ("budget=1.2GiB",), "int4"),
    ]
    if device == "cuda":
        chosen += [
            Contender("diffusers fp16", "diffusers", "fp16"),
            Contender("diffusers fp16, model offload", "diffusers", "fp16", ("model_offload", "tiling")),
            Contender("diffusers fp16, group offload", "diffusers", "fp16", ("group_offload", "tiling")),
            Contender(
                "diffusers fp16, bitsandbytes NF4", "diffusers", "nf4"
            ),  # which diffusers takes on GPUs only
            Contender("diffusers fp16, bitsandbytes int8", "diffusers", "int8"),
            Contender("tightfit fp16", "tightfit", "fp16"),
            Contender("tightfit int4, bitsandbytes", "tightfit", "int4", ("backend=bitsandbytes",)),
        ]
    return chosen


def named(every: list[Contender], only: list[str]) -> list[Contender]:
    """Those that are called so, or whose names begin so where none is."""
    whole = {one.name for one in every} & {*only}
    beginnings = tuple({*only} - whole)
    return [one for one in every if one.name in whole or one.name.startswith(beginnings)]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model", type=Path)
    parse.add_argument("work", type=Path)
    parse.add_argument("--size", type=int, default=512)
    parse.add_argument("--steps", type=int, default=4)
    parse.add_argument("--rounds", type=int, default=2)
    parse.add_argument(
        "--patience", type=float, default=90, metavar="SECONDS", help="what once took longer is not run again"
    )
    parse.add_argument("--only", action="append", default=[], metavar="NAME")
    parse.add_argument("--ask", choices=ASKS, help="image to image, inpainting, one or two ControlNets")
    parse.add_argument("--make", action="store_true")
    args = parse.parse_args()
    if args.steps < 2:
        parse.error("--steps: a step is timed from the end of the one before, so at least 2")
    inspect(args.model)  # refuses a model that names its own classes: other programs would run their code
    model, work = args.model.absolute(), args.work.absolute()
    every = contenders(Hardware.detect().device)
    chosen = [
        contender
        for contender in (named(every, args.only) if args.only else every)
        if not args.ask or contender.takes_pictures
    ]
    if missing := [package for package in OPENVINO if find_spec(package) is None]:
        print(f"OpenVINO is left out: pip install {' '.join(missing)}")
        chosen = [contender for contender in chosen if not contender.needs_openvino]
    try:
        pythons, exports = make(model, work, chosen)
        asks = asked(args.ask, model, work, args.size)
    except subprocess.CalledProcessError as error:
        sys.exit(f"peers: {shlex.join(map(str, error.cmd))} failed with exit code {error.returncode}")
    except TightfitError as error:
        sys.exit(f"peers: {error}")
    if args.make:
        return
    rows: dict[str, Row] = {}
    for number in range(args.rounds):
        for contender in chosen:
            if rows.get(contender.name, {}).get("seconds", 0) > args.patience:
                continue
            job = {
                "model": str(work / contender.model if contender.model else model),
                "precision": contender.precision,
            }
            job |= {
                "options": contender.options,
                "steps": args.steps,
                "size": args.size,
                "asks": asks,
                "to": str(picture(work, contender.name)),
            }
            row = run(pythons[contender.engine], contender.engine, job)
            print(f"{number + 1}/{args.rounds} {contender.name:<34} {line(row)}", flush=True)
            how = {"engine": contender.engine, "precision": contender.precision, "options": contender.options}
            rows[contender.name] = better(rows.get(contender.name), row) | how | {"rounds": number + 1}
    for contender in chosen:
        both = [picture(work, name) for name in (contender.name, contender.like)]
        if (
            "failed" not in rows[contender.name]
            and contender.like in rows
            and all(file.exists() for file in both)
        ):
            decibels = min(psnr(*map(Image.open, both)), MOST_PSNR)
            rows[contender.name] |= {"psnr": decibels, "like": contender.like}
    told_of = {
        "model": args.model.name,
        "size": args.size,
        "steps": args.steps,
        "rounds": args.rounds,
        "sdcpp": BUILD,
        "ask": args.ask,
    }
    record("peers", told_of | {"exports": exports, "rows": rows})
    table(rows)


def make(model: Path, work: Path, chosen: list[Contender]) -> tuple[dict[str, str], dict[str, Row]]:
    """Each engine's interpreter, and each export's row. What WORK lacks is made under a temporary name
    first."""
    work.mkdir(parents=True, exist_ok=True)
    engines, models = {c.engine for c in chosen}, {c.model for c in chosen if c.model}
    pythons = {"diffusers": sys.executable, "openvino": sys.executable, "tightfit": sys.executable}
    if "optimum" in engines or "optimum" in models:
        pythons["optimum"] = environment(work / "env-optimum", OPTIMUM, {})
    if "sdcpp" in engines:
        pythons["sdcpp"] = environment(work / "env-sdcpp", SDCPP, {"CMAKE_ARGS": BUILD})
    file = work / "exports.json"
    exports: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    for name in sorted(name for name in models if not (work / name).exists()):
        partial = work / f"{name}.partial"
        engine, to = "tightfit", ["--precision", name.removeprefix("onnx-")]
        if name == "optimum" or name.startswith("openvino-"):
            engine, _, kind = name.partition("-")
            to = kind.split()
        if name.startswith("onnx-"):
            to += ["--to", "onnx", *(["--compute", "fp32"] if name.startswith("onnx-int") else [])]
        row = run(
            pythons[engine], f"{engine}_export", {"model": str(model), "to": str(partial), "options": to}
        )
        print(f"{name:<38} {line(row)}", flush=True)
        if "failed" in row:
            raise TightfitError(f"the export of {name} failed: {row['failed']}")
        partial.rename(work / name)
        file.write_text(json.dumps(exports := exports | {name: row}))
    return pythons, exports


def asked(ask: str | None, model: Path, work: Path, size: int) -> Row:
    """What is asked besides the prompt, by diffusers' names: of noise in large squares, and of ControlNets
    made from the U-Net."""
    if not ask:
        return {}
    squares = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    given, mask = work / "given.png", work / "mask.png"
    Image.fromarray(squares).resize((size, size), Image.Resampling.NEAREST).save(given)
    half = Image.new("L", (size, size))
    half.paste(255, (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
    half.save(mask)
    if ask.startswith("control"):
        nets = [network(model, work / f"control-{number}") for number in range(2 if ask == "controls" else 1)]
        return {"controlnet": nets, "control_image": [str(given)] * len(nets)}
    return {"image": str(given), "strength": 0.75} | (
        {"mask_image": str(mask)} if ask == "inpainting" else {}
    )


def network(model: Path, to: Path) -> str:
    """The folder of a ControlNet of the model's U-Net."""
    if not to.exists():
        import torch
        from diffusers import ControlNetModel, UNet2DConditionModel

        folder = inspect(model).denoiser.folder
        unet: Any = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
        net: Any = ControlNetModel.from_unet(unet)
        partial = to.with_name(f"{to.name}.partial")
        net.to(torch.float16).save_pretrained(partial)
        partial.rename(to)
    return str(to)


def picture(work: Path, name: str) -> Path:
    return work / f"{name.replace(' ', '-').replace(',', '')}.png"


def environment(folder: Path, packages: tuple[str, ...], variables: dict[str, str]) -> str:
    """The interpreter of a virtual environment with these packages, built with these variables set."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "made.json"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], check=True, env=os.environ | variables
        )
        done.write_text(json.dumps({"packages": packages, "variables": variables}))
    return str(python)


def run(python: str, engine: str, job: Row) -> Row:
    """Run a job in its own process; one that fails is a row that says so."""
    program = ["-m", f"{__package__}.programs"] if engine.startswith("tightfit") else [str(PROGRAMS)]
    done = subprocess.run(
        [python, *program, engine, json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def better(before: Row | None, now: Row) -> Row:
    """Least seconds of the rounds and most bytes; a failure stays a failure."""
    if before is None or "failed" in now:
        return now
    if "failed" in before:
        return before
    least = {name: min(before[name], now[name]) for name in ("seconds", "step_seconds")}
    return (
        now
        | least
        | {name: max(before[name], now[name]) for name in ("peak_bytes", "device_bytes") if name in now}
    )


def line(row: Row) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    step = f", {row['step_seconds']:.2f} s a step" if "step_seconds" in row else ""
    return f"{shown(peak(row))}, {row['seconds']:.1f} s in all{step}"


def peak(row: Row) -> int:
    """Bytes of GPU memory if a GPU was used, else of the process."""
    return row.get("device_bytes") or row.get("peak_bytes", 0)


def table(rows: dict[str, Row]) -> None:
    """Each against diffusers in bf16, the best that most people run on a CPU, or the first contender; then
    how each ran."""
    painted = {name: row for name, row in rows.items() if "failed" not in row}
    if not painted:
        sys.exit("peers: no contender painted anything")
    base = painted.get("diffusers bf16") or next(iter(painted.values()))
    print(f"\n{'':<34} {'peak':>10} {'ratio':>6} {'s a step':>9} {'ratio':>6} {'in all':>7} {'dB':>5}")
    for name, row in sorted(rows.items(), key=lambda item: peak(item[1])):
        if "failed" in row:
            print(f"{name:<34} failed: {row['failed']}")
            continue
        memory, pace = peak(row) / peak(base), row["step_seconds"] / base["step_seconds"]
        figures = f"{memory:>6.2f} {row['step_seconds']:>9.2f} {pace:>6.2f} {row['seconds']:>7.1f}"
        decibels = f" {row['psnr']:>5.1f}" if "psnr" in row else ""
        print(f"{name:<34} {shown(peak(row)):>10} {figures}{decibels}")
    print(f"\nsd.cpp is built with {BUILD} and has {os.cpu_count()} threads")
    for name, row in painted.items():
        how = ", ".join((row["precision"], *row["options"], f"rounds: {row['rounds']}"))
        print(
            f"{name:<34} {how}; "
            f"{', '.join(f'{package} {version}' for package, version in row['versions'].items())}"
        )


if __name__ == "__main__":
    main()
