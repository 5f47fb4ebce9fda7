"""Requests meet the engine: which one runs next, and what the engine's events mean for them."""

from __future__ import annotations

import logging
from collections.abc import Collection

from nestd.bundle.errors import (
    Cancelled,
    InsufficientMemory,
    Internal,
    Loading,
    Refused,
    RemoteUnavailable,
    RequestError,
    request_error,
)
from nestd.bundle.manifest import Manifest
from nestd.daemon.conversations import Conversations
from nestd.daemon.elastic.answer_energy import Share
from nestd.daemon.elastic.governor import Governor
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.engine.messages import (
    Cancel,
    Delta,
    Event,
    Exited,
    Failed,
    Finished,
    LoadFailed,
    Ready,
    Start,
    Stats,
)
from nestd.daemon.filter import Filter, Judged
from nestd.daemon.intake import Intake
from nestd.daemon.logs import about
from nestd.daemon.remote.messages import REMOTE, RemoteFailed, RemoteFinished
from nestd.daemon.remote.rung import RemoteRung, with_reason
from nestd.daemon.replies import Replies
from nestd.daemon.requests import RequestBook, RequestRecord
from nestd.daemon.selection import sampling_of
from nestd.daemon.supervisor import Supervisor
from nestd.daemon.tools import call_of, chosen_tools, structure_of, with_tools

log = logging.getLogger(__name__)

# A request that killed the engine so often is answered 500 (docs/mqtt.md, delivery rule 2).
DEADLY_ATTEMPTS = 3
# When to come again after the filter itself has failed.
FILTER_RETRY_MS = 10_000


