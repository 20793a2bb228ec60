"""What a command need not import: parts of torch, diffusers and scipy that are loaded because a file imports
their package, and never used.

All that this package changes in how libraries are imported is here. It is for commands, whose process is
ours: in another program's the libraries are imported as they are. What is put off comes with the first look
at it, but for torch's kernels for `meta`, which `have_meta_kernels` has to be asked for. Taken away are
torch's distributed part, without which torch is built too, for some systems; transformers' docstrings and
templates of chats; and what `FACES` has in place of a name, until the others of its package are read.
"""

from __future__ import annotations

import gc
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Unpack

from .versions import installed


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """What a mark for the compiler does where nothing is compiled. Also a decorator with options."""
    return _as_it_is if function is None else function


class _Unused:
    """A class that others of their package name, and that no picture needs."""


def _by_call(module: str, names: Sequence[str]) -> Mapping[str, Any]:
    """Names of a module, of classes or functions, that read it once one is called."""

    def standing_in(name: str) -> type:
        def call(_: type, *args: Any, **kwargs: Any) -> Any:
            face = sys.modules[module]
            assert isinstance(face, _Face)
            face.read()
            return getattr(face, name)(*args, **kwargs)

        return type(name, (), {"__new__": call})  # a class, as annotations name them

    return {name: standing_in(name) for name in names}


_COMPILER = "torch._dynamo"
_META = "torch._meta_registrations"  # kernels for `meta` that are Python: of the dry run alone
# What takes for granted that they are there, with the operators that they are made of: as a module, or as a
# face that is read.
_ON_META = {"torch._decomp.decompositions", "torch._inductor", "torch._refs"}
_ON_META_READ = {_COMPILER, "torch._export", "torch.export"}
_ALONE = f"{_COMPILER}._trace_wrapped_higher_order_op"  # transformers', which imports nothing of the compiler
_MARKS = "allow_in_graph", "assume_constant_result", "disable", "forbid_in_graph"
# Names that are called where anything is. The hub's client, 3.9 MiB and 0.14 s, and who imports it: what a
# folder is read by is in modules beside it.
_CALLED = {
    "huggingface_hub.hf_api": (
        *("HfApi", "create_repo", "model_info"),
        *("resolve_revision", "upload_file", "upload_folder"),
    ),
    "huggingface_hub._snapshot_download": ("snapshot_download",),
    "transformers.safetensors_conversion": ("auto_conversion",),
    "httpx._main": ("main",),  # its command, with pygments, 0.06 s
}
# Packages of which one or two modules are needed, but whose __init__ looks for or imports all of them, and
# modules that others import and a picture has no use for. In seconds of a core, beside 1.3 for torch: torch's
# compiler (1.1), diffusers' networks (0.5), the list of transformers' models (0.6), and scipy, for samplers
# with beta sigmas and for LMS (0.5). Of torch itself 0.3 and 28 MiB of 220, two thirds of it with the kernels
# for `meta`. Quantisers, lists of models, losses and pages of caches, which these libraries import for each
# of their models, are 9 MiB more, and 130 modules. Each with what others of these files ask of it: of the
# compiler what diffusers has where there is none.
FACES: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    **{module: partial(_by_call, module, names) for module, names in _CALLED.items()},
    "pynvml": dict,
    "requests": dict,
    "unittest": dict,
    "unittest.mock": dict,
    "diffusers.hooks": dict,
    "diffusers.models.autoencoders": dict,
    "diffusers.models.controlnets": dict,
    "diffusers.models.transformers": dict,
    "diffusers.models.unets": dict,
    "diffusers.quantizers": lambda: {"DiffusersAutoQuantizer": _Unused, "DiffusersQuantizer": _Unused},
    "scipy.integrate": dict,
    "scipy.stats": dict,
    "torch._export": dict,
    _COMPILER: lambda: dict.fromkeys(_MARKS, _as_it_is),
    _META: dict,
    "torch._prims": dict,
    "torch.ao": dict,
    "torch.distributions": dict,
    "torch.export": dict,
    "torch.fx.passes": dict,
    "torch.masked": dict,
    "torch.nn.intrinsic": dict,
    "torch.nn.qat": dict,
    "torch.nn.quantizable": dict,
    "torch.nn.quantized": dict,
    "torch.optim": dict,
    "torch.profiler": dict,
    "torch.quantization": dict,
    "torch.testing": dict,
    "torch.utils.data": dict,
    # Two are for loaders of diffusers that nothing here calls: what looks for nudity in pictures, and what
    # LoRAs' models are compared with, whose file is 7 MiB that a picture of a known text does without.
    "transformers": lambda: {
        "__version__": installed("transformers"),
        "AutoImageProcessor": None,
        "PreTrainedModel": _Unused,
    },
    "transformers.generation.continuous_batching": dict,
    "transformers.generation.continuous_batching.cache": lambda: {"PagedAttentionCache": _Unused},
    "transformers.loss.loss_utils": lambda: {"LOSS_MAPPING": {}},
    "transformers.models": dict,
    "transformers.models.auto": lambda: {"AutoModel": _Unused},
    "transformers.processing_utils": lambda: {"Unpack": Unpack},
    "transformers.quantizers": lambda: {"HfQuantizer": _Unused},
    "transformers.quantizers.auto": lambda: {"get_hf_quantizer": None},
}
# Python's search for cycles takes a third of the time of imports, of which hardly anything is ever freed.
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
        linecache.clearcache()  # sources, which torch and transformers have read of themselves: 2.5 MiB
        gc.freeze()
        gc.set_threshold(*_USUALLY)


