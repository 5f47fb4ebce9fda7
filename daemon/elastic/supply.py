"""What the board runs on: the kernel's power_supply class.

Source: Documentation/ABI/testing/sysfs-class-power. Batteries of mice and headsets
(`scope` = Device) are other people's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import children, read_int, read_scaled, read_text

_MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class Supply:
    """Mains and battery at one moment; None: this board cannot tell.

    Attributes:
        on_battery: the battery is being drained, whatever is plugged in.
        battery_percent: charge of all system batteries together.
        battery_watts: what they give while they discharge.
    """

    on_battery: bool | None = None
    battery_percent: float | None = None
    battery_watts: float | None = None


class SupplySource:
    """Lists the supplies at each `read()`, since batteries come and go on a USB cable."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "sys/class/power_supply"

    def read(self) -> Supply:
        """Return mains and battery now."""
        batteries, mains = [], []
        for path in children(self._folder, "*"):
            if read_text(path / "scope") == "Device":
                continue
            if read_text(path / "type") == "Battery":
                if read_int(path / "present") != 0:
                    batteries.append(path)
            elif (online := read_int(path / "online")) is not None:
                mains.append(online > 0)
        if not batteries:
            return Supply(on_battery=None if not mains else not any(mains))
        states = [read_text(path / "status") for path in batteries]
        if "Discharging" in states:
            on_battery: bool | None = True
        elif set(states) <= {"Charging", "Full", "Not charging"}:
            on_battery = False
        else:  # "Unknown": some gauges only count
            on_battery = not any(mains) if mains else None
        watts = [value for path in batteries if (value := _watts(path)) is not None]
        return Supply(
            on_battery=on_battery,
            battery_percent=_percent(batteries),
            battery_watts=sum(watts) if watts and on_battery else None,
        )


def _percent(batteries: list[Path]) -> float | None:
    """Return the charge, each battery weighted by its size where all tell theirs."""
    for kind in ("energy", "charge"):
        now = [read_int(path / f"{kind}_now") for path in batteries]
        full = [read_int(path / f"{kind}_full") for path in batteries]
        if None not in now and None not in full and sum(x or 0 for x in full) > 0:
            return min(100.0, 100 * sum(x or 0 for x in now) / sum(x or 0 for x in full))
    shares = [share for path in batteries if (share := read_int(path / "capacity")) is not None]
    return sum(shares) / len(shares) if shares else None


def _watts(path: Path) -> float | None:
    watts = read_scaled(path / "power_now", _MICRO)
    if watts is None:
        amperes = read_scaled(path / "current_now", _MICRO)
        volts = read_scaled(path / "voltage_now", _MICRO)
        if amperes is None or volts is None:
            return None
        watts = amperes * volts
    # Drivers do not agree on the sign of a discharge current.
    return abs(watts)
