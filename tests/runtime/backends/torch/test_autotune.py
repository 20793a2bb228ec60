"""The fastest way is found once for each device and shape, and remembered across processes."""

from __future__ import annotations

import json
import time

import pytest
import torch
from tightfit.runtime.backends.torch import autotune

CPU = torch.device("cpu")


class OutOfResources(Exception):  # noqa: N818  triton's name
    pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", None)
    monkeypatch.setattr(autotune, "_for_now", {})
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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("of 2 GiB"), RuntimeError("CUDA error: out of memory"), MemoryError()]
)
def test_a_choice_for_want_of_memory_is_not_written(cache, monkeypatch, error):
    """This process keeps to it; the next one, which may have the memory, tries again."""
    calls: list[str] = []
    lacking = True

    def roomy() -> torch.Tensor:
        calls.append("roomy")
        if lacking:
            raise error
        return torch.ones(1)

    both = {"slow": ways(calls)["slow"], "roomy": roomy}
    autotune.fastest("a product", CPU, both)
    assert calls[-1] == "slow"
    autotune.fastest("another", CPU, {"fast": ways(calls)["fast"]})
    assert [key.rpartition(" · ")[2] for key in json.loads(cache.read_text())] == ["another"]
    calls.clear()
    autotune.fastest("a product", CPU, both)
    assert calls == ["slow"]
    lacking = False
    monkeypatch.setattr(autotune, "_chosen", None)  # as another process has
    monkeypatch.setattr(autotune, "_for_now", {})
    autotune.fastest("a product", CPU, both)
    assert calls[-1] == "roomy"
    assert "roomy" in json.loads(cache.read_text()).values()


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


def test_a_way_that_fails_is_left_out(cache):
    def uncompiled() -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    answer = autotune.fastest(
        "a product", CPU, {"uncompiled": uncompiled, "plain": lambda: torch.full((1,), 7.0)}
    )
    assert answer == 7
    assert list(json.loads(cache.read_text()).values()) == ["plain"]


def test_that_there_was_no_memory_is_what_is_raised(cache):
    def fails(error: Exception) -> torch.Tensor:
        raise error

    ways = {
        "large": lambda: fails(torch.OutOfMemoryError("of 2 GiB")),
        "odd": lambda: fails(OutOfResources("shared memory")),
    }
    with pytest.raises(torch.OutOfMemoryError, match="of 2 GiB"):
        autotune.fastest("a product", CPU, ways)
    assert not cache.exists()


class FakeGpu:
    """A clock, and a device that computes one thing after the other while the host goes on: 10 µs to launch,
    50 to compute, and 15 to wait for the end."""

    type = "fake"

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0
        self.calls = 0

    def perf_counter(self) -> float:
        return self.now

    def synchronize(self, _: object) -> None:
        self.now = max(self.now, self.busy_until) + 15e-6

    def work(self, compute: float = 50e-6) -> None:
        self.calls += 1
        self.now += 10e-6
        self.busy_until = max(self.now, self.busy_until) + compute


@pytest.mark.parametrize(("compute", "seconds"), [(50e-6, 50e-6), (1e-6, 10e-6), (0.1, 0.1), (0.0, 10e-6)])
def test_what_a_gpu_computes_is_timed(monkeypatch, compute, seconds):
    """Not the launch and the wait: by a turn of one call 50 µs would be 75, and 1 µs 26. Where the host is
    slower, it counts."""
    gpu = FakeGpu()
    monkeypatch.setattr(autotune, "time", gpu)
    monkeypatch.setattr(torch, "fake", gpu, raising=False)
    assert autotune.turn_seconds(lambda: gpu.work(compute), gpu) == pytest.approx(seconds, rel=0.03)
    assert gpu.calls < 1000


def test_a_cpu_is_timed_call_by_call():
    calls: list[int] = []
    autotune.turn_seconds(lambda: calls.append(1), CPU)
    autotune.turn_seconds(lambda: calls.append(1), None)
    assert calls == [1, 1]


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
