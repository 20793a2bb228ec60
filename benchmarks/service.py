"""A queue under load: jobs lost, memory, jobs a second, and what it adds to painting, beside pipelines.

    python -m tightfit.benchmarks.service --minutes 2 --models emoji tiny-sdxl
    python -m tightfit.benchmarks.service --minutes 10 --url http://127.0.0.1:7860 --pid PID

A server that is measured for long has to know its ended jobs: `tightfit serve --limit-kept 100000`.
Clients ask one after another for pictures of several sizes, steps and models. Some cancel, some go away.
`queue` is, of a job that waited while another ran, the time from that one's end to its own, without texts,
steps and decoding; `pipeline` the same of calls in Python, one after another in this process.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any, Protocol

import psutil

from .. import load
from ..runtime.asking import request_of
from ..runtime.jobs import Order, Record
from ..runtime.service import QueueFullError, Service
from ..runtime.units import shown
from .record import named, record

SIZES = ((64, 64), (96, 64), (64, 96), (128, 128))
STEPS = (1, 2, 4)
CANCELLED, LEFT = 0.1, 0.05  # shares of jobs: that are cancelled, and that nobody waits for
ENDS = ("done", "failed", "cancelled", "stopped")


class Door(Protocol):
    """A way to a service. A job is told by its names in our own API."""

    def submit(self, model: str, options: Mapping[str, Any], client: str) -> str:
        """Its id."""
        ...

    def wait(self, id: str) -> None: ...  # noqa: A002

    def cancel(self, id: str) -> None: ...  # noqa: A002

    def job(self, id: str) -> Mapping[str, Any]: ...  # noqa: A002


class Here:
    """A service in this process, which keeps its jobs in a folder."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def submit(self, model: str, options: Mapping[str, Any], client: str) -> str:
        while True:
            try:
                return self.service.queue(Order(model, options, client=client)).id
            except QueueFullError:
                time.sleep(0.05)

    def wait(self, id: str) -> None:  # noqa: A002
        if ticket := self.service.ticket(id):
            ticket.wait()

    def cancel(self, id: str) -> None:  # noqa: A002
        if ticket := self.service.ticket(id):
            ticket.cancel()

    def job(self, id: str) -> Mapping[str, Any]:  # noqa: A002
        known = self.service.record(id)
        assert isinstance(known, Record)
        return vars(known)


class Elsewhere:
    """A server's own API."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=f"{url.rstrip('/')}/v1/tightfit", headers=headers, timeout=60)

    def submit(self, model: str, options: Mapping[str, Any], client: str) -> str:  # noqa: ARG002
        while (answer := self._http.post("/jobs", json={"model": model, **options})).status_code == 503:
            time.sleep(0.05)
        return answer.raise_for_status().json()["id"]

    def wait(self, id: str) -> None:  # noqa: A002
        with self._http.stream("GET", f"/jobs/{id}/events") as answer:
            for _ in answer.iter_lines():
                pass

    def cancel(self, id: str) -> None:  # noqa: A002
        self._http.delete(f"/jobs/{id}").raise_for_status()

    def job(self, id: str) -> Mapping[str, Any]:  # noqa: A002
        return self._http.get(f"/jobs/{id}").raise_for_status().json()


class Load:
    """Clients of one door, until `seconds` are over."""

    def __init__(self, door: Door, models: Sequence[str], clients: int, seconds: float) -> None:
        self.door, self.models, self.seconds = door, models, seconds
        self.asked: dict[str, bool] = {}
        """Jobs that were taken, and whether they were cancelled."""
        self.wait_seconds: list[float] = []
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._safely, args=(number,)) for number in range(clients)]

    def warm(self) -> None:
        """One picture of each model and size, after which nothing new is loaded or planned."""
        for model, (width, height) in itertools.product(self.models, SIZES):
            asked = {"prompt": "a", "width": width, "height": height, "num_inference_steps": 1}
            self.door.wait(self.door.submit(model, asked, ""))

    def run(self) -> None:
        self._end = time.monotonic() + self.seconds
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        for id_ in self.asked:
            while self.door.job(id_)["state"] not in ENDS:
                time.sleep(0.1)

    def _safely(self, number: int) -> None:
        try:
            self._ask(number, random.Random(number))
        except Exception as error:  # told with the results
            self.failures.append(repr(error))

    def _ask(self, number: int, chance: random.Random) -> None:
        while time.monotonic() < self._end:
            start, model = time.monotonic(), chance.choice(self.models)
            id_, luck = self.door.submit(model, options(chance), str(number)), chance.random()
            self.asked[id_] = luck < CANCELLED
            if luck < CANCELLED:
                time.sleep(chance.uniform(0, 0.1))
                self.door.cancel(id_)
            if not CANCELLED <= luck < CANCELLED + LEFT:
                self.door.wait(id_)
                self.wait_seconds.append(time.monotonic() - start)


def options(chance: random.Random) -> dict[str, Any]:
    width, height = chance.choice(SIZES)
    count = chance.choice(STEPS)
    size = {"width": width, "height": height, "num_inference_steps": count}
    return {"prompt": "a red heart", "seed": chance.randrange(2**32), **size}


def added_seconds(jobs: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the queue adds to each job that waited when the one before it ended."""
    done = sorted((job for job in jobs if job["ended"]), key=lambda job: job["ended"])
    return [
        job["ended"] - before["ended"] - painting_seconds(job["summary"]["stages"])
        for before, job in itertools.pairwise(done)
        if job["state"] == before["state"] == "done" and job["created"] < before["ended"]
    ]


