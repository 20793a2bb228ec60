"""Five seconds of what `fuzz.py` does for minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")


def test_no_answer_is_a_servers_error(server):
    command = [
        sys.executable,
        str(Path(__file__).with_name("fuzz.py")),
        "--url",
        server.url,
        "--minutes",
        "0.09",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout[-4000:]
