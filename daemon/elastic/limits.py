"""What a snapshot forbids: ceilings on the stage, and signs of trouble.

Three kinds, by how the policy obeys them:

- a **hard** ceiling is never exceeded, not for one step: memory, the profile's cap, a critical
  battery, a weak supply, heat at the limit, thrashing;
- a **soft** ceiling is a target that is approached in bounded steps: battery saver;
- **trouble** has no target of its own (heat near the limit, watts over the cap, memory pressure):
  it takes one bounded step down after the other until it ends. Close to trouble the plan holds.

Pure functions; the latches that give thresholds their hysteresis go in and come out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nestd.bundle.manifest import Modality
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.settings import BatterySettings, ElasticSettings

Band = Literal["critical", "low", "saver", "normal"]
_BANDS: tuple[Band, ...] = ("critical", "low", "saver", "normal")


@dataclass(frozen=True, slots=True)
class Latches:
    """What outlives a snapshot so that a threshold is not crossed back and forth.

    Attributes:
        band: the battery's.
        hot: heat reached the hard margin and has not yet gone below the soft one.
        weak_until: time until which the supply counts as weak, or None.
        oom_kills: the count at the last snapshot.
        thrash_until: time until which the board counts as thrashing, or None.
    """

    band: Band = "normal"
    hot: bool = False
    weak_until: float | None = None
    oom_kills: int | None = None
    thrash_until: float | None = None


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The largest stage that something allows (-1: none at all), and what it is."""

    stage: int
    reason: str
    code: Literal["power_saver", "insufficient_memory"] = "insufficient_memory"


@dataclass(frozen=True, slots=True)
class Limits:
    """All that one snapshot forbids.

    Attributes:
        hard, soft: the lowest ceiling of each kind.
        grow: the highest stage to which the plan may grow, with the margin that growing needs.
        floor: the smallest sub-model at full context, below which only memory leads.
        trouble: why a step down is due, or None.
        hold: why the plan must not grow though nothing is wrong, or None.
        power, memory: what about power (battery, supply, heat, watts) and about memory stands
            against the top of the ladder, whichever of them binds; None where nothing does.
    """

    hard: Ceiling
    soft: Ceiling
    grow: Ceiling
    floor: int
    trouble: str | None
    hold: str | None
    power: str | None
    memory: str | None


def latch(snapshot: Snapshot, elastic: ElasticSettings, before: Latches) -> Latches:
    """Return the latches after `snapshot`."""
    power, memory, now = snapshot.power, snapshot.memory, snapshot.time
    weak_until, thrash_until = before.weak_until, before.thrash_until
    if power.under_voltage or power.over_current:
        weak_until = now + elastic.power.under_voltage_hold_s
    killed = (
        memory.oom_kills is not None
        and before.oom_kills is not None
        and memory.oom_kills > before.oom_kills
    )
    full = memory.pressure_full_percent
    if killed or (full is not None and full >= elastic.memory.pressure_full_percent):
        thrash_until = now + elastic.pace.step_interval_s
    margin = margin_c(snapshot, elastic)
    hot = before.hot
    if margin is not None:
        if margin <= elastic.thermal.hard_margin_c:
            hot = True
        elif margin > elastic.thermal.soft_margin_c + elastic.thermal.hysteresis_c:
            hot = False
    return replace(
        before,
        band=_band(snapshot, elastic.battery, before.band),
        hot=hot,
        weak_until=weak_until if weak_until is not None and now <= weak_until else None,
        thrash_until=thrash_until if thrash_until is not None and now <= thrash_until else None,
        oom_kills=memory.oom_kills,
    )


def margin_c(snapshot: Snapshot, elastic: ElasticSettings) -> float | None:
    """Return the degrees left until the board slows itself down, or None if it cannot tell."""
    throttle = elastic.thermal.throttle_c
    if throttle is None:
        throttle = snapshot.thermal.throttle_c
    celsius = snapshot.thermal.celsius
    return None if throttle is None or celsius is None else throttle - celsius


