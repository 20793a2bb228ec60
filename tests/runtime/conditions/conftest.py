"""Tiny models whose denoisers read more than latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def with_channels(tiny_models, made_once) -> Callable[[str, int], Path]:
    """Called with a family and a number: that model with a random U-Net that reads so many channels."""

    def made(family: str, channels: int) -> Path:
        from tightfit.benchmarks.random_parts import wider

        return made_once(f"channels/{family}-{channels}", partial(wider, tiny_models[family], channels))

    return made
