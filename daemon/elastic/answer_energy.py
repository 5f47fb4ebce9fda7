"""What answers cost in joules, from the snapshots taken around them.

The figure is the whole board's (or what `watts_scope` says) from an answer's start to its end: what
else ran on the board meanwhile is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestd.daemon.elastic.resources import Snapshot

# Weight of the past in joules per token: the last three answers or so count.
_PAST = 0.7


@dataclass(frozen=True, slots=True)
class EnergyMark:
    """The energy counter at one moment, and what it covers."""

    joules: float
    scope: str


def mark(snapshot: Snapshot, now: float) -> EnergyMark | None:
    """Return the counter at `now`, shortly after `snapshot`; None: the board cannot tell."""
    power = snapshot.power
    if power.joules is None or power.watts_scope is None:
        return None
    return EnergyMark(
        power.joules + (power.watts or 0.0) * (now - snapshot.time), power.watts_scope
    )


class AnswerEnergy:
    """Adds up answers; `joules_per_token` is that of the last few, their prompts included."""

    def __init__(self) -> None:
        self._joules = 0.0
        self._tokens = 0.0

    @property
    def joules_per_token(self) -> float | None:
        """Joules of the last answers by their tokens; None before the first."""
        return self._joules / self._tokens if self._tokens else None

    def add(self, start: EnergyMark | None, end: EnergyMark | None, tokens: int) -> float | None:
        """Return the joules of one answer of so many tokens; None: the board cannot tell.

        A laptop that was unplugged meanwhile is measured by another sensor, and an answer between
        two readings of a counter has not been measured at all.
        """
        if start is None or end is None or start.scope != end.scope or end.joules <= start.joules:
            return None
        joules = end.joules - start.joules
        if tokens:
            self._joules = _PAST * self._joules + joules
            self._tokens = _PAST * self._tokens + tokens
        return joules
