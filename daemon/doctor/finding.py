"""What a check says: an outcome, what was seen and, where something is amiss, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        outcome: `warning` works, but less well than it could; `failed` does not work;
            `skipped` could not be looked at, and `seen` says why.
        remedy: what to do, there for `warning` and `failed`.
    """

    name: str
    outcome: Outcome
    seen: str
    remedy: str | None = None


def ok(name: str, seen: str) -> Finding:
    """Nothing is amiss."""
    return Finding(name, "ok", seen)


def warning(name: str, seen: str, remedy: str) -> Finding:
    """It works, but less well than it could."""
    return Finding(name, "warning", seen, remedy)


def failed(name: str, seen: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(name, "failed", seen, remedy)


def skipped(name: str, why: str) -> Finding:
    """It could not be looked at."""
    return Finding(name, "skipped", why)
