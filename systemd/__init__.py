"""The systemd unit of a node, its user, its directories, and drop-ins for kinds of boards.

`nestd install` and scripts/build-deb put the files where systemd looks for them; docs/systemd.md
says what each line is for. A drop-in whose name begins a device profile's name (raspberry-pi)
belongs to those boards; others are chosen by memory or by hand.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["DROP_INS", "text"]

DROP_INS = ("jetson-gpu", "low-memory", "raspberry-pi")


def text(name: str) -> str:
    """Return a file of this folder."""
    return (files("nestd.systemd") / name).read_text(encoding="utf-8")