def painting_seconds(passes: Sequence[Mapping[str, Mapping[str, float]]]) -> float:
    """Of all stages but the first, in which a run is planned."""
    return sum(s["seconds"] for stages in passes for name, s in stages.items() if name != "prepare")


def alone_seconds(models: Sequence[str], count: int, wishes: Mapping[str, Any]) -> list[float]:
    """What a pipeline adds to the stages of its run, for as many pictures of the same kind."""
    chance, added = random.Random(0), []
    pipelines = {model: load(model, **wishes) for model in models}
    for model, (width, height) in itertools.product(models, SIZES):
        pipelines[model]("a", width=width, height=height, num_inference_steps=1)
    for _ in range(count):
        pipeline, asked = pipelines[chance.choice(models)], options(chance)
        start = time.perf_counter()
        result = pipeline.generate(request_of(asked))
        seconds = time.perf_counter() - start
        stages = [{name: {"seconds": stage.seconds} for name, stage in result.stages.items()}]
        added.append(seconds - painting_seconds(stages))
    for pipeline in pipelines.values():
        pipeline.close()
    return added


class Memory:
    """Bytes of a process, twice a second."""

    def __init__(self, pid: int | None) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.bytes: list[int] = []
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.bytes.append(self._process.memory_info().rss)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def minutes(self) -> tuple[int, int]:
        """In the mean of the first and of the last minute, or of a third where that is less."""
        count = max(1, min(120, len(self.bytes) // 3))
        return round(mean(self.bytes[:count])), round(mean(self.bytes[-count:]))


def measured(work: Load, memory: Memory) -> dict[str, Any]:
    """What came of it."""
    work.warm()
    start = time.monotonic()
    with memory:
        work.run()
    seconds = time.monotonic() - start
    jobs = [work.door.job(id_) for id_ in work.asked]
    lost = [
        job
        for job, cancelled in zip(jobs, work.asked.values(), strict=True)
        if job["state"] != "done" and not (cancelled and job["state"] == "cancelled")
    ]
    first, last = memory.minutes()
    states = Counter(str(job["state"]) for job in jobs)
    return {
        "seconds": round(seconds, 1),
        "jobs": dict(states),
        "lost": len(lost) + len(work.failures),
        "failures": [*work.failures, *(job["error"] for job in lost)][:5],
        "jobs_a_second": round(states["done"] / seconds, 2),
        "first_minute_bytes": first,
        "last_minute_bytes": last,
        "queue_ms": spread(added_seconds(jobs)),
        "client_ms": spread(work.wait_seconds),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(seconds) < 2:
        return {}
    p99 = quantiles(seconds, n=100)[98]
    return {"median": round(1000 * median(seconds), 1), "p99": round(1000 * p99, 1), "of": len(seconds)}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--minutes", type=float, default=10)
    parse.add_argument("--clients", type=int, default=8)
    parse.add_argument("--models", nargs="+", default=["emoji"])
    parse.add_argument("--device", default="auto")
    parse.add_argument("--precision", default="auto")
    parse.add_argument("--url", help="of a server; default: a service in this process")
    parse.add_argument("--pid", type=int, help="the server's, whose memory is read")
    parse.add_argument("--key")
    args = parse.parse_args()
    wishes = {"device": args.device, "precision": args.precision}
    finish: Callable[[], object] = lambda: None  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        if args.url:
            door = Elsewhere(args.url, args.key)
        else:
            service = Service(folder=Path(folder), **wishes)
            door, finish = Here(service), service.close
        work = Load(door, args.models, args.clients, 60 * args.minutes)
        row = measured(work, Memory(args.pid))
        finish()
    row["pipeline_ms"] = spread(alone_seconds(args.models, 200, wishes)) if not args.url else {}
    for name, value in row.items():
        print(f"{name}: {shown(value) if name.endswith('_bytes') else value}")
    models = [named(model) for model in args.models]
    record("service", {"clients": args.clients, "models": models, **row}, rehearsal=args.minutes < 2)


if __name__ == "__main__":
    main()
