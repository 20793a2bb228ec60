"""plan(): the fastest that fits, for machines that are not here; and plans as files, which are checked."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from tightfit.runtime.backends.torch import dryrun
from tightfit.runtime.costs import known
from tightfit.runtime.costs.footprint import Arrival, Footprint, Operation, Trace
from tightfit.runtime.costs.latency import call_seconds, filling_seconds, quantising_seconds
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import cards, profile
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.choose import checked, first, none_fits, plan
from tightfit.runtime.planner.estimate import ESTIMATOR
from tightfit.runtime.planner.plan import Plan, Verdict
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.recent import Recent
from tightfit.runtime.request import Request

GIB, MIB = 2**30, 2**20
TERA = 1e12
TURING = Hardware(
    "cuda",
    "RTX 2060",
    4 * GIB,
    3 * GIB,
    ("fp16", "fp32"),
    (7, 5),
    {"fp32": 3 * TERA, "fp16": 6 * TERA},
    128e9,
    12e9,
    call_seconds=0,
)
RTX_3060 = Hardware(
    "cuda",
    "RTX 3060",
    12 * GIB,
    11 * GIB,
    ("fp16", "bf16", "fp32"),
    (8, 6),
    {"fp32": 12.7 * TERA, "fp16": 25.5 * TERA, "bf16": 25.5 * TERA},
    360e9,
    24e9,
    call_seconds=0,
)
OLD_CPU = Hardware(
    "cpu",
    "an old CPU",
    8 * GIB,
    6 * GIB,
    ("fp32",),
    rates={"fp32": 0.2 * TERA},
    bandwidth=20e9,
    bus=20e9,
    call_seconds=0,
)


# Leaves 15 ways of 180: for what depends on precision and residency alone.
PLAIN = {"attention": "sdpa", "tiling": "whole", "cfg": "batched"}


@pytest.fixture(scope="module")
def spec(tiny_models):
    """Whose calls are followed once for all cards, and whose ways are costed once for each."""
    return inspect(tiny_models["sd1"])


def test_precision_follows_the_hardware(spec):
    assert plan(TURING, spec, wishes=Wishes(**PLAIN))[0].precision == "fp16"
    assert plan(OLD_CPU, spec, wishes=Wishes(**PLAIN))[0].precision == "fp32"
    slow = plan(OLD_CPU, spec, wishes=Wishes(**PLAIN, precision="bf16"))[0]
    assert slow.precision == "bf16"
    assert "slow" in slow.reason


def test_whole_numbers_where_the_processor_multiplies_them_fast(spec):
    """On a CPU whenever that is faster; on a GPU, where its kernels are yet to be timed, when asked for."""
    wishes = Wishes(requests=1000)
    rates = {**OLD_CPU.rates, "int8": 4 * OLD_CPU.rates["fp32"]}
    best = plan(dataclasses.replace(OLD_CPU, rates=rates), spec, wishes=wishes)[0]
    assert {name: placement.precision for name, placement in best.placements.items()} == {
        "text_encoder": "int8", "unet": "int8-dynamic", "vae_decoder": "int8"
    }  # fmt: skip
    assert all(p.precision != "int8-dynamic" for p in plan(OLD_CPU, spec, wishes=wishes))
    asked = Wishes(precision="int8-dynamic")
    for refused in (
        p for p in plan(OLD_CPU, spec, wishes=asked) if p.placements["unet"].residency != "streamed"
    ):
        assert "no fast 8-bit integer products" in refused.reason
    able = dataclasses.replace(OLD_CPU, rates=rates)
    # Which it has no arithmetic for.
    slow = plan(able, spec, wishes=Wishes(compute="bf16", precision="int8-dynamic"))
    assert not any(p.fits for p in slow)
    once, often = (
        plan(able, spec, wishes=Wishes(precision="int8-dynamic", requests=count))[0] for count in (1, 100)
    )
    # Its weights are packed each time they are loaded.
    assert often.predicted.seconds < once.predicted.seconds
    gpu = dataclasses.replace(RTX_3060, rates={**RTX_3060.rates, "int8": 2 * RTX_3060.rates["fp16"]})
    assert all(p.precision != "int8-dynamic" for p in plan(gpu, spec))
    found = plan(gpu, spec, wishes=asked)
    assert found[0].fits
    assert found[0].placements["unet"].compute == "fp16"
    assert not any(p.fits for p in found if p.placements["unet"].residency == "streamed")


def test_sdxl_vae_never_runs_in_fp16(tiny_models):
    spec = inspect(tiny_models["sdxl"])
    for hardware, precision, expected in (
        (TURING, "auto", "fp32"),
        (RTX_3060, "fp16", "bf16"),
        (RTX_3060, "fp32", "fp32"),
    ):
        for made in plan(hardware, spec, wishes=Wishes(**PLAIN, precision=precision)):
            if made.precision == precision or precision == "auto":
                assert made.placements["vae_decoder"].precision in (
                    expected,
                    made.precision.replace("fp16", expected),
                )


def test_every_candidate_has_its_reason(spec):
    plans = plan(RTX_3060, spec)
    assert [p.chosen for p in plans] == [True] + [False] * (len(plans) - 1)
    assert all(p.reason for p in plans)
    assert len({(p.cfg, tuple(p.placements.values())) for p in plans}) == len(plans) == 5 * 3 * 3 * 2 * 2


def test_what_is_asked_for_is_taken(spec):
    asked = {"precision": "fp32", "residency": "streamed", "attention": "chunked", "cfg": "sequential"}
    unet = plan(RTX_3060, spec, wishes=Wishes(**asked, tiling="tiled"))[0]
    for field in ("precision", "residency", "attention"):
        assert getattr(unet.placements["unet"], field) == asked[field]
    assert unet.placements["vae_decoder"].tiling == "tiled"
    assert unet.cfg == "sequential"


def test_what_an_engine_refuses_says_why(spec):
    plans = plan(OLD_CPU, spec, wishes=Wishes(precision="fp16", attention="sliced"))
    assert not plans[0].fits
    assert "refused: torch multiplies fp16 matrices" in plans[0].reason
    error = none_fits(plans, OLD_CPU, Request("a").resolve(spec), Wishes())
    assert "as asked: torch multiplies fp16 matrices" in str(error)


def test_starting_operators_counts():
    """Slices of a small picture are many small operators: on a card with a fused kernel they never win."""
    spec, wishes = inspect("emoji"), Wishes(residency="resident", tiling="whole", cfg="batched")
    for name in ("gtx-1650", "rtx-3060-12gb"):
        assert plan(profile(name), spec, wishes=wishes)[0].placements["unet"].attention == "sdpa"
    large = Request("a", width=1024, height=1024)
    assert plan(profile("rx-6600"), spec, large, Wishes(precision="fp16", cfg="batched"))[0].fits


def test_quality_floor(spec):
    assert plan(RTX_3060, spec)[0].precision == "fp16"
    best = plan(RTX_3060, spec, wishes=Wishes(min_psnr=90))[0]
    assert best.precision == "fp32"
    assert "below the floor" in plan(RTX_3060, spec, wishes=Wishes(min_psnr=90, precision="fp16"))[0].reason


def test_residency_pays_only_when_it_is_used_again(spec):
    assert plan(OLD_CPU, spec, wishes=Wishes(requests=1))[0].placements["unet"].residency == "staged"
    assert plan(OLD_CPU, spec, wishes=Wishes(requests=100))[0].placements["unet"].residency == "resident"


def test_no_guidance_no_second_half(spec):
    plans = plan(RTX_3060, spec, Request("a", guidance_scale=1.0))
    assert {(p.cfg, p.guided) for p in plans} == {("batched", False)}
    assert "CFG" not in plans[0].summary()


def test_a_smaller_budget_never_takes_more(spec):
    request = Request("a", width=512, height=512)
    last = None
    for budget in (2000, 1000, 500, 320, 300, 290):
        best = plan(RTX_3060, spec, request, Wishes(budget=budget * MIB, precision="fp16"))[0]
        if best.fits:
            assert best.predicted.peak_bytes + best.predicted.context_bytes <= budget * MIB
            assert last is None or best.predicted.seconds >= last
            last = best.predicted.seconds
    assert last is not None


def test_random_requests_and_budgets(tiny_models):
    """Never over budget; never "does not fit" while a candidate that fits exists; never one slower than
    another that fits; and the same where a few candidates tell which."""
    draw = random.Random(0)
    specs = [inspect(folder) for folder in tiny_models.values()]
    refused = told = 0
    machines = (RTX_3060, OLD_CPU, profile("rx-6600"))
    for _ in range(3):  # of which each is costed once for all its budgets
        spec, hardware = draw.choice(specs), draw.choice(machines)
        width, height = draw.choice(((64, 64), (256, 192)))
        request = Request(
            "a", width=width, height=height, guidance_scale=draw.choice((1.0, 7.5)), num_inference_steps=2
        )
        for _ in range(8):
            budget = round(2 ** draw.uniform(20, 25)) + hardware.context_bytes
            plans = plan(hardware, spec, request, Wishes(budget=budget))
            fitting = [
                p
                for p in plans
                if p.predicted.peak_bytes + p.predicted.context_bytes <= budget and "refused" not in p.reason
            ]
            assert [p for p in plans if p.fits] == plans[: len(fitting)]
            assert plans[0].chosen == plans[0].fits == bool(fitting)
            if fitting:
                assert plans[0].predicted.seconds <= min(p.predicted.seconds for p in fitting) * 1.002
            else:
                refused += 1
            soon = first(ESTIMATOR.estimate(hardware, request.resolve(spec), Wishes(budget=budget)))
            assert soon in (None, plans[0])
            told += soon is not None
    assert 3 < refused < 21
    assert told > 3


def test_the_first_plan_takes_a_few_dry_runs(sd1, monkeypatch):
    trace, taken = dryrun._trace, []
    monkeypatch.setattr(known.KNOWN, "_folder", None)
    monkeypatch.setattr(dryrun, "_traces", Recent(64))
    monkeypatch.setattr(dryrun, "_trace", lambda *given: (taken.append(given), trace(*given))[1])
    spec = inspect(sd1)
    best = first(ESTIMATOR.estimate(OLD_CPU, Request("a").resolve(spec), Wishes()))
    count = len(taken)
    assert count == 3  # the text encoder, the U-Net, the VAE
    assert plan(OLD_CPU, spec, Request("a"))[0] == best
    assert len(taken) > 3 * count


def test_the_first_plan_with_cached_steps(tiny_models):
    """Loaded for each request it was 3 % slower than streamed, where it does not fit to stay loaded."""
    spec, wishes = inspect(tiny_models["sdxl"]), Wishes(precision="fp32", prefer="balanced", requests=100)
    request = Request("a", width=256, height=64, num_inference_steps=25, guidance_scale=1.0)
    job = request.resolve(spec)
    for budget in {
        p.predicted.peak_bytes + p.predicted.context_bytes for p in plan(RTX_3060, spec, job, wishes)
    }:
        tight = dataclasses.replace(wishes, budget=budget)
        assert first(ESTIMATOR.estimate(RTX_3060, job, tight)) in (None, plan(RTX_3060, spec, job, tight)[0])


def test_the_cure_keeps_the_quality_floor(spec):
    """What is named as enough must itself be allowed."""
    request = Request("a", width=256, height=256).resolve(spec)
    wishes = Wishes(**PLAIN, budget=2 * MIB, min_psnr=90)
    text = str(none_fits(plan(RTX_3060, spec, request, wishes), RTX_3060, request, wishes))
    enough = text.split("--vram ")[1].split()[0]
    best = plan(RTX_3060, spec, request, Wishes(**PLAIN, budget=enough, min_psnr=90))[0]
    assert best.fits
    assert best.precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_planning_one_precision_does_not_change_another(sd1_copy, precision):
    """Reading fp16 files as bf16 takes a buffer that reading them as fp16 does not."""
    from tightfit.export import random_model

    random_model.write("sd1", sd1_copy.parent / "halves", tiny=True, precision="fp16")
    peaks = []
    for before in ((), ("bf16", "fp16")):
        spec, hardware = (
            inspect(sd1_copy.parent / "halves"),
            dataclasses.replace(OLD_CPU, precisions=("bf16", "fp16", "fp32")),
        )
        for each in (*before, precision):
            found = plan(hardware, spec, wishes=Wishes(**PLAIN, precision=each))
        peaks.append(sorted(p.predicted.peak_bytes for p in found))
    assert peaks[0] == peaks[1]


def test_streaming_keeps_loaded_what_there_is_room_for():
    """Between nothing kept and staged, in bytes and in seconds; within the budget; never where staging
    fits."""
    spec, slow = inspect("emoji"), dataclasses.replace(OLD_CPU, read=1e8)
    asked = {"precision": "fp32", "attention": "sdpa", "cfg": "batched", "tiling": "whole"}
    staged = plan(slow, spec, wishes=Wishes(**asked, residency="staged"))[0].predicted
    (least,) = plan(slow, spec, wishes=Wishes(**asked, residency="streamed"))
    for share in (0.3, 0.6, 0.9):
        low = least.predicted.peak_bytes
        budget = int((low + share * (staged.peak_bytes - low)) / 0.96)
        found = plan(slow, spec, wishes=Wishes(**asked, budget=budget))
        best, *rest = (p for p in found if p.placements["unet"].kept_bytes)
        assert best.chosen
        assert 0.9 * budget < best.predicted.peak_bytes <= budget
        assert best.residency.startswith("streamed, keeps ")
        order = [best, *rest, *(p for p in found if p.residency == "streamed")]
        assert [p.predicted.seconds for p in order] == sorted(p.predicted.seconds for p in order)
        assert [p.predicted.peak_bytes for p in order] == sorted(
            (p.predicted.peak_bytes for p in order), reverse=True
        )
        assert staged.seconds < best.predicted.seconds < least.predicted.seconds
        assert best.placements["text_encoder"].residency == "staged"
        assert (
            checked(best, slow, Request("a").resolve(spec), Wishes(budget=budget)).predicted == best.predicted
        )
    assert not any(p.placements["unet"].kept_bytes for p in plan(slow, spec, wishes=Wishes(**asked)))


def test_what_is_kept_is_bytes_of_what_streams(spec):
    made = plan(RTX_3060, spec, wishes=Wishes(residency="streamed", precision="fp16"))[0].to_json()
    for residency, kept in (("streamed", -1), ("streamed", "much"), ("staged", 1)):
        made["placements"]["unet"] |= {"residency": residency, "kept_bytes": kept}
        with pytest.raises(TightfitError, match="it keeps"):
            Plan.from_json(json.dumps(made))
    made["placements"]["unet"] |= {"kept_bytes": 0, "packed": True}
    with pytest.raises(TightfitError, match="packed of staged fp16 is True"):
        Plan.from_json(json.dumps(made))


def test_nothing_fits_says_what_would(spec):
    asked = {"precision": "fp16", "cfg": "sequential"}
    wishes = Wishes(**asked, budget=32 * MIB)
    hardware = dataclasses.replace(TURING, free_bytes=GIB)
    request = Request("a", width=1024, height=768).resolve(spec)
    plans = plan(hardware, spec, request, wishes)
    assert not plans[0].fits
    text = str(none_fits(plans, hardware, request, wishes))
    words = text.split()
    width, height = map(int, words[words.index("is") + 1].rstrip(",").split("x"))
    assert plan(hardware, spec, dataclasses.replace(request, width=width, height=height), wishes)[0].fits
    enough = int(words[words.index("--vram") + 1].removesuffix("MiB"))
    assert plan(hardware, spec, request, Wishes(**asked, budget=enough * MIB))[0].fits
    assert not plan(hardware, spec, request, Wishes(**asked, budget=(enough - 1) * MIB))[0].fits


@pytest.mark.parametrize("name", cards())
def test_every_profile_paints(spec, name):
    best = plan(profile(name), spec, Request("a"), Wishes(**PLAIN))[0]
    assert best.fits
    assert best.predicted.seconds > 0


def test_unknown_hardware():
    with pytest.raises(TightfitError, match="rtx-2060"):
        profile("rtx-9999")


def test_total_and_saved(tiny_models):
    for folder in tiny_models.values():
        for made in plan(RTX_3060, inspect(folder), wishes=Wishes(attention="chunked", cfg="batched")):
            text = json.dumps(made.to_json())
            assert "null" not in text
            assert Plan.from_json(text) == made


def test_what_the_plan_command_prints_is_read_too(spec):
    plans = plan(RTX_3060, spec)
    assert Plan.from_json(json.dumps({"plans": [p.to_json() for p in reversed(plans)]})) == plans[0]


def test_a_plan_that_was_saved_before_there_were_verdicts(spec):
    """Version 5 with `fits` alone; a budget that nothing fits has the other kind."""
    for wishes in (Wishes(), Wishes(budget=MIB, precision="fp16")):
        made = plan(RTX_3060, spec, wishes=wishes)[0]
        data = made.to_json()
        assert data["fits"] is made.fits
        assert data.pop("verdict") == made.verdict.value
        assert Plan.from_json(json.dumps(data)) == made
    for wrong in ({"verdict": "fits"}, {"verdict": "perhaps"}, {"verdict": None}, {"verdict": ["refused"]}):
        with pytest.raises(TightfitError, match="not a tightfit plan"):
            Plan.from_json(json.dumps(data | wrong))


def test_each_verdict(spec):
    """By what was asked for; the reason beside it may say what it likes."""
    asked = {
        Verdict.FITS: (RTX_3060, Wishes()),
        Verdict.TOO_LARGE: (RTX_3060, Wishes(budget=MIB, precision="fp16")),
        Verdict.TOO_COARSE: (RTX_3060, Wishes(min_psnr=90, precision="fp16")),
        Verdict.REFUSED: (OLD_CPU, Wishes(precision="fp16", attention="sliced")),
    }
    for verdict, (hardware, wishes) in asked.items():
        assert plan(hardware, spec, wishes=wishes)[0].verdict is verdict
    best = plan(RTX_3060, spec, wishes=Wishes(precision="fp16", residency="resident"))[0]
    other = dataclasses.replace(best, reason="is refused: so it says")
    assert not best.beats(other)
    assert best.beats(dataclasses.replace(best, verdict=Verdict.REFUSED, reason="fits"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 99}',
        '{"plans": []}',
        '{"version": 3, "placements": {"unet": {"x": 1}}}',
        "[" * 100_000,
    ],
)
def test_damaged_plans(text):
    with pytest.raises(TightfitError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"batched"', '"sequentail"'),
        ('"cuda"', '"tpu"'),
        ('"fp16"', '"fp17"'),
        ('"fp16"', '"auto"'),
        ('"residency": "', '"residency": "un'),
        ('"sdpa"', '"flash3"'),
        ('"whole"', "null"),
        ('"version": 5', '"version": 1'),
        ('"guided": true', '"guided": "yes"'),
        ('"psnr": ', '"seconds": "soon", "psnr": '),  # of a name that comes twice the last counts
        ('"quantising_seconds": ', '"reading_seconds": "soon", "quantising_seconds": '),
    ],
)
def test_plans_that_leave_something_open(spec, old, new):
    text = json.dumps(plan(RTX_3060, spec)[0].to_json())
    assert old in text
    with pytest.raises(TightfitError):
        Plan.from_json(text.replace(old, new))


def test_a_saved_plan_is_checked(tiny_models):
    spec, request = inspect(tiny_models["sd1"]), Request("a")
    saved = plan(RTX_3060, spec, request)[0]
    assert checked(saved, RTX_3060, request.resolve(spec), Wishes()).predicted == saved.predicted
    elsewhere = checked(
        saved, dataclasses.replace(TURING, precisions=("fp16", "fp32")), request.resolve(spec), Wishes()
    )
    assert "RTX 3060" in elsewhere.reason
    assert elsewhere.budget_bytes == TURING.free_bytes
    with pytest.raises(TightfitError, match="precision fp32 is asked for, the plan says fp16"):
        checked(saved, RTX_3060, request.resolve(spec), Wishes(precision="fp32"))
    with pytest.raises(TightfitError, match="not for emoji"):
        checked(saved, RTX_3060, request.resolve(inspect("emoji")), Wishes())
    assert (
        checked(
            dataclasses.replace(saved, budget_bytes=GIB), RTX_3060, request.resolve(spec), Wishes()
        ).budget_bytes
        == GIB
    )
    with pytest.raises(TightfitError, match="another kind of model"):
        checked(saved, RTX_3060, request.resolve(inspect(tiny_models["sdxl"])), Wishes())
    with pytest.raises(TightfitError, match="runs on cpu"):
        checked(saved, OLD_CPU, request.resolve(spec), Wishes())
    with pytest.raises(TightfitError, match=r"does not run here: it needs .* too much"):
        checked(saved, RTX_3060, Request("a", width=1024, height=1024).resolve(spec), Wishes(budget=MIB))


@pytest.mark.parametrize("field", ["precision", "residency", "attention", "tiling", "cfg"])
def test_unknown_choices(field):
    with pytest.raises(TightfitError, match=f"unknown {field} 'int9': choose auto, "):
        Wishes(**{field: "int9"})


@pytest.mark.parametrize("field", ["compile", "cuda_graphs"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_truth_is_no_text(field, value):
    with pytest.raises(TightfitError, match=f"{field} must be true or false, not {value!r}"):
        Wishes(**{field: value})


def test_what_a_network_takes_once():
    """By hand: 10 modules, 5 tensors, of which 2 stream, four operators, two of them the same product of 16
    operations and one of 81; then a call of three modules that dequantises once."""
    small, large = (Operation(flops, 0.0, "product") for flops in (16.0, 81.0))
    trace = Trace((), (), (small, large, Operation(16.0, 0.0, "product"), Operation(0.0, 0.0)))
    own = Footprint((600,), 0, trace, (), modules=10, flowing=2, arrivals=(Arrival("a", 1, 0, 0),))
    bf16 = Placement("torch", "bf16", "bf16", "staged", "sdpa", "whole")
    starts = {"build": 1.0, "fill": 10.0, "pack": 100.0, "count": 1e3, "bf16/first": 1e4}
    cpu = dataclasses.replace(OLD_CPU, starts=starts | {"product": 0.0, "": 0.0}, moves={"fresh": 6.0})
    once = 10 * 1 + 600 / 6 + 4 * 1e3 + (2 + 3) * 1e4
    assert filling_seconds(cpu, bf16, own, 3, False) == pytest.approx(once + 3 * 10)
    assert filling_seconds(cpu, bf16, own, 3, True) == pytest.approx(once + 3 * 110)
    assert filling_seconds(dataclasses.replace(cpu, device="cuda"), bf16, own, 3, True) == 0
    still = dataclasses.replace(own, flowing=0)
    assert call_seconds(cpu, bf16, own) - call_seconds(cpu, bf16, still) == pytest.approx(2 * 10)
    unpacking = Trace((), (), (Operation(0.0, 0.0, "unpack4"),), (("", 0, 0),) * 3)
    eight = dataclasses.replace(own, trace=unpacking, flowing=0, arrivals=())
    slow = dataclasses.replace(
        cpu, starts=starts | {"unpack/count": 0.5, "unpack4": 0.25, "bf16/module": 7.0}
    )
    assert filling_seconds(slow, bf16, eight, 0, False) == pytest.approx(10 * 1 + 600 / 6 + 1e3 + 0.5)
    assert call_seconds(slow, bf16, eight) == pytest.approx(3 * 7 + 0.25)
    quick = dataclasses.replace(cpu, starts={"int8/quantise": 2.0}, moves={"int8/quantise": 4.0})
    assert quantising_seconds(quick, "int8-dynamic", 3, 8) == pytest.approx(3 * 2 + 8 / 4)


def test_starts_of_operators():
    """A CPU does one thing after another; a GPU is told what comes next while it computes. By hand: 2 ms of
    work and 5 starts."""
    work = Operation(OLD_CPU.rates["fp32"] * 1e-3, 0.0, "product")
    light = (Operation(0.0, 0.0, "unpack"), Operation(0.0, 0.0), Operation(0.0, 0.0))
    own = Footprint((), 0, Trace((), (), (work, work, *light)), (), 0)
    fp32 = Placement("torch", "fp32", "fp32", "resident", "sdpa", "whole")
    starts = {"product": 4e-4, "unpack": 1e-4}
    cpu = dataclasses.replace(OLD_CPU, starts=starts, call_seconds=1e-5)
    assert call_seconds(cpu, fp32, own) == pytest.approx(2e-3 + 2 * 4e-4 + 1e-4 + 2 * 1e-5)
    # Weights of 1 GB that are packed in the call, at 10 GB/s, by a convolution at half the rate.
    plain = dataclasses.replace(own, trace=Trace((), (), (dataclasses.replace(work, packed=1e9),)))
    packing = dataclasses.replace(
        cpu,
        rates={**cpu.rates, "fp32/plain": cpu.rates["fp32"] / 2},
        moves={"fp32/order": 1e10},
        starts={**starts, "fp32/plain": 5e-4},
    )
    assert call_seconds(packing, fp32, plain) == pytest.approx(2e-3 + 0.1 + 5e-4)
    gpu = dataclasses.replace(cpu, device="cuda")
    assert call_seconds(gpu, fp32, own) == pytest.approx(2e-3 + 1e-4 + 2 * 1e-5)
