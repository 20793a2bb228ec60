"""Footprints between processes: the same plans, and nothing that is broken, foreign or old."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tightfit import Request, Wishes, inspect, plan, profile
from tightfit.runtime.backends.torch import dryrun, engine
from tightfit.runtime.costs import known
from tightfit.runtime.costs.known import Known
from tightfit.runtime.planner import estimate

ONE = Wishes(precision="bf16", attention="sdpa", tiling="tiled")  # staged, resident and streamed


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """What a new process plans, as JSON, and how many calls were followed for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def once(model: str, keep: bool = True) -> tuple[str, int]:
        kept, calls, trace = Known(), [], dryrun._trace
        if keep:
            kept.keep()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "KNOWN", kept)
            patch.setattr(dryrun, "_trace", lambda *a: calls.append(1) or trace(*a))
            for cache in (dryrun._traces, dryrun._modules, estimate.ESTIMATOR.costs):
                cache.clear()
            spec = inspect(model)
            plans = plan(profile("rtx-2060"), spec, Request("a", width=64, height=64), ONE)
            kept.write()
        return json.dumps([each.to_json() for each in plans]), len(calls)

    return once


def test_the_next_process_follows_no_call_and_plans_the_same(planned):
    without, calls = planned("emoji", keep=False)
    assert calls
    assert planned("emoji") == (without, calls)
    assert planned("emoji") == (without, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(file.read_bytes().replace(b'"held":[', b'"held":[1,', 1)),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_bytes(b"\x80\x04."),
    ],
)
def test_what_is_damaged_is_computed_again(planned, tmp_path, damage):
    fresh = planned("emoji")
    for file in (tmp_path / "tightfit" / "dry-runs").iterdir():
        damage(file)
    assert planned("emoji") == fresh
    assert planned("emoji") == (fresh[0], 0)


def test_other_versions_are_told_apart(planned, monkeypatch):
    fresh = planned("emoji")
    monkeypatch.setattr(known, "versions", lambda: ("another torch",))
    assert planned("emoji") == fresh


def test_another_model_of_the_same_shapes_shares_what_is_known(planned, sd1, tmp_path):
    """And one with another config does not."""
    fresh = planned(str(sd1))
    assert planned(str(sd1)) == (fresh[0], 0)
    assert planned("emoji")[1]


def test_files_are_bounded(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(known, "_MOST_FILES", 2)
    planned("emoji")
    assert len(list((tmp_path / "tightfit" / "dry-runs").iterdir())) == 2


def test_nothing_is_kept_unless_a_command_asks(planned, tmp_path):
    planned("emoji", keep=False)
    assert not list(tmp_path.rglob("*.json"))
    asked = "import tightfit.runtime.costs.known as known; print(known.KNOWN._folder)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