def budget(memory: Memory, elastic: ElasticSettings) -> int | None:
    """Return the bytes that nestd may use in all: what is free, what it has, less the reserve."""
    if memory.free_bytes is None:
        return None
    return memory.free_bytes + (memory.private_bytes or 0) - elastic.memory.reserve_bytes


def limits(
    snapshot: Snapshot,
    elastic: ElasticSettings,
    cost: ModelCost,
    latches: Latches,
    encoders: Collection[Modality],
    sessions: int = 1,
) -> Limits:
    """Return what `snapshot` forbids; encoders and sessions must fit beside the decoder."""
    smallest = cost.stage_of_rung(0)
    thrashing = []
    if latches.thrash_until is not None:
        why = "the board is out of memory (PSI full, or an OOM kill)"
        thrashing.append(Ceiling(smallest, why))
    memory_hard = _memory_ceiling(snapshot.memory, elastic, cost, encoders, sessions, 0)
    power_hard = _power_ceilings(elastic, cost, latches)
    hard = [_cap(elastic, cost), *memory_hard, *power_hard, *thrashing]

    saver = _saver_ceiling(snapshot, elastic.battery, cost, latches)
    top = Ceiling(len(cost.stages) - 1, "nothing stands against the top of the ladder")
    soft = [top, *saver]

    margin = elastic.memory.grow_margin_bytes
    memory_grow = _memory_ceiling(snapshot.memory, elastic, cost, encoders, sessions, margin)
    troubles = memory_trouble(snapshot, elastic), _power_trouble(snapshot, elastic)
    holds = near_memory_trouble(snapshot, elastic), _near_power_trouble(snapshot, elastic)
    return Limits(
        hard=_lowest(hard),
        soft=_lowest(soft),
        grow=_lowest([*hard, *soft, *memory_grow]),
        floor=smallest,
        trouble=troubles[0] or troubles[1],
        hold=holds[0] or holds[1],
        power=_told(power_hard, troubles[1], saver, holds[1]),
        memory=_told(thrashing, troubles[0], [*memory_hard, *memory_grow], holds[0]),
    )


def _lowest(ceilings: Sequence[Ceiling]) -> Ceiling:
    return min(ceilings, key=lambda item: item.stage)


def _told(*reasons: Sequence[Ceiling] | str | None) -> str | None:
    """Return the first reason that there is."""
    first = next((item for item in reasons if item), None)
    return first if isinstance(first, str) or first is None else _lowest(first).reason


def _power_ceilings(elastic: ElasticSettings, cost: ModelCost, latches: Latches) -> list[Ceiling]:
    smallest = cost.stage_of_rung(0)
    found = []
    if latches.weak_until is not None:
        hold_s = elastic.power.under_voltage_hold_s
        found.append(Ceiling(smallest, f"the supply was too weak within the last {hold_s:.0f} s"))
    if latches.hot:
        found.append(Ceiling(smallest, "the board is at the temperature that slows it down"))
    battery = elastic.battery
    if latches.band == "critical":
        percent = battery.critical_percent
        found.append(Ceiling(-1, f"the battery is below {percent:.0f} %", "power_saver"))
    elif latches.band == "low":
        found.append(Ceiling(smallest, f"the battery is below {battery.low_percent:.0f} %"))
    return found


def _saver_ceiling(
    snapshot: Snapshot, battery: BatterySettings, cost: ModelCost, latches: Latches
) -> list[Ceiling]:
    if latches.band != "saver":
        return []
    why = f"the battery is below {battery.saver_percent:.0f} %"
    if snapshot.power.battery_percent is None:
        why = "the board runs on a battery without a gauge"
    return [Ceiling(cost.stage_of_share(battery.saver_ladder_percent), why)]


def cap_params(elastic: ElasticSettings, cost: ModelCost) -> int:
    """Return the most effective parameters that the configuration allows."""
    caps = [cost.submodels[-1].effective_params]
    if elastic.max_effective_params is not None:
        caps.append(elastic.max_effective_params)
    if elastic.max_submodel is not None:
        # `check_names` has refused an unknown name when the bundle was opened.
        name = elastic.max_submodel.lower()
        caps += [item.effective_params for item in cost.submodels if item.name.lower() == name]
    return min(caps)


