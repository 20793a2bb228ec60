"""`tightfit export`: from arguments to an export, its progress as a bar and lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.adapters import ADAPTERS, written
from ..runtime.cli.options import ModelsDirs, adapting, taking
from ..runtime.cli.output import progress_bar, say
from ..runtime.errors import printable
from ..runtime.models.hub import located
from ..runtime.models.layouts import library
from ..runtime.units import shown
from . import export as exporter

app = typer.Typer()

_Model = typer.Argument(help="emoji, file, folder, name, hub id.", metavar="MODEL")
_Output = typer.Option("-o", "--output", help="A folder that is not there yet.", metavar="DIR")
_Precision = typer.Option(help="int8 or int4; with --to onnx fp32 and fp16 too.", metavar="NAME")
_To = typer.Option(help=f"{' or '.join(exporter.PRECISIONS)}.", metavar="ENGINE")
_Compute = typer.Option(help="With --to onnx: what int8 and int4 compute in.", metavar="NAME")
_Calibrate = typer.Option(help="Paint N prompts to find which layers need more bits.", metavar="N")
_Control = typer.Option(help="With --to onnx: ControlNets beside it.", metavar="FILE")
_Bits = typer.Option(help="With --calibrate: of a weight, on average.", metavar="B")
_Steps = typer.Option(help="With --calibrate: steps of each picture; at most 20 by default.", metavar="N")
_Size = typer.Option(help="With --calibrate: pixels; default: model's.", metavar="N")


@dataclass(frozen=True)
class Arguments:
    """What is typed after `tightfit export`."""

    model: Annotated[str, _Model]
    output: Annotated[Path, _Output]
    precision: Annotated[str, _Precision]
    models_dirs: ModelsDirs = None
    to: Annotated[str, _To] = "torch"
    compute: Annotated[str, _Compute] = "auto"
    control: Annotated[list[str] | None, _Control] = None
    calibrate: Annotated[int, _Calibrate] = 0
    bits: Annotated[float | None, _Bits] = None
    steps: Annotated[int | None, _Steps] = None
    size: Annotated[int | None, _Size] = None


@app.command()
@taking(Arguments, adapting([kind for kind in ADAPTERS if kind.in_weights or kind.is_network]))
def export(typed: Arguments, adapters: Mapping[str, Any]) -> None:
    """Write a model with its weights in 8 or 4 bits, or as ONNX, to be run from then on with --model DIR."""
    known = {field.name for field in fields(exporter.Options)}
    options = {name: value for name, value in vars(typed).items() if name in known}
    models_dirs = typed.models_dirs or ()
    controls = [library.located(name, library.Kind.CONTROLNET) for name in typed.control or ()]
    options |= {"adapters": written(adapters, models_dirs), "control": controls}
    model = located(typed.model, models_dirs)
    with _listener() as listener:
        exporter.export_model(model, typed.output, typed.precision, typed.to, listener, **options)
    patterns = "*.safetensors", "*.onnx*"
    total = sum(file.stat().st_size for pattern in patterns for file in typed.output.rglob(pattern))
    say(f"{typed.output} · {typed.precision} · {shown(total)}")


@contextmanager
def _listener() -> Iterator[exporter.Listener]:
    """Prints lines as they are. Shows a bar from the first network on, and a line for each finished one."""
    bar: Any = None
    task: Any = None
    with ExitStack() as stack:

        def progress(network: str, action: str, done: int, total: int) -> None:
            nonlocal bar, task
            if bar is None:
                bar = stack.enter_context(progress_bar(24))
                task = bar.add_task("", total=1)
            if total < 0:
                text = printable(f"{network}: {action}")
                bar.console.print(text, markup=False, emoji=False, soft_wrap=True)
            else:
                bar.update(task, description=f"{network}: {action}", completed=done, total=total)

        yield exporter.Listener(partial(say, err=True), progress)
