"""A batch is killed while it works, and started again: no picture is lost, made twice, or torn.

    python tests/runtime/batch/test_kill.py --kills 30

kills it so often, at random moments; the test does so twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from PIL import Image

OPTIONS = [
    "--device", "cpu", "--precision", "fp32", "--residency", "resident", "--attention", "sdpa",
    "--tiling", "whole", "--steps", "2", "--retries", "1000000",
]  # fmt: skip
FILE = "tightfit-batch.db"


def table(folder: Path, pictures: int) -> Path:
    """Mixed sizes and prompts, every seed once."""
    rows = (
        {"prompt": f"a heart {seed % 5}", "seed": seed, "width": 64 + 32 * (seed % 2), "height": 64}
        for seed in range(pictures)
    )
    file = folder / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def start(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tightfit", "batch", str(file), "-o", str(file.parent / "d"), *OPTIONS]
    where = str(Path(__file__).parents[4])
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": where}
    )


def seeds(folder: Path) -> list[int]:
    """Of all pictures that there are, each read to its end."""
    found = []
    for picture in folder.rglob("*.png"):
        with Image.open(picture) as image:
            image.load()
            found.append(int(image.text["parameters"].partition("Seed: ")[2].partition(",")[0]))
    return sorted(found)


def killed(folder: Path, kills: int, pictures: int) -> dict[str, int]:
    """Kill it so often while it paints, then let it end; answers what there was before that."""
    file, moments = table(folder, pictures), random.Random(kills)
    output, there = folder / "d", 0
    for _ in range(kills):
        process = start(file)
        before, deadline = len([*output.rglob("*.png")]), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len([*output.rglob("*.png")]) > before:
                time.sleep(moments.random() * 0.3)
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
        found = seeds(output)
        assert len(found) == len({*found}), "a picture was made twice"
        there = len(found)
    process = start(file)
    _, said = process.communicate(timeout=250)
    assert process.returncode == 0, said.decode()
    assert seeds(output) == [*range(pictures)]
    with closing(sqlite3.connect(output / FILE)) as ledger:
        known = dict(ledger.execute("select file, sha256 from pictures where state = 'done'").fetchall())
    assert known == {
        picture.relative_to(output).as_posix(): hashlib.sha256(picture.read_bytes()).hexdigest()
        for picture in output.rglob("*.png")
    }
    assert not [*output.rglob("*.partial")]
    return {"kills": kills, "pictures": pictures, "before_the_last_start": there}


def test_killed(tmp_path):
    told = killed(tmp_path, 1, 12)
    assert 0 < told["before_the_last_start"] <= 12


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--kills", type=int, default=30)
    parse.add_argument("--pictures", type=int, default=600)
    given = parse.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(json.dumps(killed(Path(place), given.kills, given.pictures)))
