"""Runs each step of the Dockerfile and of the systemd unit in a clean folder, where no container engine is at
hand.

    python packaging/check.py

Of the Dockerfile: COPY takes what git would commit, RUN is run by sh, in a virtual environment in place of
the image's Python, with the image's folders below one of ours. Then what CMD and ExecStart say is started,
waited for by HEALTHCHECK's own command, asked for a picture with the key, and ended by SIGTERM, which has to
leave exit code 0.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).parent
KEY = "a key for this check"
PLACES = ("/src", "/state", "/models", "/var/lib/tightfit", "/var/cache/tightfit", "/opt/tightfit")
SECONDS = 120
SERVED = "7860"  # the port in the image; another here, where something may be served already


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = image(root)
        for name, command in (("CMD", started(root)), ("ExecStart", unit(root))):
            serve(command, root, environment)
            print(f"{name}: served a picture, and ended at SIGTERM", flush=True)


def steps() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and what follows it."""
    text = (HERE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


PORT = free_port()


def placed(text: str, root: Path) -> str:
    """A command with the image's folders below `root`, and its port here."""
    text = text.replace(SERVED, PORT)
    for place in PLACES:
        text = re.sub(rf"(?<![\w/.]){place}(?![\w-])", str(root / place.lstrip("/")), text)
    return text


def image(root: Path) -> dict[str, str]:
    """Run what builds the image; answers with its environment."""
    for place in PLACES:
        (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    python = root / "opt/tightfit"
    venv.create(python, with_pip=True)
    environment = {"PATH": f"{python / 'bin'}:{os.environ['PATH']}", "HOME": str(root / "nohome")}
    environment |= {
        name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "http"))
    }
    folder = root / "src"
    for instruction, text in steps():
        if instruction == "ARG":
            name, _, value = text.partition("=")
            environment[name] = os.environ.get(name, value)
        elif instruction == "ENV":
            pairs = (pair.partition("=") for pair in shlex.split(text))
            environment |= {name: placed(value, root) for name, _, value in pairs}
        elif instruction == "WORKDIR":
            folder = Path(placed(text, root))
        elif instruction == "COPY":
            copy(folder)
        elif instruction == "RUN":
            print(f"RUN {text}", flush=True)
            subprocess.run(["sh", "-ec", placed(text, root)], cwd=folder, env=environment, check=True)
    return environment


def copy(to: Path) -> None:
    """What git would commit."""
    names = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(names, cwd=HERE.parent, stdout=subprocess.PIPE, check=True).stdout
    pack = ["tar", "-c", "--null", "-T", "-"]
    packed = subprocess.run(pack, cwd=HERE.parent, input=listed, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=to, input=packed, check=True)


def started(root: Path) -> list[str]:
    (command,) = (text for instruction, text in steps() if instruction == "CMD")
    return [placed(word, root) for word in json.loads(command)]


def unit(root: Path) -> list[str]:
    """What systemd would start; its own check of the unit first, where it is installed."""
    file = HERE / "tightfit.service"
    text = placed(file.read_text(encoding="utf-8"), root)
    copied = root / file.name
    copied.write_text(text, encoding="utf-8")
    try:
        subprocess.run(["systemd-analyze", "verify", str(copied)], check=True)
    except FileNotFoundError:
        print("systemd-analyze is not here: the unit's words are not checked", flush=True)
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    return [*shlex.split(command), "--port", PORT]


def serve(command: list[str], root: Path, environment: dict[str, str]) -> None:
    """Start the server, wait until it is ready, have it paint, and end it."""
    (health,) = (text for instruction, text in steps() if instruction == "HEALTHCHECK")
    asking = json.loads(placed(health[health.index("[") :], root))
    told = environment | {"TIGHTFIT_API_KEY": KEY}
    process = subprocess.Popen(command, cwd=root / "state", env=told)
    try:
        end = time.monotonic() + SECONDS
        while subprocess.run(asking, env=told, capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{shlex.join(command)} is not ready")
            time.sleep(1)
        paint()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(SECONDS)
    if code:
        sys.exit(f"{shlex.join(command)} ended with exit code {code} at SIGTERM")


def paint() -> None:
    asked = json.dumps({"prompt": "a red heart", "size": "64x64", "quality": "low"}).encode()
    address = f"http://127.0.0.1:{PORT}/v1/images/generations"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(address, asked, headers), timeout=SECONDS) as answer:
        content = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    if not content.startswith(b"\x89PNG"):
        sys.exit("what was painted is no PNG")


if __name__ == "__main__":
    main()
