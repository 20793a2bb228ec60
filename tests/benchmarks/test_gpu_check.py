"""What a GPU's few minutes hang on, rehearsed where there is none: sections that fail, hang or die cost only
themselves, what is wrong comes first, and bytes are the card's own."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tightfit.benchmarks import gpu_check, gpu_fast, gpu_probe, gpu_report, gpu_sections
from tightfit.benchmarks.gpu_card import Card, Seen
from tightfit.kernels.formats import FORMATS
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.placement import PRECISIONS

ROW = "open(sys.argv[1], 'a').write('{\"n\": 1}\\n')"


def apart(tmp_path, then: str, seconds: float = 60, left: float = 60) -> list[dict[str, Any]]:
    """The rows of a section that writes one, and then does what it is told."""
    file = tmp_path / "rows.jsonl"
    return gpu_check.Apart(
        [sys.executable, "-c", f"import os, signal, sys, time; {ROW}; {then}", str(file)], file
    ).rows(seconds, left)


@pytest.fixture
def check(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sections, "CAPS", (2,))  # to plan for one is quicker; so small a model fits it
    (tmp_path / "tiny-sd1").symlink_to(tiny_models["sd1"])
    return gpu_sections.Check(tmp_path, "cpu", tiny=True, steps=1)


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("raise KeyError('x')", "ended with 1: KeyError: 'x'"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died by SIGSEGV"),
        ("open(sys.argv[1], 'a').write('{\"half'); sys.stdout.flush(); os._exit(3)", "ended with 3"),
    ],
)
def test_a_section_that_fails_or_dies_keeps_its_rows(tmp_path, then, why):
    """A row that was being written is left out."""
    rows = apart(tmp_path, then)
    assert rows[0] == {"n": 1}
    assert rows[1]["failed"].startswith(why)
    assert [*rows[2]] == ["log"]
    assert len(rows) == 3


def test_a_section_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    child = (
        "import subprocess; subprocess.Popen("
        "[sys.executable, '-c', 'import time; time.sleep(600)', 'child of ' + sys.argv[1]])"
    )
    rows = apart(tmp_path, f"{child}; time.sleep(600)", seconds=1)
    assert rows[:2] == [{"n": 1}, {"failed": "ended after 1 s"}]
    import psutil

    with_name = [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if f"child of {tmp_path}" in " ".join(p.info["cmdline"] or [])
    ]
    assert all(p.info["status"] == psutil.STATUS_ZOMBIE for p in with_name)


def test_the_end_of_all_time_is_no_failure(tmp_path):
    assert apart(tmp_path, "time.sleep(600)", seconds=60, left=1) == [
        {"n": 1},
        {"left": "when the time was over"},
    ]


def arguments(**more):
    return Namespace(device="cpu", tiny=True, steps=1, limit=100.0, section=None, models=[], **more)


def test_each_section_is_recorded_and_told(monkeypatch, tmp_path, capsys):
    """One that died leaves the others be; without a setup of its own it has the last one's; 1 says that
    something was wrong."""
    setup = {"date": "", "command": "", "hardware": {"name": "a card"}, "versions": {"torch": "2"}}

    def run(section, *_):
        return ({}, [{"failed": "died by SIGSEGV"}]) if section.name == "speed" else (setup, [{"n": 1}])

    monkeypatch.setattr(gpu_check, "_section", run)
    told: list[Any] = []

    def record(name, results, setup, rehearsal):
        assert rehearsal
        told.append((results["section"], setup["hardware"]))
        return tmp_path

    monkeypatch.setattr(gpu_check, "record", record)
    assert gpu_check.every(arguments()) == 1
    assert [name for name, _ in told] == [section.name for section in gpu_check.sections("bf16")]
    assert all(hardware == {"name": "a card"} for _, hardware in told)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a card: torch 2"
    assert "speed: died by SIGSEGV" in lines[2]


def test_no_section_begins_without_time(monkeypatch, tmp_path):
    told: list[Any] = []
    monkeypatch.setattr(
        gpu_check, "record", lambda name, results, setup, rehearsal: told.append(results["rows"]) or tmp_path
    )
    args = arguments()
    args.limit = 1.0
    assert gpu_check.every(args) == 0
    assert told == [[{"left": "for want of time"}]] * len(gpu_check.sections("bf16"))


def test_what_a_section_raises_is_its_last_row(monkeypatch, tmp_path):
    def broken():
        yield {"a": 1}
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    fake = SimpleNamespace(card=SimpleNamespace(name=lambda: None), sections=lambda: {"speed": broken})
    monkeypatch.setattr(gpu_sections, "Check", lambda *_: fake)
    monkeypatch.setattr(gpu_check, "envelope", lambda *_: {"versions": {}})
    args = arguments(rows=tmp_path / "rows", folder=tmp_path)
    args.section = "speed"
    assert gpu_check.within(args) == 1
    setup, row, failed = gpu_check._read(args.rows)
    assert setup["setup"] == {"versions": {}}
    assert row["a"] == 1
    assert failed == {"failed": "RuntimeError: CUDA error: an illegal memory access was encountered"}


class FakeCard:
    """A card of 8 GiB on which others and the context hold 300 MiB."""

    def __init__(self, reserved: list[int]) -> None:
        self.reserved = reserved

    def memory_reserved(self) -> int:
        return self.reserved[0] if len(self.reserved) == 1 else self.reserved.pop(0)

    def mem_get_info(self) -> tuple[int, int]:
        return 2**33 - 300 * 2**20 - self.reserved[0], 2**33


def test_used_and_outside_are_the_cards_own():
    card = Card("cpu")
    card.is_gpu, card.torch = True, FakeCard([2**20])
    assert card.read() == (301 * 2**20, 300 * 2**20)
    # torch took 1 MiB between the two looks, so that it is looked at again
    card.torch = FakeCard([2**20, 2**21])
    assert card.read() == (302 * 2**20, 300 * 2**20)


def test_a_peak_between_is_seen(monkeypatch):
    card = Card("cpu")
    held = [5, 1]
    monkeypatch.setattr(card, "read", lambda: (held[0], held[1]))
    with card.watched() as seen:
        held[:] = 9, 2
        time.sleep(0.2)
        held[:] = 4, 1
    assert seen == Seen(9, 2)


def test_a_budget_is_held_by_what_the_card_says(check, monkeypatch):
    """Not by what was predicted, nor by what torch counts of its own."""
    plan: Any = SimpleNamespace(
        predicted=SimpleNamespace(peak_bytes=100, context_bytes=10, stages={"denoise": 100}, seconds=1.0)
    )
    stages = {"denoise": SimpleNamespace(peak_bytes=100)}
    result = SimpleNamespace(peak_bytes=100, seconds=1.0, notices=(), stages=stages, images=["a picture"])

    class Pipe:
        __enter__ = __exit__ = lambda self, *_: self
        generate = staticmethod(lambda _: result)

    for used, held in ((200, True), (201, False)):

        @contextmanager
        def watched(used=used):
            yield Seen(used, 40)

        monkeypatch.setattr(check.card, "watched", watched)
        row, picture = check.ran(Pipe(), plan, 200)
        assert (row["held"], row["context"], picture) == (held, (10, 40), "a picture")
        found = [fault.kind for fault in gpu_report.faults({"caps": [{"plan": "p", "cap": 200} | row]})]
        assert found == ([] if held else ["budget"]) + ["prediction"]  # the context, by 75 %


@pytest.mark.parametrize(
    "error", [TightfitError("the card is gone"), RuntimeError("cuDNN: the card is gone")]
)
def test_a_plan_that_fails_is_a_row(check, monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(gpu_sections.Pipeline, "generate", failing)
    rows = list(check.capped([("sd1", "bf16")], lambda _: (None, ""), 2))
    assert len(rows) == 2
    assert all(row["failed"].endswith("the card is gone") for row in rows)
    (fault,) = gpu_report.faults({"caps": rows})  # told once
    assert "and 1 more" in fault.text


def test_plans_that_differ_run_and_their_pictures_are_compared(check):
    """A picture of nothing is far from every plan's."""
    rows = list(check.capped([("sd1", "bf16")], lambda _: (Image.new("RGB", (64, 64)), "nothing"), 3))
    assert len({row["plan"] for row in rows}) == 3
    assert all(abs(row["error"]) < 0.05 and row["held"] for row in rows)
    kinds = [fault.kind for fault in gpu_report.faults({"caps": rows})]
    assert kinds.count("picture") == 3


