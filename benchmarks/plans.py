"""What tightfit would do on each card of profiles/: `python -m tightfit.benchmarks.plans sd15:512 sdxl:1024 >
docs/plans.md`.

Nothing is measured and no weight is read: MODEL:SIZE needs only configs and file headers.
"""

from __future__ import annotations

import argparse

from .. import Request, TightfitError, inspect, plan
from ..runtime.machine.profiles import cards, profile
from ..runtime.models.spec import ModelSpec
from ..runtime.planner.choose import none_fits
from ..runtime.planner.wishes import Wishes
from ..runtime.units import shown


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+", metavar="MODEL:SIZE", type=sized)
    parse.add_argument("--steps", type=int, default=20)
    args = parse.parse_args()
    print("# What runs on which card\n")
    print(
        "Chosen plans, predicted. The fp16 files of each model; a desktop on the card. "
        "Seconds are by the makers' rates, scaled"
    )
    print(
        "by what published runs of such cards reach (`profiles/classes.toml`); "
        "those with a + by the rates alone, so at best."
    )
    print(
        "Made by `python -m tightfit.benchmarks.plans "
        f"{' '.join(f'{spec.folder.name}:{side}' for spec, side in args.models)}`."
    )
    for spec, side in args.models:
        request = Request("a", None, side, side, args.steps, scheduler="euler").resolve(spec)
        print(f"\n## {spec.folder.name}, {side}x{side}, {args.steps} steps\n")
        print(
            "| card | to fit in | precision | residency | CFG "
            "| attention | VAE | encode | denoise | decode | seconds |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for card in cards():
            hardware = profile(card)
            plans = plan(hardware, spec, request)
            best, room = plans[0], shown(hardware.free_bytes - hardware.context_bytes)
            if not best.fits:
                print(f"| {card} | {room} | {none_fits(plans, hardware, request, Wishes())} |")
                continue
            unet, vae = best.denoiser, best.decoder
            how = (unet.precision, best.residency, best.cfg, unet.attention, f"{vae.precision} {vae.tiling}")
            stages = (shown(count) for count in best.predicted.stages.values())
            seconds = f"{best.predicted.seconds:.1f}{'' if hardware.efficiency else '+'}"
            print(f"| {card} | {room} | {' | '.join((*how, *stages, seconds))} |", flush=True)


def sized(text: str) -> tuple[ModelSpec, int]:
    """Model and side of MODEL:SIZE; argparse reports what is wrong with any other text."""
    name, _, side = text.rpartition(":")
    if not name or not side.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:SIZE, such as emoji:128")
    try:
        spec = inspect(name)
        Request("a", width=int(side), height=int(side)).resolve(spec)
    except TightfitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return spec, int(side)


if __name__ == "__main__":
    main()
