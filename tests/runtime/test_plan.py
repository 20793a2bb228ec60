"""plan(): a pure choice, for machines that are not here."""

from __future__ import annotations

import json

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.hardware import Hardware
from tightfit.runtime.hub import inspect
from tightfit.runtime.plan import Plan, plan

GIB = 2**30
GTX_1650 = Hardware("cuda", "GTX 1650", 4 * GIB, 3 * GIB, ("fp16", "fp32"), (7, 5))
RTX_3060 = Hardware("cuda", "RTX 3060", 12 * GIB, 11 * GIB, ("fp16", "bf16", "fp32"), (8, 6))
OLD_CPU = Hardware("cpu", "an old CPU", 8 * GIB, 6 * GIB, ("fp32",))


def test_total_and_saved(tiny_models):
    for folder in tiny_models.values():
        (made,) = plan(RTX_3060, inspect(folder))
        text = json.dumps(made.to_json())
        assert "null" not in text
        assert Plan.from_json(text) == made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 99}',
        '{"version": 1, "placements": {"unet": {"x": 1}}}',
        '{"version": 1, "model": "m", "device": "cpu", "cfg": "batched", "placements": {}, "reasons": []}',
    ],
)
def test_damaged_plans(text):
    with pytest.raises(TightfitError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batched", "sequentail"),
        ("cuda", "tpu"),
        ("fp16", "fp17"),
        ("fp16", "auto"),
        ("resident", "floating"),
        ("resident", "auto"),
    ],
)
def test_plans_that_leave_something_open(sd1, old, new):
    text = json.dumps(plan(RTX_3060, inspect(sd1))[0].to_json())
    with pytest.raises(TightfitError):
        Plan.from_json(text.replace(f'"{old}"', f'"{new}"'))


def test_precision_follows_the_hardware(sd1):
    spec = inspect(sd1)
    assert plan(GTX_1650, spec)[0].precision == "fp16"
    assert plan(OLD_CPU, spec)[0].precision == "fp32"
    (slow,) = plan(OLD_CPU, spec, precision="bf16")
    assert slow.precision == "bf16"
    assert "slow" in slow.reasons[0]


def test_sdxl_vae_never_runs_in_fp16(tiny_models):
    spec = inspect(tiny_models["sdxl"])
    assert plan(GTX_1650, spec)[0].placements["vae_decoder"].precision == "fp32"
    assert plan(RTX_3060, spec)[0].placements["vae_decoder"].precision == "bf16"
    assert plan(RTX_3060, spec, precision="fp32")[0].placements["vae_decoder"].precision == "fp32"


def test_weight_bytes_by_residency(sd1):
    spec = inspect(sd1)
    sizes = [4 * c.parameters for c in spec.components.values()]
    assert plan(OLD_CPU, spec, residency="staged")[0].weight_bytes == max(sizes)
    assert plan(OLD_CPU, spec, residency="resident")[0].weight_bytes == sum(sizes)


def test_staged_where_memory_is_short(sd1):
    spec = inspect(sd1)
    small = Hardware("cpu", "a watch", 32 * 2**20, 16 * 2**20, ("fp32",))
    assert {p.residency for p in plan(small, spec)[0].placements.values()} == {"staged"}
    assert {p.residency for p in plan(OLD_CPU, spec)[0].placements.values()} == {"resident"}


def test_unknown_choices(sd1):
    with pytest.raises(TightfitError, match="auto, fp32, bf16, fp16"):
        plan(OLD_CPU, inspect(sd1), precision="int9")
    with pytest.raises(TightfitError, match="auto, resident, staged"):
        plan(OLD_CPU, inspect(sd1), residency="floating")
