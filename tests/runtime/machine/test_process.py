"""A process under RLIMIT_AS has less memory than the machine."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from tightfit.runtime.errors import OutOfMemoryError
from tightfit.runtime.machine import process
from tightfit.runtime.machine.hardware import GIB, Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.choose import none_fits, plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")


def test_a_limit_is_what_is_free(monkeypatch):
    """But for what is mapped and not used: 500 MiB of files, and 64 of a heap for each thread."""
    monkeypatch.setattr(process.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(process, "address_space", lambda: 6 * GIB)
    monkeypatch.setattr(process, "cgroup_memory", lambda *_: (None, 0))
    found = Hardware.detect("cpu")
    mapped = process.psutil.Process().memory_info()
    assert found.free_bytes <= 6 * GIB - 756 * MIB
    assert found.free_bytes == pytest.approx(6 * GIB - max(756 * MIB, mapped.vms - mapped.rss), abs=32 * MIB)
    monkeypatch.setattr(process, "address_space", lambda: math.inf)
    assert (
        Hardware.detect("cpu").free_bytes > found.free_bytes or Hardware.detect("cpu").total_bytes < 6 * GIB
    )


def test_the_limit_is_named_as_the_cure(monkeypatch, sd1):
    monkeypatch.setattr(process, "address_space", lambda: 1300 * MIB)
    monkeypatch.setattr("tightfit.runtime.planner.choose.address_space", lambda: 1300 * MIB)
    found, spec = (
        Hardware("cpu", "a processor", 8 * GIB, 500 * MIB, ("fp32",), context_bytes=600 * MIB),
        inspect(sd1),
    )
    request = Request("a", width=64, height=64).resolve(spec)
    wishes = Wishes(precision="fp32", attention="sdpa")
    said = str(none_fits(plan(found, spec, request, wishes), found, request, wishes))
    assert "under this process's limit of 1.27 GiB (ulimit -v)" in said


def test_a_limit_too_small_for_the_libraries_is_one_line(tmp_path):
    """Where C++ libraries would abort the process: of 100, 150, 550 and 775 MiB none gave a line."""
    with (
        pytest.raises(OutOfMemoryError, match=r"may map 550 MiB.*ulimit -v"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(process, "address_space", lambda: 550 * MIB)
        Hardware.detect("cpu")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (150 << 20,) * 2);"
        "from tightfit.__main__ import main; sys.argv[1:] = ['a cat']; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert (
        ran.stderr.startswith("tightfit: out of memory: this process may map 150 MiB")
        and ran.stderr.count("\n") == 1
    )