def _cap(elastic: ElasticSettings, cost: ModelCost) -> Ceiling:
    stage = cost.stage_of_params(cap_params(elastic, cost))
    if stage == len(cost.stages) - 1:
        return Ceiling(stage, "nothing stands against the top of the ladder")
    return Ceiling(stage, "the profile or the configuration allows no larger one")


def _memory_ceiling(
    memory: Memory,
    elastic: ElasticSettings,
    cost: ModelCost,
    encoders: Collection[Modality],
    sessions: int,
    margin: int,
) -> list[Ceiling]:
    available = budget(memory, elastic)
    if available is None:
        return [Ceiling(cost.stage_of_rung(0), "the board does not tell how much memory is free")]
    stage = cost.largest_stage(available - margin, encoders, sessions)
    if stage < 0:
        # Answering something, however small, is no growth that could wait for a margin.
        stage = min(0, cost.largest_stage(available, encoders, sessions))
    if stage == len(cost.stages) - 1:
        return []
    others = [*sorted(encoders), *([f"{sessions} running answers"] if sessions > 1 else [])]
    beside = f" beside {' and '.join(others)}" if others else ""
    why = "in the memory that is free" if not margin else "in memory with the margin for growing"
    return [Ceiling(stage, f"no more fits{beside} {why}")]


def memory_trouble(snapshot: Snapshot, elastic: ElasticSettings) -> str | None:
    """Return why memory makes a step down due."""
    some = snapshot.memory.pressure_some_percent
    if some is not None and some >= elastic.memory.pressure_percent:
        return f"tasks wait for memory {elastic.memory.pressure_percent:.0f} % of the time"
    if snapshot.memory.pressure_event:
        return "systemd reports memory pressure"
    return None


def _power_trouble(snapshot: Snapshot, elastic: ElasticSettings) -> str | None:
    """Return why heat or power make a step down due, the most pressing first."""
    power = snapshot.power
    margin = margin_c(snapshot, elastic)
    if margin is not None and margin <= elastic.thermal.soft_margin_c:
        return f"within {elastic.thermal.soft_margin_c:.0f} °C of throttling"
    if power.throttled:
        return "the firmware holds the clock down"
    cap = elastic.power.watt_cap
    if cap is not None and power.watts is not None and power.watts > cap:
        return f"the board draws more than {cap:g} W"
    return None


def near_memory_trouble(snapshot: Snapshot, elastic: ElasticSettings) -> str | None:
    """Return why memory forbids growing."""
    some = snapshot.memory.pressure_some_percent
    if some is not None and some >= elastic.memory.pressure_percent / 2:
        return "memory pressure has not gone yet"
    return None


def _near_power_trouble(snapshot: Snapshot, elastic: ElasticSettings) -> str | None:
    margin = margin_c(snapshot, elastic)
    thermal = elastic.thermal
    if margin is not None and margin <= thermal.soft_margin_c + thermal.hysteresis_c:
        return "the board has not cooled down yet"
    cap, watts = elastic.power.watt_cap, snapshot.power.watts
    if cap is not None and watts is not None:
        ease = 1 - elastic.power.watt_hysteresis_percent / 100
        if watts > cap * ease:
            return f"the draw is close to the cap of {cap:g} W"
    return None


def _band(snapshot: Snapshot, battery: BatterySettings, before: Band) -> Band:
    """Return the battery's band: entered below its threshold, left some percent above it."""
    power = snapshot.power
    on_battery = power.on_battery if battery.supply == "auto" else battery.supply == "battery"
    if not on_battery:
        return "normal"
    if power.battery_percent is None:
        # A battery that tells no charge is treated with care.
        return "saver"
    thresholds = (battery.critical_percent, battery.low_percent, battery.saver_percent)
    for band, threshold in zip(_BANDS, thresholds, strict=False):
        inside = _BANDS.index(before) <= _BANDS.index(band)
        if power.battery_percent < threshold + (battery.hysteresis_percent if inside else 0):
            return band
    return "normal"
