"""The tables of README.md and docs/results.md, made from benchmarks/results/*.jsonl:

    python -m tightfit.benchmarks.readme            # write both files
    python -m tightfit.benchmarks.readme --check    # exit code 1 if one of them is stale

docs/results.md has every row, README.md a few of them. Rows in which we lose, or do not fit, stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..runtime.cli.output import write
from ..runtime.units import shown
from . import start, suite
from .compare import seconds, spread
from .peers.__main__ import REFERENCE, contenders
from .steps import middle

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- made by python -m tightfit.benchmarks.readme -->", "<!-- until here -->"
MACHINE = "EPYC"  # in the name of the one that docs/results.md has first
Row = dict[str, Any]
# README.md's contenders: for each program its least memory and its usual precisions, whoever is ahead.
README_CONTENDERS = (
    "tightfit int4",
    "tightfit int8-dynamic",
    "tightfit bf16",
    "tightfit fp32",
    "tightfit fp32, ONNX",
    "diffusers bf16",
    "diffusers fp32",
    "sd.cpp q4_0, flash, tiling",
    "sd.cpp f16",
    "Optimum fp32",
)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true")
    args = parse.parse_args()
    for name, section in pages().items():
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        new = replaced(text, section())
        if not args.check:
            write(file, new.removesuffix("\n"))
        elif new != text:
            sys.exit(f"{name} is stale: run python -m tightfit.benchmarks.readme")


def pages() -> dict[str, Callable[[], str]]:
    """Each file, and the function that makes its marked section."""
    return {"README.md": summary, "docs/results.md": tables}


def replaced(text: str, section: str) -> str:
    """The text with `section` between its marks."""
    before, begin, following = text.partition(BEGIN)
    _, end, after = following.partition(END)
    if not (begin and end):
        raise ValueError(f"no section to replace: the text lacks '{END if begin else BEGIN}'")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def summary() -> str:
    """README.md's section: one table of contenders, and the errors of predictions."""
    stages, median, worst = prediction_errors()
    errors = f"{median:.1%} off in the median, {worst:.1%} at worst"
    return f"{peers(README_CONTENDERS)}\nPredicted peak against measured peak, {stages} stages: {errors}.\n"


def tables() -> str:
    """docs/results.md's section: all tables."""
    of_contenders = f"{peers()}\n{beside_openvino()}\n{in_turns()}"
    return f"{of_contenders}\n{plans()}\n{cached_pictures()}\n{cached_calls()}\n{details()}"


def results(name: str, contains: str = "") -> list[Any]:
    """Results in NAME.jsonl from commands that contain a text, the newest last."""
    return [line["results"] for line in recorded(name) if contains in line["command"] + " "]


def recorded(name: str) -> list[Row]:
    return [*map(json.loads, (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())]


def elsewhere(line: Row) -> str:
    """', on Intel …' where a result is not of the machine that a page names."""
    return "" if MACHINE in line["hardware"]["name"] else f", on {line['hardware']['name']}"


def table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *rows]) + "\n"


def whole_peers() -> Row:
    """The newest run with all contenders, but for OpenVINO's, which has to be installed beside."""
    names = {contender.name for contender in contenders("cpu") if not contender.needs_openvino}
    return next(
        run for run in reversed(results("peers")) if run["rows"].keys() >= names and not run.get("ask")
    )


def beside_openvino() -> str:
    """The newest run with OpenVINO of each machine, but for the whole one."""
    with_it = (line for line in recorded("peers") if "OpenVINO" in "".join(line["results"]["rows"]))
    newest = {elsewhere(line): line["results"] for line in with_it}
    runs = ((machine, run) for machine, run in newest.items() if run != whole_peers())
    tables = "".join(f"Beside OpenVINO{machine}: {peers(run=run)}\n" for machine, run in runs)
    said = "One round ranks nothing on a host whose speed changes by two within the hour; calls in turns do"
    return f"{tables}{said}:\n"


