"""The governor: the one place that loads, unloads and switches.

    sample -> decide -> apply

once a second, and around each answer. Sampling takes a fraction of a millisecond, deciding less, so
both happen in the daemon's main loop; what is applied are commands that the engine obeys between
two tokens:

- an answer that runs on more than the plan allows goes on, on less, from its next token; it goes
  up again with the plan, but never beyond what its request asks for;
- a request that waits gets its sub-model when its turn comes;
- while the plan refuses, new requests are answered with the reason and when to come again; what
  runs is finished on the smallest sub-model, never broken off;
- the engine is told the largest sub-model that may run, to hand back the memory of all beyond it,
  and the encoders that may stay loaded.

`Plan.threads` is logged and not applied: ONNX Runtime's threads are those a graph was loaded with,
and where they matter (a weak supply, heat) loading anew is a burst of work at the worst moment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Literal, Protocol

from nestd.bundle.errors import ModalityUnavailable, RequestError
from nestd.bundle.manifest import Manifest, Modality
from nestd.daemon.elastic.answer_energy import AnswerEnergy, Share, mark
from nestd.daemon.elastic.cost import ENCODERS, ModelCost
from nestd.daemon.elastic.limits import Limits
from nestd.daemon.elastic.plan import Choice, Plan, RequestMix
from nestd.daemon.elastic.policy import PolicyState, check_names, decide
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.task import choose
from nestd.daemon.engine.messages import KeepEncoders, Retain, SetSubmodel
from nestd.daemon.logs import about
from nestd.daemon.requests import RequestBook, RequestRecord
from nestd.daemon.selection import canonical, modalities_of, task_of
from nestd.daemon.settings import Settings
from nestd.daemon.supervisor import Supervisor

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0
# A younger snapshot will do at an answer's start and end. Energy counters tick in milliseconds, and
# watts over less than this are noise, which a cap on watts would take for trouble.
FRESH_SECONDS = 0.2
# A battery needs minutes to gain the percents after which the plan leaves `critical`.
POWER_RETRY_MS = 300_000


class Board(Protocol):
    """Makes snapshots (`nestd.daemon.elastic.resources.Sampler`)."""

    def sample(self, pids: Iterable[int] = (), now: float | None = None) -> Snapshot:
        """Return the board at `now`; `pids` are nestd's own processes."""

    def close(self) -> None:
        """Release what the board was watched with."""


