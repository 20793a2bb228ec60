"""`tightfit batch`: a table of requests becomes a folder of pictures; the same command goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TightfitError
from ..machine.process import check_address_space
from ..pictures import METADATA
from ..planner.plan import MOST_PER_CALL
from ..planner.wishes import Wishes
from ..request import Request
from ..texts import TEXTS
from .naming import Template
from .options import (
    ADAPTERS_IN_ORDER,
    ASKING_IN_ORDER,
    MODEL,
    NO_TEXT_CACHE,
    WILDCARDS,
    Adapting,
    Asking,
    Device,
    ModelsDirs,
    row_of,
    taking,
    wishes,
)
from .saving import FORMATS, Writing

_OUTPUT, _BATCH = "Output", "Batch"
_NAME = "[number]-[seed]"
TABLE = typer.Argument(help="jsonl, csv, txt; - reads standard input.", metavar="TABLE", readable=False)
_Folder = typer.Option(
    "-o", "--output", help="Folder.", metavar="DIR", readable=False, rich_help_panel=_OUTPUT
)
KIND = typer.Option("--table", help="jsonl, csv, txt.", metavar="NAME", rich_help_panel=_BATCH)
_Upload = typer.Option(help="Copy them to s3://…, …", metavar="URL", rich_help_panel=_OUTPUT)
_Name = typer.Option(help="Of files: a template.", metavar="TEXT", rich_help_panel=_OUTPUT)
REPEAT = typer.Option(help="Each row; 1.", show_default=False, metavar="N", rich_help_panel=_BATCH)
_DryRun = typer.Option("--dry-run", help="Say what would run.", rich_help_panel=_BATCH)
_Price = typer.Option(help="Dollars an hour: 0.35/h.", metavar="X", rich_help_panel=_BATCH)
PER_CALL = typer.Option(help="Most at once, 1 to 16; default 16.", metavar="N", rich_help_panel="Machine")
_Retries = typer.Option(
    help="Of one that failed; 0.", show_default=False, metavar="N", rich_help_panel=_BATCH
)
_FailFast = typer.Option("--fail-fast", help="End at the first that fails.", rich_help_panel=_BATCH)
_CLUSTER = "Cluster"
_Ray = typer.Option(help="Paint there: auto, HOST:PORT.", metavar="ADDRESS", rich_help_panel=_CLUSTER)
_Stage = typer.Option("--stage-models", help="Send them to its nodes.", rich_help_panel=_CLUSTER)
_Format = typer.Option(help=f"{', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=_OUTPUT)
_Quality = typer.Option(help="Of JPEG and WebP, 1 to 100; default 90.", metavar="N", rich_help_panel=_OUTPUT)
_Metadata = typer.Option(help="Text inside: full, a1111, none.", metavar="NAME", rich_help_panel=_OUTPUT)
_Json = typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUTPUT)


def check_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise TightfitError(f"--{option} must be a whole number from {least}, not {value}")


def check_counts(repeat: int, images_per_call: int) -> None:
    """Of the options of every command that plans a table. Raises TightfitError."""
    check_least("repeat", repeat, 1)
    if not 1 <= images_per_call <= MOST_PER_CALL:
        said = f"a whole number from 1 to {MOST_PER_CALL}, not {images_per_call}"
        raise TightfitError(f"--images-per-call must be {said}")


@dataclass(frozen=True)
class Options:
    """Options of `batch` besides those of Request and Wishes."""

    table: Annotated[Path, TABLE]
    output: Annotated[Path, _Folder]
    model: Annotated[str | None, MODEL] = None
    models_dirs: ModelsDirs = None
    device: Device = "auto"
    kind: Annotated[str | None, KIND] = None
    repeat: Annotated[int, REPEAT] = 1
    dry_run: Annotated[bool, _DryRun] = False
    price: Annotated[str | None, _Price] = None
    images_per_call: Annotated[int, PER_CALL] = MOST_PER_CALL
    retries: Annotated[int, _Retries] = 0
    fail_fast: Annotated[bool, _FailFast] = False
    ray: Annotated[str | None, _Ray] = None
    stage_models: Annotated[bool, _Stage] = False
    upload: Annotated[str | None, _Upload] = None
    wildcards: Annotated[Path | None, WILDCARDS] = None
    no_text_cache: Annotated[bool, NO_TEXT_CACHE] = False
    name: Annotated[str, _Name] = _NAME
    format: Annotated[str | None, _Format] = None
    quality: Annotated[int | None, _Quality] = None
    metadata: Annotated[str | None, _Metadata] = None
    as_json: Annotated[bool, _Json] = False

    def checked(self) -> Options:
        check_counts(self.repeat, self.images_per_call)
        check_least("retries", self.retries, 0)
        if self.stage_models and not self.ray:
            raise TightfitError("--stage-models sends models to a cluster: say which, by --ray auto")
        if re.match(r"[a-z][a-z\d+.-]+:/", str(self.output)):
            said = f"--output {self.output} is an address"
            raise TightfitError(f"{said}: name a folder, where the ledger is, and the address by --upload")
        if self.upload is not None and "://" not in self.upload:
            raise TightfitError(f"--upload {self.upload} is no address: give such as s3://bucket/folder")
        if self.output.exists() and not self.output.is_dir():
            raise TightfitError(f"--output {self.output} is no folder: name one")
        from ..batch.requests import place_of

        place_of(self.name)
        Template(Path(self.name))
        Writing(self.format, self.quality, self.metadata or METADATA[0]).checked()
        return self


_ORDER = f"""
table output kind repeat dry_run price retries fail_fast ray stage_models
negative_prompt num_inference_steps guidance_scale width height seed scheduler num_images
{ASKING_IN_ORDER}
model models_dirs {ADAPTERS_IN_ORDER}
precision compute backend provider device budget images_per_call residency attention tiling prefer
min_psnr ... no_text_cache name format quality metadata upload as_json
"""


@taking(Options, Adapting, Asking, Request, Wishes, order=_ORDER)
def batch(
    options: Options,
    adapting: Mapping[str, Any],
    asking: Mapping[str, Any],
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
) -> None:
    """Paint a table of requests into a folder, a line each. The same command goes on where it was.

    Columns are the options of a request by their names; docs/batch.md has the rest."""
    TEXTS.keep(not options.no_text_cache)
    check_address_space()
    options.checked()
    wishes(wished)  # raises here for what no plan knows
    from .batching import run_batch

    run_batch(options, row_of(adapting, {**asked, **asking}, wished, options), wished.get("budget"))