class Dispatch:
    """Starts requests on the engine, as many as the plan allows, and turns its events into replies.

    A request whose engine has died runs alone from then on: if it dies again, it is to blame.
    """

    def __init__(
        self,
        book: RequestBook,
        supervisor: Supervisor,
        replies: Replies,
        governor: Governor,
        intake: Intake,
        conversations: Conversations,
        judge: Filter,
        rung: RemoteRung,
        manifest: Manifest,
        max_tokens: int,
    ) -> None:
        self._book = book
        self._supervisor = supervisor
        self._replies = replies
        self._governor = governor
        self._intake = intake
        self._conversations = conversations
        self._filter = judge
        self._rung = rung
        self._manifest = manifest
        self._max_tokens = max_tokens
        self.stats: Stats | None = None
        # Answered by the engine, and with the filter now.
        self.judging: list[RequestRecord] = []

    def start_next(self, now: float) -> None:
        """Give remote server and engine the next requests, as far as they may run more."""
        wait_for_server = self._start_remote(now)
        while self._supervisor.state == "ready" and self._may_run_more():
            record = self._book.next_waiting(but=wait_for_server)
            if record is None or record.request is None:
                return
            if record.deaths and self._book.running:
                return
            request = record.request
            record.energy = self._governor.energy(now)
            refusal = self._governor.refusal()
            if isinstance(refusal, InsufficientMemory):
                return  # it has been accepted, and memory comes back sooner than a battery charges
            try:
                if refusal is not None:
                    raise with_reason(refusal, record.remote)
                self._conversations.recall(record, now)
                self._governor.check_encoders(record)
                choice = self._governor.choose(record)
                sampling = sampling_of(request, self._manifest.generation, self._max_tokens)
                structure = structure_of(request)
                messages = with_tools(record.prompt, chosen_tools(request))
            except RequestError as error:
                self._replies.error(record, error)
                continue
            if record.remote_trouble is not None:
                choice = Choice(choice.value, f"{record.remote_trouble}; {choice.reason}")
            engine_id = self._book.start(record, choice, now)
            self._supervisor.send(
                Start(
                    id=engine_id,
                    messages=messages,
                    submodel=choice.value,
                    sampling=sampling,
                    structure=structure,
                    context_length=self._governor.plan.context_length.value,
                )
            )

    def _start_remote(self, now: float) -> Collection[RequestRecord]:
        """Start what the remote server is to answer; return what waits for a place there."""
        waiting = []
        for record in self._book.startable():
            if record.request is None or record.remote is None:
                continue  # it must not go there, as intake has found
            try:
                self._conversations.recall(record, now)
                record.remote = self._rung.choose(record.request, record.prompt, now, record)
            except RequestError as error:
                self._replies.error(record, error)
                continue
            if record.remote is None or not record.remote.value:
                continue
            if self._rung.is_full:
                waiting.append(record)
                continue
            choice = Choice(REMOTE, record.remote.reason)
            log.info(
                "request %s goes to the remote server: %s",
                record.id,
                choice.reason,
                extra=about(record.id),
            )
            self._rung.ask(self._book.start(record, choice, now, remote=True), record)
        return waiting

    def handle(self, event: Event, now: float) -> None:
        """React to an event of the present engine process."""
        if isinstance(event, Delta):
            record = self._book.by_engine_id(event.id)
            if record is not None and record.state == "running":
                self._pass_on(record, event)
        elif isinstance(event, Finished | Failed):
            energy = self._governor.energy(now)
            record = self._book.leave_engine(event.id)
            if record is not None and record.state == "running":
                self._conclude(record, event, energy, now)
        elif isinstance(event, Stats):
            self.stats = event
        elif isinstance(event, Ready):
            self._governor.engine_ready()
        elif isinstance(event, Exited):
            self._engine_died(event, now)
        elif isinstance(event, LoadFailed) and self._supervisor.degraded is not None:
            self.refuse_waiting()

    def handle_remote(self, event: Delta | RemoteFinished | RemoteFailed, now: float) -> None:
        """React to what the remote server says, or to its failure."""
        if isinstance(event, Delta):
            record = self._book.by_remote_id(event.id)
            if record is not None:
                self._pass_on(record, event)
            return
        record = self._book.leave_remote(event.id)
        if record is None or record.state != "running":
            return  # cancelled or expired meanwhile
        if isinstance(event, RemoteFinished):
            self._replies.counters["remote_done"] += 1
            self._judge(record, event, None, now)
        else:
            self._remote_failed(record, event, now)

    def _remote_failed(self, record: RequestRecord, event: RemoteFailed, now: float) -> None:
        self._replies.counters["remote_failed"] += 1
        after = self._rung.failed(event, now)
        log.warning("request %s: %s", record.id, event.message, extra=about(record.id))
        if record.request is not None and self._rung.requires(record.request):
            self._replies.error(record, RemoteUnavailable(f"{event.message}: ask again", after))
            return
        # As after the death of an engine: clients throw away what an earlier attempt has said.
        record.remote, record.remote_trouble = Choice(False, event.message), event.message
        self._book.wait_again(record)
        self._replies.accepted(record)

    def judged(self, event: Judged, now: float) -> None:
        """React to the filter's verdict on a request or on its answer."""
        record, verdict, finished = event.record, event.verdict, event.finished
        if finished is not None:
            self.judging.remove(record)
        if record.state == "ended" or record.request is None:
            return  # cancelled or expired meanwhile
        if verdict is None:
            sentence = "the node's filter failed, so nothing passes: its owner finds why in the log"
            self._replies.error(record, Internal(sentence, FILTER_RETRY_MS))
            return
        text = None if finished is None else self._filter.replaced(verdict)
        # Another text would not be of the form that was promised.
        free = structure_of(record.request) is None
        if finished is None and verdict.allow:
            record.passed = True
        elif finished is not None and verdict.allow and text in (None, finished.text):
            self._answer(record, finished, event.joules, now)
        elif finished is not None and text is not None and free:
            # A reason of the contract, which no engine gives.
            changed = finished.model_copy(update={"text": text, "finish_reason": "content_filter"})
            self._answer(record, changed, event.joules, now)
        else:
            what = "request" if finished is None else "answer"
            why = f" ({verdict.reason})" if verdict.reason else ""
            self._replies.error(record, Refused(f"the node's filter refuses the {what}{why}"))

    def cancel(self, record: RequestRecord) -> None:
        """End a request at its client's wish; the engine drops it within one step."""
        self._end_early(record)
        self._replies.error(record, Cancelled("the client cancelled the request"))

    def expire(self, now: float) -> None:
        """End what has outlived its deadline."""
        for record in self._book.expired(now):
            if record.state != "ended":
                self._end_early(record)
            self._replies.too_late(record)
        self._book.forget_expired(now)

    def refuse_waiting(self) -> None:
        """The engine does not load: tell everybody who waits for it."""
        for record in self._book.waiting:
            if record.remote is None or not record.remote.value:
                error = self.unavailable() or Loading("the model is loading")
                self._replies.refuse(record, with_reason(error, record.remote))

    def unavailable(self) -> RequestError | None:
        """Why no request can be taken now, or None."""
        reason = self._supervisor.degraded
        if reason is None:
            return None
        return Loading(f"the engine cannot load the bundle: {reason}", retry_after_ms=60_000)

    def _may_run_more(self) -> bool:
        running = self._book.running
        if any(record.deaths for record in running):
            return False
        # While the plan refuses, its requests are answered one by one with the reason.
        return len(running) < max(1, self._governor.plan.concurrency.value)

    def _conclude(
        self, record: RequestRecord, event: Finished | Failed, energy: Share, now: float
    ) -> None:
        if isinstance(event, Failed):
            retryable = event.code == InsufficientMemory.code
            after = self._governor.retry_after_ms(event.code) if retryable else None
            self._replies.error(record, request_error(event.code, event.message, after))
        elif event.finish_reason == "cancelled":
            self._replies.error(record, Cancelled("the engine was told to drop the request"))
        else:
            joules = self._governor.answered(record, event.completion_tokens, energy)
            # A place becomes free after each of those that run side by side.
            side_by_side = len(self._book.running) + 1
            self._intake.answered_in((now - (record.started or now)) * 1000 / side_by_side)
            self._judge(record, event, joules, now)

    def _pass_on(self, record: RequestRecord, delta: Delta) -> None:
        record.submodel = delta.submodel
        streams = record.request is not None and record.request.stream
        if streams and not self._filter.judges("answer"):
            self._replies.delta(record, delta)

    def _judge(
        self, record: RequestRecord, finished: Finished, joules: float | None, now: float
    ) -> None:
        """Answer, if the filter lets it pass."""
        if self._filter.judges("answer"):
            self.judging.append(record)
            self._filter.answer(record, finished, joules)
        else:
            self._answer(record, finished, joules, now)

    def _answer(
        self, record: RequestRecord, finished: Finished, joules: float | None, now: float
    ) -> None:
        turn = self._conversations.answered(record, finished.text, now)
        tools = chosen_tools(record.request) if record.request else ()
        self._replies.done(record, finished, joules, call_of(finished.text, tools), turn, now)

    def _end_early(self, record: RequestRecord) -> None:
        if record.engine_id is None:
            return
        if self._book.by_remote_id(record.engine_id) is not None:
            self._rung.cancel(record.engine_id)
            self._book.leave_remote(record.engine_id)
        else:
            self._supervisor.send(Cancel(id=record.engine_id))

    def _engine_died(self, event: Exited, now: float) -> None:
        self.stats = None
        self._governor.energy(now)
        for record in self._book.running:
            if record.engine_id is not None:
                self._book.leave_engine(record.engine_id)
            if record.state != "running":
                continue
            record.deaths += 1
            if record.deaths >= DEADLY_ATTEMPTS:
                sentence = (
                    f"the engine died {record.deaths} times over this request (last with status "
                    f"{event.returncode}): send something else; the log has the cause"
                )
                self._replies.error(record, Internal(sentence))
            else:
                log.warning(
                    "request %s runs again: attempt %d",
                    record.id,
                    record.attempt + 1,
                    extra=about(record.id),
                )
                self._book.wait_again(record)
                self._replies.accepted(record)
        if self._supervisor.degraded is not None:
            self.refuse_waiting()
