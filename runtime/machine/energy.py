"""Energy that a device has used, by its own counters, whatever else it did meanwhile. Never estimated."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .detect import driver

_POWERCAP = Path("/sys/class/powercap")
_ZONES = "intel-rapl:[0-9]*"  # AMD's too; those of intel-rapl-mmio count the same packages once more


class Energy:
    """Of an NVIDIA card by its driver, or of the CPU's packages by RAPL, from the time it is made."""

    def __init__(self, device: str, powercap: Path = _POWERCAP) -> None:
        self._device, self._powercap = device, powercap
        self._joules = 0.0
        self._last = self._counters()

    def joules(self) -> float | None:
        """So far; None where a counter is not there, or may not be read. To be asked at least every few
        minutes, as a package's counter begins again at 65 or 262 kJ."""
        now = self._counters()
        if not now or self._last.keys() != now.keys():
            self._last = {}
            return None
        for name, (joules, range_joules) in now.items():
            used = joules - self._last[name][0]
            self._joules += used if used >= 0 else used + range_joules
        self._last = now
        return self._joules

    def _counters(self) -> dict[str, tuple[float, float]]:
        """Joules of each counter, and at how many it begins again."""
        if self._device == "cpu":
            return self._packages()
        joules = driver(
            self._device, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000
        )
        return {} if isinstance(joules, str) else {"card": (joules, 0.0)}

    def _packages(self) -> dict[str, tuple[float, float]]:
        found = {}
        with suppress(OSError, ValueError):  # none, or only root may read them
            for zone in self._powercap.glob(_ZONES):
                if (zone / "name").read_text().startswith("package"):
                    values = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
                    joules, range_joules = (value / 1e6 for value in values)
                    found[zone.name] = joules, range_joules
            return found
        return {}