def peers(names: Collection[str] | None = None, run: Row | None = None) -> str:
    """All contenders of a run, by default the whole one, or those named, against diffusers in bf16, least
    memory first."""
    run = run or whole_peers()
    peer = next(name for name in ("diffusers bf16", *run["rows"]) if name in run["rows"])
    base, rows = run["rows"][peer], []
    for name, row in sorted(run["rows"].items(), key=lambda item: item[1].get("peak_bytes", 0)):
        if names is not None and name not in names:
            continue
        if "failed" in row:
            rows.append(f"| {name} | failed: {row['failed']} | | | |")
            continue
        memory, pace = row["peak_bytes"] / base["peak_bytes"], row["step_seconds"] / base["step_seconds"]
        bold = "**" if name.startswith("tightfit") else ""
        peak, step = f"{shown(row['peak_bytes'])}, {memory:.2f}", f"{row['step_seconds']:.2f} s, {pace:.2f}"
        decibels = f"{row['psnr']:.0f} dB" if "psnr" in row else ""
        decibels += f" ({row['like']})" if "like" in row and row["like"] != REFERENCE else ""
        rows.append(f"| {bold}{name}{bold} | {peak} | {step} | {row['seconds']:.1f} s | {decibels} |")
    title = f"**{run['model']}**, {run['size']}×{run['size']}, {run['steps']} steps, "
    rounds = "1 round" if run["rounds"] == 1 else f"{run['rounds']} rounds in turns"
    title += f"the same weights, prompt and guidance, {rounds} "
    title += "(`python -m tightfit.benchmarks.peers sd15 WORK`):"
    head = f"| | process peak, ratio to {peer} | a step, ratio | start to picture "
    head += f"| PSNR to {REFERENCE} |"
    return f"{title}\n\n{table(head, rows)}"


