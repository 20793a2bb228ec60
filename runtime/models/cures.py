"""What to do with a model in a format that is not read: a command that turns it into a diffusers folder."""

from __future__ import annotations

import re
from pathlib import Path

_PICKLE = "a pickle can run any code when it is opened, so tightfit never does"
_PLAIN = re.compile(r"[\w./\\:~ +@-]{1,200}")  # safe between quotes in a shell


def of_pickles(folder: str | Path) -> str:
    """Cure for a diffusers folder or a hub repository whose weights are .bin files."""
    return (
        f"{_PICKLE}; convert it once, in a place you trust: "
        f"{_command('DiffusionPipeline', 'from_pretrained', folder)}"
    )


def of_pickle(file: Path) -> str:
    """For a checkpoint in one file, such as A1111's."""
    command = _command("StableDiffusionPipeline", "from_single_file", file)
    return (
        f"{_PICKLE}; convert it once, in a place you trust: "
        f"{command} (with StableDiffusionXLPipeline if it is SDXL)"
    )


GGUF = (
    "GGUF is not read: use the model it was made from, in diffusers' layout; "
    "--precision int4 makes that as small"
)


def is_adapter(tensors: frozenset[str]) -> bool:
    """Whether this is a LoRA or a relative, by the names that kohya's and diffusers' tools give."""
    return any(
        name.startswith(("lora_", "lycoris_")) or ".lora_" in name or ".lora." in name for name in tensors
    )


def _command(pipeline: str, method: str, source: str | Path) -> str:
    """One line for a shell, Windows' included. A name that a shell might interpret becomes MODEL."""
    name = str(source).replace("\\", "/")
    name = name if _PLAIN.fullmatch(name) else "MODEL"
    return (
        f'python -c "from diffusers import {pipeline} as P; '
        f"P.{method}('{name}').save_pretrained('converted')\""
    )
