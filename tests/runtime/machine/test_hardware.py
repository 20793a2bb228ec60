"""Detection says what is true of this machine, and refuses what is not here."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tightfit.runtime.costs.latency import attention_seconds
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine import detect, hardware, process
from tightfit.runtime.machine.hardware import GIB, Hardware, half_is_broken
from tightfit.runtime.machine.process import cgroup_cores, cgroup_memory
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.placement import ATTENTIONS, Placement

# What each version calls its folder's controllers, and its files of limit, use and the pages of files that
# can be dropped.
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
        assert cpu.total_bytes == pytest.approx(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01
        )


@pytest.mark.parametrize(("tiles", "faster"), [((), "sliced"), (("amx_bf16", "amx_int8"), "sdpa")])
def test_the_attention_that_was_measured_to_be_faster(monkeypatch, tiles, faster):
    """Uncalibrated, with AMX and without, of SD 1.5's largest at 512x512."""
    monkeypatch.setattr(detect, "cpu_flags", lambda: frozenset({"avx512f", "avx512_bf16", *tiles}))
    cpu, way = detect._cpu(""), Placement("torch", "bf16", "bf16", "staged", "sdpa", "whole")
    seconds = {
        kind: attention_seconds(cpu, replace(way, attention=kind), (2, 8, 4096, 4096, 40))
        for kind in ATTENTIONS
    }
    assert min(seconds, key=lambda kind: seconds[kind]) == faster


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
    assert card.total_bytes == torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if not torch.version.hip:
        assert sum(card.workspaces) == pytest.approx(
            sum(hardware.workspaces_of(card.capability, rocm=False)), abs=2**20
        )


def group(
    tmp_path: Path, version: int, path: str, limit: object, used: int, inactive: int, inside: str = ""
) -> tuple[Path, Path]:
    """A control group of those bytes at `path`, for a process that is told it is in `inside` or, without one,
    in `path`."""
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


@pytest.mark.parametrize(
    ("folder", "row", "files", "expected"),
    [
        ("mine", "0::/mine", {"cpu.max": "150000 100000"}, 1.5),
        ("", "0::/docker/abc", {"cpu.max": "50000 100000"}, 0.5),
        ("mine", "0::/mine", {"cpu.max": "max 100000"}, math.inf),
        ("mine", "0::/mine", {"cpu.max": "nonsense"}, math.inf),
        ("cpu,cpuacct/a", "3:cpu,cpuacct:/a", {"cpu.cfs_quota_us": "2000", "cpu.cfs_period_us": "1000"}, 2),
        ("cpu/a", "3:cpu:/a", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, math.inf),
        ("cpuset/a", "3:cpuset:/a", {"cpu.cfs_quota_us": "1", "cpu.cfs_period_us": "100000"}, math.inf),
    ],
)  # fmt: skip
def test_cores_that_a_control_group_leaves(tmp_path, folder, row, files, expected):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"9:pids:/other\n{row}\n")
    assert cgroup_cores(tmp_path, tmp_path / "own") == expected


