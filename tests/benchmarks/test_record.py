"""What a measurement says of the machine it was made on, and what a colour means on the page of
measurements."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from tightfit.benchmarks import readme, record, report
from tightfit.runtime.placement import PRECISIONS

FOLDER = re.compile(r"(^|[\s=,'\"])(/|~|\.\.?[/\\]|[A-Za-z]:[/\\])")


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/srv/models/emoji", "emoji"),
        ("../sdxl", "sdxl"),
        ("~/models/sd15/", "sd15"),
        (r"C:\models\sd15", "sd15"),
        ("/my models/of mine", "of mine"),
        ("/models/sd15:256", "sd15:256"),
        ("--work=/tmp/x", "--work=x"),
        ("/a/p.json,/b/q.json", "p.json,q.json"),
        ("sd15", "sd15"),
        ("owner/name", "owner/name"),
        ("folder/model", "folder/model"),
        ("int4 (linears only), /8", "int4 (linears only), /8"),
        ("512x768", "512x768"),
    ],
)
def test_commands_name_no_folder_of_the_machine(argument, kept, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/root/tightfit/benchmarks/sizes.py", argument, "--size", "64"])
    assert shlex.split(record.command()) == [
        "python",
        "-m",
        "tightfit.benchmarks.sizes",
        kept,
        "--size",
        "64",
    ]


def test_stored_commands_name_no_folder_of_the_machine():
    rows = [
        json.loads(line)
        for file in sorted((readme.ROOT / "benchmarks" / "results").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) > 100
    assert [row["command"] for row in rows if FOLDER.search(row["command"])] == []


def test_stored_rows_name_no_folder_of_the_machine():
    """Whatever a model is called in them: `../sdxl` is sdxl."""
    places = []

    def look(value, key=""):
        if isinstance(value, dict):
            places.extend(name for name in value if FOLDER.match(name))
            for name, each in value.items():
                look(each, name)
        elif isinstance(value, list):
            for each in value:
                look(each, key)
        elif isinstance(value, str) and key in ("model", "contender", "what") and FOLDER.match(value):
            places.append(value)

    for file in sorted((readme.ROOT / "benchmarks" / "results").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            look(json.loads(line))
    assert places == []


def test_models_are_named_without_their_folders():
    for place, name in (
        ("../sdxl", "sdxl"),
        ("/srv/sd15:512", "sd15:512"),
        ("owner/name", "owner/name"),
        ("emoji", "emoji"),
    ):
        assert record.named(place) == name


def test_a_rehearsal_leaves_the_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "benchmarks" / "record.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.delenv("OUT", raising=False)
    setup = {"command": "x"}
    assert record.record("a", 1, setup).parent == tmp_path / "benchmarks" / "results"
    kept = record.record("b", 1, setup, rehearsal=True)
    assert kept.is_relative_to(tmp_path / "cache")
    assert [file.name for file in (tmp_path / "benchmarks" / "results").iterdir()] == ["a.jsonl"]
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert record.record("b", 1, setup, rehearsal=True).parent == tmp_path / "out"


def row(precision: str, backend: str, pace: float) -> dict:
    unet = {"precision": precision, "backend": backend}
    stages = {name: {"peak_bytes": 2**20, "seconds": [pace / 3]} for name in ("encode", "denoise", "decode")}
    predicted = {"stages": dict.fromkeys(stages, 2**20), "seconds": pace, "peak_bytes": 2**20}
    plan = {"placements": {"unet": unet}, "predicted": predicted}
    return {
        "summary": f"{backend} {precision}", "plan": plan, "key": precision + backend,
        "reference": "fp32torch",
        "peak_bytes": 2**20, "seconds": [pace], "runs": [pace], "stages": stages, "outcome": "ok",
        "quality": {"psnr": 40.0, "lpips": 0.1, "ssim": 0.9}, "warmup_seconds": 1.0, "process_bytes": 2**21,
    }  # fmt: skip


def meanings(page: str) -> dict[str, set[str]]:
    """Which kinds each colour stands for, by all legends of a page."""
    found: dict[str, set[str]] = {}
    for colour, kind in re.findall(r'<li><span class="([\w ]+)"></span>([^<]+)</li>', page):
        found.setdefault(colour, set()).add(kind)
    return found


def test_a_colour_means_one_thing():
    """On all plots of a page, and on two pages: the order of the rows and which of them ran make no
    difference."""
    every = [
        row(precision, backend, 1.0 + i)
        for i, precision in enumerate(PRECISIONS)
        for backend in ("torch", "onnx")
    ]
    whole, few = meanings(report._plots(every)), meanings(report._plots(every[:5:-2]))
    assert len(whole) == 2 * len(PRECISIONS) + 3
    assert all(len(kinds) == 1 for kinds in whole.values())
    assert {colour: whole[colour] for colour in few} == few
    drawn = report._plots(every)
    for colour, kinds in whole.items():
        (kind,) = kinds
        classes = colour.split()
        assert all(f".{name} {{" in report._STYLE or f".{name} " in report._STYLE for name in classes), colour
        if kind in PRECISIONS:
            circles = re.findall(rf'<circle class="{colour}" [^>]*><title>(\w+) (\S+):', drawn)
            assert {(engine, precision) for engine, precision in circles} == {("torch", kind)}
