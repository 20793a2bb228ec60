"""`tightfit bench`: each plan in a process of its own, rows that can be gone on from, compared and looked at."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from PIL import Image
from tightfit.benchmarks import compare, metrics, plots, report, suite
from tightfit.runtime import planner
from tightfit.runtime.cli import app
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.hardware import Hardware
from tightfit.runtime.hub import inspect
from tightfit.runtime.plan import Wishes
from tightfit.runtime.request import Request
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def measured(tiny_models, tmp_path_factory):
    """The tiny SD 1.x in fp32 and int8, two pictures each, and a plan that no memory is enough for: the folder, and its rows."""
    folder, spec, here = tmp_path_factory.mktemp("bench"), inspect(str(tiny_models["sd1"])), Hardware.detect("cpu")
    effort, request = suite.Effort(steps=2, pictures=2), Request("a", scheduler="euler").resolve(spec)
    plans = [planner.plan(here, spec, request, Wishes(precision=each))[0] for each in ("fp32", "int8")]
    plans += planner.plan(here, spec, request, Wishes(precision="bf16", budget="1MiB"))[:1]
    jobs = suite.jobs(spec, plans, request, effort)
    return folder, list(suite.measured(jobs, folder, "tightfit bench", lambda _: None))


def test_rows_say_all(measured):
    folder, rows = measured
    assert [row["outcome"] for row in rows] == ["ok", "ok", "does not fit"]
    exact, int8, unfit = rows
    assert "too much" in unfit["why"]
    assert exact["plan"]["placements"]["unet"]["precision"] == "fp32"
    assert exact["reference"] == int8["reference"] == exact["key"]
    assert exact["quality"]["psnr"] == metrics.MOST_PSNR
    for number, row in enumerate((exact, int8)):
        assert len(row["seconds"]) == 2
        for stage in ("encode", "denoise", "decode"):
            predicted = row["plan"]["predicted"]["stages"][stage]
            assert predicted == pytest.approx(row["stages"][stage]["peak_bytes"], rel=0.05), (number, stage)
        assert row["process_bytes"] > 100 * 2**20
    pairs = [[Image.open(folder / "pictures" / row["key"] / f"{i}.png") for i in range(2)] for row in (int8, exact)]
    assert int8["quality"]["psnr_worst"] == pytest.approx(min(map(metrics.psnr, *pairs)), abs=1e-3)
    assert rows == suite.read(folder / "results.jsonl")
    json.dumps(rows, allow_nan=False)


def test_out_of_memory_is_a_row(measured, monkeypatch):
    """Whether the pipeline says so, or the system ends the process."""
    folder, rows = measured
    spec, here = inspect(rows[0]["model"]), Hardware.detect("cpu")
    plan = planner.plan(here, spec, None, Wishes(precision="fp32"))[0]
    (job,) = suite.jobs(spec, [plan], Request("a", scheduler="euler").resolve(spec), suite.Effort(1, 1))
    for code, out in ((-9, ""), (0, json.dumps({"outcome": "out of memory", "why": "there was none"}))):
        answer = subprocess.CompletedProcess([], code, out, "")
        monkeypatch.setattr(suite.subprocess, "run", lambda *_, answer=answer, **__: answer)
        assert suite.run(job, folder / "pictures")["outcome"] == "out of memory"
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "Trace\nKeyError: 'x'"))
    assert suite.run(job, folder / "pictures") == {"outcome": "failed", "why": "KeyError: 'x'"}


def test_the_same_command_goes_on(tiny_models, tmp_path):
    """What the folder has is not measured again, unless that is asked for."""
    arguments = ["bench", "--model", str(tiny_models["sd1"]), "--steps", "1", "--pictures", "1", "--device", "cpu"]
    arguments += ["--precision", "fp32", "--plans", "quick", "-o", str(tmp_path / "out"), "--report", str(tmp_path / "page.html")]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    rows = suite.read(tmp_path / "out" / "results.jsonl")
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"{len(rows)} of {len(rows)} plans are in" in again.output
    assert suite.read(tmp_path / "out" / "results.jsonl") == rows
    CliRunner().invoke(app, [*arguments, "--again"], catch_exceptions=False)
    assert len(suite.read(tmp_path / "out" / "results.jsonl")) == 2 * len(rows)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--hardware", "rtx-2060"], "tightfit plan --hardware rtx-2060"),
        (["--sizes", "64,big"], "pixels such as 256,512x768, not 'big'"),
        (["--pictures", "0"], "from 1 up"),
        (["--plans", "nowhere.json"], "nowhere.json cannot be read"),
        (["--ram", "1MiB"], "does not fit"),
    ],
)
def test_what_cannot_be_measured(tiny_models, tmp_path, arguments, cure):
    with pytest.raises(TightfitError, match=cure):
        CliRunner().invoke(
            app, ["bench", "--model", str(tiny_models["sd1"]), "-o", str(tmp_path), *arguments], catch_exceptions=False
        )


def test_choosing(tiny_models):
    spec, here = inspect(str(tiny_models["sd1"])), Hardware.detect("cpu")
    plans = suite.candidates(here, spec, Request("a").resolve(spec), {})
    every, best, quick = (suite.choose(plans, which) for which in ("all", "auto", "quick"))
    assert len(every) > len(best) > 2
    assert not any(plan.reason.startswith("is refused") for plan in every)
    for plan in best:  # no other is at least as good in all three and better in one
        told = plan.predicted
        for other in every:
            less = (
                told.seconds - other.predicted.seconds,
                told.peak_bytes - other.predicted.peak_bytes,
                other.predicted.psnr - told.psnr,
            )
            assert not (min(less) >= 0 and max(less) > 0)
    assert len({plan.precision for plan in quick}) == len(quick) == len({plan.precision for plan in every if plan.fits})
    fastest = min((plan for plan in every if plan.precision == "bf16"), key=lambda plan: plan.predicted.seconds)
    assert fastest.predicted.seconds == next(plan for plan in quick if plan.precision == "bf16").predicted.seconds


def slower(row, factor):
    changed = deepcopy(row)
    changed["seconds"] = [factor * each for each in row["seconds"]]
    return changed


def test_comparison_beyond_noise(measured):
    row = deepcopy(measured[1][0])
    row["seconds"] = [1.0, 1.1, 1.2]
    assert compare.changes(row, slower(row, 1.05)) == []  # overlapping
    (change,) = compare.changes(row, slower(row, 2.0))
    assert (change.what, change.better, change.before, change.after) == ("seconds", False, "1.10 s", "2.20 s")
    assert compare.changes(slower(row, 2.0), row)[0].better
    larger = row | {"peak_bytes": int(row["peak_bytes"] * 1.02), "quality": row["quality"] | {"psnr": 40.0}}
    assert [(each.what, each.better) for each in compare.changes(row, larger)] == [("peak bytes", False), ("PSNR", False)]
    gone = row | {"outcome": "out of memory"}
    assert [(each.what, each.better) for each in compare.changes(row, gone)] == [("outcome", False)]
    assert [(each.what, each.better) for each in compare.changes(gone, row)] == [("outcome", True)]


def test_compare_command(measured, tmp_path):
    rows = [row | ({"seconds": [1.0, 1.1]} if row["outcome"] == "ok" else {}) for row in measured[1]]
    before, after, elsewhere = (tmp_path / name for name in ("before.jsonl", "after.jsonl", "elsewhere.jsonl"))
    before.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = [slower(row, 3.0) if row["outcome"] == "ok" else row for row in rows[:2]]
    after.write_text("".join(json.dumps(row) + "\n" for row in changed))
    same = CliRunner().invoke(app, ["bench", "compare", str(before), str(before)], catch_exceptions=False)
    assert same.exit_code == 0
    assert "3 plans in both, 0 in one only: 0 figures worse, 0 better" in same.output
    worse = CliRunner().invoke(app, ["bench", "compare", str(before), str(after)], catch_exceptions=False)
    assert worse.exit_code == 1
    assert "2 plans in both, 1 in one only: 2 figures worse, 0 better" in worse.output
    better = CliRunner().invoke(app, ["bench", "compare", str(after), str(before)], catch_exceptions=False)
    assert better.exit_code == 0
    for row in changed:
        row["hardware"] = row["hardware"] | {"name": "another"}
    elsewhere.write_text("".join(json.dumps(row) + "\n" for row in changed))
    merged = CliRunner().invoke(app, ["bench", "compare", str(before), str(elsewhere), str(after)], catch_exceptions=False)
    assert merged.exit_code == 0
    assert "(another)" in merged.output
    assert "does not fit | – | –" in merged.output


def test_results_of_others_are_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    for text, cure in (("nonsense", "line 1 of .* is no result"), ('{"version": 99}', "version 99"), ('{"version": 1}', "line 1")):
        file.write_text(text + "\n")
        with pytest.raises(TightfitError, match=cure):
            suite.read(file)


class Tags(HTMLParser):
    """Which are open, and how many of each there were."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "img", "path", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle", "rect", "polyline"):
            assert self.open.pop() == tag


