"""A memory cgroup (v1 or v2) for benchmarks, made as root and removed afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A cgroup with a memory limit; use it as a context manager.

    Attributes:
        path: its directory.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.version = 1 if (ROOT / "memory").is_dir() else 2
        self.path = (ROOT / "memory" if self.version == 1 else ROOT) / name
        self.path.mkdir()
        limit = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.path / limit).write_text(str(limit_bytes))

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.path.rmdir()

    def join(self) -> None:
        """Put this process into it (for subprocess's preexec_fn)."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def usage(self) -> dict[str, int]:
        """Return bytes in use: all, and anonymous."""
        names = (
            ("memory.usage_in_bytes", "rss") if self.version == 1 else ("memory.current", "anon")
        )
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return {"all": int((self.path / names[0]).read_text()), "anonymous": int(stat[names[1]])}

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed here for want of memory."""
        file = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self.path / file).read_text().splitlines():
            name, value = line.split()
            if name == "oom_kill":
                return int(value)
        raise RuntimeError(f"{self.path / file} does not count OOM kills")
