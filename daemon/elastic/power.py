"""Power: what feeds the board, whether that is enough, and how much it draws.

Several boards tell watts in several ways; the first of these that answers is used, and
`watts_scope` says what it covers: the Jetson's input rail (module), RAPL (platform or processor),
the discharging battery (board), the Pi 5's PMIC (board without USB and HATs).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.energy import EnergyMeter, Rapl
from nestd.daemon.elastic.jetson import JetsonSource
from nestd.daemon.elastic.raspberry import RaspberrySource
from nestd.daemon.elastic.supply import SupplySource


@dataclass(frozen=True, slots=True)
class Power:
    """Power at one moment; None: this board cannot tell.

    Attributes:
        on_battery, battery_percent: see `Supply`.
        under_voltage: the supply is too weak now, or was since the last snapshot.
        over_current: the board drew too much since the last snapshot.
        throttled: the firmware holds the clock down now.
        volts: at the board's input.
        watts, joules, watts_scope: draw, energy since start, and what they cover.
    """

    on_battery: bool | None = None
    battery_percent: float | None = None
    under_voltage: bool | None = None
    over_current: bool | None = None
    throttled: bool | None = None
    volts: float | None = None
    watts: float | None = None
    joules: float | None = None
    watts_scope: str | None = None


class PowerSource:
    """Reads `Power` below `root`."""

    def __init__(self, root: Path) -> None:
        self._supply = SupplySource(root)
        self._raspberry = RaspberrySource(root)
        self._jetson = JetsonSource(root)
        self._rapl = Rapl(root)
        self._meters: dict[str, EnergyMeter] = {}
        self._events: dict[str, int] = {}

    def read(self, now: float) -> Power:
        """Return power at `now`, seconds of a monotonic clock."""
        supply, raspberry, jetson = self._supply.read(), self._raspberry.read(), self._jetson.read()
        scope: str | None = None
        watts: float | None = None
        joules: float | None = None
        if jetson.watts is not None:
            scope = "module"
            watts, joules = self._meter(scope).from_watts(now, jetson.watts)
        elif (counted := self._rapl.joules()) is not None:
            scope = self._rapl.scope
            watts, joules = self._meter(scope).from_joules(now, counted)
        elif supply.battery_watts is not None:
            scope = "board"
            watts, joules = self._meter(scope).from_watts(now, supply.battery_watts)
        elif raspberry.watts is not None:
            scope = "board without USB"
            watts, joules = self._meter(scope).from_watts(now, raspberry.watts)
        under_voltage = raspberry.under_voltage
        counted_under_voltage = self._new("under-voltage", jetson.under_voltage_events)
        return Power(
            on_battery=supply.on_battery,
            battery_percent=supply.battery_percent,
            under_voltage=counted_under_voltage if under_voltage is None else under_voltage,
            over_current=self._new("over-current", jetson.over_current_events),
            throttled=raspberry.throttled,
            volts=raspberry.volts if jetson.volts is None else jetson.volts,
            watts=watts,
            joules=joules,
            watts_scope=scope,
        )

    def _meter(self, scope: str) -> EnergyMeter:
        return self._meters.setdefault(scope, EnergyMeter())

    def _new(self, kind: str, count: int | None) -> bool | None:
        """Return whether a counter rose since the last call."""
        if count is None:
            return None
        before = self._events.get(kind, count)
        self._events[kind] = count
        return count > before