def test_the_tightest_quota_of_a_group_and_its_parents(tmp_path):
    for path, quota in (("", "max"), ("a", "100000"), ("a/b", "300000")):
        (tmp_path / path).mkdir(exist_ok=True)
        (tmp_path / path / "cpu.max").write_text(f"{quota} 100000\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert cgroup_cores(tmp_path, tmp_path / "own") == 1


def test_rates_are_of_the_cores_that_there_are(tmp_path, monkeypatch):
    """Estimated, and measured with another number of them."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(detect, "cores", lambda: 4)
    four = Hardware.detect("cpu")
    monkeypatch.setattr(detect, "cores", lambda: 0.5)
    half = Hardware.detect("cpu")
    assert half.rates == pytest.approx({kind: rate / 8 for kind, rate in four.rates.items()})
    measured = {"rates": {"fp32": 8e11}, "moves": {"fresh": 4e9}, "read": 3e9, "cores": 2}
    file = detect.calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({f"cpu {half.name}": measured}))
    found = Hardware.detect("cpu")
    assert found.rates["fp32"] == pytest.approx(2e11)
    assert found.moves == {"fresh": pytest.approx(1e9)}
    assert found.read == 3e9


def test_threads_that_are_asked_for(monkeypatch):
    monkeypatch.setattr(process, "cgroup_cores", lambda *_: math.inf)
    monkeypatch.setattr(process.psutil, "cpu_count", lambda **_: 8)
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert process.cores() == 3
    for text, count in (("2", 2), ("1,4", 1), ("64", 3), ("0", 3), ("many", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert process.cores() == count


def test_a_limit_makes_the_cpu_smaller(monkeypatch):
    monkeypatch.setattr(process, "cgroup_memory", lambda *_: (GIB, GIB // 2))
    cpu = Hardware.detect("cpu")
    assert cpu.total_bytes == GIB
    assert cpu.host_bytes == GIB // 2
    own = psutil.Process().memory_info().rss
    assert GIB // 2 < cpu.free_bytes == pytest.approx(min(GIB, GIB // 2 + own), abs=50 * 2**20)


def test_a_full_group_leaves_the_host_nothing(monkeypatch):
    monkeypatch.setattr(process, "cgroup_memory", lambda *_: (GIB, 2 * GIB))
    assert Hardware.detect("cpu").host_bytes == 0


@pytest.mark.parametrize("limit", [None, 2**63 - 4096], ids=["none", "version 1's largest"])
def test_no_limit_leaves_the_machine_as_it_is(monkeypatch, limit):
    monkeypatch.setattr(process, "cgroup_memory", lambda *_: (limit, GIB))
    cpu = Hardware.detect("cpu")
    assert cpu.total_bytes == psutil.virtual_memory().total
    assert cpu.host_bytes == pytest.approx(psutil.virtual_memory().available, abs=GIB)


def test_rates_that_were_not_measured_follow_those_that_were(tmp_path, monkeypatch):
    """As of a calibration by a version that knew no int8; one of another machine's that this one lacks is
    left out."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    estimated = Hardware.detect("cpu")
    file = detect.calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    measured = {"rates": {"fp32": 2 * estimated.rates["fp32"], "fp8": 1e15}}
    file.write_text(json.dumps({f"cpu {estimated.name}": measured}))
    found = Hardware.detect("cpu")
    assert found.calibrated
    assert found.rates == pytest.approx({kind: 2 * rate for kind, rate in estimated.rates.items()})
    file.write_text(json.dumps({f"cpu {estimated.name}": {"read": 1e9}}))
    assert Hardware.detect("cpu").rates == estimated.rates
    (plain := tmp_path / "file").touch()
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(plain))
    assert f"{plain} is no folder" in Hardware.detect("cpu").notes[-1]


class FakeCard:
    """As much of torch.cuda as detection asks, on the second of two cards: the products run on the CPU, and
    have the libraries keep what `kept` says; `built` are the architectures that torch has kernels for."""

    def __init__(
        self, monkeypatch, name: str, capability: tuple[int, int], kept: dict[str, int], *built: str
    ) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        card = self
        self.name, self.capability, self.kept, self.built = name, capability, kept, list(built)
        self.context, self.total = 300 * 2**20, 4 * GIB
        self.workspaces: dict[str, int] = {}
        self.cached = 0

        class OnTheCpu(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                kwargs = dict(kwargs or {})
                if kwargs.get("device") == "cuda":
                    if not card.has_kernels():
                        raise RuntimeError(
                            "CUDA error: no kernel image is available for execution on the device\n"
                            "Compile with"
                        )
                    kwargs["device"] = "cpu"
                if func.__name__ in card.kept:
                    card.workspaces[func.__name__] = card.kept[func.__name__]
                    card.cached = 2**20
                return func(*args, **kwargs)

        self.mode = OnTheCpu
        monkeypatch.setattr(torch, "cuda", self)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.workspaces.clear, raising=False)

    def has_kernels(self) -> bool:
        return f"sm_{self.capability[0]}{self.capability[1]}" in self.built

    def detect(self, device: str) -> Hardware:
        with self.mode():
            return Hardware.detect(device)

    def is_available(self) -> bool:
        return True

    def memory_allocated(self) -> int:
        return sum(self.workspaces.values())

    def memory_reserved(self) -> int:
        return self.memory_allocated() + self.cached

    def mem_get_info(self) -> tuple[int, int]:
        return self.total - self.context - self.memory_reserved(), self.total

    def empty_cache(self) -> None:
        self.cached = 0

    def synchronize(self) -> None:
        pass

    def get_device_name(self) -> str:
        return self.name

    def get_device_capability(self) -> tuple[int, int]:
        return self.capability

    def get_arch_list(self) -> list[str]:
        return self.built

    def current_device(self) -> int:
        return 1

    def get_device_properties(self, number: int):
        return {1: SimpleNamespace(total_memory=self.total, is_integrated=1, uuid="1-2")}[number]

    def get_allocator_backend(self) -> str:
        return "native"


