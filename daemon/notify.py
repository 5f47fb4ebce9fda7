"""Tells systemd how the daemon is (sd_notify): READY=1, STATUS=..., WATCHDOG=1, STOPPING=1.

Without systemd nothing happens. See `man sd_notify`.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


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

    def send(self, line: str) -> None:
        """Send one line, for example READY=1."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.connect(self._address)
                sock.sendall(line.encode())
        except OSError as error:
            log.warning("cannot notify systemd: %s", error)

    def status(self, text: str) -> None:
        """Show `text` in `systemctl status`, if it is news."""
        if text != self._last_status:
            self._last_status = text
            self.send(f"STATUS={text}")

    def alive(self, now: float) -> None:
        """Feed the watchdog, at a quarter of its patience; call it where real progress is made."""
        if self._watchdog_seconds is not None and now >= self._next_alive:
            self._next_alive = now + self._watchdog_seconds / 4
            self.send("WATCHDOG=1")
