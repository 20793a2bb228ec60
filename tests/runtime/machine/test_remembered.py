"""What torch said is taken for granted in the same circumstances alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tightfit.runtime.machine import remembered
from tightfit.runtime.machine.remembered import Torch

SAID = remembered.Said("2", 4, "AVX2", ("fp32",), False)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What a new process is told, and how often torch was asked for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []
    monkeypatch.setattr(remembered, "_asked", lambda: calls.append(1) or SAID)
    monkeypatch.setattr(remembered, "_only_cpu", lambda: True)

    def once(keep: bool = True) -> tuple[remembered.Said, int]:
        calls.clear()
        one = Torch()
        if keep:
            one.keep()
        return one.said(), len(calls)

    return once


KNOWN = replace(SAID, only_cpu=True)


def test_torch_is_asked_once(told):
    assert told() == (SAID, 1)
    assert told() == (KNOWN, 0)
    assert told(keep=False) == (SAID, 1)


@pytest.mark.parametrize(
    "change", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "accelerator", "processor", "package"]
)
def test_it_is_asked_again_where_its_answer_may_be_another(told, monkeypatch, change, tmp_path):
    told()
    monkeypatch.setenv("ANYTHING_ELSE", "1")
    assert told() == (KNOWN, 0)
    with monkeypatch.context() as patch:
        if change == "accelerator":
            patch.setattr(remembered, "_accelerators", lambda _: ["/dev/nvidia0"])
        elif change == "processor":
            patch.setattr(remembered, "cpu_flags", lambda: frozenset({"sse2"}))
        elif change == "package":
            (other := tmp_path / "onednn.py").write_text("")
            patch.setattr(remembered, "_ASKING", (other,))
        else:
            patch.setenv(change, "7")
        assert told() == (SAID, 1)
        assert told() == (KNOWN, 0)
    assert told() == (KNOWN, 0)


@pytest.mark.parametrize("content", [b"", b"[" * 9999, b"[]", b'{"HERE": 1}', b'{"HERE": {"version": "2"}}'])
def test_what_is_damaged_is_asked_again(told, tmp_path, content):
    told()
    file = tmp_path / "tightfit" / "torch.json"
    (here,) = json.loads(file.read_text())
    file.write_bytes(content.replace(b"HERE", here.encode()))
    assert told() == (SAID, 1)
    assert told() == (KNOWN, 0)


@pytest.mark.parametrize(
    ("cuda", "node", "available", "only"),
    [
        (None, "/dev/nvidia0", False, True),  # a build for CPUs
        ("12.6", None, False, True),
        ("12.6", "/dev/nvidia0", False, False),  # a driver that fails now may work again
        ("12.6", None, True, False),  # none of the places that are known, and it is there
    ],
)
def test_a_gpu_is_never_ruled_out_where_one_may_be(monkeypatch, cuda, node, available, only):
    for name, value in {"cuda": cuda, "hip": None, "xpu": None}.items():
        monkeypatch.setattr(torch.version, name, value, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    monkeypatch.setattr(remembered, "_accelerators", lambda _: [node] if node else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert remembered._only_cpu() == only


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are asked by torch alone")
def test_what_looks_like_an_accelerator(tmp_path):
    bus, dev = tmp_path / "sys/bus/pci/devices", tmp_path / "dev"
    for place, vendor, kind in (("0:1", "0x10de", "0x030200"), ("0:2", "0x1234", "0x030000"),
                                ("0:3", "0x8086", "0x010802"), ("0:4", "0x1002", "0x120000")):  # fmt: skip
        (bus / place).mkdir(parents=True)
        (bus / place / "vendor").write_text(f"{vendor}\n")
        (bus / place / "class").write_text(f"{kind}\n")
    for node in ("nvme0", "nvram", "dri/card0", "nvidia-uvm", "dri/renderD128", "kfd", "dxg"):
        (dev / node).parent.mkdir(parents=True, exist_ok=True)
        (dev / node).touch()
    names = {one.rpartition("/")[2] for one in remembered._accelerators(tmp_path)}
    assert names == {"0:1", "0:4", "nvidia-uvm", "renderD128", "kfd", "dxg"}
