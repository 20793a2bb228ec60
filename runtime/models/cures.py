"""What to do with a model that is not read, or does not fit: a command that turns it into one that is, or
does."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import TightfitError

_PICKLE = "a pickle can run any code when it is opened, so models are not read from one"
_PLAIN = re.compile(r"[\w./\\:~ +@-]{1,200}")  # safe between quotes in a shell


def of_pickles(repository: str) -> str:
    """Cure for a hub repository whose weights are .bin files."""
    return (
        f"{_PICKLE}; fetch it with hf download {repository} --local-dir FOLDER, "
        "and turn each .bin file into safetensors with tightfit convert"
    )


def of_pickle(file: Path) -> str:
    """Cure for a checkpoint, an embedding or one network's weights."""
    return f'{_PICKLE}; write it as safetensors once, which runs none: tightfit convert "{_shown(file)}"'


def exporting(model: str | Path, precision: str) -> str:
    """Command that writes a model in 8 or 4 bits: it is read faster, streams, and is not quantised again."""
    return f'tightfit export "{_shown(model)}" --precision {precision} -o DIR'


def of_mixed(found: str) -> TightfitError:
    """The error for parts of a model that do not belong together, by what was found."""
    return TightfitError(f"{found}: files of different models were mixed; copy or download it again")


def is_adapter(tensors: frozenset[str]) -> bool:
    """Whether this is a LoRA or a relative, by the names that kohya's and diffusers' tools give."""
    return any(
        name.startswith(("lora_", "lycoris_")) or re.search(r"\.lora_|[._]lora\.", name) for name in tensors
    )


def _shown(source: str | Path) -> str:
    """The name, or MODEL in place of one that a shell might interpret."""
    name = str(source).replace("\\", "/")
    return name if _PLAIN.fullmatch(name) else "MODEL"