def test_few_plans_show_every_choice(check):
    hardware = gpu_sections.Hardware.detect("cpu")
    wishes = gpu_sections.Wishes(precision="bf16")
    plans = gpu_sections.plan(hardware, gpu_sections.inspect(check.written("sd1")), check.short, wishes)
    few = [one for _, one in gpu_sections.differing([(2, one) for one in plans], 8)]
    assert len(few) == 8
    for choice in ("residency", "attention"):
        seen = {getattr(one.placements["unet"], choice) for one in few}
        assert seen == {getattr(one.placements["unet"], choice) for one in plans}
    assert {one.cfg for one in few} == {"batched", "sequential"}


def test_wrong_comes_first_and_worst_first():
    sections = {
        "caps": [
            {"plan": "a", "failed": "no"},
            {"plan": "b", "error": 0.07},
            {"plan": "c", "error": -0.3},
            {"plan": "d", "held": False, "used": 3_000_000_000, "cap": 2_000_000_000},
            {"plan": "e", "decibels": 20.0, "floor": 35.0, "beside": "fp32"},
            {"plan": "f", "decibels": float("nan"), "floor": 35.0, "beside": "fp32"},
            {"plan": "fine", "decibels": 60.0, "floor": 35.0, "beside": "fp32", "error": 0.01, "held": True},
        ],
        "speed": [
            {"pipeline": "ours", "seconds": 2.0, "times": 2.0, "of": "diffusers"},
            {"pipeline": "diffusers", "seconds": 1.0, "times": 1.0, "of": "diffusers"},
        ],
        "probe": [{"kernel": "k", "cases": 4, "wrong": 4, "worst": float("nan"), "bound": 0.1}],
    }
    found = gpu_report.faults(sections)
    assert [fault.kind for fault in found] == ["picture"] * 3 + [
        "budget",
        "prediction",
        "prediction",
        "failure",
        "slower",
    ]
    assert [fault.text[-1] for fault in found if fault.kind in ("budget", "prediction")] == ["d", "c", "b"]


