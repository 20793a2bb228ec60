"""`tightfit bench`: each plan in a process of its own, rows that can be gone on from, compared and looked
at."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from tightfit.__main__ import app
from tightfit.benchmarks import cli as cli_bench
from tightfit.benchmarks import compare, metrics, one, plots, report, suite
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request
from typer.testing import CliRunner


def setup(**versions):
    return {"date": "", "command": "tightfit bench",
            "hardware": {"name": "here", "threads": 2, "bytes": 2**30, "cores": 2},
            "versions": {"torch": "2.13", **versions}}  # fmt: skip


started = subprocess.run


def in_this_process(command, *, input=None, **options):  # noqa: A002
    """A benchmark's process starts in six seconds: `test_the_same_command_goes_on` waits for one."""
    if input is None:  # another program
        return started(command, **options)
    return subprocess.CompletedProcess(command, 0, json.dumps(one.run(json.loads(input))), "")


@pytest.fixture(scope="module")
def measured(tiny_models, tmp_path_factory):
    """The tiny SD 1.x in fp32 and int8, two rounds of two pictures each, and a plan that no memory is enough
    for: the jobs, their folder, and its rows."""
    spec, here = inspect(str(tiny_models["sd1"])), Hardware.detect("cpu")
    effort, request = (
        suite.Effort(steps=2, pictures=2, rounds=2),
        Request("a", scheduler="euler").resolve(spec),
    )
    plans = [planner.plan(here, spec, request, Wishes(precision=each))[0] for each in ("fp32", "int8")]
    plans += planner.plan(here, spec, request, Wishes(precision="bf16", budget="1MiB"))[:1]
    jobs, folder = (
        suite.jobs(spec, plans, request, effort),
        suite.Folder(tmp_path_factory.mktemp("bench"), setup()),
    )
    assert len(folder.missing(jobs)) == 2 * 2 + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.subprocess, "run", in_this_process)
        for _ in suite.measured(folder.missing(jobs), folder):
            pass
    return jobs, folder, folder.rows(jobs)


def test_rows_say_all(measured):
    _, folder, rows = measured
    assert [row["outcome"] for row in rows] == ["ok", "ok", "does not fit"]
    exact, int8, unfit = rows
    assert "too much" in unfit["why"]
    assert exact["plan"]["placements"]["unet"]["precision"] == "fp32"
    assert exact["reference"] == int8["reference"] == exact["key"]
    assert exact["quality"]["psnr"] == metrics.MOST_PSNR
    for number, row in enumerate((exact, int8)):
        assert (len(row["seconds"]), len(row["runs"])) == (4, 2)
        assert row["runs"][0] == statistics.median(row["seconds"][:2])
        for stage in ("encode", "denoise", "decode"):
            predicted = row["plan"]["predicted"]["stages"][stage]
            assert predicted == pytest.approx(row["stages"][stage]["peak_bytes"], rel=0.05), (number, stage)
            assert len(row["stages"][stage]["seconds"]) == 4
        assert row["process_bytes"] > 100 * 2**20
    pairs = [
        [Image.open(folder.pictures / row["key"] / f"{i}.png") for i in range(4)] for row in (int8, exact)
    ]
    decibels = [metrics.psnr(*pair) for pair in zip(*pairs, strict=True)]
    assert int8["quality"]["psnr_worst"] == pytest.approx(min(decibels), abs=1e-3)
    assert int8["quality"]["psnr"] == pytest.approx(statistics.median(decibels), abs=1e-3)
    assert suite.rows(suite.read(folder.file)) == [unfit, exact, int8]  # in the order of their last lines
    count = len(folder.lines)
    assert folder.rows(measured[0]) == rows
    assert len(folder.lines) == count  # nothing is said twice
    json.dumps(rows, allow_nan=False)


