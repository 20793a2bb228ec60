"""`tightfit cluster plan`: a batch on paper, on cards that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TightfitError
from ..planner.plan import MOST_PER_CALL
from ..planner.wishes import Wishes
from ..request import Request
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    MODEL,
    Adapting,
    Asking,
    ModelsDirs,
    row_of,
    taking,
    wishes,
)

_BATCH, _SITE = "Batch", "Cluster"
_Table = typer.Argument(help="jsonl, csv, txt; - reads standard input.", metavar="TABLE", readable=False)
_Profiles = typer.Option(help="rtx-3060-12gb:4@0.20/h,gtx-1650:10.", metavar="CARDS", rich_help_panel=_SITE)
_Kind = typer.Option("--table", help="jsonl, csv, txt.", metavar="NAME", rich_help_panel=_BATCH)
_Repeat = typer.Option(help="Each row; 1.", show_default=False, metavar="N", rich_help_panel=_BATCH)
_Wildcards = typer.Option(
    help="Of files for __name__.", metavar="DIR", readable=False, rich_help_panel="Words"
)
_Price = typer.Option(help="A node without its own: 0.35/h.", metavar="X", rich_help_panel=_SITE)
_PerCall = typer.Option(help="Most at once, 1 to 16; default 16.", metavar="N", rich_help_panel="Machine")
_Storage = typer.Option(
    help="Of shared files a second; 1.25GB.", show_default=False, metavar="BYTES", rich_help_panel=_SITE
)
_Network = typer.Option(
    help="Of one node a second; 1.25GB.", show_default=False, metavar="BYTES", rich_help_panel=_SITE
)
_Stage = typer.Option("--stage-models", help="Models come from the driver.", rich_help_panel=_SITE)
_Json = typer.Option("--json", help="Print one JSON object.", rich_help_panel="Output")

cluster = typer.Typer(
    help="A batch on many machines, on paper.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class Options:
    """Options of `cluster plan` besides those of Request and Wishes."""

    table: Annotated[Path, _Table]
    profiles: Annotated[str, _Profiles]
    model: Annotated[str | None, MODEL] = None
    models_dirs: ModelsDirs = None
    kind: Annotated[str | None, _Kind] = None
    repeat: Annotated[int, _Repeat] = 1
    price: Annotated[str | None, _Price] = None
    storage: Annotated[str | None, _Storage] = None
    network: Annotated[str | None, _Network] = None
    stage_models: Annotated[bool, _Stage] = False
    images_per_call: Annotated[int, _PerCall] = MOST_PER_CALL
    wildcards: Annotated[Path | None, _Wildcards] = None
    as_json: Annotated[bool, _Json] = False

    def checked(self) -> Options:
        if self.repeat < 1:
            raise TightfitError(f"--repeat must be a whole number from 1, not {self.repeat}")
        if not 1 <= self.images_per_call <= MOST_PER_CALL:
            said = f"a whole number from 1 to {MOST_PER_CALL}, not {self.images_per_call}"
            raise TightfitError(f"--images-per-call must be {said}")
        return self


_ORDER = f"""
table profiles price storage network stage_models kind repeat
negative_prompt num_inference_steps guidance_scale width height seed scheduler num_images
{ASKING_IN_ORDER}
model models_dirs {ADAPTERS_IN_ORDER}
precision compute backend provider budget images_per_call residency attention tiling min_psnr ...
as_json
"""


@cluster.callback()
def _cluster() -> None:
    """A batch on many machines, on paper."""


@cluster.command("plan")
@taking(Options, Adapting, Asking, Request, Wishes, order=_ORDER)
def plan(
    options: Options,
    adapting: Mapping[str, Any],
    asking: Mapping[str, Any],
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
) -> None:
    """Say what a batch would take on cards of profiles/: hours, dollars, which card paints what, and what
    holds it up. The table and its defaults are those of tightfit batch."""
    wishes(wished)  # raises here for what no plan knows
    from .fleets import forecast

    row = row_of(adapting, {**asked, **asking}, wished, options.checked())
    forecast(options, row, wished.get("budget"))
