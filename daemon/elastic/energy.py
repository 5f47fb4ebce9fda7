"""Watts and joules: RAPL energy counters, and the integral over readings of power.

Source: Documentation/power/powercap/powercap.rst. A RAPL counter wraps at `max_energy_range_uj`
(at 60 W after an hour or so), and since 2020 only root may read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import children, read_int, read_text

_MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class _Counter:
    file: Path
    wraps_at: int


class Rapl:
    """The processor's energy counters; `joules()` grows from 0 and never wraps."""

    def __init__(self, root: Path) -> None:
        zones = {
            path: read_text(path / "name") or ""
            for path in children(root / "sys/class/powercap", "intel-rapl:*")
            # Sub-zones (intel-rapl:0:1) are contained in their package.
            if path.name.count(":") == 1
        }
        # psys is the whole platform and contains the packages.
        platform = [path for path, name in zones.items() if name == "psys"]
        packages = [path for path, name in zones.items() if name.startswith("package")]
        self.scope = "platform" if platform else "processor"
        self._counters = [
            _Counter(path / "energy_uj", wraps_at)
            for path in platform or packages
            if (wraps_at := read_int(path / "max_energy_range_uj"))
        ]
        self._last: list[int] | None = None
        self._total = 0

    def joules(self) -> float | None:
        """Return the joules used since the first call; None where the counters are closed."""
        now = [value for item in self._counters if (value := read_int(item.file)) is not None]
        if not now or len(now) != len(self._counters):
            return None
        if self._last is not None:
            for counter, before, after in zip(self._counters, self._last, now, strict=True):
                self._total += (after - before) % (counter.wraps_at + 1)
        self._last = now
        return self._total * _MICRO


class EnergyMeter:
    """Turns joules into watts and watts into joules, whichever the board gives."""

    def __init__(self) -> None:
        self._time: float | None = None
        self._joules: float | None = None
        self._watts: float | None = None
        self._total = 0.0

    def from_joules(self, now: float, joules: float) -> tuple[float | None, float]:
        """Return mean watts since the last call (None at the first) and the joules so far."""
        watts = None
        if self._time is not None and self._joules is not None and now > self._time:
            watts = (joules - self._joules) / (now - self._time)
        self._time, self._joules = now, joules
        return watts, joules

    def from_watts(self, now: float, watts: float) -> tuple[float, float]:
        """Return the watts and their integral so far, in joules (trapezoids)."""
        if self._time is not None and self._watts is not None:
            self._total += (now - self._time) * (watts + self._watts) / 2
        self._time, self._watts = now, watts
        return watts, self._total