def test_what_a_folder_has(measured, tmp_path, tiny_models):
    """Neither other software, nor other weights, nor what failed is taken for a measurement of today."""
    jobs, folder, rows = measured
    copy = tmp_path / "bench"
    shutil.copytree(folder.file.parent, copy)
    # There may be room for it now.
    assert [job for job, _ in suite.Folder(copy, setup()).missing(jobs)] == [jobs[2]]
    assert len(suite.Folder(copy, setup(torch="2.14")).missing(jobs)) == 5
    assert len(suite.Folder(copy, setup()).missing(jobs, again=True)) == 5
    failed = suite.Folder(copy, setup())
    failed._append({**failed.lines[1], "outcome": "failed", "why": "a power cut"})
    assert failed.rows(jobs)[1]["outcome"] == "failed"
    assert len(failed.missing(jobs)) == 1 + 1
    weights = tmp_path / "model"
    shutil.copytree(tiny_models["sd1"], weights)
    before = suite.Job(inspect(str(weights)), jobs[0].plan, jobs[0].request, jobs[0].effort).key
    next(weights.rglob("unet/*.safetensors")).touch()
    assert suite.Job(inspect(str(weights)), jobs[0].plan, jobs[0].request, jobs[0].effort).key != before
    assert [row["key"] for row in rows] == [job.key for job in jobs]


def test_a_new_reference_judges_anew(measured, tmp_path):
    """A plan that was its own reference is no exact one beside a better."""
    jobs, folder, rows = measured
    copy = tmp_path / "bench"
    shutil.copytree(folder.file.parent, copy)
    alone = suite.Folder(copy, setup())
    (own,) = alone.rows(suite.jobs(jobs[1].spec, [jobs[1].plan], jobs[1].request, jobs[1].effort))
    assert own["quality"]["psnr"] == metrics.MOST_PSNR
    assert suite.Folder(copy, setup()).rows(jobs)[1]["quality"] == rows[1]["quality"]


def test_a_line_that_was_cut_off(measured, tmp_path):
    _, folder, _ = measured
    file = tmp_path / "results.jsonl"
    text = folder.file.read_bytes()
    file.write_bytes(text[:-40])
    with pytest.raises(TightfitError, match="remove it"):
        suite.read(file)
    assert suite.Folder(tmp_path, setup()).lines == suite.read(folder.file)[:-1]
    assert text.startswith(file.read_bytes())


def test_out_of_memory_is_a_row(measured, monkeypatch):
    """Whether the pipeline says so, or the system ends the process."""
    jobs, folder, _ = measured
    for code, out in ((-9, ""), (0, json.dumps({"outcome": "out of memory", "why": "there was none"}))):
        answer = subprocess.CompletedProcess([], code, out, "")
        monkeypatch.setattr(suite.subprocess, "run", lambda *_, answer=answer, **__: answer)
        assert suite.run(jobs[0], 0, folder.pictures)["outcome"] == "out of memory"
    monkeypatch.setattr(
        suite.subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess([], 1, "", "Trace\nKeyError: 'x'"),
    )
    assert suite.run(jobs[0], 0, folder.pictures) == {"outcome": "failed", "why": "KeyError: 'x'"}


@pytest.mark.parametrize("changed", ["cfg", "placements"])
def test_another_plan_than_asked_for_is_out_of_memory(measured, tmp_path, monkeypatch, changed):
    """The pipeline goes on with one that takes less; its figures are not this plan's."""
    jobs, _, _ = measured
    plan = jobs[0].plan
    other = {
        "cfg": "sequential" if plan.cfg == "batched" else "batched",
        "placements": jobs[1].plan.placements,
    }[changed]

    class Stepping(Pipeline):
        def generate(self, request):
            return replace(
                super().generate(request), plan=replace(plan, **{changed: other}), notices=("less was free",)
            )

    monkeypatch.setattr(
        one,
        "load",
        lambda name, **options: Stepping(inspect(name), Hardware.detect("cpu"), plan=options["plan"]),
    )
    job = {"plan": plan.to_json(), "model": jobs[0].spec.name, "pictures": [["cat", 0]],
           "folder": str(tmp_path), "options": {"num_inference_steps": 1}}  # fmt: skip
    assert one.run(job) == {"outcome": "out of memory", "why": "less was free"}


