"""What the kernel says of a process: resident memory, storage read. Needs nothing but Python."""

from __future__ import annotations

from pathlib import Path


def resident(pid: int | str = "self") -> dict[str, int]:
    """Return the resident bytes of a process: all, anonymous, and of files."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kib = {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile")}
    return {"rss": kib["VmRSS"], "anonymous": kib["RssAnon"], "file": kib["RssFile"]}


def storage_read(pid: int | str = "self") -> int:
    """Return the bytes that a process has had read from storage, page faults counted."""
    counters = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in counters)["read_bytes"])
