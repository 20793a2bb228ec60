"""What a command need not import: parts of torch, diffusers and scipy that are loaded because a file imports
their package, and never used.

All that this package changes in how libraries are imported is here. It is for commands, whose process is
ours: in another program's the libraries are imported as they are. Nothing is taken away but torch's
distributed part, without which torch is built too, for some systems; what is put off comes with the first
look at it.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .versions import installed


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """What a mark for the compiler does where nothing is compiled. Also a decorator with options."""
    return _as_it_is if function is None else function


_COMPILER = "torch._dynamo"
_ALONE = f"{_COMPILER}._trace_wrapped_higher_order_op"  # transformers', which imports nothing of the compiler
_MARKS = "allow_in_graph", "assume_constant_result", "disable", "forbid_in_graph"
# Packages of which one or two modules are needed, but whose __init__ looks for or imports all of them. In
# seconds of a core, beside 1.3 for torch: torch's compiler (1.1), diffusers' networks (0.5), the list of
# transformers' models (0.6), and scipy, for samplers with beta sigmas and for LMS (0.5). Each with what
# others of these files ask of it: of the compiler what diffusers has where there is none.
FACES: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "diffusers.models.autoencoders": dict,
    "diffusers.models.controlnets": dict,
    "diffusers.models.transformers": dict,
    "diffusers.models.unets": dict,
    "scipy.integrate": dict,
    "scipy.stats": dict,
    _COMPILER: lambda: dict.fromkeys(_MARKS, _as_it_is),
    "transformers": lambda: {"__version__": installed("transformers")},
    "transformers.models": dict,
}
# Python's search for cycles takes a third of the time of imports, of which hardly anything is ever freed.
_READING = threading.RLock()
_SELDOM, _USUALLY = (50_000, 20, 100), (700, 10, 10)


def begin() -> None:
    """Import no more than is needed from here on. Asking again changes nothing."""
    gc.set_threshold(*_SELDOM)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def settle() -> None:
    """Have Python search for cycles as ever, but for those in what is here already. Nothing without
    `begin`."""
    if gc.get_threshold() == _SELDOM:
        gc.freeze()
        gc.set_threshold(*_USUALLY)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "transformers":
            _stay_alone()
        if fullname.startswith(f"{_COMPILER}.") and fullname != _ALONE:
            face = sys.modules.get(_COMPILER)
            if isinstance(face, _Face):
                face.read()  # its files import one another, in the order that its __init__ has
        if fullname not in FACES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader and spec.submodule_search_locations:
            spec.loader = _Later(spec.loader)
            return spec
        return None  # another version's, or none: as without this


class _Later(Loader):
    """Runs the __init__ of a package when something is looked for in it that no module has set."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Face(spec.name)
        module.__dict__.update(FACES[spec.name]())
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_unread"] = self._loader

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader …
        return getattr(self._loader, name)


class _Face(ModuleType):
    def read(self) -> None:
        """Run the package's __init__, once."""
        with _READING:
            if loader := self.__dict__.pop("_unread", None):
                loader.exec_module(self)
                # Some put another module in their place.
                self.__dict__["_read"] = sys.modules.get(self.__name__, self)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_unread" in own and not _is_of_python(name):
            if self.__name__ != _COMPILER:
                with suppress(ModuleNotFoundError):
                    return import_module(f"{self.__name__}.{name}")
            self.read()
            return getattr(own.get("_read", self), name)
        if own.get("_read", self) is not self:
            return getattr(own["_read"], name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _is_of_python(name: str) -> bool:
    """Whether Python's own machinery asks for it, of any module."""
    return name.startswith("__") and name.endswith("__") and name != "__all__"


def _stay_alone() -> None:
    """Have torch say that it is built without its distributed part, which transformers then leaves out:
    tensors that are spread over machines, and sympy with them."""
    try:
        import torch.distributed as distributed
    except ImportError:
        return
    distributed.is_available = lambda: False