def test_the_same_command_goes_on(tiny_models, tmp_path, monkeypatch):
    """What the folder has is not measured again, unless that is asked for."""
    candidates, few = suite.candidates, {"residency": "resident", "attention": "sdpa", "tiling": "whole"}
    monkeypatch.setattr(suite, "candidates", lambda *of: candidates(*of[:3], {**of[3], **few}))
    arguments = [
        "bench",
        "--model",
        str(tiny_models["sd1"]),
        "--steps",
        "1",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--plans",
        "quick",
    ]
    arguments += [
        "--precision",
        "fp32",
        "--sizes",
        "64,64x64",
        "-o",
        str(tmp_path / "out"),
        "--report",
        str(tmp_path / "page.html"),
    ]
    first = CliRunner().invoke(app(), arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    lines = suite.read(tmp_path / "out" / "results.jsonl")
    assert len(lines) == 1  # of one size, named twice
    again = CliRunner().invoke(app(), arguments, catch_exceptions=False)
    assert "1 of 1 runs are already in" in again.output
    assert suite.read(tmp_path / "out" / "results.jsonl") == lines
    monkeypatch.setattr(suite.subprocess, "run", in_this_process)
    repeated = CliRunner().invoke(app(), [*arguments, "--again", "--json"], catch_exceptions=False)
    assert len(suite.read(tmp_path / "out" / "results.jsonl")) == 2
    (row,) = json.loads(repeated.stdout.splitlines()[-1])
    assert row["key"] == lines[0]["key"]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_quick_begins_with_the_fastest_and_ends_in_time(measured, monkeypatch, tmp_path):
    """One process is begun in any case; no other that would end too late."""
    jobs, _, _ = measured
    slow = [replace(job, effort=suite.Effort(2, 2, 1, seconds=job.seconds + 0.1)) for job in jobs[:2]]
    assert suite.in_time(jobs) == jobs
    # The reference takes too much.
    assert [job.seconds for job in suite.in_time(slow)] == sorted(job.seconds for job in slow)
    ample = [
        replace(job, effort=suite.Effort(2, 2, 1, seconds=100 * job.seconds)) for job in (jobs[1], jobs[0])
    ]
    assert suite.in_time(ample)[0].key == jobs[0].key
    folder = suite.Folder(tmp_path, setup())
    monkeypatch.setattr(suite, "run", lambda *_: {"outcome": "failed", "why": ""})
    clock = iter((0.0, 0.0, 5.0))
    monkeypatch.setattr(suite.time, "perf_counter", lambda: next(clock))
    assert len(list(suite.measured(folder.missing(slow), folder))) == 1


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--hardware", "rtx-2060"], "tightfit plan --hardware rtx-2060"),
        (["--sizes", "64,big"], "pixels such as 256,512x768, not 'big'"),
        (["--sizes", ""], "pixels such as"),
        (["--pictures", "0"], "at least 1"),
        (["--steps", "-1"], "--steps must be at least 1"),
        (["--plans", "nowhere.json"], "auto, all, quick, or files"),
        (["--ram", "1MiB"], "does not fit"),
        (["--report", "/nowhere/page.html"], "there is no folder /nowhere"),
        (["--report", "."], "is a folder"),
        (["--plans", "."], "auto, all, quick, or files"),
        (["--model", "/dev/null"], "null"),
        (["--steps", "3", "compare", "a", "b"], "leave out --"),
    ],
)
def test_what_cannot_be_measured(tiny_models, tmp_path, arguments, cure):
    with pytest.raises(TightfitError, match=cure):
        CliRunner().invoke(
            app(),
            ["bench", "--model", str(tiny_models["sd1"]), "-o", str(tmp_path), *arguments],
            catch_exceptions=False,
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
    assert (
        len({plan.precision for plan in quick})
        == len(quick)
        == len({plan.precision for plan in every if plan.fits})
    )
    fastest = min(
        (plan for plan in every if plan.precision == "bf16"), key=lambda plan: plan.predicted.seconds
    )
    assert (
        fastest.predicted.seconds
        == next(plan for plan in quick if plan.precision == "bf16").predicted.seconds
    )


def slower(row, factor):
    changed = deepcopy(row)
    for field in ("seconds", "runs"):
        changed[field] = [factor * each for each in row[field]]
    return changed


def test_comparison_beyond_noise(measured):
    row = measured[2][0] | {"seconds": [1.0, 1.1, 1.05], "runs": [1.0, 1.1, 1.05]}
    assert compare.changes(row, slower(row, 1.08)) == []  # overlapping
    assert compare.changes(row, slower(row, 1.15)) == []  # not by more than both spread
    (change,) = compare.changes(row, slower(row, 2.0))
    assert (change.what, change.better, change.before, change.after) == (
        "seconds",
        False,
        "1.05 s",
        "2.1 s (+100%)",
    )
    assert compare.changes(slower(row, 2.0), row)[0].better
    once = row | {"seconds": [1.0], "runs": [1.0]}
    assert compare.changes(once, slower(once, 2.0)) == []  # one process says nothing of noise
    larger = row | {"peak_bytes": int(row["peak_bytes"] * 1.02), "quality": row["quality"] | {"psnr": 40.0}}
    assert [(each.what, each.better) for each in compare.changes(row, larger)] == [
        ("peak bytes", False),
        ("PSNR", False),
    ]
    gone, unfit = row | {"outcome": "out of memory"}, row | {"outcome": "does not fit"}
    assert [(each.what, each.better) for each in compare.changes(row, gone)] == [("outcome", False)]
    assert [(each.what, each.better) for each in compare.changes(gone, row)] == [("outcome", True)]
    assert compare.changes(gone, unfit) == []


@pytest.fixture
def files(measured, tmp_path):
    """Lines of three processes of each plan that ran; and a way to write them as a file, slower and
    elsewhere."""
    lines = [
        line | {"round": number, "seconds": [1.0 + number / 100], **setup()}
        for line in measured[1].lines
        if line["outcome"] == "ok" and line["round"] == 0
        for number in range(3)
    ] + [line for line in measured[1].lines if line["outcome"] != "ok"]

    def write(name, factor=1.0, machine="here", left=None, **versions):
        file = tmp_path / name
        changed = [
            slower(line | {"runs": []}, factor) if "seconds" in line else line for line in lines[:left]
        ]
        own = setup(**versions)
        own["hardware"]["name"] = machine
        file.write_text("".join(json.dumps(line | own) + "\n" for line in changed))
        return str(file)

    return write


def compared(*names):
    return CliRunner().invoke(app(), ["bench", "compare", *names], catch_exceptions=False)


def test_compare_command(files):
    before, slow = files("before.jsonl"), files("slow.jsonl", 3.0, torch="2.14")
    same = compared(before, before)
    assert same.exit_code == 0
    assert "3 plans in both, 0 missing: 0 figures worse, 0 better" in same.output
    worse = compared(before, slow)
    assert worse.exit_code == 1
    assert "3 plans in both, 0 missing: 2 figures worse, 0 better" in worse.output
    assert "differs: torch 2.13 → 2.14" in worse.output
    assert compared(slow, before).exit_code == 0
    lost = compared(before, files("lost.jsonl", left=3))
    assert lost.exit_code == 1
    assert lost.output.count("\nmissing: ") == 2
    few = compared(before, files("few.jsonl", 3.0, left=2))
    assert "seconds of 1 plans are not judged" in few.output


def test_compare_machines(files):
    merged = compared(
        files("before.jsonl"), files("elsewhere.jsonl", 3.0, "another", left=6), files("slow.jsonl", 3.0)
    )
    assert merged.exit_code == 0
    assert "another" in merged.output
    assert merged.output.count("3.00×") == 4
    assert "nothing is judged" in merged.output


def test_results_of_others_are_refused(tmp_path, files):
    file = tmp_path / "results.jsonl"
    for text, cure in (("nonsense", "line 1 of .* is no result"), ('{"version": 99}', "version 99"),
                       ('{"version": 2}', "line 1"), ("[]", "line 1"), ("", "has no results")):  # fmt: skip
        file.write_text(text + "\n" * bool(text))
        with pytest.raises(TightfitError, match=cure):
            compared(str(file), files("before.jsonl"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TightfitError, match="line 1"):
        compared(str(file), str(file))
    line = json.loads((tmp_path / "before.jsonl").read_text().splitlines()[0])
    for broken in ({"seconds": []}, {"seconds": ["x"]}, {"peak_bytes": None}):
        file.write_text(json.dumps(line | broken) + "\n")
        with pytest.raises(TightfitError, match="line 1"):
            compared(str(file), str(file))


_EVIL = (
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    2**70,
    "",
    "x",
    "\u2028\x1b[31m",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    0.5,
)


def broken(lines: list[dict], seed: int) -> str:
    """The text of a results file in which a value or two are something else, or lacking."""
    rnd, lines = random.Random(seed), deepcopy(lines)

    def places(value, owner=None, key=None):
        if owner is not None:
            yield owner, key
        for name in (
            value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        ):
            yield from places(value[name], value, name)

    for _ in range(rnd.choice((1, 1, 2))):
        owner, key = rnd.choice(list(places(rnd.choice(lines))))
        if rnd.random() < 0.3:
            del owner[key]
        else:
            owner[key] = rnd.choice(_EVIL)
    return "".join(json.dumps(line, ensure_ascii=rnd.random() < 0.5) + "\n" for line in lines)


def test_results_that_are_damaged(measured, tmp_path, capsys):
    """Every use of a results file gives its figures, or says in one line what is wrong with it."""
    _, folder, _ = measured
    good, bad, refused = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", 0
    good.write_text("".join(json.dumps(line) + "\n" for line in folder.lines))
    here = Hardware.detect("cpu")
    for seed in range(40):
        bad.write_text(broken(folder.lines, seed), encoding="utf-8")
        try:
            rows = suite.rows(suite.read(bad))
        except TightfitError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        report.page(rows, tmp_path / "pictures")
        cli_bench._print(rows, here, {row["key"] for row in rows})
        for names in ((good, bad), (bad, good), (bad, good, good)):
            done = CliRunner().invoke(app(), ["bench", "compare", *map(str, names)])
            assert isinstance(done.exception, TightfitError | SystemExit | None), (seed, done.exception)
    assert 10 < refused < 40


def kept(folder, name, make):
    folder.mkdir()
    make(folder / name)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="of pipes and links")
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder: kept(folder, "results.jsonl", os.mkfifo), "a pipe"),
        (lambda folder: kept(folder, "results.jsonl", Path.mkdir), "a folder"),
        (lambda folder: kept(folder, "results.jsonl", lambda file: file.symlink_to("/dev/zero")), "a device"),
        (
            lambda folder: kept(folder, "results.jsonl", lambda file: file.write_bytes(b"\x00\xff\n")),
            "line 1 of",
        ),
        (
            lambda folder: kept(folder, "results.jsonl", lambda file: file.write_text("[" * 100_000 + "\n")),
            "nested too deep",
        ),
        (lambda folder: kept(folder, "pictures", Path.touch), "cannot be written"),
        (Path.touch, "cannot be written"),
    ],
    ids=["pipe", "folder", "device", "binary", "nested", "pictures", "file"],
)
def test_output_folders_that_cannot_be(measured, tmp_path, make, word):
    make(tmp_path / "out")
    with pytest.raises(TightfitError, match=word) as caught:
        cli_bench._measure(measured[0], tmp_path / "out", Hardware.detect("cpu"), False)
    assert "\n" not in str(caught.value)


