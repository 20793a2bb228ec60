"""Detection says what is true of this machine, and refuses what is not here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from tightfit.runtime import hardware
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.hardware import GIB, Hardware, cgroup_memory

# What each version calls its folder's controllers, and its files of limit, use and the pages of files that can be dropped.
VERSIONS = {
    2: ("", "0::", ("memory.max", "memory.current", "inactive_file")),
    1: ("memory", "4:memory:", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
}
versions = pytest.mark.parametrize("version", VERSIONS)


def test_cpu():
    cpu = Hardware.detect("cpu")
    assert cpu.device == "cpu"
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert "fp32" in cpu.precisions
    assert cpu.name
    if hasattr(os, "sysconf"):
        assert cpu.total_bytes == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01)


def test_what_is_not_here():
    import torch

    with pytest.raises(TightfitError, match="choose auto, cuda, xpu, mps, cpu"):
        Hardware.detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(TightfitError, match="--device cpu"):
            Hardware.detect("cuda")


@pytest.mark.gpu
def test_cuda():
    import torch

    card = Hardware.detect("auto")
    assert card.device == "cuda"
    assert card.total_bytes == torch.cuda.get_device_properties(0).total_memory


def group(tmp_path: Path, version: int, path: str, limit: object, used: int, inactive: int, inside: str = "") -> tuple[Path, Path]:
    """A control group of those bytes at `path`, for a process that is told it is in `inside` or, without one, in `path`."""
    kinds, row, (limit_file, used_file, inactive_name) = VERSIONS[version]
    folder = tmp_path / "cgroup" / kinds / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 700\n{inactive_name} {inactive}\nactive_file 50\n")
    own = tmp_path / "own"
    own.write_text(f"9:name=systemd:/other\n8:pids:/other\n{row}{inside or path}\n")
    return tmp_path / "cgroup", own


@versions
@pytest.mark.parametrize("path", ["/", "/user.slice/mine.service", "/with:a colon"])
def test_the_limit_of_a_control_group(tmp_path, version, path):
    assert cgroup_memory(*group(tmp_path, version, path, 3000, 1000, 200)) == (3000, 800)


@versions
def test_the_limit_inside_a_container(tmp_path, version):
    """The path is the one outside, and the group's own folder is the root."""
    assert cgroup_memory(*group(tmp_path, version, "/", 3000, 1000, 200, inside="/docker/abc")) == (3000, 800)


@versions
def test_the_own_group_comes_before_the_root(tmp_path, version):
    group(tmp_path, version, "/", 9000, 5000, 0)
    assert cgroup_memory(*group(tmp_path, version, "/mine", 3000, 1000, 200)) == (3000, 800)


@versions
def test_more_droppable_than_used_is_nothing_used(tmp_path, version):
    assert cgroup_memory(*group(tmp_path, version, "/", 3000, 100, 200)) == (3000, 0)


def test_max_is_no_limit(tmp_path):
    assert cgroup_memory(*group(tmp_path, 2, "/mine", "max", 1000, 200))[0] is None


@versions
@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_group_with_a_file_missing_has_no_limit(tmp_path, version, file):
    root, own = group(tmp_path, version, "/", 3000, 1000, 200)
    kinds, _, (limit, used, _) = VERSIONS[version]
    (root / kinds / (limit, used, "memory.stat")[file]).unlink()
    assert cgroup_memory(root, own) == (None, 0)


def test_version_1_beside_an_empty_version_2(tmp_path):
    root, own = group(tmp_path, 1, "/mine", 3000, 1000, 200)
    own.write_text("0::/\n" + own.read_text())
    assert cgroup_memory(root, own) == (3000, 800)


def test_no_control_groups(tmp_path):
    assert cgroup_memory(tmp_path, tmp_path / "own") == (None, 0)
    (tmp_path / "own").write_text("8:pids:/\n0::/\n")
    assert cgroup_memory(tmp_path, tmp_path / "own") == (None, 0)


def test_a_limit_makes_the_cpu_smaller(monkeypatch):
    monkeypatch.setattr(hardware, "cgroup_memory", lambda *_: (GIB, GIB // 2))
    cpu = Hardware.detect("cpu")
    assert cpu.total_bytes == GIB
    assert cpu.host_bytes == GIB // 2
    own = psutil.Process().memory_info().rss
    assert GIB // 2 < cpu.free_bytes == pytest.approx(min(GIB, GIB // 2 + own), abs=50 * 2**20)


def test_a_full_group_leaves_the_host_nothing(monkeypatch):
    monkeypatch.setattr(hardware, "cgroup_memory", lambda *_: (GIB, 2 * GIB))
    assert Hardware.detect("cpu").host_bytes == 0


@pytest.mark.parametrize("limit", [None, 2**63 - 4096], ids=["none", "version 1's largest"])
def test_no_limit_leaves_the_machine_as_it_is(monkeypatch, limit):
    monkeypatch.setattr(hardware, "cgroup_memory", lambda *_: (limit, GIB))
    cpu = Hardware.detect("cpu")
    assert cpu.total_bytes == psutil.virtual_memory().total
    assert cpu.host_bytes == pytest.approx(psutil.virtual_memory().available, abs=GIB)


def test_rates_that_were_not_measured_follow_those_that_were(tmp_path, monkeypatch):
    """As of a calibration by a version that knew no int8; one of another machine's that this one lacks is left out."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    estimated = Hardware.detect("cpu")
    file = hardware.calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    measured = {"rates": {"fp32": 2 * estimated.rates["fp32"], "fp8": 1e15}}
    file.write_text(json.dumps({f"cpu {estimated.name}": measured}))
    found = Hardware.detect("cpu")
    assert found.calibrated
    assert found.rates == pytest.approx({kind: 2 * rate for kind, rate in estimated.rates.items()})
    file.write_text(json.dumps({f"cpu {estimated.name}": {"read": 1e9}}))
    assert Hardware.detect("cpu").rates == estimated.rates
