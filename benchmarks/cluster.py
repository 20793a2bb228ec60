"""A table of pictures by a Ray cluster of nodes on this machine, beside as many processes without Ray.

    python -m tightfit.benchmarks.cluster --pictures 200

`apart`: a process for each node, which paints its part of the table as `tightfit batch` does. `spread`: the
same by `--ray`, with nodes of unlike budgets. `lossy`: one of them is killed half-way, and another is added.
Seconds are from the plan to the last picture, loading included, but not imports, nor the start of Ray.
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
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from .batch import BySeed, rows
from .record import record

_BUDGETS = ("4GiB", "650MiB")
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


def alone(pictures: int, steps: int, part: int, of: int, folder: Path) -> float:
    """One part of the table here, in seconds. It begins when all others are ready, too."""
    from ..runtime.batch.ledger import Ledger
    from ..runtime.batch.painting import Here
    from ..runtime.batch.requests import Reading
    from ..runtime.batch.running import Batch, planned
    from ..runtime.machine.hardware import Hardware
    from ..runtime.open_models import OpenModels
    from ..runtime.pipeline import MANY
    from ..runtime.planner.wishes import Wishes

    here = Here(OpenModels(Hardware.detect("cpu"), None, Wishes(requests=MANY, images_per_call=16)))
    with Ledger(folder) as ledger:
        assert not ledger.ask(Reading().pictures(_asked(rows(pictures, [(64, 64)], steps)[part::of])))
        planned(ledger, here)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        start = time.perf_counter()
        Batch(ledger, BySeed(folder), painter=here).run()
        return time.perf_counter() - start


def apart(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A process of one thread for each node."""
    count = len(_BUDGETS)
    given = [sys.executable, "-m", "tightfit.benchmarks.cluster", "--pictures", str(args.pictures)]
    processes = [
        subprocess.Popen(
            [*given, "--steps", str(args.steps), "--part", str(part), str(count), str(folder / str(part))],
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
    from ..runtime.batch.requests import Reading
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
            assert not ledger.ask(Reading().pictures(_asked(rows(args.pictures, [(64, 64)], args.steps))))
            ready_seconds = time.perf_counter() - begun
            planned(ledger, crew)
            planned_seconds = time.perf_counter() - begun - ready_seconds
            made = 0

            def tell(news: Any) -> None:
                nonlocal made
                made += isinstance(news, Encoded)
                if halfway and isinstance(news, Encoded) and made == args.pictures // 2:
                    halfway(cluster, nodes[-1])

            work = Spread(ledger, BySeed(folder), tell, crew=crew)
            start = time.perf_counter()
            work.run()
            seconds = time.perf_counter() - start
            plans = sorted({record["plan"] for record in ledger.records() if record["plan"]})
    finally:
        cluster.shutdown()
    pictures = len([*folder.rglob("*.png")])
    budgets = [about.budget_bytes for about in abouts.values()]
    shares = [asdict(share) for share in work.shares.values()]
    before = {"ready_seconds": ready_seconds, "planned_seconds": planned_seconds}
    said = {"seconds": seconds, **before, "pictures": pictures, "budgets": budgets}
    return {**said, "nodes": shares, "plans": plans}


def _added(cluster: Any, budget: str) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, labels={"tightfit-budget": budget})


def lossy(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    def halfway(cluster: Any, node: Any) -> None:
        cluster.remove_node(node, allow_graceful=False)
        _added(cluster, _BUDGETS[0])

    return spread(args, folder, halfway)


WAYS = {"apart": apart, "spread": spread, "lossy": lossy}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pictures", type=int, default=200)
    parse.add_argument("--steps", type=int, default=8)
    parse.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parse.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.part:
        part, of, folder = int(args.part[0]), int(args.part[1]), Path(args.part[2])
        sys.stdout.write(f"{alone(args.pictures, args.steps, part, of, folder)}\n")
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