def test_pictures_that_are_damaged(measured, tmp_path):
    """One that was cut short is named, and not shown as if it were what the plan painted."""
    jobs, folder, rows = measured
    shutil.copytree(folder.pictures, tmp_path / "pictures")
    for line, file in ((rows[0], "0.png"), (rows[1], "0.png")):
        picture = tmp_path / "pictures" / line["key"] / file
        whole = picture.read_bytes()
        picture.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TightfitError, match=r"0\.png.*remove it"):
            report.page(rows, tmp_path / "pictures")
        with pytest.raises(TightfitError, match=r"0\.png.*remove it"):
            suite.judged(tmp_path / "pictures", jobs[1], folder.lines[1])
        picture.write_bytes(whole)


def test_a_link_that_leads_nowhere_among_the_weights(measured, tmp_path):
    job = measured[0][0]
    folder = Path(shutil.copytree(job.spec.folder, tmp_path / "model"))
    age = suite._age(replace(job.spec, folder=folder))
    (folder / "lost.safetensors").symlink_to(tmp_path / "nowhere")
    assert suite._age(replace(job.spec, folder=folder)) == age


def test_rows_name_the_model_and_not_its_folder(measured):
    _, _, rows = measured
    assert (
        {row["model"] for row in rows}
        == {row["plan"]["model"] for row in rows}
        == {measured[0][0].spec.folder.name}
    )


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
    _, folder, rows = measured
    page = report.page(rows, folder.pictures)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.count["svg"] == 5
    assert tags.count["img"] == 3  # two pictures and one difference
    assert tags.count["circle"] == 2 + 1 + 6 + 2
    assert 'src="http' not in page and "href=" not in page
    assert "does not fit" in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_page_in_a_browser(measured, tmp_path):
    """As drawn: every circle lies within its plot, and nothing is wider than the window."""
    _, folder, rows = measured
    script = """<script>
      const inside = [...document.querySelectorAll("circle")].every(each => {
        const a = each.getBoundingClientRect(), b = each.ownerSVGElement.getBoundingClientRect();
        return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
      });
      const loaded = [...document.images].every(each => each.naturalWidth > 0);
      document.title = JSON.stringify([inside, loaded,\
 document.documentElement.scrollWidth <= window.innerWidth]);
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(report.page(rows, folder.pictures).replace("</body>", script))
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1000,800",
        "--dump-dom",
        file.as_uri(),
    ]
    dom = subprocess.run(browser, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<title>[true,true,true]</title>" in dom


def test_cached_steps_are_an_axis(measured):
    """A plan with cached steps is another job and another line, says what it saves, and has a plot."""
    jobs, folder, rows = measured
    plan = replace(jobs[1].plan, step_cache=2)
    assert replace(jobs[1], plan=plan).key != jobs[1].key
    fast = deepcopy(rows[1]) | {"key": "fast", "summary": plan.summary(), "seconds": [rows[1]["runs"][0] / 2]}
    fast["plan"]["step_cache"] = 2
    assert len(compare.by_identity([*rows, fast])) == len(rows) + 1
    columns, lines = report.table([*rows[:2], fast])
    saved = {row["key"]: cells[columns.index("saves")] for row, cells in lines}
    assert saved.pop("fast").endswith(f"{compare.seconds(rows[1]) / fast['seconds'][0]:.2f}×")
    assert {*saved.values()} == {""}
    page = report.page([*rows, fast], folder.pictures)
    assert page.count("<svg") == 6
    assert "int8, cached" in page
    assert "saves" not in report.table(rows)[0]


def test_what_is_not_packed_is_as_rows_of_before(measured):
    """These have no such field."""
    jobs, _, rows = measured
    before = deepcopy(rows[1])
    for placement in before["plan"]["placements"].values():
        assert placement.pop("packed") is False
    assert compare.identity(before) == compare.identity(rows[1])
    placements = {
        name: replace(placement, packed=True) for name, placement in jobs[1].plan.placements.items()
    }
    assert replace(jobs[1], plan=replace(jobs[1].plan, placements=placements)).key != jobs[1].key


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

    assert report.front([row(3, 1.0), row(1, 5.0), row(2, 6.0), row(2, 2.0), row(4, 1.0)]) == [
        (1, 5.0),
        (2, 2.0),
        (3, 1.0),
    ]


def test_advice(measured):
    """Each budget's fastest, by what was measured."""
    fast, small = (measured[2][0] | {"summary": name, "seconds": [seconds], "process_bytes": gib * 2**30 - 1}
                   for name, seconds, gib in (("fast", 1.0, 6), ("small", 2.0, 2)))  # fmt: skip
    lines = report.advice([fast, small, measured[2][2]])
    assert [line.split(": ")[:2] for line in lines] == [
        ["fastest within 2 to 4 GiB", "small"],
        ["fastest within 6 to 24 GiB", "fast"],
    ]


def test_cells_of_one_process_have_no_spread(measured):
    row = measured[2][1]
    assert len(report.cells(row)) == len(report.COLUMNS)
    spread = list(report.COLUMNS).index("±")
    assert float(report.cells(row)[spread]) == pytest.approx(
        abs(row["runs"][1] - row["runs"][0]) / 2, rel=0.1
    )
    assert report.cells(row | {"runs": row["runs"][:1]})[spread] == ""
