"""An export that is planned before it is made."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import tightfit
from tightfit.runtime.cli.plan import _of_seconds, tenths
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.planner.choose import none_fits, plan
from tightfit.runtime.planner.exported import exported, may_export
from tightfit.runtime.planner.plan import Verdict
from tightfit.runtime.planner.wishes import Wishes


@pytest.fixture(scope="module")
def klein(tiny_model):
    return tightfit.inspect(tiny_model("flux2-klein"))


@pytest.fixture(scope="module")
def int4(klein, made_once):
    write = functools.partial(tightfit.export_model, klein.name, precision="int4")
    return tightfit.inspect(made_once("models/flux2-klein-int4", write))


def test_it_has_the_tensors_that_an_export_has(klein, int4):
    def stored(spec):
        return {
            (name, key): (tensor.dtype, tensor.shape, tensor.stored_bytes)
            for name, component in spec.components.items()
            for key, tensor in component.tensors.items()
        }

    made = exported(klein, "int4")
    assert stored(made) == stored(int4)
    assert made is exported(klein, "int4")
    assert all(made.components[name].formats == part.formats for name, part in int4.components.items())
    assert may_export(klein) and not may_export(int4)


def test_an_export_is_named_where_it_fits_and_the_model_does_not(klein, int4):
    wishes = Wishes(residency="streamed", attention="sdpa", tiling="tiled")
    job = tightfit.Request("a heart", width=64, height=64).resolve(klein)
    card = profile("rtx-3060-12gb")
    small = plan(card, int4, job.request, wishes)[0].predicted
    card = replace(card, host_bytes=small.host_bytes)
    wishes = replace(wishes, budget=small.peak_bytes + card.context_bytes)
    plans = plan(card, klein, job, wishes)
    assert not plans[0].fits
    said = str(none_fits(plans, card, job, wishes))
    assert said.endswith(
        f'; in int4 it fits, once it is written so: tightfit export "{klein.name}" --precision int4 -o DIR'
    )
    assert plan(card, int4, job.request, wishes)[0].fits
    less = replace(card, host_bytes=small.host_bytes // 2)
    assert "tightfit export" not in str(none_fits(plan(less, klein, job, wishes), less, job, wishes))


def test_the_least_that_the_host_lacks_is_said(klein):
    """Of the plans that fit the card, not of the one that takes the least of it."""
    job = tightfit.Request("a heart", width=64, height=64).resolve(klein)
    card, wishes = replace(profile("rtx-3060-12gb"), host_bytes=0), Wishes(residency="streamed")
    all_streams = next(one for one in plan(card, klein, job, wishes) if one.verdict is Verdict.TOO_LARGE)
    had = all_streams.predicted
    some = replace(had, host_bytes=had.host_bytes // 2, peak_bytes=had.peak_bytes * 2)
    some_streams = replace(all_streams, predicted=some, reason="needs half of that")
    assert "it needs half of that" in str(none_fits([all_streams, some_streams], card, job, wishes))


def test_seconds_are_split_and_the_export_is_named_where_quantising_is_most(klein, int4):
    job = tightfit.Request("a heart", width=64, height=64).resolve(klein)
    wishes = Wishes(precision="int4", residency="staged", attention="sdpa", tiling="whole")
    card = profile("rtx-3060-12gb")
    anew, once = (plan(card, spec, job.request, wishes)[0] for spec in (klein, int4))
    assert anew.predicted.quantising_seconds > 0 == once.predicted.quantising_seconds
    assert anew.predicted.painting_seconds == pytest.approx(once.predicted.painting_seconds)
    assert anew.predicted.reading_seconds > once.predicted.reading_seconds > 0
    slow = replace(anew, predicted=replace(anew.predicted, seconds=9.0, quantising_seconds=5.0))
    assert f'tightfit export "{klein.name}" --precision int4' in _of_seconds(slow)
    assert "export" not in _of_seconds(once)
    few = replace(once.predicted, seconds=0.04, reading_seconds=0.02)
    assert _of_seconds(replace(once, predicted=few)) == "0.0 s"


@pytest.mark.parametrize(
    ("whole", "parts", "wanted"),
    [
        (0.24, (0.16, 0.0, 0.08), [0.1, 0.0, 0.1]),
        (10.0, (3.34, 3.33, 3.33), [3.4, 3.3, 3.3]),
        (0.0, (0.0, 0.0), [0.0, 0.0]),
        (1.04, (1.04,), [1.0]),
        (5.0, (1.0, 2.0), [1.0, 2.0]),  # not all of it
    ],
)
def test_parts_in_tenths_add_up(whole, parts, wanted):
    assert tenths(whole, parts) == wanted
