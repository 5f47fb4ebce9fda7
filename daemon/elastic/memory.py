"""Memory: what is free for this daemon, and how hard the system is fighting for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.cgroup import Cgroup
from nestd.daemon.elastic.pressure import PressureWatch, read_pressure
from nestd.daemon.elastic.sysfs import read_keys, read_text

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory at one moment, in bytes and percent; None: this board cannot tell.

    Attributes:
        total_bytes, available_bytes: MemTotal and MemAvailable of the machine. Page cache, mapped
            weights included, counts as available.
        limit_bytes, limit_free_bytes: the tightest cgroup limit and what it leaves, or None.
        private_bytes: memory of nestd's own processes that no file backs.
        swap_used_bytes: of the machine.
        pressure_some_percent, pressure_full_percent: PSI avg10, the worse of machine and cgroup.
        pressure_event: systemd's pressure threshold was crossed since the last snapshot.
        oom_kills: kills in this cgroup so far.
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    limit_free_bytes: int | None = None
    private_bytes: int | None = None
    swap_used_bytes: int | None = None
    pressure_some_percent: float | None = None
    pressure_full_percent: float | None = None
    pressure_event: bool | None = None
    oom_kills: int | None = None

    @property
    def capacity_bytes(self) -> int | None:
        """What `free_bytes` is a part of."""
        free, limited = self.available_bytes, self.limit_free_bytes
        if limited is not None and (free is None or limited < free):
            return self.limit_bytes
        return self.total_bytes

    @property
    def free_bytes(self) -> int | None:
        """What can still be taken: the machine's or the cgroup's, whichever is less."""
        known = [free for free in (self.available_bytes, self.limit_free_bytes) if free is not None]
        return min(known, default=None)


class MemorySource:
    """Reads `Memory` below `root`."""

    def __init__(self, root: Path, environ: Mapping[str, str]) -> None:
        self._root = root
        self._cgroup = Cgroup(root)
        self._watch = PressureWatch(environ)

    def read(self, pids: Iterable[int]) -> Memory:
        """Return memory now; `pids` are nestd's own processes."""
        info = read_keys(self._root / "proc/meminfo")
        group = self._cgroup.read()
        some, full = read_pressure(self._root / "proc/pressure/memory", group.pressure)
        swap_total, swap_free = info.get("SwapTotal"), info.get("SwapFree")
        return Memory(
            total_bytes=info.get("MemTotal"),
            available_bytes=info.get("MemAvailable"),
            limit_bytes=group.limit_bytes,
            limit_free_bytes=group.free_bytes,
            private_bytes=self._private(pids),
            swap_used_bytes=(
                swap_total - swap_free if swap_total is not None and swap_free is not None else None
            ),
            pressure_some_percent=some,
            pressure_full_percent=full,
            pressure_event=self._watch.fired(),
            oom_kills=group.oom_kills,
        )

    def close(self) -> None:
        """Stop watching for pressure."""
        self._watch.close()

    def _private(self, pids: Iterable[int]) -> int | None:
        """Return resident minus file-backed pages (statm's `shared`), summed over `pids`."""
        total = None
        for pid in pids:
            fields = (read_text(self._root / f"proc/{pid}/statm") or "").split()
            if len(fields) >= 3:
                total = (total or 0) + (int(fields[1]) - int(fields[2])) * _PAGE
        return total
