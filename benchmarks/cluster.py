"""A table of pictures by a Ray cluster of nodes on this machine, beside as many processes without Ray.

    python -m tightfit.benchmarks.cluster --pictures 200

`apart`: a process for each node, in its budget, which paints its part of the table as `tightfit batch` does.
`spread`: the same by `--ray`. `lossy`: one node is killed half-way, and another is added. `planned`: what
`tightfit cluster plan` would say of two such nodes. Seconds begin after 32 pictures more than `--pictures`,
with which each process imports and loads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from .batch import BySeed, rows
from .record import record

_BUDGETS = ("4GiB", "650MiB")
_WARM = 32  # pictures of all before the clock begins: each process imports and loads with its first run
_STORE_BYTES = 80 * 2**20


def _asked(table: Sequence[dict[str, Any]]) -> Any:
    """Rows of the benchmark of batches, as a table has them."""
    common = {"model": "emoji", "precision": "fp32"}
    return (
        (
            number,
            {**common, "num_inference_steps": row["steps"], **{k: v for k, v in row.items() if k != "steps"}},
        )
        for number, row in enumerate(table, 1)
    )


def _ask(ledger: Any, pictures: int, steps: int) -> None:
    from ..runtime.batch.requests import Reading

    assert not ledger.ask(Reading().pictures(_asked(rows(pictures, [(64, 64)], steps))))


class _Clock:
    """Seconds since so many pictures were made."""

    def __init__(self, warm: int) -> None:
        self._warm, self.made, self._start = warm, 0, 0.0

    def __call__(self, news: Any) -> None:
        from ..runtime.batch.painting import Encoded

        self.made += isinstance(news, Encoded)
        if self.made == self._warm and not self._start:
            self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _here(part: int) -> Any:
    """A painter in the budget of one node."""
    from ..runtime.batch.painting import Here
    from ..runtime.machine.hardware import Hardware
    from ..runtime.open_models import OpenModels
    from ..runtime.pipeline import MANY
    from ..runtime.planner.wishes import Wishes

    wishes = Wishes(budget=_BUDGETS[part], requests=MANY, images_per_call=16)
    return Here(OpenModels(Hardware.detect("cpu"), None, wishes))


def alone(pictures: int, steps: int, part: int, folder: Path) -> float:
    """One part of the table here, in seconds. It begins when all others are ready, too."""
    from ..runtime.batch.ledger import Ledger
    from ..runtime.batch.requests import Reading
    from ..runtime.batch.running import Batch, planned

    here = _here(part)
    with Ledger(folder) as ledger:
        table = rows(pictures + _WARM, [(64, 64)], steps)[part :: len(_BUDGETS)]
        assert not ledger.ask(Reading().pictures(_asked(table)))
        planned(ledger, here)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        clock = _Clock(_WARM // len(_BUDGETS))
        Batch(ledger, BySeed(folder), clock, painter=here).run()
        return clock.seconds()


def on_paper(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """The same two nodes as `tightfit cluster plan` has them: nothing is painted."""
    from ..runtime.batch.fleet import Card, Site, schedule
    from ..runtime.batch.kinds import kinds_of
    from ..runtime.batch.ledger import Ledger

    painters = {budget: _here(part) for part, budget in enumerate(_BUDGETS)}
    with Ledger(None) as ledger:
        _ask(ledger, args.pictures, args.steps)
        kinds, errors = kinds_of(ledger, painters)
    assert not errors, errors
    planned = schedule([Card(budget, 1) for budget in _BUDGETS], kinds, Site())
    shares = {share.card.name: sum(share.pictures) for share in planned.shares}
    return {"seconds": planned.seconds, "pictures": planned.pictures, "shares": shares}


def apart(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A process of one thread for each node."""
    count = len(_BUDGETS)
    given = [sys.executable, "-m", "tightfit.benchmarks.cluster", "--pictures", str(args.pictures)]
    processes = [
        subprocess.Popen(
            [*given, "--steps", str(args.steps), "--part", str(part), str(folder / str(part))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for part in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    each = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {"seconds": max(each), "painting": each, "pictures": len([*folder.rglob("*.png")])}


def spread(
    args: argparse.Namespace, folder: Path, halfway: Callable[[Any, Any], object] | None = None
) -> dict[str, Any]:
    """By Ray; `halfway` is called with the cluster and one of its nodes."""
    from ..runtime.batch.ledger import Ledger
    from ..runtime.batch.nodes import RayCrew
    from ..runtime.batch.painting import Encoded, Encoding
    from ..runtime.batch.running import planned
    from ..runtime.batch.spread import Spread
    from ..runtime.batch.worker import Setup

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    cluster = import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=head)
    nodes = [_added(cluster, budget) for budget in _BUDGETS]
    setup = Setup(Encoding("picture"), str(folder), device="cpu", images_per_call=16)
    note = lambda text: sys.stderr.write(f"{text}\n")  # noqa: E731
    try:
        with RayCrew(f"{cluster.address}", setup, (), note) as crew, Ledger(folder) as ledger:
            begun = time.perf_counter()
            abouts = crew.ready()
            _ask(ledger, args.pictures + _WARM, args.steps)
            ready_seconds = time.perf_counter() - begun
            planned(ledger, crew)
            planned_seconds = time.perf_counter() - begun - ready_seconds
            clock, used = _Clock(_WARM), _cpu_seconds()

            def tell(news: Any) -> None:
                clock(news)
                if halfway and isinstance(news, Encoded) and clock.made == _WARM + args.pictures // 2:
                    halfway(cluster, nodes[-1])

            work = Spread(ledger, BySeed(folder), tell, crew=crew)
            work.run()
            seconds, now = clock.seconds(), _cpu_seconds()
            plans = sorted({record["plan"] for record in ledger.records() if record["plan"]})
            sums = ledger.sums(0)  # of runs, as the workers clock them
    finally:
        cluster.shutdown()
    pictures = len([*folder.rglob("*.png")])
    budgets = [about.budget_bytes for about in abouts.values()]
    shares = [asdict(share) for share in work.shares.values()]
    before = {"ready_seconds": ready_seconds, "planned_seconds": planned_seconds}
    said = {"seconds": seconds, **before, "pictures": pictures, "budgets": budgets}
    cpu = {name: now[name] - used[name] for name in now}
    return {**said, "nodes": shares, "plans": plans, "painting": sums["seconds"], "cpu_seconds": cpu}


def _cpu_seconds() -> dict[str, float]:
    """Of this process, of those that paint, and of Ray's own."""
    used = {"driver": sum(psutil.Process().cpu_times()[:2]), "painting": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            is_actor = "ray::" in " ".join(process.cmdline())
            used["painting" if is_actor else "ray"] += sum(process.cpu_times()[:2])
    return used


def _added(cluster: Any, budget: str) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, labels={"tightfit-budget": budget})


def lossy(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    def halfway(cluster: Any, node: Any) -> None:
        cluster.remove_node(node, allow_graceful=False)
        _added(cluster, _BUDGETS[0])

    return spread(args, folder, halfway)


WAYS = {"planned": on_paper, "apart": apart, "spread": spread, "lossy": lossy}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pictures", type=int, default=200)
    parse.add_argument("--steps", type=int, default=8)
    parse.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parse.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.part:
        part, folder = int(args.part[0]), Path(args.part[1])
        sys.stdout.write(f"{alone(args.pictures, args.steps, part, folder)}\n")
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for way in args.ways:
            results[way] = WAYS[way](args, Path(place) / way)
            results[way]["per_hour"] = 3600 * args.pictures / results[way]["seconds"]
            sys.stdout.write(f"{way}: {results[way]}\n")
    record("cluster", {"model": "emoji", "pictures": args.pictures, "steps": args.steps, "ways": results})


if __name__ == "__main__":
    main()
