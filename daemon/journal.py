"""Answers on disk, so that a daemon that was killed neither runs nor tells a request twice.

An answer is appended, and synchronised to the disk, before it is published; that the broker has it
is appended when it says so. The next process gives the broker what it has not acknowledged, and
settles a request that is delivered again without running it. Answers are kept until their request
expires. Refusals are not here: such a request may come again (docs/mqtt.md, delivery rule 2).

The file is one JSON object a line. A last line that was cut short by a power failure is dropped.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nestd.daemon.delivery import Final
from nestd.daemon.media_store import write_durably
from nestd.daemon.mqtt.packets import Message
from nestd.daemon.mqtt.parse import JSON_TYPE
from nestd.daemon.requests import ReplyTo, RequestRecord

log = logging.getLogger(__name__)

# A file of so many bytes that holds more past than present is written anew.
COMPACT_BYTES = 256 * 1024

Key = tuple[str, str]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    client: str
    id: str


class Answer(_Line):
    """A `done` or `error`; `until` is the Unix time of its request's deadline."""

    kind: Literal["answer"] = "answer"
    fingerprint: str
    blobs: dict[str, str]
    topic: str
    correlation_data: str | None
    payload: str
    until: float


class Told(_Line):
    """The broker has the answer to this request."""

    kind: Literal["told"] = "told"


_LINES: TypeAdapter[Answer | Told] = TypeAdapter(
    Annotated[Answer | Told, Field(discriminator="kind")]
)


class Journal:
    """The file of one node.

    `clock` is that of the records, `wall_clock` is Unix time, which the next process shares.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall_clock = wall_clock
        self._lines: dict[Key, tuple[float, bytes]] = {}
        self._untold: dict[Key, RequestRecord] = {}
        self._bytes = 0

    def load(self) -> list[RequestRecord]:
        """Return what an earlier process has answered, oldest first.

        The final event of a record is `confirmed` if the broker has it.
        """
        answers: dict[Key, Answer] = {}
        told: set[Key] = set()
        for line in self._read().splitlines():
            try:
                item = _LINES.validate_json(line)
            except ValidationError:
                log.warning("a line of %s cannot be read and is dropped", self._path)
                continue
            key = (item.client, item.id)
            if isinstance(item, Told):
                told.add(key)
            else:
                answers[key] = item
                told.discard(key)
        records = []
        now, wall = self._clock(), self._wall_clock()
        for key, answer in answers.items():
            if answer.until <= wall:
                continue
            record = _record(answer, now, answer.until - wall, key in told)
            self._lines[key] = (answer.until, _bytes(answer))
            self._untold[key] = record
            records.append(record)
        self._compact()
        self.tick()
        return records

    def add(self, record: RequestRecord, message: Message) -> None:
        """Write the answer to `record` before it is published."""
        correlation = message.correlation_data
        key = (record.client, record.id)
        answer = Answer(
            client=record.client,
            id=record.id,
            fingerprint=record.fingerprint.hex(),
            blobs=record.blobs,
            topic=message.topic,
            correlation_data=None if correlation is None else correlation.hex(),
            payload=message.payload.decode(),
            until=self._wall_clock() + record.deadline - self._clock(),
        )
        line = _bytes(answer)
        self._lines[key] = (answer.until, line)
        self._untold[key] = record
        self._append(line, durably=True)

    def tick(self) -> None:
        """Note what the broker has acknowledged."""
        told = [key for key, record in self._untold.items() if _is_told(record)]
        for key in told:
            del self._untold[key]
            line = _bytes(Told(client=key[0], id=key[1]))
            until, answer = self._lines[key]
            self._lines[key] = (until, answer + line)
            # If this line is lost, the answer is told twice: no reason to wait for the disk.
            self._append(line, durably=False)

    def sweep(self) -> None:
        """Forget what has expired, and write the file anew when most of it is past."""
        now = self._wall_clock()
        for key in [key for key, (until, _) in self._lines.items() if until <= now]:
            del self._lines[key]
            self._untold.pop(key, None)
        alive = sum(len(line) for _, line in self._lines.values())
        if self._bytes > 2 * alive and (not alive or self._bytes > COMPACT_BYTES):
            self._compact()

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            log.error("cannot read %s, requests may be run twice: %s", self._path, error)
            return b""

    def _append(self, line: bytes, *, durably: bool) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "ab") as file:  # noqa: PTH123  (a descriptor, not a path)
                file.write(line)
                file.flush()
                if durably:
                    os.fdatasync(descriptor)
            self._bytes += len(line)
        except OSError as error:
            # The answer itself goes out all the same; after a crash it may come twice.
            log.error("cannot write %s: %s", self._path, error)

    def _compact(self) -> None:
        data = b"".join(line for _, line in self._lines.values())
        try:
            if data:
                write_durably(self._path, data)
            else:
                self._path.unlink(missing_ok=True)
            self._bytes = len(data)
        except OSError as error:
            log.error("cannot write %s: %s", self._path, error)


def _bytes(item: _Line) -> bytes:
    return item.model_dump_json().encode() + b"\n"


def _is_told(record: RequestRecord) -> bool:
    return record.final is not None and record.final.confirmed


def _record(answer: Answer, now: float, remaining: float, told: bool) -> RequestRecord:
    correlation = answer.correlation_data
    reply_to = ReplyTo(answer.topic, None if correlation is None else bytes.fromhex(correlation))
    message = Message(
        answer.topic,
        answer.payload.encode(),
        content_type=JSON_TYPE,
        correlation_data=reply_to.correlation_data,
        message_expiry_interval=max(1, math.ceil(remaining)),
    )
    return RequestRecord(
        client=answer.client,
        id=answer.id,
        fingerprint=bytes.fromhex(answer.fingerprint),
        request=None,
        reply_to=reply_to,
        arrived=now,
        deadline=now + remaining,
        blobs=answer.blobs,
        state="ended",
        final=Final(message, confirmed=told),
    )