def test_the_screen_is_one():
    rows = [{"plan": f"{i} {'long ' * 60}", "error": i, "failed": str(i), "decibels": 1.0,
             "floor": 50.0 + i, "beside": "x"}
            for i in range(1, 60)]  # fmt: skip
    speeds = [{"pipeline": str(i), "seconds": 1, "times": 3.0, "of": "diffusers"} for i in range(40)]
    lines = gpu_report.screen({"caps": rows, "speed": speeds, "later": [{"left": "for want of time"}]})
    assert len(lines) <= 38
    assert max(map(len, lines)) <= 140
    assert lines[0] == "wrong pictures and answers: 59"
    assert "less than 109" in lines[1]
    assert any(line.startswith("no time for: later") for line in lines)


def test_answers_that_are_not_numbers_are_wrong():
    judged = gpu_probe._judged([1e-9, float("nan"), 0.5], 0.1)
    assert (judged["cases"], judged["wrong"]) == (3, 2)
    assert gpu_report.faults({"probe": [{"kernel": "k", **judged}]})[0].kind == "picture"


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    """Of one format alone, and by one value alone, which it does not write."""
    card, exact = Card("cpu"), gpu_probe.dequantise.dequantise_torch

    def leaving(out, packed, scale, zero, codes, form, *rest):
        exact(out, packed, scale, zero, codes, form, *rest)
        if form == FORMATS["nf4-g64"]:
            out[-1, -1] = float("nan")

    monkeypatch.setattr(gpu_probe, "WEIGHTS", ((33, 70, 3, 3), (5, 7)))
    monkeypatch.setattr(gpu_probe.dequantise, "dequantise_torch", leaving)
    rows = list(gpu_probe.weights_unpacked_right(card))
    assert {row["kernel"].split()[1] for row in rows} == set(FORMATS)
    assert {row["kernel"].split()[1] for row in rows if row["wrong"]} == {"nf4-g64"}


def test_layers_that_ignore_their_stride_are_found(monkeypatch):
    exact = gpu_probe.quantised.filled

    def careless(layer, *rest, **more):
        made = exact(layer, *rest, **more)
        if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2):
            made.register_forward_hook(lambda _, __, out: out.roll(1, -1))
        return made

    monkeypatch.setattr(gpu_probe, "FORMATS", {"int8": FORMATS["int8"]})
    monkeypatch.setattr(gpu_probe, "LAYERS", ((2, 70, 15, 17, 33, 3, 2, 0), (1, 7, 9, 11, 5, 3, 1, 1)))
    assert not any(row["wrong"] for row in gpu_probe.layers_right(Card("cpu")))
    monkeypatch.setattr(gpu_probe.quantised, "filled", careless)
    assert all(row["wrong"] == 2 for row in gpu_probe.layers_right(Card("cpu")))  # in two layouts


