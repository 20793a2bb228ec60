"""The command line: its commands, and `main`, which makes one line and an exit code of whatever goes
wrong."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperGroup

from ... import __version__
from ..errors import OutOfMemoryError, TightfitError, first_line, out_of_memory
from ..files import cache_folder
from .batch import batch
from .cluster import cluster
from .generate import generate
from .grid import grid
from .machine import calibrate, info
from .models import models
from .options import as_typed
from .output import say
from .plan import show_plan
from .serve import serve
from .upscale import upscale
from .words import as_command, usage


class Commands(TyperGroup):
    """The commands here, and those of rooms above, each imported when it is asked for."""

    others: ClassVar[Mapping[str, str]] = {}
    """Module of a typer app by the name of its command."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.others]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.others and cmd_name not in self.commands:
            command = typer.main.get_command(import_module(self.others[cmd_name]).app)
            command.name = cmd_name
            self.add_command(command, cmd_name)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Stable Diffusion that fits the card you have.  [bold]tightfit "a red heart"[/bold] is short for
    generate."""
    if version:
        typer.echo(f"tightfit {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(generate)
app.command()(batch)
app.add_typer(cluster, name="cluster")
app.command()(grid)
app.command()(upscale)
app.command("plan")(show_plan)
app.command()(serve)
app.command()(models)
app.command()(info)
app.command()(calibrate)

_LONGEST = 2000  # characters of an error; what a file says may have millions


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    say(f"tightfit: {line if len(line) <= _LONGEST else f'{line[:_LONGEST]} …'}", err=True)
    sys.exit(2)


def _said(error: TightfitError) -> str:
    """Its line, in which options are called as they are typed; in a row of a table as its columns are."""
    from ..batch.table import RowError

    if isinstance(error, OutOfMemoryError) and not error.complete:
        return _no_memory(error)
    return str(error) if isinstance(error, RowError) else as_typed(str(error))


def _no_memory(error: Exception) -> str:
    return f"out of memory ({first_line(error)}): close what else uses the memory, or paint a smaller picture"


def _stop(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _settle() -> None:
    """What holds for the whole process: streams, settings of libraries, warnings, signals."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    # With one of two cores busy a picture took 1.1 s while OpenMP's threads spun, 0.5 s while they slept
    # (docs/decisions.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # diffusers 0.36 tells of Optimum's two packages, and that there is no CUDA.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of configs in its own words
    # No HOME and no such user: the hub's library would make a folder called ~.
    if os.path.expanduser("~") == "~":  # noqa: PTH111
        os.environ.setdefault("HF_HOME", str(cache_folder().parent / "huggingface"))
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", "CUDA is not available or torch_xla is imported")
        # Of a config that no model fits, as is said then.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    for name in ("SIGTERM", "SIGHUP"):  # so that what was half written goes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)


def _run() -> Any:
    """The command that was typed; its exit code, or None."""
    # click's UsageError, which newer typers keep inside themselves
    usage_error: Any = typer.BadParameter.__mro__[1]
    try:
        return app(as_command(sys.argv[1:]), standalone_mode=False)
    except TightfitError as error:
        _fail(_said(error))
    except usage_error as error:
        if not (message := usage(error)):  # of a command of commands, whose help is printed
            return 0
        _fail(message)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        _fail(_no_memory(error))


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 when interrupted."""
    _settle()
    code = _run()
    if code == 130:
        # What was begun is tidied up already; leaving takes a moment.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        typer.echo("tightfit: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)
