"""tightfit: Stable Diffusion that fits the card you have.

    import tightfit

    pipe = tightfit.load("emoji", precision="fp32")
    image = pipe("a red heart", seed=7)
    tightfit.save(image, "heart.png")

Importing this loads no engine; torch and the rest come with the first call that needs them.
"""

TYPE_CHECKING = False  # checkers take it as true; `typing` takes 2.5 ms more before Ctrl-C is ours
if TYPE_CHECKING:
    from .export.export import export_model
    from .runtime.adapters import read_adapter
    from .runtime.client import Remote, connect
    from .runtime.errors import TightfitError
    from .runtime.events import Event, Result
    from .runtime.machine.hardware import Hardware
    from .runtime.machine.profiles import profile
    from .runtime.models.hub import inspect
    from .runtime.models.spec import ModelSpec
    from .runtime.pictures import save
    from .runtime.pipeline import Pipeline, load
    from .runtime.planner.choose import plan
    from .runtime.planner.plan import Plan
    from .runtime.planner.wishes import Wishes
    from .runtime.request import Request
    from .runtime.service import Service, Ticket
    from .runtime.upscale import Upscaler, upscale

__version__ = "0.1.0"
__all__ = [
    "Event",
    "Hardware",
    "ModelSpec",
    "Pipeline",
    "Plan",
    "Remote",
    "Request",
    "Result",
    "Service",
    "Ticket",
    "TightfitError",
    "Upscaler",
    "Wishes",
    "connect",
    "export_model",
    "inspect",
    "load",
    "plan",
    "profile",
    "read_adapter",
    "save",
    "upscale",
]

_HOMES = {
    "export.export": ("export_model",),
    "runtime.adapters": ("read_adapter",),
    "runtime.client": ("Remote", "connect"),
    "runtime.errors": ("TightfitError",),
    "runtime.events": ("Event", "Result"),
    "runtime.machine.hardware": ("Hardware",),
    "runtime.machine.profiles": ("profile",),
    "runtime.models.hub": ("inspect",),
    "runtime.models.spec": ("ModelSpec",),
    "runtime.pictures": ("save",),
    "runtime.pipeline": ("Pipeline", "load"),
    "runtime.planner.choose": ("plan",),
    "runtime.planner.plan": ("Plan",),
    "runtime.planner.wishes": ("Wishes",),
    "runtime.request": ("Request",),
    "runtime.service": ("Service", "Ticket"),
    "runtime.upscale": ("Upscaler", "upscale"),
}


def __getattr__(name: str):
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
