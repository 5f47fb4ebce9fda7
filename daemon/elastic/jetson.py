"""NVIDIA Jetson: power rails (INA3221, INA238) and over-current counters.

The counters are the kernel's `soctherm_oc` hwmon. OC1 is under-voltage, OC2 average over-current,
OC3 instantaneous over-current: an Orin at full clocks counts several of the last a second and
only trims its clocks for microseconds, so OC3 is not reported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import children, hwmons, read_int, read_scaled, read_text

# The rail of the whole module (Orin Nano, NX), or, on the AGX Orin, the three that add up to it.
_WHOLE = ("VDD_IN", "VIN_SYS", "VIN")
_PARTS = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}


@dataclass(frozen=True, slots=True)
class Jetson:
    """What only a Jetson tells; None: this board cannot.

    Attributes:
        watts: of the whole module.
        volts: at its input rail.
        under_voltage_events, over_current_events: counted by the hardware since boot.
    """

    watts: float | None = None
    volts: float | None = None
    under_voltage_events: int | None = None
    over_current_events: int | None = None


@dataclass(frozen=True, slots=True)
class _Rail:
    label: str
    volts: Path
    amperes: Path
    watts: Path

    def read(self) -> float | None:
        watts = read_scaled(self.watts, 1e-6)
        if watts is not None:
            return watts
        volts, amperes = read_scaled(self.volts, 1e-3), read_scaled(self.amperes, 1e-3)
        return None if volts is None or amperes is None else volts * amperes


class JetsonSource:
    """Finds the rails once, and reads them at each `read()`."""

    def __init__(self, root: Path) -> None:
        self._rails = _module_rails(root)
        self._counters = hwmons(root, "soctherm_oc")

    def read(self) -> Jetson:
        """Return rails and counters now."""
        watts = [rail.read() for rail in self._rails]
        whole = None if not watts or None in watts else sum(value or 0 for value in watts)
        folder = self._counters[0] if self._counters else None
        return Jetson(
            watts=whole,
            volts=read_scaled(self._rails[0].volts, 1e-3) if self._rails else None,
            under_voltage_events=read_int(folder / "oc1_event_cnt") if folder else None,
            over_current_events=read_int(folder / "oc2_event_cnt") if folder else None,
        )


def _module_rails(root: Path) -> list[_Rail]:
    rails = []
    for path in hwmons(root, "ina3221", "ina238"):
        labels = children(path, "in?_label")
        for file in labels:
            number = file.name[2]
            rails.append(_rail(path, read_text(file) or "", number))
        if not labels and read_text(path / "name") == "ina238":
            # One chip, one rail: Jetson boards with an INA238 have it at the module's input.
            rails.append(_rail(path, "VIN", "1"))
    whole = [rail for rail in rails if rail.label in _WHOLE]
    if whole:
        return whole[:1]
    parts = [rail for rail in rails if rail.label in _PARTS]
    return parts if {rail.label for rail in parts} == _PARTS else []


def _rail(path: Path, label: str, number: str) -> _Rail:
    return _Rail(
        label=label,
        volts=path / f"in{number}_input",
        amperes=path / f"curr{number}_input",
        watts=path / f"power{number}_input",
    )
