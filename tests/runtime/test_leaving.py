"""A command ends at once, and loses nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEAVE = "from tightfit.runtime.leaving import leave\n"


def ran(code: str, **pipes) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LEAVE + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [0, 2, 130])
def test_output_exit_code_and_handlers(code):
    """Of a pipe, which is written in blocks. A weak reference's callback would run if Python took modules
    apart."""
    done = ran(
        "import atexit, sys\natexit.register(print, 'last')\n"
        "class Late:\n    def __del__(self): sys.stderr.write('torn down')\nlate = Late()\n"
        f"print('x' * 200_000)\nleave({code})"
    )
    assert done.returncode == code
    assert done.stdout == "x" * 200_000 + "\nlast\n"
    assert done.stderr == ""


def test_threads_are_waited_for():
    """One at work, and one of a pool without work, as torch's compiler has: nothing is taken apart for it."""
    done = ran(
        "import sys, threading, time\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "class Late:\n    def __del__(self): sys.stderr.write('torn down')\nlate = Late()\n"
        "pool = ThreadPoolExecutor(1)\npool.submit(int).result()\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('written'))).start()\nleave(0)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "written\n", "")


def test_a_closed_pipe_is_told_as_ever():
    code = LEAVE + "import sys\nsys.stdout.write('x')\nleave(0)\nsys.exit(0)"
    read = "import os, subprocess, sys; r, w = os.pipe(); os.close(r)\n"
    read += f"print(subprocess.run([sys.executable, '-c', {code!r}], stdout=w, stderr=-1).returncode)"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    plain = read.replace("leave(0)", "")
    expected = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert done.stdout == expected.stdout != "0\n"
