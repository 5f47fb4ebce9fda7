"""Memory limits of the control groups that this process is in, v2 and v1.

A process may sit several groups deep (a slice, a service, a container in a pod): each group above
it may have a limit, and the one with the least room left counts.

Page cache inside a limit is counted as room, since the kernel takes it back before it kills;
whoever plans must count the file pages that it wants to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import read_int, read_keys, read_text

# cgroup v1 writes "no limit" as the largest page-aligned signed 64-bit number.
_V1_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest limit above this process.

    Attributes:
        limit_bytes: `memory.max` or `memory.high` of that group, whichever is smaller.
        free_bytes: what it leaves, page cache counted as free; never below 0.
        oom_kills: processes that the kernel killed in this process's own group so far.
        pressure: this process's own group's memory.pressure file, or None.
    """

    limit_bytes: int | None
    free_bytes: int | None
    oom_kills: int | None
    pressure: Path | None


class Cgroup:
    """Finds the groups once, and reads them at each `read()`."""

    def __init__(self, root: Path) -> None:
        self._v2: list[Path] = []
        self._v1: list[Path] = []
        for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                self._v2 = _with_parents(root / "sys/fs/cgroup", path)
            elif "memory" in controllers.split(","):
                self._v1 = _with_parents(root / "sys/fs/cgroup/memory", path)

    def read(self) -> CgroupMemory:
        """Return the tightest limit; all None where no group limits or counts memory."""
        limits = [pair for path in self._v2 if (pair := _read_v2(path))]
        limits += [pair for path in self._v1 if (pair := _read_v1(path))]
        limit, free = min(limits, key=lambda pair: pair[1], default=(None, None))
        pressure = self._v2[0] / "memory.pressure" if self._v2 else None
        events = read_keys(self._v2[0] / "memory.events") if self._v2 else {}
        return CgroupMemory(limit, free, events.get("oom_kill"), pressure)


def _with_parents(mount: Path, path: str) -> list[Path]:
    """Return the group's folder and those above it, up to the mount point, the deepest first.

    Inside a container the path may name a folder of the host that is not mounted here: then what
    is mounted is the container's own group.
    """
    own = mount / path.strip("/")
    if not own.is_dir():
        own = mount
    groups = [own]
    while groups[-1] != mount:
        groups.append(groups[-1].parent)
    return groups


def _read_v2(group: Path) -> tuple[int, int] | None:
    # "max" (no limit) is no number, so it reads as None.
    limits = [
        limit
        for name in ("memory.max", "memory.high")
        if (limit := read_int(group / name)) is not None
    ]
    used = read_int(group / "memory.current")
    if not limits or used is None:
        return None
    stat = read_keys(group / "memory.stat")
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return min(limits), max(0, min(limits) - used + cache)


def _read_v1(group: Path) -> tuple[int, int] | None:
    limit = read_int(group / "memory.limit_in_bytes")
    used = read_int(group / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _V1_NO_LIMIT:
        return None
    stat = read_keys(group / "memory.stat")
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return limit, max(0, limit - used + cache)