class Governor:
    """Holds the plan and applies it.

    Attributes:
        snapshot: the last one.
    """

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        board: Board,
        book: RequestBook,
        supervisor: Supervisor,
        now: float,
    ) -> None:
        """Take the first snapshot and decide the first plan.

        Raises:
            ConfigError: the configuration names a sub-model that the bundle does not have.
        """
        check_names(settings, manifest)
        self._settings = settings
        self._manifest = manifest
        self._board = board
        self._book = book
        self._supervisor = supervisor
        self._smallest = ModelCost.of(manifest, settings).ladder[0].name
        self._owner = canonical(settings.elastic.submodel, manifest)
        self._state = PolicyState()
        self._retained: str | None = None
        self._kept: tuple[Modality, ...] = ()
        self._disabled: frozenset[Modality] = frozenset()
        self._energy = AnswerEnergy()
        self.snapshot = self._board.sample(self._pids(), now)
        self._decide()

    # What the plan says

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        assert self._state.plan is not None
        return self._state.plan

    @property
    def bounds(self) -> Limits:
        """What the last snapshot forbids."""
        assert self._state.bounds is not None
        return self._state.bounds

    @property
    def wanted(self) -> str:
        """The sub-model that the owner has set, or `auto`."""
        return self._owner

    @property
    def switched_off(self) -> tuple[Modality, ...]:
        """The encoders that the owner does not want."""
        return tuple(sorted(self._disabled))

    @property
    def joules_per_token(self) -> float | None:
        """Of the last answers; None where the board cannot tell."""
        return self._energy.joules_per_token

    def refusal(self) -> RequestError | None:
        """Why no request can be taken now, or None."""
        refusal = self.plan.refusal
        return None if refusal is None else refusal.error(self.retry_after_ms(refusal.code))

    def retry_after_ms(self, code: str) -> int:
        """When a request that was refused with `code` may succeed."""
        if code == "power_saver":
            return POWER_RETRY_MS
        wait_s = self._state.pace.wait_s
        return round(
            1000 * (self._settings.elastic.pace.grow_after_s if wait_s is None else wait_s)
        )

    def choose(self, record: RequestRecord) -> Choice[str]:
        """Return what `record` runs on under the plan, and why.

        While the plan refuses that is the smallest sub-model: only what runs already gets so far.
        """
        assert record.request is not None
        if self.plan.refusal is not None:
            return Choice(self._smallest, self.plan.refusal.reason)
        task = task_of(record.request, record.prompt, record.wish or record.request.submodel)
        return choose(task, self.plan, self._manifest, self._settings)

    def forbidden(self, needed: Iterable[Modality]) -> RequestError | None:
        """Why a request that needs these encoders can never be taken as things are, or None."""
        for modality in sorted(needed):
            if modality not in self._manifest.modalities:
                return self._missing(modality)
            if modality in self._disabled:
                return ModalityUnavailable(
                    f"the owner of this node has switched {modality} off: ask another node"
                )
        return None

    def check_encoders(self, record: RequestRecord) -> None:
        """Make sure that a request, whose turn it is, has its encoders.

        Raises:
            ModalityUnavailable: the bundle, the owner or memory stands against one of them.
        """
        needed = modalities_of(record.prompt)
        forbidden = self.forbidden(needed)
        if forbidden is not None:
            raise forbidden
        if not needed <= set(self.plan.modalities.value):
            self._decide()  # the plan may be older than the request
        if self.plan.refusal is None and not needed <= set(self.plan.modalities.value):
            raise ModalityUnavailable(
                f"{self.plan.modalities.reason}: ask again later or on another node",
                self.retry_after_ms(ModalityUnavailable.code),
            )

    # What happens

    def tick(self, now: float) -> None:
        """Sample, decide and apply if it is time."""
        if now >= self.next_sample:
            self.observe(now)

    @property
    def next_sample(self) -> float:
        """When the next snapshot is due."""
        return self.snapshot.time + SAMPLE_SECONDS

    def observe(self, now: float) -> None:
        """Sample, decide and apply."""
        self.snapshot = self._board.sample(self._pids(), now)
        self._decide()

    def engine_ready(self) -> None:
        """A new engine process knows nothing of the plan yet."""
        self._retained, self._kept = None, ()
        self._retain()
        self._keep_encoders()

    def prefer(self, name: str) -> Choice[str | None]:
        """Let `auto` mean `name` for all that runs and comes; `auto` itself gives the choice back.

        Raises:
            ModelNotFound: the bundle has no such sub-model.
        """
        self._owner = canonical(name, self._manifest)
        for record in self._book.running:
            # Also an answer whose request has named another size: the owner means all of them.
            record.wish = None if self._owner == "auto" else self._owner
        self._decide()
        self._redirect_all()
        return self.plan.submodel

    def prefer_for(self, record: RequestRecord, name: str) -> Choice[str]:
        """Let one running answer go on on `name`, as far as the plan allows that.

        Raises:
            ModelNotFound: the bundle has no such sub-model.
        """
        record.wish = canonical(name, self._manifest)
        return self._redirect(record)

    def set_modality(self, modality: Modality, enabled: bool) -> Choice[tuple[Modality, ...]]:
        """Forbid an encoder, or allow it and load it now; return the encoders of the plan.

        Raises:
            ModalityUnavailable: the bundle has no such encoder.
        """
        if modality not in self._manifest.modalities:
            raise self._missing(modality)
        if not enabled:
            self._disabled |= {modality}
            self._decide()
            return self.plan.modalities
        self._disabled -= {modality}
        self._decide(frozenset({modality}))
        if modality in self.plan.modalities.value:
            self._keep_encoders(load=(modality,))
        return self.plan.modalities

    def unload(self, modality: Modality | Literal["all"]) -> Choice[tuple[Modality, ...]]:
        """Unload an encoder, or all, unless a request needs it; return the encoders of the plan.

        The next request that needs it loads it again.

        Raises:
            ModalityUnavailable: the bundle has no such encoder.
        """
        if modality == "all":
            self._decide(unload=frozenset(ENCODERS))
        elif modality in self._manifest.modalities:
            self._decide(unload=frozenset({modality}))
        else:
            raise self._missing(modality)
        return self.plan.modalities

    def energy(self, now: float) -> Share:
        """Return one answer's share of the energy; call it before an answer begins or ends."""
        if now - self.snapshot.time >= FRESH_SECONDS:
            self.observe(now)
        return self._energy.advance(mark(self.snapshot, now), len(self._book.running))

    def answered(self, record: RequestRecord, tokens: int, end: Share) -> float | None:
        """Take note of an answer's end and return its joules; None: the board cannot tell."""
        return self._energy.add(record.energy, end, tokens)

    def close(self) -> None:
        """Watch the board no longer."""
        self._board.close()

    # Deciding and applying

    def _missing(self, modality: Modality) -> ModalityUnavailable:
        return ModalityUnavailable(
            f"this bundle has no {modality} encoder, it takes "
            f"{', '.join(self._manifest.modalities)}: ask a node whose info lists it"
        )

    def _pids(self) -> list[int]:
        engine = self._supervisor.engine_pid
        return [os.getpid()] if engine is None else [os.getpid(), engine]

    def _decide(
        self,
        wanted: frozenset[Modality] = frozenset(),
        unload: frozenset[Modality] = frozenset(),
    ) -> None:
        before = self._state.plan
        mix = RequestMix(
            self._wanted() | wanted,
            self._owner,
            self._disabled,
            unload,
            running=len(self._book.running),
        )
        self._state = decide(self.snapshot, self._settings, self._manifest, mix, self._state)
        if self.plan == before:
            return
        _log_changes(before, self.plan)
        self._redirect_all()
        self._retain()
        self._keep_encoders()

    def _wanted(self) -> frozenset[Modality]:
        """The encoders of what runs and of what is next: others load when it is their turn."""
        following = self._book.next_waiting()
        records = self._book.running if following is None else (*self._book.running, following)
        return frozenset().union(*(modalities_of(record.prompt) for record in records))

    def _redirect_all(self) -> None:
        for record in self._book.running:
            if record.state == "running":
                self._redirect(record)

    def _redirect(self, record: RequestRecord) -> Choice[str]:
        """Let a running answer go on on what the plan has for it now."""
        choice = self.choose(record)
        if choice.value != record.route[-1].value and record.engine_id is not None:
            self._supervisor.send(SetSubmodel(submodel=choice.value, id=record.engine_id))
            record.route.append(choice)
            log.info(
                "request %s goes on on %s: %s",
                record.id,
                choice.value,
                choice.reason,
                extra=about(record.id),
            )
        return choice

    def _retain(self) -> None:
        largest = self.plan.largest.value or self._smallest
        if self._supervisor.state == "ready" and largest != self._retained:
            self._retained = largest
            self._supervisor.send(Retain(submodel=largest))

    def _keep_encoders(self, load: tuple[Modality, ...] = ()) -> None:
        """Tell the engine which encoders may stay; a new process has none."""
        keep = self.plan.modalities.value
        if self._supervisor.state == "ready" and (keep != self._kept or load):
            self._kept = keep
            self._supervisor.send(KeepEncoders(keep=keep, load=load))


def _log_changes(before: Plan | None, plan: Plan) -> None:
    """Say what has changed and why, each thing once."""
    if plan.refusal is not None:
        if before is None or before.refusal is None:
            log.warning("requests are refused: %s", plan.refusal.reason)
        return
    for item in fields(plan):
        new = getattr(plan, item.name)
        old = None if before is None else getattr(before, item.name)
        if isinstance(new, Choice) and (old is None or new.value != old.value):
            was = "" if old is None else f"{_words(old.value)} -> "
            name = item.name.replace("_", " ")
            log.info("plan: %s %s%s (%s)", name, was, _words(new.value), new.reason)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(value) or "none"
    return "-" if value is None else str(value)
