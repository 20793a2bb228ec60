"""`tightfit serve` as a process: what it says, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

httpx = pytest.importorskip("httpx")
COMMAND = (sys.executable, "-m", "tightfit", "serve", "--port", "0")


@pytest.fixture
def refused(capfd, monkeypatch):
    """Called with arguments: the one line that they are refused with."""
    from tightfit.__main__ import app
    from tightfit.runtime.cli.app import main

    monkeypatch.setenv("TIGHTFIT_API_KEY", "")

    def line(*arguments: str) -> str:
        app()
        monkeypatch.setattr(sys, "argv", ["tightfit", "serve", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr().err.strip()
        assert ended.value.code == 2 and "\n" not in said
        return said

    return line


def test_what_others_reach_needs_a_key(refused):
    assert "others can reach 0.0.0.0: give --api-key" in refused("--host", "0.0.0.0", "--port", "0")
    assert "others can reach ::" in refused("--host", "::", "--port", "0")
    assert "every page of the web" in refused("--cors", "*")
    assert "every page of the web" in refused("--allow-host", "*")
    assert "--host 0.0.0.0, with --api-key" in refused("--listen", "--api")


def test_what_cannot_be_listened_on(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "stop what does, or give --port" in refused("--port", port)
    assert "is no address here" in refused("--host", "no.such.host.invalid")
    assert "65535" in refused("--port", "99999")


def test_wishes_and_models_that_are_not(refused, tmp_path):
    state = ("--port", "0", "--state", str(tmp_path))
    assert "does not exist" in refused(*state, "--model", "nothing")
    assert "unknown precision" in refused(*state, "--precision", "fp1")
    assert "an amount such as" in refused(*state, "--limit-body", "much")
    assert "alone takes" in refused(*state, "--ram", "1MiB")


def test_a_signal_ends_it_and_what_waits_is_kept(tmp_path):
    from tightfit.runtime.jobs import Jobs

    arguments = ["--state", str(tmp_path / "state"), "--log-json", "--precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = process.stdout.readline()
        place = re.fullmatch(r"tightfit serves emoji at (http://127.0.0.1:\d+) on .*, in .*B\n", line)
        assert place, (line, process.poll())
        jobs = f"{place[1]}/v1/tightfit/jobs"
        options = {"prompt": "a red heart", "width": 64, "height": 64, "num_inference_steps": 900}
        ids = [httpx.post(jobs, json=options, timeout=30).json()["id"] for _ in range(2)]
        with httpx.stream("GET", f"{jobs}/{ids[1]}/events", timeout=60) as waiting:
            process.send_signal(signal.SIGTERM)
            assert '"state":"postponed"' in waiting.read().decode().splitlines()[-2]
        greeted, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert greeted == "stopping after this step; again to end at once\n"
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line.get("job") for line in lines} == {*ids} and lines[0]["model"] == "emoji", said
    assert [record.id for record, _ in Jobs(tmp_path / "state").unfinished()] == ids, said
