"""What streaming costs on each card of profiles/: seconds per U-Net call with streamed weights, by several
ways of copying.

    python -m tightfit.benchmarks.streaming sd15:512 sdxl:1024

`bound` is the larger of all computing and all copying, which no order of copies beats. `one ahead` copies
each unit while the one before it computes. `ring` copies ahead as far as the buffer allows. `kept` also keeps
loaded what the card has room for. Nothing is measured and no weight is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from .. import Hardware, Request, plan
from ..runtime.backends import engine
from ..runtime.costs.latency import arrival_spans, bus_rate, call_seconds
from ..runtime.machine.profiles import cards, profile
from ..runtime.models.families.family import Extent
from ..runtime.models.spec import ModelSpec
from ..runtime.placement import Placement
from ..runtime.planner.wishes import Wishes
from ..runtime.units import shown
from .plans import sized


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+", metavar="MODEL:SIZE", type=sized)
    for spec, side in parse.parse_args().models:
        print(f"\n## {spec.folder.name}, {side}x{side}\n")
        print("| card | bound | one ahead | ring | kept | of it loaded |")
        print("|---|---|---|---|---|---|")
        for card in cards():
            if (hardware := profile(card)).device == "cuda" and not hardware.unified:
                print(f"| {card} | {' | '.join(row(hardware, spec, side))} |", flush=True)


def row(hardware: Hardware, spec: ModelSpec, side: int) -> list[str]:
    precision = hardware.precisions[0]
    placement = Placement("torch", precision, precision, "streamed", "sdpa", "whole")
    streamed = engine("torch").footprint(spec, spec.denoiser, placement, hardware, Extent(2, side, side))
    head, spans = arrival_spans(hardware, placement, streamed)
    copies = [arrival.bytes / bus_rate(hardware, streamed) for arrival in streamed.arrivals]
    variants = [
        max(sum(copies), head + sum(spans)),
        head + one_ahead(copies, spans),
        call_seconds(hardware, placement, streamed),
    ]
    wishes = Wishes(
        precision=precision, residency="streamed", cfg="batched", attention="sdpa", budget=hardware.free_bytes
    )
    best = plan(hardware, spec, Request("a", width=side, height=side), wishes)[0].denoiser
    kept = engine("torch").footprint(spec, spec.denoiser, best, hardware, Extent(2, side, side))
    variants.append(call_seconds(hardware, replace(placement, kept_bytes=best.kept_bytes), kept))
    return [f"{seconds:.3f}" for seconds in variants] + [shown(best.kept_bytes)]


def one_ahead(copies: Sequence[float], spans: Sequence[float]) -> float:
    """Two slots: a unit's copy starts when the unit before it starts to compute, which frees the slot of the
    one before that."""
    began, ended, arrived = 0.0, 0.0, 0.0
    ends = []
    for _ in range(2):
        for copy, span in zip(copies, spans, strict=True):
            arrived = max(arrived, began) + copy
            began = max(ended, arrived)
            ended = began + span
        ends.append(ended)
    return ends[1] - ends[0]


if __name__ == "__main__":
    main()
