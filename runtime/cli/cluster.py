"""`tightfit cluster plan`: a batch on paper, on cards that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..planner.plan import MOST_PER_CALL
from ..planner.wishes import Wishes
from ..request import Request
from .batch import KIND, PER_CALL, REPEAT, TABLE, check_counts
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    MODEL,
    WILDCARDS,
    Adapting,
    Asking,
    ModelsDirs,
    row_of,
    taking,
    wishes,
)

_SITE = "Cluster"
_Profiles = typer.Option(help="rtx-3060-12gb:4@0.20/h,gtx-1650:10.", metavar="CARDS", rich_help_panel=_SITE)
_Price = typer.Option(help="A node without its own: 0.35/h.", metavar="X", rich_help_panel=_SITE)
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

    table: Annotated[Path, TABLE]
    profiles: Annotated[str, _Profiles]
    model: Annotated[str | None, MODEL] = None
    models_dirs: ModelsDirs = None
    kind: Annotated[str | None, KIND] = None
    repeat: Annotated[int, REPEAT] = 1
    price: Annotated[str | None, _Price] = None
    storage: Annotated[str | None, _Storage] = None
    network: Annotated[str | None, _Network] = None
    stage_models: Annotated[bool, _Stage] = False
    images_per_call: Annotated[int, PER_CALL] = MOST_PER_CALL
    wildcards: Annotated[Path | None, WILDCARDS] = None
    as_json: Annotated[bool, _Json] = False

    def checked(self) -> Options:
        check_counts(self.repeat, self.images_per_call)
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
