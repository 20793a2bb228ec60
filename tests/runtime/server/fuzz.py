"""Asks our server, by its own OpenAPI, whatever schemathesis thinks of: no answer may be a server's error.

    python tests/runtime/server/fuzz.py --minutes 20

The suite runs a few seconds of it. It speaks to a server of its own on 127.0.0.1, or to one at `--url`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def fuzzed(url: str, minutes: float) -> int:
    """The exit code of schemathesis: 0 if it found nothing."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", "not_a_server_error", "--max-time", str(max(1, round(minutes * 60)))),
        *("--phases", "coverage,fuzzing" if minutes > 1 else "fuzzing"),
        *("--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60"),
        *("--warnings", "off", "--no-color"),
        *(() if minutes > 1 else ("--max-examples", "3", "--seed", "1", "--generation-deterministic")),
    ]
    with tempfile.TemporaryDirectory() as folder:  # where it keeps what it has seen
        environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        return subprocess.run(command, cwd=folder, env=environment, timeout=60 * minutes + 300).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.url:
        sys.exit(fuzzed(given.url, given.minutes))
    from conftest import _serving
    from tightfit.runtime.service import Limits

    # Small jobs, as most of the time should go into requests; and room for all of them.
    limits = Limits(waiting=10**6, waiting_each=10**6, pixels=64 * 64, steps=2, images=2, seconds=10)
    with tempfile.TemporaryDirectory() as folder, _serving(Path(folder), limits=limits) as server:
        sys.exit(fuzzed(server.url, given.minutes))


if __name__ == "__main__":
    main()
