"""What answers cost in joules, from the snapshots taken around them.

The figure is the whole board's (or what `watts_scope` says) while an answer runs: what else ran on
the board is in it. Answers that run side by side share it in equal parts, moment by moment, so the
joules of all answers add up to what the board drew while any of them ran.
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


@dataclass(frozen=True, slots=True)
class Share:
    """Joules that one answer would have cost if it had run since the first mark of `row`.

    Attributes:
        row: counts interruptions: across one nothing has been measured.
    """

    joules: float
    row: int


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
        self._last: EnergyMark | None = None
        self._share = Share(0.0, 0)

    @property
    def joules_per_token(self) -> float | None:
        """Joules of the last answers by their tokens; None before the first."""
        return self._joules / self._tokens if self._tokens else None

    def advance(self, now: EnergyMark | None, running: int) -> Share:
        """Share out what was drawn since the last call, in which `running` answers ran.

        A laptop that was unplugged meanwhile is measured by another sensor.
        """
        last, self._last = self._last, now
        share = self._share
        if last is None or now is None or last.scope != now.scope:
            self._share = Share(0.0, share.row + 1)
        elif running:
            drawn = max(0.0, now.joules - last.joules)
            self._share = Share(share.joules + drawn / running, share.row)
        return self._share

    def add(self, start: Share | None, end: Share, tokens: int) -> float | None:
        """Return the joules of one answer of so many tokens; None: the board cannot tell.

        An answer between two readings of a counter has not been measured at all.
        """
        if start is None or start.row != end.row or end.joules <= start.joules:
            return None
        joules = end.joules - start.joules
        if tokens:
            self._joules = _PAST * self._joules + joules
            self._tokens = _PAST * self._tokens + tokens
        return joules
