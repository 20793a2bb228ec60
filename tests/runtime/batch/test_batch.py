"""A table becomes a folder of pictures: each once, as it is alone; whatever ends it, the same command goes
on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tightfit
from PIL import Image
from tightfit.__main__ import app
from tightfit.runtime import infotext
from tightfit.runtime.batch import ledger, painting, running
from tightfit.runtime.batch.ledger import FILE, Ledger
from tightfit.runtime.batch.report import Report
from tightfit.runtime.batch.requests import Reading
from tightfit.runtime.errors import TightfitError
from typer.testing import CliRunner

ONE_WAY = [
    "--device", "cpu", "--precision", "fp32", "--residency", "resident", "--attention", "sdpa",
    "--tiling", "whole", "--width", "64", "--height", "64", "--steps", "2",
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"prompt": "a red heart", "seed": "1..3"},
    {"prompt": "a cat", "seed": 7, "height": [64, 96], "name": "cats/cat"},
    {"prompt": "a cat, (night:1.3)", "negative_prompt": "day", "seed": 7, "scheduler": "euler_a"},
    {"prompt": "a dog", "seed": 9, "num_images": 2, "width": 96},
    {"prompt": "a red heart", "seed": 2},  # as one before
]  # of 9 pictures
PICTURES = 9


@pytest.fixture
def table(tmp_path) -> Path:
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "t.jsonl"


def batch(table: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """Run the command and answer its report."""
    arguments = ["batch", str(table), "-o", str(table.parent / "d"), *ONE_WAY, *more, "--json"]
    result = CliRunner().invoke(app(), arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def files(table: Path) -> dict[str, str]:
    """The pictures that there are, by their places, and their hashes."""
    folder = table.parent / "d"
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.*g"))
    }


def agrees(table: Path) -> None:
    """Ledger and folder say the same, and no half file is left."""
    with closing(sqlite3.connect(table.parent / "d" / FILE)) as ledger:
        known = dict(ledger.execute("select file, sha256 from pictures where state = 'done'").fetchall())
    assert known == files(table)
    assert not [*(table.parent / "d").rglob("*.partial")]


def test_each_picture_is_as_it_is_alone_and_once(table):
    report = batch(table)
    assert (report["pictures"], report["done"], report["painted"]) == (PICTURES,) * 3
    agrees(table)
    records = report["records"]
    assert {one["file"]: one["sha256"] for one in records} == files(table)
    assert sorted(one["seed"] for one in records) == [1, 2, 2, 3, 7, 7, 7, 9, 10]
    took = [one for one in records if one["seconds"] is not None]
    assert report["painting_seconds"] == pytest.approx(sum(one["seconds"] for one in took))
    assert report["peak_bytes"] == max(one["peak_bytes"] for one in took)
    slowest = report["slowest"]
    assert slowest[0]["seconds"] == max(one["seconds"] for one in took)
    assert len({(one["seconds"], one["plan"]) for one in slowest}) == len(slowest) > 1  # a run once
    seeds = {one["file"]: one["seed"] for one in records}
    assert all(one["seed"] == seeds[one["file"]] for one in slowest)
    assert {"cats/cat-1.png", "cats/cat-2.png"} <= files(table).keys()
    with closing(sqlite3.connect(table.parent / "d" / FILE)) as ledger:
        plans = [plan for (plan,) in ledger.execute("select plan from pictures where plan is not null")]
    assert any("2 pictures a call" in plan for plan in plans)
    with tightfit.load(
        device="cpu", precision="fp32", residency="resident", attention="sdpa", tiling="whole"
    ) as pipe:
        for file in files(table):
            made = Image.open(table.parent / "d" / file)
            carried = infotext.parse(made.text["parameters"], file)
            alone = pipe(**carried.request)
            assert alone.size == made.size
            assert np.abs(np.asarray(made, int) - np.asarray(alone, int)).max() <= 1, file
    before = files(table)
    assert batch(table)["painted"] == 0
    assert files(table) == before


def test_people_are_told_which_picture_was_slowest():
    slowest = [{"file": "a.png", "row": 3, "seconds": 1.5, "together": 4}]
    slowest += [{"file": "b.png", "row": 1, "seconds": 0.5, "together": 1}]
    sums = {"seconds": 6.5, "predicted_seconds": 6.0, "peak_bytes": 1, "joules": None, "joules_pictures": 0}
    said = Report({"done": 5}, 5, 7.0, sums, slowest, [], None).lines()
    assert any(
        line.endswith("slowest: a.png (row 3 and 3 with it) 1.5 s, b.png (row 1) 0.5 s") for line in said
    )


def test_a_changed_table_and_a_lost_file(table):
    batch(table)
    before = files(table)
    lost = next(iter(before))
    pixels = np.asarray(Image.open(table.parent / "d" / lost), int)
    (table.parent / "d" / lost).unlink()
    known = (table.parent / "d" / FILE).read_bytes()
    assert batch(table, "--dry-run")["pictures"] == 1
    assert (table.parent / "d" / FILE).read_bytes() == known
    table.write_text('{"prompt": "a", "seed": "x"}')
    with pytest.raises(TightfitError, match="row 1: seed"):
        batch(table)
    assert files(table).items() == (kept := before.items() - {(lost, before[lost])})
    table.write_text("\n".join(map(json.dumps, [{"prompt": "new", "seed": 1}, *ROWS[:3]])))
    report = batch(table)
    assert (report["pictures"], report["painted"]) == (PICTURES - 2, 2)
    assert kept <= files(table).items()
    again = np.asarray(Image.open(table.parent / "d" / lost), int)
    assert np.abs(again - pixels).max() <= 1  # beside another now, and so rounded otherwise
    agrees(table)


def test_twins_in_a_format_without_text(table):
    """The copy is the file's bytes: it has no text that could name it."""
    table.write_text("\n".join(map(json.dumps, [{"prompt": "cat", "seed": 1}] * 2)))
    url = f"memory://{table.parent}/there"
    batch(table, "--format", "jpeg", "--metadata", "none", "--upload", url)
    there, root = fsspec.core.url_to_fs(url)
    uploaded = {name.removeprefix(f"{root}/"): there.cat_file(name) for name in there.find(root)}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in uploaded.items()} == files(table)
    assert len(files(table)) == 2 and len({*files(table).values()}) == 1
    agrees(table)


