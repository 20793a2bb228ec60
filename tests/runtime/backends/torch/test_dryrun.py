"""What a dry run remembers of operators, or answers itself, is what torch's own kernels would have given."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from tightfit.runtime.backends.torch import dryrun
from tightfit.runtime.backends.torch.cpu_kernels import channels_last
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.wishes import Wishes
from torch._prims_common import suggest_memory_format


class Forgetful(dict):
    def __setitem__(self, *_):
        pass


@pytest.mark.parametrize("machine", ["gtx-1650", "cpu-8gb"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_remembered_operators_leave_the_same_trace(monkeypatch, tiny_models, machine, precision):
    spec, hardware = inspect(str(tiny_models["sdxl"])), profile(machine)
    parts = (("text_encoder", "whole"), ("unet", "whole"), ("vae_decoder", "whole"), ("vae_decoder", "tiled"))
    ways = [
        (name, Placement("torch", precision, "fp32", "resident", "sdpa", tiling)) for name, tiling in parts
    ]

    def traces():
        dryrun._traces.clear()
        return [
            dryrun.footprint(spec, spec.components[name], way, hardware, Extent(1, 136, 72)).trace
            for name, way in ways
        ]

    monkeypatch.setattr(dryrun, "_answers", {})
    once, again = traces(), traces()
    assert dryrun._answers
    monkeypatch.setattr(dryrun, "_answers", Forgetful())
    monkeypatch.setattr(dryrun, "_plainly", lambda *_: None)
    assert once == again == traces()


def test_what_a_card_answers_is_no_processors(monkeypatch, tiny_models):
    """A convolution's weights are packed in each call on a CPU, and nowhere else."""
    spec, way = (
        inspect(str(tiny_models["sd1"])),
        Placement("torch", "fp32", "fp32", "resident", "sdpa", "whole"),
    )

    def traced(machine):
        dryrun._traces.clear()
        return dryrun.footprint(spec, spec.denoiser, way, profile(machine), Extent(1, 64, 64)).trace

    monkeypatch.setattr(dryrun, "_answers", {})
    alone = traced("cpu-8gb")
    monkeypatch.setattr(dryrun, "_answers", {})
    card, after = traced("gtx-1650"), traced("cpu-8gb")
    assert after == alone
    assert sum(one.packed for one in after.operations) > sum(one.packed for one in card.operations) == 0


def test_channels_are_last_where_torch_says_so():
    draw, seen = random.Random(0), set()
    for _ in range(1000):
        sides = [draw.choice((0, 1, 1, 2, 3)) for _ in range(4)]
        x = torch.empty(sides, device="meta")
        x = draw.choice((x, x.to(memory_format=torch.channels_last), x.permute(draw.sample(range(4), 4))))
        x = draw.choice((x, x[:, : sides[1] // 2], x[:1].expand(2, *x.shape[1:]) if len(x) else x))
        seen.add(is_last := suggest_memory_format(x) is torch.channels_last)
        assert channels_last(x) == is_last, (x.shape, x.stride())
    assert len(seen) == 2


def test_equal_arguments_of_other_types_are_others():
    """1, 1.0 and True are equal and hash so, yet make other dtypes; and strides are the answer's."""
    whole, wide = torch.ones(2, 3, dtype=torch.int64, device="meta"), torch.ones(3, 2, device="meta").t()
    for _ in range(2):
        with torch.inference_mode(), dryrun.Recorder("cpu", False):
            assert [(whole * by).dtype for by in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
            assert [(x + x).stride() for x in (wide, wide.contiguous())] == [(1, 2), (3, 1)]
            variance, mean = torch.var_mean(wide, dim=1)
            assert variance.shape == mean.shape == (2,)


def test_what_is_remembered_has_an_end(monkeypatch):
    monkeypatch.setattr(dryrun, "_answers", {})
    monkeypatch.setattr(dryrun, "_MOST_ANSWERS", 8)
    with torch.inference_mode(), dryrun.Recorder("cpu", False):
        for count in range(1, 50):
            torch.empty(count, device="meta") + 1
            assert len(dryrun._answers) <= 8


@pytest.mark.parametrize("searched", [True, False])
def test_planning_leaves_the_search_for_cycles_as_it_was(tiny_models, searched):
    was = gc.isenabled()
    try:
        (gc.enable if searched else gc.disable)()
        plan(
            profile("gtx-1650"),
            inspect(str(tiny_models["sd1"])),
            wishes=Wishes(precision="fp32", attention="sdpa"),
        )
        assert gc.isenabled() == searched
    finally:
        (gc.enable if was else gc.disable)()
