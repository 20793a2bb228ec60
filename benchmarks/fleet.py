"""A large batch on paper, on more and more nodes of one card: where more nodes help no more, and why.

    python -m tightfit.benchmarks.fleet sd15 --card rtx-3060-12gb --pictures 10000

Nothing is painted: seconds are predicted. Pictures come in `--sizes`; nodes read the model from shared
storage of `--storage` bytes a second, and send PNGs to one driver.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..runtime.batch.fleet import Card, Kind, Schedule, Site, schedule
from .record import named, record

_HEAD = (
    "| nodes | seconds | times one node | of each node | most goes to |\n| --: | --: | --: | --: | --- |\n"
)
NODES = (1, 2, 5, 10, 20, 50, 75, 100, 150, 200)


def kinds(model: str, card: str, pictures: int, sizes: Sequence[str], steps: int) -> list[Kind]:
    """The pictures as `tightfit cluster plan` plans them."""
    from ..runtime.batch.kinds import kinds_of
    from ..runtime.batch.ledger import Ledger
    from ..runtime.batch.painting import Here
    from ..runtime.batch.requests import Reading
    from ..runtime.machine.profiles import profile
    from ..runtime.open_models import OpenModels
    from ..runtime.pipeline import MANY
    from ..runtime.planner.plan import MOST_PER_CALL
    from ..runtime.planner.wishes import Wishes

    wishes = Wishes(requests=MANY, images_per_call=MOST_PER_CALL)
    models = OpenModels(profile(card), None, wishes)
    with Ledger(None) as ledger:
        errors = ledger.ask(Reading({"model": model}).pictures(_rows(pictures, sizes, steps)))
        known, more = kinds_of(ledger, {card: Here(models)})
    assert not errors and not more, [*errors, *more]
    return known


def _rows(pictures: int, sizes: Sequence[str], steps: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, size in enumerate(sizes, 1):
        width, height = map(int, size.split("x"))
        count = pictures // len(sizes) + (number <= pictures % len(sizes))
        row = {"prompt": "a red heart", "seed": f"1..{count}", "width": width, "height": height}
        yield number, {**row, "num_inference_steps": steps}


def row(planned: Schedule, alone: Schedule) -> dict[str, Any]:
    """Of one number of nodes, beside a node alone."""
    speed = alone.seconds / planned.seconds
    return {
        "nodes": planned.nodes,
        "seconds": planned.seconds,
        "speedup": speed,
        "efficiency": speed / planned.nodes,
        "bound": planned.bound,
        "parts_seconds": planned.parts,
    }


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model", nargs="?", default="emoji")
    parse.add_argument("--card", default="rtx-3060-12gb")
    parse.add_argument("--pictures", type=int, default=10_000)
    parse.add_argument("--sizes", nargs="+", default=["512x512"], metavar="WxH")
    parse.add_argument("--steps", type=int, default=20)
    parse.add_argument("--storage", type=float, default=Site().storage_rate, help="bytes a second")
    parse.add_argument("--nodes", nargs="+", type=int, default=[*NODES])
    args = parse.parse_args()
    known = kinds(args.model, args.card, args.pictures, args.sizes, args.steps)
    site = replace(Site(), storage_rate=args.storage)
    runs = {count: schedule([Card(args.card, count)], known, site) for count in sorted({1, *args.nodes})}
    rows = [row(planned, runs[1]) for planned in runs.values()]
    sys.stdout.write(_HEAD)
    for one in rows:
        share = f"{100 * one['efficiency']:.0f} %"
        cells = one["nodes"], f"{one['seconds']:.0f}", f"{one['speedup']:.1f}", share, one["bound"]
        sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    alone = runs[1]
    best = {"storage": alone.best_nodes(site.storage_rate), "driver": alone.driver_nodes}
    sys.stdout.write(
        f"fastest at about {best['storage']:.0f} nodes; the driver keeps up with {best['driver']:.0f}\n"
    )
    said = {"model": named(args.model), "card": args.card, "pictures": args.pictures, "sizes": args.sizes}
    ways = [{"pictures": kind.pictures, **vars(kind.ways[args.card])} for kind in known]
    more = {"steps": args.steps, "storage_rate": args.storage, "kinds": ways, "nodes_at_most": best}
    record("fleet", {**said, **more, "rows": rows})


if __name__ == "__main__":
    main()
