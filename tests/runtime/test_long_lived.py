"""A process that plans and paints for long: what it keeps has an end, what it says of itself stays true."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import weakref

import pytest
import tightfit
from tightfit.runtime.backends.torch import dryrun
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.costs import known
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine import detect, process
from tightfit.runtime.machine.hardware import GIB, Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner import estimate
from tightfit.runtime.planner.choose import none_fits, plan, refuse_hopeless
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request
from tightfit.runtime.units import parse_bytes

MIB = 2**20
CPU = Hardware("cpu", "a processor", 64 * GIB, 60 * GIB, ("fp32",), providers=(), context_bytes=600 * MIB)


@pytest.fixture
def traced(monkeypatch):
    """The sizes of the latents, or None for text, of each call that is followed; nothing is remembered from
    before."""
    followed, trace = [], dryrun._trace
    dryrun._traces.clear()
    monkeypatch.setattr(known.KNOWN, "_folder", None)

    def note(module, call, inputs, *others):
        followed.append(inputs.get("sample", inputs.get("latents", (0, 0, 0, 0)))[2:])
        return trace(module, call, inputs, *others)

    monkeypatch.setattr(dryrun, "_trace", note)
    return followed


@pytest.mark.slow
def test_each_new_size_leaves_nothing(monkeypatch, shallow_models):
    """Objects of all kinds that are alive after 4 and after 10 sizes, when caches of a tenth of their length
    are full."""
    wishes = Wishes(precision="fp32", attention="sdpa")
    monkeypatch.setattr(dryrun._traces, "_most", 8)
    monkeypatch.setattr(estimate.ESTIMATOR.costs, "_most", 2)
    spec, alive = inspect(shallow_models["sdxl"]), []
    for number in range(1, 11):
        plan(CPU, spec, Request("a", width=64 * number, height=64).resolve(spec), wishes)
        gc.collect()
        alive.append((len(gc.get_objects()), len(weakref.finalize._registry)))  # pyright: ignore[reportAttributeAccessIssue]
    assert alive[9][1] == alive[3][1]
    assert alive[9][0] < alive[3][0] * 1.05


def test_a_model_goes_with_all_that_is_known_of_it(shallow_models):
    spec = inspect(shallow_models["sd1"])
    before = len(estimate.ESTIMATOR.costs), len(dryrun._modules), len(dryrun._sizes_of)
    plan(CPU, spec, wishes=Wishes(precision="fp32"))
    there, held = weakref.ref(spec), weakref.ref(spec.components["unet"])
    del spec
    gc.collect()
    assert there() is held() is None
    assert (len(estimate.ESTIMATOR.costs), len(dryrun._modules), len(dryrun._sizes_of)) <= before


def test_what_is_named_as_enough_is_so_in_the_same_process(monkeypatch, sd1):
    """Which has grown by planning, and would be taken for others' memory when the next pipeline is made."""
    held = [450 * MIB]
    for module in (process, detect):
        monkeypatch.setattr(module, "resident", lambda: held[0])
    monkeypatch.setattr(
        planner, "plan", lambda *of, plan=planner.plan: (held.append(held.pop() + 70 * MIB), plan(*of))[1]
    )
    for _ in range(2):
        pipe = tightfit.load(str(sd1), device="cpu", budget="601MiB", precision="fp32")
        with pytest.raises(TightfitError, match="needs --ram") as refused:
            pipe.plans(Request("a"))
        enough = re.search(r"--ram (\w+)", str(refused.value))
        assert enough
        again = tightfit.load(str(sd1), device="cpu", budget=enough[1], precision="fp32")
        assert again.plans(Request("a"))[0].fits
        assert parse_bytes(enough[1], "") >= 600 * MIB
        held[0] = 450 * MIB


def test_neither_budget_nor_option_can_be(sd1):
    """What no memory would change is the reason."""
    spec, request = inspect(sd1), Request("a").resolve(inspect(sd1))
    wishes = Wishes(precision="fp16", attention="sliced", budget=MIB)
    for raised in (
        lambda: none_fits(plan(CPU, spec, request, wishes), CPU, request, wishes),
        lambda: refuse_hopeless(CPU, request, wishes),
    ):
        with pytest.raises(TightfitError) as refused:
            raise raised() or AssertionError
        assert "as asked: torch multiplies fp16 matrices" in str(refused.value)
        assert "--ram" not in str(refused.value)


def test_a_context_that_leaves_nothing_is_said(sd1):
    spec, request, wishes = inspect(sd1), Request("a").resolve(inspect(sd1)), Wishes(budget=500 * MIB)
    plans = plan(CPU, spec, request, wishes)
    assert re.search(
        r"needs \S+ \w+ to \w+ beside the 600 MiB of the process, \d+ MiB too much", plans[0].reason
    )
    with pytest.raises(TightfitError, match=r"the process alone takes \d+ MiB, and 64x64 needs --ram 6"):
        refuse_hopeless(CPU, request, wishes)