def test_page_is_whole(measured):
    folder, rows = measured
    page = report.page(rows, folder / "pictures")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.count["svg"] == 5
    assert tags.count["img"] == 3  # two pictures and one difference
    assert tags.count["circle"] == 2 + 2 + 6 + 2
    assert 'src="http' not in page and "href=" not in page
    assert "does not fit" in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_page_in_a_browser(measured, tmp_path):
    """As drawn: every circle lies within its plot, and nothing is wider than the window."""
    folder, rows = measured
    script = """<script>
      const inside = [...document.querySelectorAll("circle")].every(each => {
        const a = each.getBoundingClientRect(), b = each.ownerSVGElement.getBoundingClientRect();
        return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
      });
      const loaded = [...document.images].every(each => each.naturalWidth > 0);
      document.title = JSON.stringify([inside, loaded, document.documentElement.scrollWidth <= window.innerWidth]);
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(report.page(rows, folder / "pictures").replace("</body>", script))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800", "--dump-dom", file.as_uri()]
    dom = subprocess.run(browser, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<title>[true,true,true]</title>" in dom


def test_axes():
    linear = plots.axis("x", [3.0, 7.0], str)
    assert (linear.low, linear.logarithmic) == (0.0, False)
    assert linear.ticks() == [0, 2, 4, 6]
    wide = plots.axis("x", [0.5, 900.0], str)
    assert wide.logarithmic
    assert all(math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9) for tick in wide.ticks())
    assert [plots.axis("x", [1.0, 100.0], str).place(value) for value in (0.8, 125)] == pytest.approx([0, 1])
    assert plots.axis("x", [0.0], str).ticks()


def test_front():
    def row(peak, seconds):
        return {"peak_bytes": peak, "seconds": [seconds]}

    assert report.front([row(3, 1.0), row(1, 5.0), row(2, 6.0), row(2, 2.0), row(4, 1.0)]) == [(1, 5.0), (2, 2.0), (3, 1.0)]