def test_a_doubt_that_fails_is_a_row(monkeypatch):
    def wrong(_):
        yield {"a": 1}
        raise KeyError("x")

    monkeypatch.setattr(gpu_probe, "DOUBTS", ((wrong, False), (wrong, True), (gpu_probe.versions, False)))
    rows = list(gpu_probe.rows("cpu"))
    first = [
        {"doubt": "wrong", "a": 1},
        {"doubt": "wrong", "failed": "KeyError: 'x'"},
        {"doubt": "wrong", "skipped": "needs a GPU"},
    ]
    assert rows[:3] == first
    assert rows[3]["torch"] == torch.__version__


def test_ours_beside_diffusers(check):
    """The same seed gives the same picture, nearly."""
    rows = list(check.speed(["diffusers", ("sd1", "bf16")]))
    assert rows[1]["decibels"] > rows[1]["floor"]
    assert [row["pipeline"] for row in rows[2:]] == ["diffusers", "sd1 bf16"]
    assert rows[2]["times"] == 1.0


def test_every_section_and_every_precision_is_known(check):
    assert [*check.sections()] == [section.name for section in gpu_check.sections(check.half)]
    assert gpu_probe.FLOORS.keys() == set(PRECISIONS)
    assert all(section.seconds > gpu_check.LEAST for section in gpu_check.sections("fp16"))


def test_fast_paths_are_rehearsed(check, monkeypatch):
    """What a CPU can do of them: the norm that overwrites its answer, weights that stream."""
    monkeypatch.setattr(gpu_fast, "MAPS", ((2, 64, 4, 4),))
    norms = list(check.sections()["norms"]())
    assert [row["wrong"] for row in norms] == [0, 0]  # in two layouts
    assert all(row["overwritten us"] > 0 for row in norms)
    (row,) = check.sections()["graphs"]()
    assert "CUDA has graphs" in row["skipped"]
    _, *others = check.sections()["layouts"]()
    assert [row["wrong"] for row in others] == [0, 0, 0]
    assert all(row["dB"] > 90 for row in others)
    (row,) = check.sections()["overlap"]()
    assert not row["wrong"]
    assert row["copying s"] > 0


@pytest.mark.slow  # a compiler of C++ takes half a minute
def test_compiled_blocks_answer_as_they_did(check):
    (row,) = check.sections()["blocks compiled"]()
    assert not row["wrong"]
    predicted, took = row["compiling s"]
    assert predicted > 0
    assert took > 0


class Moment:
    """A CUDA event on the CPU's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Moment) -> float:
        return 1e3 * (other.at - self.at)


def test_doubts_of_gpus_ask_what_there_is(monkeypatch):
    """Each line runs on a card of which only the memory is made up: 300 MiB outside of torch's, a product
    keeps 32."""
    held = iter(range(0, 32 * 2**20 * 100, 32 * 2**20))
    cuda = SimpleNamespace(
        Event=Moment,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: None,
        set_per_process_memory_fraction=lambda _: None,
        memory_allocated=lambda: next(held),
        max_memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        memory_stats=lambda: {"num_ooms": 1},
        mem_get_info=lambda: (2**33 - 300 * 2**20, 2**33),
    )
    card = Card("cpu")
    card.is_gpu, card.torch = True, cuda
    monkeypatch.setattr(gpu_probe, "unpackers", lambda _: {"torch": lambda *_: None})
    monkeypatch.setattr(gpu_probe, "CONVOLUTIONS", (((1, 4, 8, 8), 4, torch.float32),))
    monkeypatch.setattr(gpu_probe, "HEADS", ((8, 16, 2),))
    monkeypatch.setattr(gpu_probe, "UNPACKED", (8, 8, 3, 3))
    monkeypatch.setattr(gpu_probe, "HALF", torch.float32)  # CPUs take minutes for fp16
    monkeypatch.setattr(gpu_probe, "quantise", lambda weight, form: {})
    monkeypatch.setattr(gpu_probe, "PINNED", (1,))
    pinned = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sides, pin_memory=False, **how: pinned(*sides, **how))
    rows = [row for doubt, only in gpu_probe.DOUBTS if only for row in doubt(card)]
    kept = [row["MiB"] for row in rows if "kept after" in row]
    assert kept == [32] * 4
    context = next(row for row in rows if row.get("what") == "the context, and others")
    assert (context["bare MiB"], context["measured"]) == (300, 300 * 2**20)
    assert len([row for row in rows if "convolution" in row]) == 2
    assert [row["refused inside"] for row in rows if "refused inside" in row] == [0]
    assert any("is not held" in row.get("failed", "") for row in rows)  # a CPU has no cap
    assert next(row for row in rows if "copied MiB" in row)["pinned GB/s"] > 0
    (row,) = gpu_probe.attention(card)
    assert not row["wrong"]