def test_a_hopeless_size_is_not_followed(sd1, traced):
    """It would take minutes. The size that is named runs, a step larger does not."""
    spec, wishes = inspect(sd1), Wishes(budget=700 * MIB, precision="fp32")
    request = Request("a", width=16384, height=8192).resolve(spec)
    with pytest.raises(TightfitError, match="one feature map of 16384x8192 takes") as refused:
        refuse_hopeless(CPU, request, wishes)
    assert max(max(size) for size in traced) * spec.downsampling < 8192
    found = re.search(r"that fits is (\d+)x(\d+)", str(refused.value))
    assert found
    width, height = map(int, found.groups())
    assert plan(CPU, spec, dataclasses.replace(request, width=width, height=height), wishes)[0].fits
    larger = dataclasses.replace(request, width=width + 128, height=height + 64)
    assert not plan(CPU, spec, larger, wishes)[0].fits


def test_the_largest_size_is_found_by_one_way_of_running(sd1, traced):
    spec, wishes = inspect(sd1), Wishes(budget=660 * MIB)
    request = Request("a", width=1024, height=1024).resolve(spec)
    plans = plan(CPU, spec, request, wishes)
    followed = len(traced)
    assert "largest of this shape" in str(none_fits(plans, CPU, request, wishes))
    sizes = {size for size in traced[followed:] if any(size)}
    assert len(traced) - followed <= 3 * len(sizes)


def test_a_saved_plan_costs_one_way_of_running(sd1, traced):
    here = Hardware.detect("cpu")
    spec, request = inspect(sd1), Request("a", width=128, height=128, num_inference_steps=1, seed=1)
    saved = plan(here, spec, request)[0]
    traced.clear()
    dryrun._traces.clear()
    with tightfit.Pipeline(inspect(sd1), here, plan=Plan.from_json(json.dumps(saved.to_json()))) as pipe:
        result = pipe.generate(request)
    assert len(traced) == 3
    assert result.plan.reason.startswith("read from a file")


NO_MEMORY = [
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes"
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    ImportError("/lib/libgomp.so.1: cannot allocate memory in static TLS block"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
@pytest.mark.parametrize("where", ["call", "build"])
def test_words_for_no_memory_step_down(monkeypatch, sd1, error, where):
    """Each, as torch, oneDNN, Python and the loader say it; once, and the picture is made all the same."""
    place, name = (dryrun, "run") if where == "call" else (TorchSession, "__init__")
    original, calls = getattr(place, name), []

    def once(*of):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*of)

    request = Request("a", width=128, height=128, num_inference_steps=1, seed=1, guidance_scale=1.0)
    with tightfit.load(str(sd1), device="cpu", precision="fp32") as pipe:
        pipe.plans(request)
        monkeypatch.setattr(place, name, once)
        (notice,) = pipe.generate(request).notices
    assert re.match(r"out of memory to \w+ \(.+\); went on with torch", notice)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_no_memory_to_plan_is_one_line(monkeypatch, sd1, error):
    monkeypatch.setattr(planner, "first", lambda *_: (_ for _ in ()).throw(error))
    line = r"^out of memory to prepare \(.+\): make the picture smaller"
    with tightfit.load(str(sd1), device="cpu") as pipe, pytest.raises(TightfitError, match=line):
        pipe.generate(Request("a"))
    monkeypatch.setattr(planner, "first", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with tightfit.load(str(sd1), device="cpu") as pipe, pytest.raises(RuntimeError, match="something else"):
        pipe.generate(Request("a"))


def test_pictures_come_as_they_are_painted_where_there_is_room(sd1):
    """That is where U-Net and VAE stay loaded together; the stages' bytes and the pictures are the same."""
    request, made = Request("a", width=128, height=128, num_inference_steps=1, seed=1, num_images=3), {}
    for residency in ("resident", "staged"):
        with tightfit.load(str(sd1), device="cpu", precision="fp32", residency=residency) as pipe:
            events = list(pipe.run(request))
        made[residency] = [event.picture.tobytes() for event in events if event.picture]
        order = [event.stage for event in events[1:-1]]
        assert order == (
            ["denoise", "decode"] * 3 if residency == "resident" else ["denoise"] * 3 + ["decode"] * 3
        )
        result = events[-1].result
        assert result
        assert [image.tobytes() for image in result.images] == made[residency]
        for name in ("denoise", "decode"):
            assert result.stages[name].peak_bytes == pytest.approx(
                result.plan.predicted.stages[name], rel=0.05
            )
    assert made["resident"] == made["staged"]