CUBLAS = {"matmul": 8_519_680}
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def test_workspaces_are_measured(monkeypatch):
    """Whatever made them before: cuBLAS's alone, and hipBLASLt's beside it. What is free is as much as
    without them."""
    for kept in (CUBLAS, {"matmul": 32 * 2**20}, {"matmul": 32 * 2**20, "linear": 76 * 2**20}):
        card = FakeCard(monkeypatch, "NVIDIA GeForce RTX 2060", (7, 5), kept, *CU130)
        card.workspaces |= kept
        card.cached = 500 * 2**20
        found = card.detect("cuda")
        assert found.workspaces == tuple(kept.values())
        assert found.free_bytes == card.total - card.context + found.context_bytes
        assert found.unified  # as the card says that torch uses, which is not its first
        assert found.passed_over == ()


def test_workspaces_by_rule():
    """torch's CublasHandlePool.cpp."""
    assert (
        hardware.workspaces_of((7, 5), rocm=False)
        == hardware.workspaces_of((8, 9), rocm=False)
        == ((2 * 4096 + 8 * 16) * 1024,)
    )
    assert hardware.workspaces_of((9, 0), rocm=False) == (8 * 4096 * 1024,)
    assert profile("rtx-2060").workspaces == (8_519_680,)
    assert profile("rx-6600").workspaces == (2**25,)
    assert (
        profile("arc-a380").workspaces == profile("cpu-8gb").workspaces == profile("m1-8gb").workspaces == ()
    )


@pytest.mark.parametrize(
    ("name", "capability", "built", "cure"),
    [
        ("NVIDIA GeForce GTX 1060 6GB", (6, 1), CU130, "torch-backend=cu126"),
        ("NVIDIA GeForce GTX 780", (3, 5), CU130, "no build has, so use --device cpu"),
        ("NVIDIA GeForce RTX 5090", (12, 0), ("sm_75", "sm_86", "sm_90"), "install a newer one"),
        ("NVIDIA GeForce RTX 2060", (7, 5), (), "no kernel image is available"),  # a build that does not tell
        (
            "NVIDIA GeForce RTX 4060",
            (8, 9),
            ("sm_80", "sm_86"),
            "no kernel image is available",
        ),  # 8.6's would run: another fault
        (
            "NVIDIA GeForce RTX 9090",
            (14, 0),
            ("sm_90", "compute_120"),
            "no kernel image is available",
        ),  # the driver compiles
    ],
)
def test_a_build_without_kernels_for_the_card(monkeypatch, name, capability, built, cure):
    card = FakeCard(monkeypatch, name, capability, CUBLAS, *built)
    with pytest.raises(TightfitError, match="no cuda device can be used here") as caught:
        card.detect("cuda")
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)
    other = card.detect("auto")
    assert other.device != "cuda"
    (note,) = other.passed_over
    assert cure in note
    assert note in other.notes


