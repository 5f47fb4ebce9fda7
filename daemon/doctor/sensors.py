"""What the board's sensors say: heat and supply."""

from __future__ import annotations

from pathlib import Path

from nestd.daemon.doctor.finding import Finding, ok, skipped, warning
from nestd.daemon.elastic.limits import margin_c
from nestd.daemon.elastic.raspberry import RaspberrySource
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.settings import ElasticSettings

_SUPPLY = (
    "use the board's own supply (5 V and 5 A for a Pi 5, 3 A for a Pi 4) and a short cable, and "
    "give USB disks their own"
)


def heat(snapshot: Snapshot, elastic: ElasticSettings) -> Finding:
    """How far the board is from slowing itself down."""
    celsius = snapshot.thermal.celsius
    if celsius is None:
        return skipped("heat", "this board tells no temperature")
    margin = margin_c(snapshot, elastic)
    seen = f"{celsius:.0f} °C at {snapshot.thermal.zone}"
    if margin is None:
        return ok("heat", f"{seen}; where it slows down is not known")
    seen += f", {margin:.0f} °C below where it slows down"
    if snapshot.power.throttled:
        seen += "; the firmware holds the clock down now"
    if snapshot.power.throttled or margin <= elastic.thermal.soft_margin_c:
        return warning("heat", seen, "give the board a fan or a heat sink, or a cooler place")
    return ok("heat", seen)


def supply(snapshot: Snapshot, root: Path) -> Finding:
    """Under-voltage now or since the start, and what feeds the board."""
    power = snapshot.power
    before = RaspberrySource(root).read().was_under_voltage
    if power.under_voltage:
        return warning("supply", "the supply is too weak now (under-voltage)", _SUPPLY)
    if before:
        return warning("supply", "the supply was too weak since the board started", _SUPPLY)
    parts = []
    if power.under_voltage is False:
        parts.append("no under-voltage")
    if power.on_battery is not None:
        parts.append("on battery" if power.on_battery else "on mains")
    if power.battery_percent is not None:
        parts.append(f"battery {power.battery_percent:.0f} %")
    if power.volts is not None:
        parts.append(f"{power.volts:.2f} V")
    if power.watts is not None and power.watts_scope is not None:
        parts.append(f"{power.watts:.1f} W ({power.watts_scope})")
    if not parts:
        return skipped("supply", "this board tells nothing about its supply")
    return ok("supply", ", ".join(parts))
