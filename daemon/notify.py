"""Tells systemd how the daemon is (sd_notify): READY=1, STATUS=..., WATCHDOG=1, STOPPING=1.

Without systemd nothing happens. See `man sd_notify`; what the unit makes of it is in
docs/systemd.md.
"""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)

# A start that makes progress asks for so much more time, again and again.
EXTENSION_SECONDS = 240.0
EXTEND_EVERY_SECONDS = 10.0


class Notifier:
    """Sends lines to the socket that systemd names in NOTIFY_SOCKET."""

    def __init__(self, address: str | None = None) -> None:
        address = address if address is not None else os.environ.get("NOTIFY_SOCKET")
        # A leading @ stands for Linux's abstract namespace, which begins with a zero byte.
        self._address = "\0" + address[1:] if address and address[0] == "@" else address
        self._last_status = ""
        patience = os.environ.get("WATCHDOG_USEC", "")
        self._watchdog_seconds = int(patience) / 1e6 if patience.isdigit() else None
        self._next_alive = 0.0
        self._next_extension = 0.0
        self._is_ready = False

    @property
    def supervised(self) -> bool:
        """Somebody listens."""
        return bool(self._address)

    def send(self, text: str) -> None:
        """Send lines, for example READY=1."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.connect(self._address)
                sock.sendall(text.encode())
        except OSError as error:
            log.warning("cannot notify systemd: %s", error)

    def status(self, text: str) -> None:
        """Show `text` in `systemctl status`, if it is news."""
        if text != self._last_status:
            self._last_status = text
            self.send(f"STATUS={text}")

    def ready(self) -> None:
        """Say that the start, or a reload, is over; once."""
        if not self._is_ready:
            self._is_ready = True
            self.send("READY=1")

    def extend(self, now: float) -> None:
        """Ask for more time to start; call it where real progress is made."""
        if not self._is_ready and now >= self._next_extension:
            self._next_extension = now + EXTEND_EVERY_SECONDS
            self.send(f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1e6:.0f}")

    def reloading(self) -> None:
        """Say that a reload begins; `ready` ends it."""
        self._is_ready = False
        self.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def alive(self, now: float) -> None:
        """Feed the watchdog, at a quarter of its patience; call it where real progress is made."""
        if self._watchdog_seconds is not None and now >= self._next_alive:
            self._next_alive = now + self._watchdog_seconds / 4
            self.send("WATCHDOG=1")
