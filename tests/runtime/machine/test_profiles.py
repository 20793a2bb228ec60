"""Every profile has the keys of profiles/README.md, a source for each figure, and makes hardware to plan
for."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine import detect
from tightfit.runtime.machine.hardware import DEVICES, GIB
from tightfit.runtime.machine.profiles import CLASSES, card_class, cards, profile, read_profile

ROOT = Path(__file__).parents[3]
PROFILES = {stem: read_profile(ROOT / "profiles" / f"{stem}.toml") for stem in cards()}
KEYS = {
    "name",
    "device",
    "memory_gib",
    "unified",
    "bandwidth_gb_s",
    "bus_gb_s",
    "fused_attention",
    "tflops",
    "sources",
}
every = pytest.mark.parametrize("stem", PROFILES)


def is_nvidia(data) -> bool:
    return data["name"].startswith("NVIDIA") or data["name"] == "Orin"


def test_at_least_sixteen():
    assert len(PROFILES) >= 16


def test_the_readme_tells_the_same_keys():
    lines = (ROOT / "profiles" / "README.md").read_text().splitlines()
    told = {line.split("`")[1].strip("[]") for line in lines if line.startswith("- `")}
    assert told == KEYS | {"capability", "efficiency"}


@every
def test_keys(stem):
    data = PROFILES[stem]
    assert data.keys() - {"efficiency"} == KEYS | ({"capability"} if is_nvidia(data) else set())
    assert {"fp32"} <= data["tflops"].keys() <= {"fp32", "fp16", "bf16", "int8"}


@every
def test_a_source_for_each_figure(stem):
    data = PROFILES[stem]
    assert (
        data["sources"].keys()
        == (data.keys() - {"device", "unified", "tflops", "sources"}) | data["tflops"].keys()
    )
    assert all(len(source) > 15 for source in data["sources"].values())


@every
def test_kinds_of_values(stem):
    data = PROFILES[stem]
    assert stem == stem.lower()  # as it is looked up
    assert data["device"] in DEVICES
    assert type(data["unified"]) is type(data["fused_attention"]) is bool
    figures = [data["memory_gib"], data["bandwidth_gb_s"], data["bus_gb_s"], *data["tflops"].values()]
    assert all(type(figure) in (int, float) and figure > 0 for figure in figures)
    if "capability" in data:
        assert [type(part) for part in data["capability"]] == [int, int]


@every
def test_rates_are_plausible(stem):
    """Halves go once to sixteen times as fast as fp32, and as the class of the card says; bf16 as fast as
    fp16; NVIDIA's bf16 came with capability 8.0."""
    data = PROFILES[stem]
    rates = data["tflops"]
    assert rates["fp32"] <= rates.get("fp16", rates["fp32"]) <= 16 * rates["fp32"]
    assert rates.get("bf16", rates.get("fp16")) == rates.get("fp16")
    assert not is_nvidia(data) or ("bf16" in rates) == (data["capability"] >= [8, 0])
    halves = card_class(data["name"], tuple(data.get("capability", ()))).get("halves")
    assert halves is None or rates["fp16"] == pytest.approx(halves * rates["fp32"], rel=0.01)
    assert (
        data["bus_gb_s"] == data["bandwidth_gb_s"]
        if data["unified"]
        else data["bus_gb_s"] < data["bandwidth_gb_s"]
    )


@every
def test_hardware_to_plan_for(stem):
    data, made = PROFILES[stem], profile(stem)
    assert made.device == data["device"]
    assert made.name == data["name"]
    assert made.total_bytes == data["memory_gib"] * 2**30
    assert 0 < made.free_bytes < made.total_bytes
    assert made.host_bytes > 0
    assert 0 <= made.context_bytes < made.free_bytes
    assert made.precisions[-1] == "fp32"
    assert {*made.precisions} <= {"fp16", "bf16", "fp32"} & made.rates.keys()
    assert all(
        made.rate(precision) == pytest.approx(data["tflops"][precision] * 1e12)
        for precision in made.precisions
    )
    assert made.bandwidth == pytest.approx(data["bandwidth_gb_s"] * 1e9)
    assert made.bus == pytest.approx(data["bus_gb_s"] * 1e9)
    assert made.unified == data["unified"]
    assert made.fused_attention == data["fused_attention"]
    assert made.capability == (tuple(data["capability"]) if is_nvidia(data) else None)
    assert not made.calibrated
    assert profile(stem.upper()) == made


def test_a_card_and_its_memory_tell_the_profile():
    for one, other in combinations(PROFILES.values(), 2):
        assert one["name"] != other["name"] or abs(one["memory_gib"] - other["memory_gib"]) >= 2 * 0.6


