"""The one door of the command line: `tightfit` and `python -m tightfit`. Importing this imports nothing that
takes time."""

import os
import sys

from .runtime import interrupts

# Commands of the rooms above the runtime: the module that has each one's typer app.
COMMANDS = {
    "export": f"{__package__}.export.cli",
    "convert": f"{__package__}.export.convert",
    "bench": f"{__package__}.benchmarks.cli",
}


def app():
    """The typer app of the whole command line."""
    from .runtime.cli.app import Commands, app

    Commands.others = COMMANDS
    return app


def main() -> None:
    """Run the command. Ctrl-C before there is anything to tidy up ends it at once, with the usual line and
    exit code."""
    interrupts.at_once()
    # Plans or paints, and ends. Commands of rooms above trace and compile, a server imports once, and where
    # torch is here already, the process is another program's.
    is_short = not {*COMMANDS, "serve"} & {*sys.argv[1:2]} and "torch" not in sys.modules
    try:
        if is_short:
            from .runtime import lean

            lean.begin()
        from .runtime.cli.app import main as run
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        from .runtime.errors import first_line, out_of_memory

        if not out_of_memory(error):
            raise
        os.write(
            2,
            (
                f"tightfit: out of memory while it was starting ({first_line(error)}): "
                "close what else uses it\n"
            ).encode(),
        )
        sys.exit(2)
    app()
    if is_short:
        from .runtime.costs.known import KNOWN
        from .runtime.machine.remembered import TORCH

        KNOWN.keep()
        TORCH.keep()
    try:
        run()
    except SystemExit as end:
        interrupts.at_once()
        if isinstance(end.code, int):
            from .runtime.leaving import leave

            leave(end.code)
        raise
    finally:
        interrupts.at_once()


if __name__ == "__main__":
    main()
