"""Repeated blocks of a network, each kind compiled once by torch.compile for all that are alike: what torch
and diffusers call regional compilation. Only for plans that ask for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import first_line
from .repeated import signature

# Of the process, what importing the compiler and compiling blocks take at most on a CPU, whose memory is the
# budget's (SD 1.5 at 512x512: docs/decisions.md). Of a GPU's memory they take nothing.
COMPILER_BYTES = 256 * 2**20
# Else weights of convolutions, which are inputs here, are put in another order in every call: 238 MiB at most
# in place of 125 for one of SD 1.5's ResNet blocks, and a fifth to a third of its time.
_OPTIONS = {"layout_optimization": False}
# Blocks share one Python function, for which torch compiles 8 kinds by default, and then gives up. A server
# meets all kinds of all sizes.
_MOST_KINDS = 1024


def blocks(module: nn.Module) -> list[nn.Module]:
    """Its transformer blocks and ResNet blocks: nearly all of a denoiser."""
    names = {part: type(part).__name__ for part in module.modules()}
    return [
        part for part, name in names.items() if name.endswith("TransformerBlock") or name == "ResnetBlock2D"
    ]


def compile_blocks(module: nn.Module) -> None:
    """Let its blocks run compiled from now on; each kind is compiled when it is first called."""
    for block in blocks(module):
        block.compile(dynamic=False, fullgraph=True, options=_OPTIONS)


def allow_kinds() -> None:
    """Let this thread compile all kinds: torch keeps settings for each thread."""
    from torch import _dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(_dynamo.config, name) < _MOST_KINDS:
            setattr(_dynamo.config, name, _MOST_KINDS)


@contextmanager
def as_they_are(module: nn.Module) -> Iterator[None]:
    """While this lasts, its blocks run operator by operator, so that they are counted. torch's own stance is
    the whole process's, where other threads paint."""
    calls = {block: block._compiled_call_impl for block in blocks(module)}
    for block in calls:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in calls.items():
            block._compiled_call_impl = call


@contextmanager
def kinds_counted(module: nn.Module) -> Iterator[set[Any]]:
    """The kinds of its blocks that are called while this lasts, as the compiler tells them apart: by class,
    weights and inputs."""
    kinds: set[Any] = set()

    def note(block: nn.Module, args: Any, named: Any) -> None:
        shapes = tuple(weight.shape for weight in block.parameters())
        kinds.add((type(block), shapes, str(signature((*args, *named.items())))))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks(module)]
    try:
        yield kinds
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def compiler_problem(device: torch.device) -> str | None:
    """Why torch's compiler fails on `device`, such as the want of a C++ compiler, or None: one sum is
    compiled and run, once."""
    x = torch.arange(8.0, device=device)
    try:
        made = torch.compile(lambda x: (x * 2 + 1).sin(), dynamic=False, fullgraph=True)(x)
    except Exception as error:  # the compiler's, that of C++ or of Triton
        return first_line(error)
    return None if torch.allclose(made, (x * 2 + 1).sin()) else "it answers otherwise than torch"
