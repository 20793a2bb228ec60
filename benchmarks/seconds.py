"""Predicted against measured seconds of whole requests, and what choosing by them costs.

    python -m tightfit.benchmarks.seconds emoji:64 sd15:256 sd15-int4:512 --plans 12 --seconds 140 --calibrate

MODEL:SIZE is emoji or a model's folder, and pixels. Of the plans that fit, some are drawn at random and
painted by: `--draw` draws others, so that constants are tried on plans that they were not made from. One
picture goes before, of the plan that is chosen: libraries are imported then, and files in memory. Loading
counts, as it does for one request; preparing does not.

With `--calibrate` this machine is measured before and after each model's plans. What the two predict differs
by the drift of a host that others use, and no prediction can be closer than that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from .. import Pipeline, Request, Wishes, plan
from ..runtime.backends.torch.calibration import calibrate
from ..runtime.costs.known import KNOWN
from ..runtime.events import Result
from ..runtime.machine.detect import with_rates
from ..runtime.machine.hardware import Hardware
from ..runtime.models.spec import ModelSpec
from ..runtime.placement import STAGES
from ..runtime.planner.estimate import ESTIMATOR, Estimate
from ..runtime.planner.plan import Plan
from .plans import sized
from .record import named, record

Row = dict[str, Any]
CLOSE = 0.25  # of the truth: what is promised of a machine that was calibrated


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+", type=sized, metavar="MODEL:SIZE")
    parse.add_argument("--steps", type=int, default=1)
    parse.add_argument("--plans", type=int, default=10_000, help="of each model, at most")
    parse.add_argument("--precision", default="auto")
    parse.add_argument("--draw", type=int, default=0)
    parse.add_argument("--seconds", type=float, default=1e9, help="of each model, for which plans are begun")
    parse.add_argument("--device", default="auto")
    parse.add_argument("--calibrate", action="store_true", help="before and after each model's plans")
    args = parse.parse_args()
    KNOWN.keep()
    hardware = Hardware.detect(args.device)
    results = [of_model(spec, side, args, hardware) for spec, side in args.models]
    record(
        "seconds",
        {"calibrated": args.calibrate or hardware.calibrated, "steps": args.steps, "models": results},
    )


def of_model(spec: ModelSpec, side: int, args: argparse.Namespace, hardware: Hardware) -> Row:
    """Rows of one model at one size, and what they come to."""
    before = calibrate(hardware) if args.calibrate else None
    hardware = with_rates(hardware, before) if before else hardware
    request = Request("a red heart", None, side, side, args.steps, seed=0)
    plans = [one for one in plan(hardware, spec, request, Wishes(precision=args.precision)) if one.fits]
    drawn = random.Random(args.draw).sample(plans, min(args.plans, len(plans)))
    paint(spec, hardware, plans[0], request)
    rows = list(measured(spec, hardware, drawn, request, time.monotonic() + args.seconds))
    if before:
        after = calibrate(hardware)  # but for first calls, as this process has met its shapes
        after["starts"] |= {kind: s for kind, s in before["starts"].items() if kind.endswith("/first")}
        estimate = ESTIMATOR.estimate(with_rates(hardware, after), request.resolve(spec), Wishes())
        for row, one in zip(rows, drawn, strict=False):
            row["afterwards"] = round(predicted_seconds(estimate, one), 3)
    summary = {"model": named(f"{spec.name}:{side}"), "plans": len(plans), **summed(rows)}
    print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n", flush=True)
    return summary | {"rows": rows}


def measured(
    spec: ModelSpec, hardware: Hardware, plans: Sequence[Plan], request: Request, until: float
) -> Iterator[Row]:
    """A row of each plan that is begun before `until`, of the first at least."""
    for one in plans:
        if one is not plans[0] and time.monotonic() > until:
            return
        result = paint(spec, hardware, one, request)
        stages = {stage: round(result.stages[stage].seconds, 3) for stage in STAGES}
        row: Row = {
            "plan": one.summary(),
            "predicted": round(result.plan.predicted.seconds, 3),
            "measured": round(sum(stages.values()), 3),
            "loading": round(sum(result.stages[stage].load_seconds for stage in STAGES), 3),
            "stages": stages,
        }
        print(f"{row['predicted']:8.2f} of {row['measured']:8.2f} s,", row["plan"], stages, flush=True)
        yield row


def predicted_seconds(estimate: Estimate, one: Plan) -> float:
    """Of a plan that was made for another calibration."""
    of_plan = replace(estimate.of(one), texts_known=one.texts_known)
    return of_plan.plan(one.cfg, one.placements, one.budget_bytes).predicted.seconds


def paint(spec: ModelSpec, hardware: Hardware, one: Plan, request: Request) -> Result:
    """A picture by this plan and no other, loaded for it alone."""
    with Pipeline(spec, hardware, plan=one) as pipe:
        *_, last = pipe.run(request)
    assert last.result
    return last.result


def summed(rows: Sequence[Row]) -> Row:
    """How far predictions are off, by the calibration before and by the mean of both; what the second
    predicts of what the first does; and how much longer than the fastest plan the one takes that is predicted
    to be the fastest."""
    ratios = [row["predicted"] / row["measured"] for row in rows]
    drifts = [row["afterwards"] / row["predicted"] for row in rows if "afterwards" in row]
    both = [ratio * (1 + drift) / 2 for ratio, drift in zip(ratios, drifts, strict=False)]
    drifted = {"drift": round(statistics.median(drifts), 2), "close_by_both": close(both)} if drifts else {}
    chosen, best = (min(rows, key=lambda row: row[key])["measured"] for key in ("predicted", "measured"))
    return {
        "measured": len(rows),
        "least": round(min(ratios), 2),
        "median": round(statistics.median(ratios), 2),
        "most": round(max(ratios), 2),
        "close": close(ratios),
        **drifted,
        "chosen": round(chosen / best, 3),
    }


def close(ratios: Sequence[float]) -> float:
    """The share of predictions that are as near the truth as is promised."""
    return round(sum(abs(ratio - 1) <= CLOSE for ratio in ratios) / len(ratios), 2)


if __name__ == "__main__":
    main()
