"""A service is killed while it works, and started again: no job is lost, known twice, or has a torn picture.

    python tests/runtime/test_service_kill.py --kills 50

kills it so often, at random moments; the test does so three times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import runpy
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

ONE_WAY: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "residency": "resident", "attention": "sdpa", "tiling": "whole",
    "cfg": "batched",
}  # fmt: skip
SERVED = "served"  # what this file is called in a process that serves
JOBS = 4  # of each start
SECONDS = 900.0  # for all that is left


def options(seed: int) -> dict[str, Any]:
    """What job `seed` asks; a third of them begin with a picture, which is kept as a file."""
    size = {"num_inference_steps": 2, "width": 64, "height": 64}
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    given = {"image": picture, "strength": 1.0} if seed % 3 == 0 else {}
    return {"prompt": "a heart", "seed": seed, **size, **given}


def serve(folder: Path, first: int, count: int, told: Connection) -> None:
    """In a process of its own: queue jobs and tell each, while those run that were left; wait for all."""
    from tightfit.runtime import service as module

    module.TRIES = 10**6  # the jobs have no part in these kills
    with module.Service(folder=folder, limits=module.Limits(waiting=10**6), **ONE_WAY) as service:
        for seed in range(first, first + count):
            ticket = service.submit("emoji", options(seed), client=str(seed % 2))
            told.send((seed, ticket.id))
            time.sleep(0.02)
        for ticket in service.active:
            ticket.wait()
    told.send(None)


class Trial:
    """A service that is killed now and then, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submitted: dict[int, str] = {}
        """Jobs that were taken, by their seeds."""
        self._starts = 0
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["tightfit.runtime.service", "torch", "diffusers"])

    def start(self, count: int, seconds: float) -> bool:
        """Start it, with `count` jobs more, and kill it after so many seconds. Whether it was done before."""
        heard, told = self._processes.Pipe(duplex=False)
        first, self._starts = 1000 * self._starts, self._starts + 1
        asked = {"ASKED": (self.folder, first, count, told)}
        process = self._processes.Process(target=runpy.run_path, args=(__file__, asked, SERVED))
        process.start()
        told.close()
        end_by, is_done = time.monotonic() + seconds, False
        with closing(heard), suppress(EOFError):
            while not is_done and heard.poll(max(0, end_by - time.monotonic())):
                said = heard.recv()
                is_done = said is None
                self.submitted |= {} if is_done else dict([said])
        if not is_done:
            process.kill()
        process.join()
        return is_done

    def check(self) -> Counter[int]:
        """All that was taken is done, as if nothing had happened. Returns how often jobs were begun."""
        import tightfit
        from tightfit.runtime.asking import request_of
        from tightfit.runtime.jobs import Jobs, State

        with closing(Jobs(self.folder)) as jobs:
            records = jobs.latest(10**6)
        seeds = [record.order.options["seed"] for record in records]
        assert len(seeds) == len({*seeds})
        assert {*self.submitted.values()} <= {record.id for record in records}
        assert {record.state for record in records} == {State.DONE}
        with tightfit.load("emoji", **ONE_WAY) as pipeline:
            for seed, record in zip(seeds, records, strict=True):
                (file,) = record.pictures
                with Image.open(file) as picture:
                    alone = pipeline.generate(request_of(options(seed))).images[0]
                    assert picture.tobytes() == alone.tobytes(), seed
        left = {file.name for file in (self.folder / "pictures").iterdir()}
        assert left == {record.pictures[0].name for record in records}
        assert not [*(self.folder / "given").iterdir()]
        return Counter(record.tries for record in records)


def trial(folder: Path, kills: int, moments: random.Random, longest: float) -> Trial:
    """Kill a service so often, each time after `longest` seconds at most."""
    one = Trial(folder)
    for _ in range(kills):
        one.start(JOBS, moments.uniform(0, longest))
    assert one.start(JOBS, SECONDS)
    return one


def test_a_service_that_is_killed_loses_nothing(tmp_path):
    one = trial(tmp_path / "state", 2, random.Random(1), 3.0)
    assert len(one.submitted) >= JOBS
    one.check()


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--kills", type=int, default=50)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--longest", type=float, default=10.0, help="seconds from a start to its kill")
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one = trial(Path(folder) / "state", args.kills, random.Random(args.seed), args.longest)
        tries = one.check()
    said = f"{args.kills} kills: {len(one.submitted)} jobs taken, 0 lost, 0 torn"
    sys.stdout.write(f"{said}; by how often they were begun: {dict(sorted(tries.items()))}\n")


if __name__ == SERVED:
    serve(*globals()["ASKED"])
elif __name__ == "__main__":
    main()
