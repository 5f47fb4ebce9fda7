"""The snapshot: everything that the board can tell, sampled once a second.

All sources are read below a root directory, so a test or a replay points the sampler at a
recorded tree. What the board cannot tell is None in every snapshot, and is said once in the log.

Cost: 0.1 to 0.3 ms on a Zen 5 core, nearly all of it system calls (benchmarks/snapshot_cost.py). A
real sensor on I2C adds its transfer, below 1 ms a rail.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from nestd.daemon.elastic.memory import Memory, MemorySource
from nestd.daemon.elastic.power import Power, PowerSource
from nestd.daemon.elastic.thermal import Thermal, ThermalSource

_log = logging.getLogger(__name__)

# None also means "no such limit" or "not yet" in these: no shortcoming of the board.
_NOT_OF_THE_BOARD = {
    "limit_bytes",
    "limit_free_bytes",
    "private_bytes",
    "pressure_event",
    "oom_kills",
    "watts",
    "joules",
    "watts_scope",
    "zone",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The board at one moment.

    Attributes:
        time: seconds of a monotonic clock; only differences mean anything.
    """

    time: float
    memory: Memory = field(default_factory=Memory)
    power: Power = field(default_factory=Power)
    thermal: Thermal = field(default_factory=Thermal)

    def unknown(self) -> list[str]:
        """Return the names of the facts that are None, such as `power.battery_percent`."""
        return [
            f"{part}.{item.name}"
            for part, facts in (
                ("memory", self.memory),
                ("power", self.power),
                ("thermal", self.thermal),
            )
            for item in fields(facts)
            if getattr(facts, item.name) is None
        ]


class Sampler:
    """Makes snapshots of the machine below `root`. Not thread-safe: one owner calls it."""

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> None:
        self._memory = MemorySource(root, os.environ if environ is None else environ)
        self._power = PowerSource(root)
        self._thermal = ThermalSource(root)
        self._said = False

    def sample(self, pids: Iterable[int] = (), now: float | None = None) -> Snapshot:
        """Return a snapshot; `pids` are nestd's own processes, whose memory is not in the way."""
        now = time.monotonic() if now is None else now
        snapshot = Snapshot(
            time=now,
            memory=self._memory.read(pids),
            power=self._power.read(now),
            thermal=self._thermal.read(),
        )
        if not self._said:
            self._said = True
            unknown = [
                name
                for name in snapshot.unknown()
                if name.partition(".")[2] not in _NOT_OF_THE_BOARD
            ]
            if snapshot.power.watts_scope is None:
                unknown.append("power.watts")
            if unknown:
                _log.info("this board cannot tell: %s", ", ".join(unknown))
        return snapshot

    def close(self) -> None:
        """Release the pressure watch."""
        self._memory.close()
