"""The README's tables, made from benchmarks/results/*.jsonl:

    python -m tightfit.benchmarks.readme            # write them
    python -m tightfit.benchmarks.readme --check    # exit code 1 if they are not what the results say

Rows in which we lose, or do not fit, stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..runtime.cli.output import write
from ..runtime.units import shown
from . import suite
from .compare import seconds, spread
from .peers.__main__ import REFERENCE, contenders

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- made by python -m tightfit.benchmarks.readme -->", "<!-- until here -->"
Row = dict[str, Any]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true")
    args = parse.parse_args()
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    new = replaced(text)
    if args.check:
        sys.exit(0 if new == text else "README.md is stale: run python -m tightfit.benchmarks.readme")
    write(file, new.removesuffix("\n"))


def replaced(text: str) -> str:
    """The README with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{peers()}\n{plans()}\n{details()}\n{END}{after}"


def results(name: str, contains: str = "") -> list[Any]:
    """What NAME.jsonl has of commands that contain a text, the newest last."""
    lines = map(json.loads, (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["results"] for line in lines if contains in line["command"] + " "]


def table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *rows]) + "\n"


def whole_peers() -> Row:
    """The newest run of all contenders."""
    names = {contender.name for contender in contenders("cpu")}
    return next(found for found in reversed(results("peers")) if found["rows"].keys() >= names)


def peers() -> str:
    """Each contender beside diffusers in bf16, least memory first."""
    found = whole_peers()
    base, rows = found["rows"]["diffusers bf16"], []
    for name, row in sorted(found["rows"].items(), key=lambda item: item[1].get("peak_bytes", 0)):
        if "failed" in row:
            rows.append(f"| {name} | failed: {row['failed']} | | | |")
            continue
        memory, pace = row["peak_bytes"] / base["peak_bytes"], row["step_seconds"] / base["step_seconds"]
        bold = "**" if name.startswith("tightfit") else ""
        peak, step = f"{shown(row['peak_bytes'])}, {memory:.2f}", f"{row['step_seconds']:.2f} s, {pace:.2f}"
        decibels = f"{row['psnr']:.0f} dB" if "psnr" in row else ""
        decibels += f" ({row['like']})" if "like" in row and row["like"] != REFERENCE else ""
        rows.append(f"| {bold}{name}{bold} | {peak} | {step} | {row['seconds']:.1f} s | {decibels} |")
    title = (
        f"**{found['model']}**, {found['size']}×{found['size']}, {found['steps']} steps, the same weights, prompt and guidance, "
    )
    title += f"{found['rounds']} rounds in turns (`python -m tightfit.benchmarks.peers sd15 WORK`):"
    head = f"| | process, of bf16 of diffusers | a step, of the same | from start to picture | PSNR beside {REFERENCE} |"
    return f"{title}\n\n{table(head, rows)}"


def plans() -> str:
    """What `tightfit bench` measured, by model and size."""
    rows = sorted(suite.rows(suite.read(RESULTS / "bench.jsonl")), key=group)
    return "\n".join(of_model(list(own)) for _, own in groupby(rows, key=group))


def group(row: Row) -> tuple[Any, ...]:
    return Path(row["model"]).name, *row["request"].values(), row["hardware"]["name"], row["hardware"]["threads"]