def have_meta_kernels() -> bool:
    """Have torch's kernels for `meta` that are Python, which register as they are imported. Whether they were
    not there before."""
    face = sys.modules.get(_META)
    return isinstance(face, _Face) and face.read()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "transformers":
            _stay_alone()
        if fullname in _ON_META:
            _begin_reading(_META)
        if fullname.startswith(f"{_COMPILER}.") and fullname != _ALONE:
            _begin_reading(_COMPILER)  # its files import one another, in the order that its __init__ has
        if fullname in _INSIDES:
            return ModuleSpec(fullname, _INSIDES[fullname])
        if fullname not in FACES and fullname not in _AROUND:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            around = _AROUND.get(fullname)
            spec.loader = _Around(spec.loader, around) if around else _Later(spec.loader)
            return spec
        return None  # another version's, or none: as without this


def _begin_reading(name: str) -> None:
    """Read a face, unless that is done or a thread is at it, which may wait for what is being found here."""
    face = sys.modules.get(name)
    if isinstance(face, _Face) and not face._is_begun:
        face.read()


@contextmanager
def _packages_uncounted(_: ModuleType) -> Iterator[None]:
    """For the names of three packages that nothing here uses, diffusers looks at each file of all that is
    installed, which takes 0.2 s."""
    with _meanwhile(metadata, "packages_distributions", dict):
        yield


@contextmanager
def _without_templates(_: ModuleType) -> Iterator[None]:
    """transformers does without jinja2, which writes chats: 24 modules, 1.8 MiB."""
    with _meanwhile(sys.modules["transformers.utils.import_utils"], "is_jinja_available", lambda: False):
        yield


@contextmanager
def _meanwhile(module: ModuleType, name: str, function: Callable[[], Any]) -> Iterator[None]:
    known = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, known)


@contextmanager
def _undocumented(module: ModuleType) -> Iterator[None]:
    """transformers writes docstrings as it is imported, from its sources and its list of models: 0.4 s."""
    yield
    module.__dict__["auto_docstring"] = _as_it_is


@contextmanager
def _generating(_: ModuleType) -> Iterator[None]:
    """A part of those kernels tells torch what a Generator is, and nobody else does: 2 ms."""
    yield
    with suppress(ImportError):
        import_module("torch._prims.rng_prims")


_AROUND = {
    "diffusers.utils.import_utils": _packages_uncounted,
    "torch": _generating,
    "transformers.utils.auto_docstring": _undocumented,
    "transformers.utils.chat_template_utils": _without_templates,
}


class _Around(Loader):
    """Reads a module in a context."""

    def __init__(self, loader: Loader, around: Callable[[ModuleType], AbstractContextManager[None]]) -> None:
        self._loader, self._around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._around(module):
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:  # as of _Later
        return getattr(self._loader, name)


class _Later(Loader):
    """Runs the __init__ of a package when something is looked for in it that no module has set."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Face(spec.name)
        module.__dict__.update(FACES[spec.name]())
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _Face)
        _INSIDES[module._inside] = _Inside(self._loader, module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader …
        return getattr(self._loader, name)


class _Inside(Loader):
    """Runs a face's __init__ as if it were a module of its own. So whoever reads it has one of Python's locks
    of imports, and these know when two threads wait for one another."""

    def __init__(self, loader: Loader, face: _Face) -> None:
        self._loader, self._face = loader, face

    def exec_module(self, module: ModuleType) -> None:  # noqa: ARG002
        face = self._face
        if face.__name__ in _ON_META_READ:
            have_meta_kernels()
        self._loader.exec_module(face)
        # Some put another module in their place.
        face.__dict__["_read"] = sys.modules.get(face.__name__, face)


_INSIDES: dict[str, _Inside] = {}


class _Face(ModuleType):
    @property
    def _inside(self) -> str:
        """A name without dots, so without a package."""
        return f"{self.__name__.replace('.', '/')}/__init__"

    @property
    def _is_begun(self) -> bool:
        return self._inside in sys.modules

    def read(self) -> bool:
        """Run the package's __init__, once. Whether it was not read before. Where another thread reads it and
        waits for this one, it is read in part after this."""
        unread = "_read" not in self.__dict__
        __import__(self._inside)  # import_module would raise in that case
        return unread

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_read" not in own and not _is_of_python(name):
            if self._is_begun:
                self.read()  # by another thread, or by this one further up
            if not self._is_begun:
                return self._looked_for(name)
            if name in own:
                return own[name]
        if own.get("_read", self) is not self:
            return getattr(own["_read"], name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def _looked_for(self, name: str) -> Any:
        """What an unread package has by that name: it is read, unless a file of its own is that."""
        if self.__name__ != _COMPILER:
            with suppress(ModuleNotFoundError):
                return import_module(f"{self.__name__}.{name}")
        self.read()
        return getattr(self.__dict__.get("_read", self), name)


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
