"""Which block device a path lies on (/proc/self/mountinfo; proc_pid_mountinfo(5))."""

from __future__ import annotations

from pathlib import Path

from nestd.daemon.elastic.sysfs import read_text


def device_of(root: Path, path: str) -> str | None:
    """Return the source of the mount that holds the absolute `path`, for example /dev/mmcblk0p2."""
    best: tuple[int, str] | None = None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 5 or len(source) < 2:
            continue
        point = fields[4].rstrip("/")
        inside = path == point or path.startswith(f"{point}/")
        # The last of equal length lies on top.
        if inside and (best is None or len(point) >= best[0]):
            best = len(point), source[1]
    return None if best is None else best[1]
