"""The fastest way is found once for each device and shape, and remembered across processes."""

from __future__ import annotations

import json
import time

import pytest
import torch
from tightfit.runtime.backends import autotune

CPU = torch.device("cpu")


class OutOfResources(Exception):  # noqa: N818  triton's name
    pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", None)
    return tmp_path / "tightfit" / "autotune.json"


def ways(calls: list[str]):
    def way(name: str, seconds: float):
        def run() -> torch.Tensor:
            calls.append(name)
            time.sleep(seconds)
            return torch.ones(1)

        return run

    def too_large() -> torch.Tensor:
        calls.append("too large")
        raise OutOfResources

    return {"slow": way("slow", 0.05), "fast": way("fast", 0), "too large": too_large}


def test_the_fastest_is_remembered(cache, monkeypatch):
    calls: list[str] = []
    autotune.fastest("a product", CPU, ways(calls))
    assert set(calls) == {"slow", "fast", "too large"}
    assert calls[-1] == "fast"
    for forget in (False, True):
        if forget:  # as another process has
            monkeypatch.setattr(autotune, "_chosen", None)
        calls.clear()
        autotune.fastest("a product", CPU, ways(calls))
        assert calls == ["fast"]
    (key,) = json.loads(cache.read_text())
    assert key.startswith("cpu · torch ")
    assert key.endswith(" · a product")
    calls.clear()
    autotune.fastest("another", CPU, ways(calls))
    assert "slow" in calls


def test_a_choice_that_is_there_no_more_is_made_again(cache):
    calls: list[str] = []
    autotune.fastest("a product", CPU, {"old": ways(calls)["slow"]})
    calls.clear()
    autotune.fastest("a product", CPU, ways(calls))
    assert calls[-1] == "fast"


@pytest.mark.parametrize("text", ["", "{", "[1]", "7"])
def test_a_file_of_something_else(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    calls: list[str] = []
    autotune.fastest("a product", CPU, ways(calls))
    assert list(json.loads(cache.read_text()).values()) == ["fast"]


def test_other_errors_are_not_hidden(cache):
    def broken() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        autotune.fastest("a product", CPU, {"broken": broken})


def test_a_cache_that_cannot_be_written(cache):
    cache.parent.write_text("a file where a folder should be")
    calls: list[str] = []
    for _ in range(2):
        calls.clear()
        autotune.fastest("a product", CPU, ways(calls))
    assert calls == ["fast"]


def test_none_left(cache):
    with pytest.raises(OutOfResources):
        autotune.fastest("a product", CPU, {"too large": ways([])["too large"]})
    assert not cache.exists()
