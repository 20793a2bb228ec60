"""What a lent GPU's half hour hangs on, rehearsed where there is none: sections that fail or take too long cost only themselves."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from tightfit.benchmarks import gpu_check
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request


@pytest.fixture
def check(tiny_models, tmp_path):
    made = gpu_check.Check(tmp_path, "cpu", tiny=True, request=Request("cat", seed=0, num_inference_steps=1, scheduler="euler"))
    (tmp_path / "sd1").symlink_to(tiny_models["sd1"])
    return made


def test_a_section_that_fails_is_a_row():
    def section():
        yield {"a": 1}
        raise KeyError("x")

    assert list(gpu_check.within(9, section, gpu_check.time.perf_counter())) == [{"a": 1}, {"failed": "KeyError: 'x'"}]


def test_a_section_is_left_when_its_time_is_over(monkeypatch):
    clock = iter((0.0, 5.0, 11.0, 11.0))
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: next(clock))
    rows = list(gpu_check.within(10, lambda: iter([{"n": n} for n in range(9)]), 0.0))
    assert rows == [{"n": 0}, {"n": 1}, {"left": "after 11 s"}]
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: gpu_check.LIMIT + 1.0)
    assert list(gpu_check.within(10, lambda: iter([{}]), 0.0)) == [{"left": "for want of time"}]


def test_each_plan_runs_once_under_the_least_cap(check):
    rows = list(check.capped(check.plain(), "bf16"))
    assert len({row["plan"] for row in rows}) == len(rows) > 10
    assert {row["cap"] for row in rows} == {"2 GB"}  # so small a model fits every one
    assert all(abs(row["error"]) < 0.05 and row["held"] for row in rows)
    line = gpu_check.summary(rows)[0]
    assert line.startswith(f"2 GB sd1 bf16: {len(rows)} plans ran, 0 failed, 0 above the cap")


def test_a_cap_counts_the_context(check):
    """What the device's context holds is the cap's too."""
    (row, *_) = check.capped(check.plain(), "bf16", every=False)

    stages = {"denoise": SimpleNamespace(peak_bytes=row["measured"])}
    result = SimpleNamespace(peak_bytes=row["measured"], seconds=1.0, notices=(), stages=stages)
    pipeline = nullcontext(SimpleNamespace(generate=lambda _: result))
    told = SimpleNamespace(peak_bytes=1, context_bytes=100, stages={"denoise": 1}, seconds=1.0)
    plan: Any = SimpleNamespace(predicted=told)
    assert check._ran(pipeline, plan, row["measured"] + 100)["held"]
    assert not check._ran(pipeline, plan, row["measured"] + 99)["held"]


def test_a_plan_that_fails_is_told(check, monkeypatch):
    def failing(*_):
        raise TightfitError("the card is gone")

    monkeypatch.setattr(gpu_check.Pipeline, "generate", failing)
    rows = list(check.capped(check.plain(), "bf16", every=False))
    assert gpu_check.summary(rows)[-1].endswith(": the card is gone")


def test_ours_beside_diffusers(check):
    rows = list(check.speed(check.plain(), ["diffusers", "bf16"]))
    assert [row["pipeline"] for row in rows] == ["diffusers", "sd1 bf16"]
    assert rows[0]["of diffusers"] == 1.0
    assert len(list(check.kernels())) == 10
