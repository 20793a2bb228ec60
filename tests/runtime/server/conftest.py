"""A service behind its application, on a free port of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Running:
    """Of a server: its address, its service, and the folder where that keeps its jobs."""

    url: str
    service: Any
    folder: Path


@contextmanager
def _serving(folder: Path, door: Any = None, **about: Any) -> Iterator[Running]:
    import uvicorn
    from tightfit.runtime.asking import Shelves
    from tightfit.runtime.server.guard import Door
    from tightfit.runtime.server.running import configured
    from tightfit.runtime.service import Service

    about = {"shelves": Shelves([]), "precision": "fp32", "residency": "resident", **about}
    service = Service(device="cpu", folder=folder, **about)
    running = uvicorn.Server(configured(service, door or Door(), host="127.0.0.1", port=0))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started and thread.is_alive():
            thread.join(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", service, folder)
    finally:
        running.should_exit = True
        service.close()
        thread.join(10)


@pytest.fixture(scope="session")
def serving() -> Any:
    """Called with a folder, perhaps a Door, and what is of its Service: a context manager, a server of emoji
    and of nothing else."""
    return _serving


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    """One for all tests of a file."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:  # as own_cache has it, which is made anew for each test
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(base / "config"))
        patch.delenv("TIGHTFIT_MODELS", raising=False)
        with _serving(tmp_path_factory.mktemp("service")) as running:
            yield running
