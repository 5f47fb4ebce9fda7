"""The owner's filter: a program, or patterns, that requests and answers have to pass.

A program gets one JSON object on its standard input and says a `Verdict` as JSON on its standard
output; it is started anew each time, without a shell, and killed when its time is over. Patterns
are such a program too (`filter_patterns`): a regular expression that runs away is then a program
that takes too long, and not a daemon that stands still. Whatever goes wrong refuses: a filter that
fails open is none.

One thing is judged at a time, in a thread, in the order in which it came; verdicts come back as
events. What they mean is in `dispatch`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nestd.daemon.engine.messages import ChatMessage, Finished, MediaContent, TextContent
from nestd.daemon.mqtt.contract import Request
from nestd.daemon.requests import RequestRecord
from nestd.daemon.settings import FilterSettings, Stage

log = logging.getLogger(__name__)


class Verdict(BaseModel):
    """What a filter says.

    Attributes:
        reason: for the client, where it is refused.
        text: takes the place of an answer that is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: bool
    reason: Annotated[str, Field(max_length=1000)] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A request, or with `finished` its answer, has been judged; no verdict: the filter failed."""

    record: RequestRecord
    finished: Finished | None
    joules: float | None
    verdict: Verdict | None


class FilterFailed(Exception):
    """The filter gave no verdict; the sentence is for the log."""


class Filter:
    """Judges in a thread of its own, and puts a `Judged` on the daemon's queue for each call."""

    def __init__(
        self, settings: FilterSettings, node: str, put_event: Callable[[Judged], None]
    ) -> None:
        self._settings = settings
        self._node = node
        self._put_event = put_event
        self._commands: list[Sequence[str]] = []
        if settings.patterns:
            patterns = (sys.executable, "-m", "nestd.daemon.filter_patterns", *settings.patterns)
            self._commands.append(patterns)
        if settings.command:
            self._commands.append(settings.command)
        self._thread = ThreadPoolExecutor(1, "filter")
        self._child: subprocess.Popen[bytes] | None = None

    def judges(self, stage: Stage) -> bool:
        """Say whether anything of this kind has to pass."""
        return bool(self._commands) and stage in self._settings.stages

    def request(self, record: RequestRecord, request: Request) -> None:
        """Judge a request, with what its conversation said before."""
        document = self._document("request", record) | {
            "tools": [tool.model_dump() for tool in request.tools],
            "response_format": request.response_format.model_dump(),
        }
        self._thread.submit(self._judge, document, record, None, None)

    def answer(self, record: RequestRecord, finished: Finished, joules: float | None) -> None:
        """Judge an answer; `joules` come back with the verdict."""
        document = self._document("answer", record) | {"text": finished.text}
        self._thread.submit(self._judge, document, record, finished, joules)

    def replaced(self, verdict: Verdict) -> str | None:
        """Return the text in the place of the judged answer, None where it is the answer's own."""
        return verdict.text if verdict.allow else self._settings.replacement

    def close(self) -> None:
        """Stop judging."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if (child := self._child) is not None:
            _kill(child)

    def _document(self, stage: Stage, record: RequestRecord) -> dict[str, Any]:
        return {
            "stage": stage,
            "node": self._node,
            "client": record.client,
            "id": record.id,
            "messages": [_plain(message) for message in record.prompt],
        }

    def _judge(
        self,
        document: dict[str, Any],
        record: RequestRecord,
        finished: Finished | None,
        joules: float | None,
    ) -> None:
        verdict: Verdict | None = Verdict(allow=True)
        try:
            for command in self._commands:
                verdict = self._ask(command, json.dumps(document).encode())
                if not verdict.allow:
                    break
                if verdict.text is not None:
                    document["text"] = verdict.text
        except FilterFailed as error:
            log.error("the filter %s", error)
            verdict = None
        self._put_event(Judged(record, finished, joules, verdict))

    def _ask(self, command: Sequence[str], data: bytes) -> Verdict:
        """Run one program; FilterFailed if it gives no verdict."""
        seconds = self._settings.timeout_s
        try:
            self._child = child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        except OSError as error:
            raise FilterFailed(f"cannot be started ({error}): correct filter.command") from error
        with child:
            try:
                output, _ = child.communicate(data, seconds)
            except subprocess.TimeoutExpired as error:
                raise FilterFailed(f"took longer than filter.timeout_s ({seconds:g} s)") from error
            finally:
                # Also what it may have started itself, which would keep its output open.
                _kill(child)
                self._child = None
        if child.returncode != 0:
            raise FilterFailed(f"ended with status {child.returncode}")
        try:
            return Verdict.model_validate_json(output)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its output"
            raise FilterFailed(f"says no verdict: {where}: {first['msg']}") from error


def _plain(message: ChatMessage) -> dict[str, Any]:
    """Return a turn with its text in one piece, and the files of its media."""
    if isinstance(message.content, str):
        return {"role": message.role, "text": message.content, "media": []}
    texts = [part.text for part in message.content if isinstance(part, TextContent)]
    media = [
        {"type": part.type, "path": str(part.path)}
        for part in message.content
        if isinstance(part, MediaContent)
    ]
    return {"role": message.role, "text": "".join(texts), "media": media}


def _kill(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended, and all that it started
