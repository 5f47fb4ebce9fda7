"""Memory pressure: PSI (Documentation/accounting/psi.rst) and systemd's memory pressure protocol.

PSI tells which share of the last ten seconds some task (or all of them) stood still for want of
memory. Raspberry Pi OS boots without it unless `psi=1` is on the kernel command line.
"""

from __future__ import annotations

import base64
import os
import re
import select
from collections.abc import Mapping
from pathlib import Path

from nestd.daemon.elastic.sysfs import read_text

_AVG10 = re.compile(r"^(some|full) avg10=([0-9.]+)", re.MULTILINE)


def read_pressure(*files: Path | None) -> tuple[float | None, float | None]:
    """Return PSI's `some avg10` and `full avg10` in percent, the worst of `files`."""
    found: dict[str, list[float]] = {"some": [], "full": []}
    for file in files:
        for kind, value in _AVG10.findall(read_text(file) or "" if file else ""):
            found[kind].append(float(value))
    return max(found["some"], default=None), max(found["full"], default=None)


class PressureWatch:
    """systemd's `$MEMORY_PRESSURE_WATCH`: a file that becomes ready when memory gets tight.

    The trigger's threshold is the unit's (`MemoryPressureThresholdSec=`); asking costs one
    `poll()`. Closes its file in `close()`.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._fd: int | None = None
        path = environ.get("MEMORY_PRESSURE_WATCH")
        # systemd writes /dev/null there to say: do not watch.
        if not path or path == "/dev/null":
            return
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            if trigger := environ.get("MEMORY_PRESSURE_WRITE"):
                os.write(self._fd, base64.b64decode(trigger))
        except (OSError, ValueError):
            # A kernel without PSI, or a hardened unit: the averages have to do.
            self.close()
            return
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def fired(self) -> bool | None:
        """Return whether the threshold was crossed since the last call; None if nobody watches."""
        return None if self._fd is None else bool(self._poll.poll(0))

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