def test_figures_known_from_elsewhere():
    """2 x cores x boost clock, and the width of the bus x its rate: those of an RTX 2060 and of an M1, by
    hand."""
    card, mac = profile("rtx-2060"), profile("m1-8gb")
    assert card.rate("fp32") == pytest.approx(2 * 1920 * 1.68e9, rel=0.01)
    assert card.bandwidth == pytest.approx(192 / 8 * 14e9)
    assert card.free_bytes == 6 * GIB - 500 * 10**6  # a desktop
    assert mac.bandwidth == pytest.approx(128 / 8 * 4.266e9, rel=0.01)
    assert mac.free_bytes == pytest.approx(5461.34 * 2**20, rel=1e-4)  # Metal's working set of 8 GiB


def test_classes():
    """Each has its keys, a source, and shares of what is possible; no two are of the same cards. A card's own
    comes first."""
    classes = read_profile(CLASSES)["classes"]
    keys = {"name", "capability", "lanes", "halves", "efficiency", "source"}
    assert all(each.keys() - {"half_is_broken"} == keys and len(each["source"]) > 15 for each in classes)
    assert all({"fp32", "fp16"} <= each["efficiency"].keys() <= {"fp32", "fp16", "bf16"} for each in classes)
    assert all(0 < share < 1 for each in classes for share in each["efficiency"].values())
    assert len({(*each["capability"], "half_is_broken" in each) for each in classes}) == len(classes)
    assert CLASSES.stem not in cards()
    plain, own = card_class("NVIDIA GeForce GTX 1660", (7, 5)), profile("gtx-1660-super").efficiency
    assert plain["efficiency"]["fp16"] != own["fp16"]
    assert plain["efficiency"]["fp32"] == own["fp32"]


@pytest.mark.parametrize(
    ("name", "capability", "found"),
    [
        ("NVIDIA GeForce GTX 1080", (6, 1), "Pascal"),
        ("NVIDIA T600 Laptop GPU", (7, 5), "GTX 16"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), "RTX 20"),
        ("Tesla T4", (7, 5), "RTX 20"),
        ("NVIDIA GeForce RTX 3080", (8, 6), "RTX 30"),
        ("Orin", (8, 7), None),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", (8, 9), "RTX 40"),
        ("NVIDIA GeForce RTX 5060", (12, 0), None),
        ("AMD Radeon RX 6600", None, None),
    ],
)
def test_a_card_without_a_profile_has_its_class(name, capability, found):
    assert card_class(name, capability).get("name") == found


def test_estimated_rates():
    """Of a card that has a profile, from its multiprocessors and clock, against the maker's rates there: an
    RTX 2060's 30 and 1680 MHz, an RTX 3060's 28 and 1777, a GTX 1050 Ti's 6 and 1392."""
    for stem, multiprocessors, clock in (
        ("rtx-2060", 30, 1680),
        ("rtx-3060-12gb", 28, 1777),
        ("gtx-1050-ti", 6, 1392),
    ):
        data = PROFILES[stem]
        properties = SimpleNamespace(multi_processor_count=multiprocessors, clock_rate=1000 * clock)
        module = SimpleNamespace(
            current_device=lambda: 0,
            get_device_name=lambda name=data["name"]: name,
            get_device_properties=lambda _, found=properties: found,
        )
        rates = detect._estimated_rates(module, tuple(data["capability"]))
        assert rates["fp32"] == pytest.approx(data["tflops"]["fp32"] * 1e12, rel=0.01)
        assert rates["fp16"] == pytest.approx(data["tflops"]["fp16"] * 1e12, rel=0.01)


@every
def test_what_seconds_rest_on_is_told(stem):
    """In the first note, made of the field; a share of the rates is only where the words say so, and launches
    only on GPUs."""
    made = profile(stem)
    assert made.notes[0] == f"seconds come from {made.seconds_from}"
    assert (
        ("published runs" in made.seconds_from)
        == bool(made.efficiency)
        == bool(card_class(made.name, made.capability))
    )
    assert (made.operator_seconds > 0) == (made.device != "cpu")


def test_measured_rates_are_not_scaled(monkeypatch, tmp_path):
    """The same card, before and after `tightfit calibrate`."""
    file = tmp_path / "calibration.json"
    file.write_text(
        json.dumps(
            {"cuda NVIDIA GeForce RTX 2060": {"rates": {"fp32": 5e12, "fp16": 11e12}, "bandwidth": 3e11}}
        )
    )
    monkeypatch.setattr(detect, "calibration_file", lambda: file)
    found = profile("rtx-2060")
    made = detect._calibrated(found)
    assert found.efficiency["fp16"] < 1
    assert made.efficiency == {}
    assert made.seconds_from == "rates measured here"
    assert made.rate("fp16") == 11e12
    assert made.operator_seconds == found.operator_seconds


def test_an_unknown_name_lists_the_known():
    with pytest.raises(TightfitError) as caught:
        profile("voodoo-2")
    message = str(caught.value)
    assert "voodoo-2" in message
    assert all(stem in message for stem in PROFILES)