def test_a_name_behind_a_file_fails_alone(table):
    folder = table.parent / "d"
    folder.mkdir()
    (folder / "file").write_text("in the way")
    rows = [{"prompt": "cat", "seed": 1, "name": "file/x"}, {"prompt": "cat", "seed": 2}]
    table.write_text("\n".join(map(json.dumps, rows)))
    report = batch(table, code=1)
    assert report["done"] == 1 and "name it otherwise" in report["failures"][0]["error"]


def test_a_poisoned_row_fails_alone(table, monkeypatch):
    run = painting.Here._run

    def poisoned(self, pairs, made):
        for news in run(self, pairs, made):
            if any(item.options["seed"] == 2 for item, _ in pairs) and not isinstance(news, painting.Stepped):
                raise RuntimeError("poison\nand more")
            yield news

    monkeypatch.setattr(painting.Here, "_run", poisoned)
    report = batch(table, "--retries", "1", code=1)
    assert report["done"] == PICTURES - 2
    assert sum(one["error"] == "poison" for one in report["records"]) == 1
    assert [(one["row"], one["error"]) for one in report["failures"]] == [
        (1, "poison"), (5, "it is the same as one that failed"),
    ]  # fmt: skip
    with pytest.raises(running.FailedError, match="row 1: poison"):
        CliRunner().invoke(
            app(), ["batch", str(table), "-o", str(table.parent / "d"), *ONE_WAY, "--fail-fast"],
            catch_exceptions=False,
        )  # fmt: skip
    monkeypatch.undo()
    assert batch(table)["done"] == PICTURES
    agrees(table)


@pytest.mark.parametrize("ends", ["disk", "interrupt"])
def test_the_same_command_goes_on(table, monkeypatch, ends):
    write, count = ledger.written, 0

    def failing(file, content):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt if ends == "interrupt" else ledger.UnkeptError("no space left")
        write(file, content)

    monkeypatch.setattr(ledger, "written", failing)
    with pytest.raises(BaseException, match="no space left" if ends == "disk" else "."):
        batch(table)
    monkeypatch.undo()
    agrees(table)
    there = files(table)
    assert len(there) >= 2
    report = batch(table)
    assert report["done"] == PICTURES
    assert report["painted"] == PICTURES - len(there)
    assert there.items() <= files(table).items()
    agrees(table)


def test_what_runs_nowhere_is_said_before_any_work(table):
    table.write_text(
        '{"prompt": "c", "model": "no-such-model"}\n{"prompt": "b"}\n{"prompt": "a", "width": 60}'
    )
    result = CliRunner().invoke(app(), ["batch", str(table), "-o", str(table.parent / "d"), *ONE_WAY])
    said = f"{result.stderr}{result.exception}"
    assert "row 3: width 60 is not a multiple of 8" in said
    assert 0 <= said.find("row 1: ") < said.index("row 3: ")  # in the table's order
    assert not (table.parent / "d").exists()


def test_a_dry_run_says_what_would_run_and_makes_nothing(table):
    said = batch(table, "--dry-run", "--price", "3600/h")
    assert said["pictures"] == PICTURES - 1  # of the twin there is nothing to paint
    assert said["cost"] == pytest.approx(said["seconds"])
    assert not (table.parent / "d").exists()


def test_what_was_painted_when_the_process_ended_is_counted_and_begun_alone(tmp_path):
    """Whatever of it ends processes fails alone."""
    asked = [(n, {"prompt": "a heart", "seed": n}) for n in range(1, 9)]
    poison, painted = 3, []
    for start in range(4):
        with Ledger(tmp_path) as ledger:
            assert not ledger.ask(Reading().pictures(iter(asked)))
            begun_again = ledger.resume()
            assert begun_again == [0, 4, 1, 0][start]
            group = next(iter(ledger.groups()), (0, 0))[0]
            while items := ledger.take(group, 4):
                seeds = [item.options["seed"] for item in items]
                if poison in seeds:
                    break  # the process is killed
                painted.append(seeds)
                for item in items:
                    ledger.write(item, tmp_path / f"{item.number}.png", b"x")
    assert painted == [[5, 6, 7, 8], [1], [2], [4]]
    with closing(sqlite3.connect(tmp_path / FILE)) as earlier:  # as a version had it that knew no energy
        earlier.execute("alter table pictures drop column joules")
    with Ledger(tmp_path) as ledger:
        ledger.ask(Reading().pictures(iter(asked)))
        assert ledger.sums(0)["joules_pictures"] == 0
        assert ledger.counts() == {"done": 7, "failed": 1}
        assert ledger.failures() == [(3, "the process ended while it was painted, 3 times")]


def test_a_folder_is_of_one_process_at_a_time(table):
    from tightfit.runtime.database import UnkeptError

    with (
        Ledger(table.parent / "d"),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UnkeptError, match="another tightfit batch"),
    ):
        connect = sqlite3.connect
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0}))
        Ledger(table.parent / "d")
