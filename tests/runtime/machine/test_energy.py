"""Energy by counters that a test turns: of packages, which begin again, and of a card."""

from __future__ import annotations

import pytest
from tightfit.runtime.machine import energy
from tightfit.runtime.machine.energy import Energy


@pytest.fixture
def packages(tmp_path):
    """Sets the counters, in microjoules, of zones by their names."""

    def put(**counters: int):
        for number, (name, value) in enumerate(counters.items()):
            zone = tmp_path / f"intel-rapl:{number}"
            zone.mkdir(exist_ok=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "energy_uj").write_text(f"{value}\n")
            (zone / "max_energy_range_uj").write_text("1000000000\n")

    put.folder = tmp_path  # type: ignore
    return put


def test_packages_are_added_and_begin_again(packages):
    packages(package_0=999_000_000, package_1=5_000_000, psys=1)
    used = Energy("cpu", packages.folder)
    assert used.joules() == 0
    packages(package_0=2_000_000, package_1=5_500_000, psys=900_000_000)  # which counts the packages, too
    assert used.joules() == pytest.approx(3.5)
    packages(package_0=3_000_000, package_1=5_500_000, psys=0)
    assert used.joules() == pytest.approx(4.5)


def test_what_cannot_be_read_is_not_guessed(packages):
    assert Energy("cpu", packages.folder / "none").joules() is None
    packages(psys=1)
    assert Energy("cpu", packages.folder).joules() is None
    packages(package_0=1)
    used = Energy("cpu", packages.folder)
    (packages.folder / "intel-rapl:0" / "energy_uj").write_text("")
    assert used.joules() is None
    packages(package_0=2)
    assert used.joules() is None  # what was used meanwhile is not known


def test_a_card_says_it_by_its_driver(monkeypatch):
    class Nvml:
        millijoules = 10_000

        def nvmlDeviceGetTotalEnergyConsumption(self, card):  # noqa: N802
            assert card == "a card"
            return self.millijoules

    nvml = Nvml()
    monkeypatch.setattr(energy, "driver", lambda device, ask: ask(nvml, "a card"))
    used = Energy("cuda")
    nvml.millijoules = 12_500
    assert used.joules() == pytest.approx(2.5)
    monkeypatch.setattr(energy, "driver", lambda device, ask: "it is no NVIDIA card")
    assert Energy("mps").joules() is None