@pytest.mark.parametrize(
    ("name", "capability", "broken"),
    [
        ("NVIDIA GeForce GTX 1650", (7, 5), True),
        ("NVIDIA GeForce GTX 1660 Ti with Max-Q Design", (7, 5), True),
        ("NVIDIA GeForce GTX 1630", (7, 5), True),
        ("NVIDIA GeForce MX450", (7, 5), True),
        ("NVIDIA GeForce MX550", (7, 5), True),
        ("NVIDIA T400 4GB", (7, 5), True),
        ("NVIDIA T600 Laptop GPU", (7, 5), True),
        ("NVIDIA T1200 Laptop GPU", (7, 5), True),
        ("Quadro T1000", (7, 5), True),
        ("Quadro T2000 with Max-Q Design", (7, 5), True),
        ("Tesla T4", (7, 5), False),
        ("NVIDIA GeForce RTX 2060", (7, 5), False),
        ("Quadro RTX 4000", (7, 5), False),
        ("NVIDIA RTX A2000", (8, 6), False),
        ("NVIDIA GeForce MX350", (6, 1), False),
        ("NVIDIA GeForce GTX 1080", (6, 1), False),
    ],
)
def test_cards_whose_halves_are_broken(monkeypatch, name, capability, broken):
    """Those with TU116 or TU117, whatever they are called."""
    assert half_is_broken(name, capability) == broken
    found = FakeCard(monkeypatch, name, capability, CUBLAS, "sm_61", *CU130).detect("cuda")
    assert found.half_is_broken == broken
    assert found.precisions == (
        ("fp32",) if broken else ("fp16", "bf16", "fp32") if capability >= (8, 0) else ("fp16", "fp32")
    )


def test_a_card_of_two_memories_is_asked_about():
    with pytest.raises(TightfitError, match=r"'rtx-3060' \(did you mean rtx-3060-12gb or rtx-3060-8gb\?\)"):
        profile("rtx-3060")


def test_profiles_whose_halves_are_broken():
    assert profile("gtx-1650").precisions == profile("gtx-1660-super").precisions == ("fp32",)
    assert profile("rtx-2060").precisions == ("fp16", "fp32")


def test_the_context_is_what_the_driver_tells(monkeypatch):
    """Of this process, less what torch reserved; by vendor where it does not."""
    card = FakeCard(monkeypatch, "NVIDIA GeForce RTX 2060", (7, 5), CUBLAS, *CU130)
    listed = [
        SimpleNamespace(pid=1, usedGpuMemory=2**30),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=card.context),
    ]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses={"GPU-1-2": listed}.get,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert card.detect("cuda").context_bytes == card.context
    # Before most kernels are loaded, for which there must be room.
    listed[1].usedGpuMemory = card.context = 200 * 2**20
    found = card.detect("cuda")
    assert (found.context_bytes, found.free_bytes) == (hardware.CUDA_CONTEXT, card.total)
    for other in ([listed[0]], [listed[0], SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]):
        listed[:] = other
        assert card.detect("cuda").context_bytes == hardware.CUDA_CONTEXT
    assert profile("rx-6600").context_bytes == hardware.ROCM_CONTEXT
    assert profile("gtx-1650").context_bytes == hardware.CUDA_CONTEXT


@pytest.mark.parametrize(
    ("release", "system", "most"),
    [
        ("6.6.87.2-microsoft-standard-WSL2", "linux", GIB // 2),
        ("11", "win32", psutil.virtual_memory().total // 2),
        ("6.8.0-45-generic", "linux", 2**62),
    ],
)
def test_what_can_be_pinned(monkeypatch, release, system, most):
    card = FakeCard(monkeypatch, "NVIDIA GeForce RTX 2060", (7, 5), CUBLAS, *CU130)
    monkeypatch.setattr(detect.platform, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(detect.sys, "platform", system)
    found = card.detect("cuda")
    assert found.pinnable_bytes == min(found.host_bytes, most)


def test_another_allocator_is_noted(monkeypatch):
    card = FakeCard(monkeypatch, "NVIDIA GeForce RTX 2060", (7, 5), CUBLAS, *CU130)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8, expandable_segments:False")
    assert not any("allocator" in note for note in card.detect("cuda").notes)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: True,roundup_power2_divisions:4")
    assert any(
        "set to expandable_segments:true, roundup_power2_divisions:" in note
        for note in card.detect("cuda").notes
    )
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(card, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert any("set to cudaMallocAsync: predictions assume" in note for note in card.detect("cuda").notes)
