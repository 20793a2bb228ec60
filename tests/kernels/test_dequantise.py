"""Weights are unpacked into torch's own order as into ours, in few launches, by torch where Triton does not
run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tightfit.kernels import dequantise as kernels
from tightfit.kernels import triton_weights
from tightfit.kernels.dequantise import dequantise, dequantise_torch, triton_problem
from tightfit.kernels.formats import FORMATS, Format
from tightfit.kernels.formats import dequantise as reference
from tightfit.kernels.quantise import quantise
from tightfit.runtime.backends.torch.meter import LiveBytes
from tightfit.runtime.backends.torch.quantised import DEQUANTISE, gpu_bytes
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [
    (7, 5),
    (16, 3, 3, 3),
    (9, 70, 3, 3),
    (8, 64, 1, 1),
    (4, 32, 2, 5),
    (1, 33, 3, 3),
    (5, 1, 3, 3),
    (3, 7, 1, 3),
]
FORMS = [*FORMATS.values(), Format("nf4", 0), Format("int4", 5)]


class Launches(TorchDispatchMode):
    """Counts the operators that are not views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_torchs_order_is_ours_reordered(form, shape, dtype):
    """To the bit, where a GPU unpacks and makes the codes itself, and where a CPU does."""
    parts, taps, row = quantise(torch.randn(shape), form), form.taps(shape), math.prod(shape[1:])
    ours, theirs = (torch.full((shape[0], row), torch.nan, dtype=dtype) for _ in range(2))
    weight = parts["packed"], parts["scale"], parts.get(form.offset)
    dequantise(ours, *weight, torch.empty(parts["packed"].numel(), dtype=torch.uint8), form, taps)
    dequantise(theirs, *weight, None, form, taps, True)
    assert theirs.view(shape[0], -1, taps).equal(ours.view(shape[0], taps, -1).transpose(1, 2))


@pytest.mark.parametrize("name", FORMATS)
def test_launches_for_a_large_convolution(name):
    """127 in int4 as long as the weight was reordered afterwards, 22 output channels at a time."""
    form, shape = FORMATS[name], (1280, 1280, 3, 3)
    parts = {
        part: torch.empty(sides, dtype=dtype, device="meta")
        for part, (dtype, sides) in form.parts(shape).items()
    }
    out = torch.empty(1280, 1280 * 9, dtype=torch.float16, device="meta")
    with Launches() as launches:
        weight = (parts["packed"], parts["scale"], parts.get(form.offset))
        dequantise(out, *weight, None, form, form.taps(shape), True)
    assert launches.count <= 16


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("nf4")])
def test_bytes_beside_the_weight_are_predicted(name):
    form, shape = FORMATS[name], (64, 128, 3, 3)
    parts = {
        part: torch.empty(sides, dtype=dtype, device="meta")
        for part, (dtype, sides) in form.parts(shape).items()
    }
    out = torch.empty(64, 128 * 9, dtype=torch.bfloat16, device="meta")
    arguments = (out, parts["packed"], parts["scale"], parts.get(form.offset), None)
    with LiveBytes("cuda") as live:
        dequantise_torch(*arguments, form, 9, True)
    predicted = gpu_bytes(DEQUANTISE, (*arguments, form.kind, form.group, 9, True), None)
    assert predicted <= live.peak <= predicted + 3 * 2 * parts["scale"].numel()
    assert predicted == 0 if form.bits == 8 else predicted >= parts["packed"].numel()


class OnGpu(torch.Tensor):
    """On a CPU, but it says that it is not."""

    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


def unpacked() -> tuple[torch.Tensor, torch.Tensor]:
    form = FORMATS["int4-g64"]
    parts = quantise(torch.randn(8, 70, 3, 3), form)
    out = torch.zeros(8, 630).as_subclass(OnGpu)
    dequantise(out, parts["packed"], parts["scale"], parts["zero"], None, form, 9, True)
    return out.as_subclass(torch.Tensor).view(8, 70, 3, 3), reference(parts, form, (8, 70, 3, 3))


@pytest.fixture
def card(monkeypatch):
    """A GPU of capability 8.6, whose Triton does what the test says."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    known = (kernels.triton_runs, kernels._problem)

    def triton_does(launch) -> None:
        monkeypatch.setattr(triton_weights, "triton", triton_weights.triton or "here")
        monkeypatch.setattr(triton_weights, "dequantise_triton", launch)
        for each in known:
            each.cache_clear()

    yield triton_does
    for each in known:
        each.cache_clear()


def test_without_a_compiler_torch_unpacks(card):
    launched = []

    def launch(*_: Any) -> None:
        launched.append(1)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nor else")

    card(launch)
    for _ in range(2):
        made, right = unpacked()
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-6)
    assert len(launched) == 1
    problem = triton_problem(torch.device("cpu"))
    assert problem is not None
    assert problem.startswith(
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable; install triton"
    )


def test_a_wrong_answer_is_a_problem_too(card):
    card(lambda out, *_: out.fill_(1))
    made, right = unpacked()
    torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-6)
    assert triton_problem(torch.device("cpu")) == "what it makes of a weight is wrong"


def test_where_it_runs_it_is_used(card):
    launched = []

    def launch(out, packed, scale, zero, form, taps, _, nchw) -> None:
        launched.append(1)
        dequantise_torch(out, packed, scale, zero, None, form, taps, nchw)

    card(launch)
    unpacked()
    unpacked()
    assert triton_problem(torch.device("cpu")) is None
    assert len(launched) == 3


def test_an_older_card_is_not_tried(card, monkeypatch):
    card(lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    made, right = unpacked()
    torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-6)
    assert "6.1" in str(triton_problem(torch.device("cpu")))


def test_no_memory_for_the_trial_is_no_answer(card):
    def launch(*_: Any) -> None:
        raise torch.OutOfMemoryError

    card(launch)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            triton_problem(torch.device("cpu"))