def of_model(rows: list[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: seconds(row) if row["outcome"] == "ok" else float("inf")):
        if row["outcome"] != "ok":
            lines.append(f"| {row['summary']} | {row['outcome']} | | | | |")
            continue
        told, quality = row["plan"]["predicted"], row["quality"] or {}
        pace = f"{seconds(row):.3g} ± {spread(row):.2g} s ({told['seconds']:.3g})"
        peak = f"{shown(row['peak_bytes'])} ({told['peak_bytes'] / row['peak_bytes'] - 1:+.1%})"
        exact = row["key"] == row["reference"]
        judged = "exact" if exact else f"{quality['psnr']:.0f} dB, {quality['ms_ssim']:.4f}" if quality else ""
        judged += f", {quality['match']:.0%}" if "match" in quality else ""
        lines.append(
            f"| {row['summary']} | {pace} | {peak} | {shown(row['process_bytes'])} | {shown(row['disk_bytes'])} | {judged} |"
        )
    first = next((row for row in rows if row["outcome"] == "ok"), rows[0])
    request, runs = first["request"], len(first.get("runs", ()))
    command = first["command"].replace(first["model"], Path(first["model"]).name)
    size = f"{request['width']}×{request['height']}, {request['steps']} steps"
    title = f"**{Path(first['model']).name}**, {size}, {runs} processes a plan"
    match = ", prompt match" if "match" in (first.get("quality") or {}) else ""
    head = "| | a picture (predicted) | peak of its tensors (predicted) | of the process | on disk | PSNR, MS-SSIM against fp32"
    return f"{title} (`{command}`):\n\n{table(head + match + ' |', lines)}"


def details() -> str:
    rows = [f"| {' | '.join(row)} |" for row in (*torch_rows(), *onnx_rows(), *emoji_rows())]
    return "**The rest**:\n\n" + table("| | tightfit | others | command |", rows)


def torch_rows() -> Iterator[tuple[str, str, str, str]]:
    cells = [value for each in results("parity")[-1].values() for value in each.values()]
    same = f"identical in {cells.count('identical')} of {len(cells)}"
    yield "fp32 pictures of four models, six schedulers, beside diffusers'", same, "", "`… parity FOLDER…`"
    newest = {json.dumps([row[k] for k in ("model", "residency", "attention", "tiling", "cfg", "stage")] + [row["predicted"]]): row
              for each in results("predicted") for row in each["rows"]}  # fmt: skip
    large = [abs(row["predicted"] / row["measured"] - 1) for row in newest.values() if row["measured"] > 2 * 2**20]
    figures = f"median {statistics.median(large):.1%}, worst {max(large):.1%} off"
    yield f"predicted against measured peak of {len(large)} stages above 2 MiB", figures, "", "`… predicted emoji:128 sd15:512 …`"
    for name, ram in (("sd15", ""), ("sd15", "1.5GiB"), ("sdxl", ""), ("sdxl", "2GiB")):
        own = [each for each in results("memory") if Path(each["model"]).name == name and (each.get("ram") or "") == ram][-1]
        ours, theirs = (f"{shown(own[who]['peak_bytes'])}, {own[who]['seconds']:.1f} s" for who in ("tightfit", "diffusers"))
        budget = f", `--ram {ram}`" if ram else ""
        yield (
            f"process of {name} in bf16, 512×512, {own['steps']} steps{budget}",
            ours,
            f"{theirs} (diffusers)",
            f"`… memory {name}`",
        )
    sizes = {(Path(row["model"]).name, row["precision"]): row for row in results("sizes")[-1]}
    for name in ("sd15", "sdxl"):
        kinds = [f"{sizes[f'{name}_{kind}', kind]['unet disk']:.2f}" for kind in ("int8", "int4")]
        fp16, nf4 = (sizes[name, kind]["unet disk"] for kind in ("fp16", "bitsandbytes nf4"))
        others = f"{fp16:.2f} GB fp16, {nf4:.2f} bitsandbytes NF4"
        yield f"U-Net of {name} on disk, int8, int4", f"{' and '.join(kinds)} GB", others, "`… sizes FOLDER…`"
    steps = results("steps")[-1]["rows"]
    ratios = ", ".join(
        f"{name.split(':')[-1].removeprefix('sd15_')} {row['ratio']:.2f}" for name, row in steps.items() if name != "sd15"
    )
    yield "a U-Net call of sd15, 512×512, of our bf16's", ratios, f"bf16 {steps['sd15']['seconds']:.2f} s", "`… steps FOLDER…`"


def onnx_rows() -> Iterator[tuple[str, str, str, str]]:
    found = whole_peers()
    exports, command = found["exports"], f"`… peers {found['model']} WORK`"
    ours, theirs = {kind: exports[f"onnx-{kind}"] for kind in ("fp32", "fp16", "int8", "int4")}, exports["optimum"]
    seconds = ", ".join(f"{kind} {row['seconds']:.0f}" for kind, row in ours.items())
    yield f"{found['model']} to ONNX, seconds", seconds, f"Optimum, fp32: {theirs['seconds']:.0f}", command
    peaks = ", ".join(f"{kind} {shown(row['peak_bytes'])}" for kind, row in ours.items())
    yield "the same, memory", peaks, f"Optimum, fp32: {shown(theirs['peak_bytes'])}", command
    last = results("onnx", " predicted ")[-1]["rows"][-1]
    figures = f"median {last['median_error']:.1%}, worst {last['worst_error']:.1%} off"
    yield (
        f"predicted against measured growth of the process, {last['plans']} plans of sd15 on ONNX Runtime",
        figures,
        "",
        "`… onnx predicted …`",
    )


def emoji_rows() -> Iterator[tuple[str, str, str, str]]:
    ablation = {row["variant"]: row for row in results("ablation")}

    def figures(variant: str) -> str:
        row = ablation[variant]
        return f"{row['median']:.1f}, {row['tenth']:.1f} dB, {row['unet_bits']:.2f} bits"

    nearest, nf4 = figures("int4 round to nearest, groups of 64"), figures("bitsandbytes NF4 (linears only)")
    what, command = "emoji, 200 prompts, against fp32 (median, tenth percentile)", "`… ablation WORK`"
    whole = figures("bitsandbytes int8 (linears only)")
    yield (
        f"{what}: int8",
        figures("int8 recipe: delicate layers in groups of 64"),
        f"bitsandbytes int8, linears only: {whole}",
        command,
    )
    yield (
        "the same: int4, calibrated",
        figures("int4 calibrated (both), 5.0 bits"),
        f"round to nearest: {nearest}; NF4: {nf4}",
        command,
    )
    yield "the same: int4, data-free", figures("int4 recipe: delicate layers and VAE int8"), "", command
    last = results("emoji")[-1]
    match = f"{last['top1']:.0%} top-1, {last['top5']:.0%} top-5; autoencoder {last['autoencoder_psnr']:.1f} dB"
    yield f"emoji: prompt match of {last['labels']} labels; autoencoder on {last['pictures']} pictures", match, "", "`… emoji WORK`"


if __name__ == "__main__":
    main()