def in_turns() -> str:
    """Single calls beside those of one contender, in turns in one process: the newest of each pair."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for line in recorded("steps"):
        run = line["results"]
        if "first" in run:
            key = run["first"], f"{run['size']}×{run['size']}", elsewhere(line), run["isa"]
            groups.setdefault(key, {}).update(run["rows"])
    return "\n".join(_turns(key, rows) for key, rows in groups.items())


def _turns(key: tuple[str, ...], rows: dict[str, Row]) -> str:
    first, size, machine, isa = key
    lines, pairs = [], {name: middle(row["ratios"]) for name, row in rows.items() if name != first}
    for name, (low, median, high) in sorted(pairs.items(), key=lambda item: item[1][1]):
        bold = "**" if name.startswith("tightfit") else ""
        least, count = min(rows[name]["seconds"]), len(rows[name]["ratios"])
        middle_half = f"{median:.2f}, {low:.2f} to {high:.2f}"
        lines.append(f"| {bold}{name}{bold} | {middle_half} | {count} | {least:.2f} s |")
    kept = f", `ONEDNN_MAX_CPU_ISA={isa}`" if isa else ""
    title = f"One U-Net call of two rows of {size}{machine}{kept}, in turns with {first}"
    head = f"| | of {first}'s time: median, quartiles | pairs | the fastest |"
    return f"{title} (`python -m tightfit.benchmarks.steps …`):\n\n{table(head, lines)}"


def plans() -> str:
    """What `tightfit bench` measured, by model and size."""
    rows = sorted(suite.rows(suite.read(RESULTS / "bench.jsonl")), key=group)
    return "\n".join(of_model(list(group_rows)) for _, group_rows in groupby(rows, key=group))


def group(row: Row) -> tuple[Any, ...]:
    machine = row["hardware"]
    return Path(row["model"]).name, *row["request"].values(), machine["name"], machine["threads"]


def of_model(rows: list[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: seconds(row) if row["outcome"] == "ok" else float("inf")):
        if row["outcome"] != "ok":
            lines.append(f"| {row['summary']} | {row['outcome']} | | | | |")
            continue
        predicted = row["plan"]["predicted"]
        pace = f"{seconds(row):.3g} ± {spread(row):.2g} s ({predicted['seconds']:.3g})"
        peak = f"{shown(row['peak_bytes'])} ({predicted['peak_bytes'] / row['peak_bytes'] - 1:+.1%})"
        bytes_ = f"{peak} | {shown(row['process_bytes'])} | {shown(row['disk_bytes'])}"
        lines.append(f"| {row['summary']} | {pace} | {bytes_} | {judged(row)} |")
    first = next((row for row in rows if row["outcome"] == "ok"), rows[0])
    request, runs = first["request"], len(first.get("runs", ()))
    command = first["command"].replace(first["model"], Path(first["model"]).name)
    size = f"{request['width']}×{request['height']}, {request['steps']} steps"
    title = f"**{Path(first['model']).name}**, {size}, {runs} processes a plan"
    match = ", prompt match" if "match" in (first.get("quality") or {}) else ""
    head = "| | a picture (predicted) | peak of its tensors (predicted) | of the process | on disk "
    head += "| PSNR, MS-SSIM against fp32"
    return f"{title} (`{command}`):\n\n{table(head + match + ' |', lines)}"


def judged(row: Row) -> str:
    """A plan's quality against the reference's pictures."""
    quality = row["quality"] or {}
    text = f"{quality['psnr']:.0f} dB, {quality['ms_ssim']:.4f}" if quality else ""
    text = "exact" if row["key"] == row["reference"] else text
    return f"{text}, {quality['match']:.0%}" if "match" in quality else text


def cached_pictures() -> str:
    """What step caching costs and saves, of the emoji: the newest of each."""
    every = [row for run in results("cache") if run["models"] == ["emoji"] for row in run["rows"]]
    newest = {(row["sampler"], row["steps"], row["every"], row.get("by", "")): row for row in every}
    lines = []
    for row in newest.values():
        quality = f"{row['median']:.1f} dB, {row['worst']:.1f}"
        way = f"{row['sampler']}, {row['steps']} steps" + (f", {row['by']}" if "by" in row else "")
        lines.append(f"| {way} | {row['every']} | {quality} | {row['ratio']:.2f} |")
    head = "| | 1 step in full of | PSNR to all in full, median, worst | times as fast |"
    title = "**Step caching**, emoji, 128×128, 8 pictures, fp32 (`python -m tightfit.benchmarks.cache`)"
    return f"{title}:\n\n{table(head, lines)}"


def cached_calls() -> str:
    """Seconds of full and shallow calls of large U-Nets: the newest run of each set of models and size."""
    newest = {(*run["models"], run["size"]): run for run in results("cache") if run["models"] != ["emoji"]}
    return "\n".join(map(_calls_of, newest.values()))


def _calls_of(run: Any) -> str:
    named = [name for name in run["rows"][0] if name.startswith("every ")]
    lines = []
    for row in run["rows"]:
        ratios = " | ".join(f"{row[name]:.2f}" for name in ("ratio", *named))
        spent = f"{row['plain']:.2f} s | {row['shallow']:.2f} s"
        lines.append(f"| {row['model']}, {row['precision']} | {spent} | {ratios} |")
    cells = " | ".join(f"1 of {name.removeprefix('every ')}" for name in named)
    head = f"| | full call | shallow | times as fast: all in full | {cells} |"
    size = f"{run['size']}×{run['size']}, batch 2, {run['steps']} steps"
    command = f"python -m tightfit.benchmarks.cache {' '.join(run['models'])}"
    return f"The same of whole U-Nets, {size} (`{command}`):\n\n{table(head, lines)}"


def details() -> str:
    rows = [f"| {' | '.join(row)} |" for row in (*torch_rows(), *onnx_rows(), *emoji_rows())]
    return "**The rest**:\n\n" + table("| | tightfit | others | command |", rows)


def torch_rows() -> Iterator[tuple[str, str, str, str]]:
    cells = [cell for row in results("parity")[-1].values() for cell in row.values()]
    same = f"identical in {cells.count('identical')} of {len(cells)}"
    yield "fp32 pictures of four models, six schedulers, beside diffusers'", same, "", "`… parity FOLDER…`"
    stages, median, worst = prediction_errors()
    title = f"predicted against measured peak of {stages} stages above 2 MiB"
    yield title, f"median {median:.1%}, worst {worst:.1%} off", "", "`… predicted emoji:128 sd15:512 …`"
    memory = {(Path(run["model"]).name, run.get("ram") or ""): run for run in results("memory")}
    for name, ram in (("sd15", ""), ("sd15", "1.5GiB"), ("sdxl", ""), ("sdxl", "2GiB")):
        run = memory[name, ram]
        ours, rival = (peak_and_seconds(run[program]) for program in ("tightfit", "diffusers"))
        budget = f", `--ram {ram}`" if ram else ""
        title = f"process of {name} in bf16, 512×512, {run['steps']} steps{budget}"
        yield title, ours, f"{rival} (diffusers)", f"`… memory {name}`"
    sizes = {(Path(row["model"]).name, row["precision"]): row for row in results("sizes")[-1]}
    for name in ("sd15", "sdxl"):
        kinds = [f"{sizes[f'{name}_{kind}', kind]['unet disk']:.2f}" for kind in ("int8", "int4")]
        fp16, nf4 = (sizes[name, kind]["unet disk"] for kind in ("fp16", "bitsandbytes nf4"))
        rivals = f"{fp16:.2f} GB fp16, {nf4:.2f} bitsandbytes NF4"
        yield f"U-Net of {name} on disk, int8, int4", f"{' and '.join(kinds)} GB", rivals, "`… sizes FOLDER…`"
    steps = dict([run for run in results("steps") if "first" not in run][-1]["rows"])
    bf16 = f"bf16 {steps.pop('sd15')['seconds']:.2f} s"
    kinds = [f"{name.split(':')[-1].removeprefix('sd15_')} {row['ratio']:.2f}" for name, row in steps.items()]
    yield "a U-Net call of sd15, 512×512, of our bf16's", ", ".join(kinds), bf16, "`… steps FOLDER…`"


def peak_and_seconds(row: Row) -> str:
    return f"{shown(row['peak_bytes'])}, {row['seconds']:.1f} s"


def prediction_errors() -> tuple[int, float, float]:
    """Number of stages above 2 MiB, median and worst relative error of their predicted peaks."""
    keys = ("model", "residency", "attention", "tiling", "cfg", "stage", "predicted")
    rows = [row for run in results("predicted") for row in run["rows"]]
    newest = {json.dumps([row[key] for key in keys]): row for row in rows}
    large = [row for row in newest.values() if row["measured"] > 2 * 2**20]
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in large]
    return len(errors), statistics.median(errors), max(errors)


def onnx_rows() -> Iterator[tuple[str, str, str, str]]:
    run = whole_peers()
    exports, command = run["exports"], f"`… peers {run['model']} WORK`"
    ours = {kind: exports[f"onnx-{kind}"] for kind in ("fp32", "fp16", "int8", "int4")}
    optimum = exports["optimum"]
    seconds = ", ".join(f"{kind} {row['seconds']:.0f}" for kind, row in ours.items())
    yield f"{run['model']} to ONNX, seconds", seconds, f"Optimum, fp32: {optimum['seconds']:.0f}", command
    peaks = ", ".join(f"{kind} {shown(row['peak_bytes'])}" for kind, row in ours.items())
    yield "the same, memory", peaks, f"Optimum, fp32: {shown(optimum['peak_bytes'])}", command
    runs = (run for run in results("onnx", " predicted ") if run.get("backend", "onnx") == "onnx")
    *_, last = (run["rows"][-1] for run in runs)
    figures = f"median {last['median_error']:.1%}, worst {last['worst_error']:.1%} off"
    title = f"predicted against measured growth of the process, {last['plans']} plans of sd15 on ONNX Runtime"
    yield title, figures, "", "`… onnx predicted …`"


def emoji_rows() -> Iterator[tuple[str, str, str, str]]:
    ablation = {row["variant"]: row for row in results("ablation")}

    def figures(variant: str) -> str:
        row = ablation[variant]
        return f"{row['median']:.1f}, {row['tenth']:.1f} dB, {row['unet_bits']:.2f} bits"

    title, command = "emoji, 200 prompts, against fp32 (median, tenth percentile)", "`… ablation WORK`"
    int8 = figures("int8 recipe: delicate layers in groups of 64")
    linears = figures("bitsandbytes int8 (linears only)")
    yield f"{title}: int8", int8, f"bitsandbytes int8, linears only: {linears}", command
    calibrated = figures("int4 calibrated (both), 5.0 bits")
    nearest, nf4 = figures("int4 round to nearest, groups of 64"), figures("bitsandbytes NF4 (linears only)")
    yield "the same: int4, calibrated", calibrated, f"round to nearest: {nearest}; NF4: {nf4}", command
    yield "the same: int4, data-free", figures("int4 recipe: delicate layers and VAE int8"), "", command
    yield from start_rows()
    last = results("emoji")[-1]
    match = f"{last['top1']:.0%} top-1, {last['top5']:.0%} top-5"
    autoencoder = f"autoencoder {last['autoencoder_psnr']:.1f} dB"
    title = f"emoji: prompt match of {last['labels']} labels; autoencoder on {last['pictures']} pictures"
    yield title, f"{match}; {autoencoder}", "", "`… emoji WORK`"


def start_rows() -> Iterator[tuple[str, str, str, str]]:
    """Whole processes, beside one that imports torch and ends."""
    line = recorded("start")[-1]
    run = line["results"]
    rows = {row["what"]: row for row in run["rows"]}
    names = start.PAINT, start.PLANNED, start.CONNECTED, start.PLAN, start.HELP
    ours = [f"{name} {rows[name]['ratio']:.2f}" for name in names]
    torch = f"{rows[start.TORCH]['seconds']:.2f} s"
    title = (
        f"a process, of one that imports torch and ends ({torch}){elsewhere(line)}; plans of {run['model']}"
    )
    theirs = f"the same picture by diffusers {rows[start.THEIRS]['ratio']:.2f}"
    yield title, ", ".join(ours), theirs, f"`… start {run['model']}`"
    yield "the same: memory beside what it paints with", shown(rows[start.PROCESS]["bytes"]), "", "the same"


if __name__ == "__main__":
    main()
