"""Heat: the zone closest to slowing the board down, and whether it already does.

Sources: thermal zones and their trip points (Documentation/driver-api/thermal/sysfs-api.rst),
`coretemp` and `k10temp` on x86 (whose zones often have no usable trip), cpufreq caps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import children, hwmons, read_int, read_scaled, read_text

_MILLI = 1e-3
# Zones that say nothing about the processor. Their limits are lower and other people's business.
_FOREIGN_ZONES = ("iwlwifi", "wifi", "battery", "charger", "nvme", "pch", "INT3400")


@dataclass(frozen=True, slots=True)
class Thermal:
    """Heat at one moment; None: this board cannot tell.

    Attributes:
        celsius: of the zone with the least margin, the hottest where no zone knows its limit.
        throttle_c: where that zone makes the kernel slow the board down (its passive trip point).
        critical_c: where the kernel switches the board off.
        zone: its name.
        clock_cap_percent: the highest clock now allowed, in percent of the processor's own.
    """

    celsius: float | None = None
    throttle_c: float | None = None
    critical_c: float | None = None
    zone: str | None = None
    clock_cap_percent: float | None = None


@dataclass(frozen=True, slots=True)
class _Sensor:
    file: Path
    name: str
    throttle_c: float | None
    critical_c: float | None


class ThermalSource:
    """Finds the sensors and their trip points once, and reads temperatures at each `read()`."""

    def __init__(self, root: Path) -> None:
        self._sensors = [
            *_zones(root),
            *(_hwmon(path) for path in hwmons(root, "coretemp", "k10temp")),
        ]
        self._clocks = [
            (path / "scaling_max_freq", maximum)
            for path in children(root / "sys/devices/system/cpu/cpufreq", "policy*")
            if (maximum := read_int(path / "cpuinfo_max_freq"))
        ]

    def read(self) -> Thermal:
        """Return the zone closest to its limit."""
        caps = [100 * cap / top for file, top in self._clocks if (cap := read_int(file))]
        readings = [
            (celsius, sensor)
            for sensor in self._sensors
            if (celsius := read_scaled(sensor.file, _MILLI)) is not None
        ]
        if not readings:
            return Thermal(clock_cap_percent=min(caps, default=None))
        limited = [item for item in readings if item[1].throttle_c is not None]
        celsius, sensor = max(
            limited or readings, key=lambda item: item[0] - (item[1].throttle_c or 0)
        )
        return Thermal(
            celsius=celsius,
            throttle_c=sensor.throttle_c,
            critical_c=sensor.critical_c,
            zone=sensor.name,
            clock_cap_percent=min(caps, default=None),
        )


def _zones(root: Path) -> list[_Sensor]:
    found = []
    for path in children(root / "sys/class/thermal", "thermal_zone*"):
        name = read_text(path / "type") or path.name
        if not name.startswith(_FOREIGN_ZONES):
            found.append(_zone(path, name))
    return found


def _zone(path: Path, name: str) -> _Sensor:
    trips: dict[str, list[float]] = {}
    for file in children(path, "trip_point_*_type"):
        kind = read_text(file)
        celsius = read_scaled(path / file.name.replace("_type", "_temp"), _MILLI)
        # An unset trip point reads 0 or -274.
        if kind and celsius is not None and celsius > 0:
            trips.setdefault(kind, []).append(celsius)
    return _Sensor(
        file=path / "temp",
        name=name,
        throttle_c=min(trips.get("passive", []) + trips.get("hot", []), default=None),
        critical_c=min(trips.get("critical", []), default=None),
    )


def _hwmon(path: Path) -> _Sensor:
    return _Sensor(
        file=path / "temp1_input",
        name=read_text(path / "temp1_label") or path.name,
        throttle_c=read_scaled(path / "temp1_max", _MILLI),
        critical_c=read_scaled(path / "temp1_crit", _MILLI),
    )
