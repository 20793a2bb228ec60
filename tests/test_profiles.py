"""Every profile has the keys of profiles/README.md, a source for each figure, and makes hardware to plan for."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.hardware import DEVICES, GIB, profile, read_profile

ROOT = Path(__file__).parent.parent
PROFILES = {file.stem: read_profile(file) for file in sorted((ROOT / "profiles").glob("*.toml"))}
KEYS = {"name", "device", "memory_gib", "unified", "bandwidth_gb_s", "bus_gb_s", "fused_attention", "tflops", "sources"}
every = pytest.mark.parametrize("stem", PROFILES)


def is_nvidia(data) -> bool:
    return data["name"].startswith("NVIDIA") or data["name"] == "Orin"


def test_at_least_sixteen():
    assert len(PROFILES) >= 16


def test_the_readme_tells_the_same_keys():
    lines = (ROOT / "profiles" / "README.md").read_text().splitlines()
    told = {line.split("`")[1].strip("[]") for line in lines if line.startswith("- `")}
    assert told == KEYS | {"capability"}


@every
def test_keys(stem):
    data = PROFILES[stem]
    assert data.keys() == KEYS | ({"capability"} if is_nvidia(data) else set())
    assert {"fp32"} <= data["tflops"].keys() <= {"fp32", "fp16", "bf16", "int8"}


@every
def test_a_source_for_each_figure(stem):
    data = PROFILES[stem]
    assert data["sources"].keys() == (data.keys() - {"device", "unified", "tflops", "sources"}) | data["tflops"].keys()
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
    """Halves go once to sixteen times as fast as fp32, bf16 as fast as fp16; NVIDIA's bf16 came with capability 8.0."""
    data = PROFILES[stem]
    rates = data["tflops"]
    assert rates["fp32"] <= rates.get("fp16", rates["fp32"]) <= 16 * rates["fp32"]
    assert rates.get("bf16", rates.get("fp16")) == rates.get("fp16")
    assert not is_nvidia(data) or ("bf16" in rates) == (data["capability"] >= [8, 0])
    assert data["bus_gb_s"] == data["bandwidth_gb_s"] if data["unified"] else data["bus_gb_s"] < data["bandwidth_gb_s"]


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
    assert all(made.rate(precision) == pytest.approx(data["tflops"][precision] * 1e12) for precision in made.precisions)
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
    """2 x cores x boost clock, and the width of the bus x its rate: those of an RTX 2060 and of an M1, by hand."""
    card, mac = profile("rtx-2060"), profile("m1-8gb")
    assert card.rate("fp32") == pytest.approx(2 * 1920 * 1.68e9, rel=0.01)
    assert card.bandwidth == pytest.approx(192 / 8 * 14e9)
    assert card.free_bytes == 6 * GIB - 500 * 10**6  # a desktop
    assert mac.bandwidth == pytest.approx(128 / 8 * 4.266e9, rel=0.01)
    assert mac.free_bytes == pytest.approx(5461.34 * 2**20, rel=1e-4)  # Metal's working set of 8 GiB


def test_an_unknown_name_lists_the_known():
    with pytest.raises(TightfitError) as caught:
        profile("voodoo-2")
    message = str(caught.value)
    assert "voodoo-2" in message
    assert all(stem in message for stem in PROFILES)
