"""The remote server, spoken to in a thread of its own (the only file that imports httpx2).

One asyncio loop in one thread holds all requests; the main loop hands questions over and cancels
them without waiting, and what comes back is put on the daemon's queue. The key is read from its
file for each request, so a new one needs no restart, and goes nowhere but into the header.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import httpx2

from nestd.bundle.errors import ConfigError
from nestd.daemon.credentials import read_secret
from nestd.daemon.engine.messages import Delta, Timings
from nestd.daemon.remote.chat import MOST_CHARACTERS, Answer, RemoteFailure, body_of
from nestd.daemon.remote.messages import (
    REMOTE,
    Question,
    RemoteEvent,
    RemoteFailed,
    RemoteFinished,
)
from nestd.daemon.remote.settings import RemoteSettings

log = logging.getLogger(__name__)

KEY = "remote.api_key_file"
CLOSE_SECONDS = 1.0
# One that was cancelled may still be closing when the next is opened.
SPARE_CONNECTIONS = 4


class RemoteServer:
    """Asks the server; `put_event` gets what it answers, from another thread."""

    def __init__(self, settings: RemoteSettings, put_event: Callable[[RemoteEvent], None]) -> None:
        """Nothing is connected yet.

        Raises:
            ConfigError: the key or the certificates cannot be read.
        """
        self._settings = settings
        self._put_event = put_event
        self._key()
        # No redirects: the key would go where the owner has not sent it.
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s),
            limits=httpx2.Limits(max_connections=settings.max_concurrent + SPARE_CONNECTIONS),
            verify=_trusting(settings.ca_file),
            follow_redirects=False,
        )
        self._thread = threading.Thread(target=self._live, name="remote", daemon=True)
        self._lives = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._tasks: dict[str, Future[None]] = {}

    def start(self) -> None:
        """Begin to take questions."""
        # Their lines about each request are ours to write, and with debug they would be long.
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._thread.start()
        self._lives.wait()

    def ask(self, question: Question) -> None:
        """Pass a question on; a delta for each piece, and in the end the answer or a failure."""
        assert self._loop is not None, "start() comes first"
        task = asyncio.run_coroutine_threadsafe(self._answer(question), self._loop)
        self._tasks[question.id] = task
        task.add_done_callback(lambda done: self._ended(question.id, done))

    def cancel(self, question_id: str) -> None:
        """Drop a question and its connection; nothing more comes of it."""
        task = self._tasks.pop(question_id, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Drop everything."""
        for question_id in list(self._tasks):
            self.cancel(question_id)
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_SECONDS)
            self._loop = None

    def _live(self) -> None:
        asyncio.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._client:
            self._lives.set()
            await self._stop.wait()

    def _ended(self, question_id: str, task: Future[None]) -> None:
        """Tell of a task that ended by an error of ours (called in the thread)."""
        self._tasks.pop(question_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the remote server could not be asked", exc_info=error)
            message = "the remote server could not be asked: the node's log has the cause"
            self._put_event(RemoteEvent(RemoteFailed(question_id, message, is_down=False)))

    def _key(self) -> str | None:
        key = read_secret(self._settings.api_key_file, KEY)
        # The HTTP library would quote such a key in its error.
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"{KEY}: the first line holds characters that no key has")
        return key

    async def _answer(self, question: Question) -> None:
        started = time.monotonic()
        try:
            self._put_event(RemoteEvent(await self._exchange(question, started)))
        except RemoteFailure as failure:
            failed = RemoteFailed(question.id, str(failure), failure.is_down)
            self._put_event(RemoteEvent(failed))

    async def _exchange(self, question: Question, started: float) -> RemoteFinished:
        try:
            return await self._stream(question, started)
        except httpx2.ConnectTimeout as error:
            raise RemoteFailure("takes no connection within remote.connect_timeout_s") from error
        except httpx2.TimeoutException as error:
            raise RemoteFailure("was silent for remote.read_timeout_s") from error
        except httpx2.ConnectError as error:
            raise RemoteFailure(f"cannot be reached ({error})") from error
        except httpx2.SSEError as error:
            raise RemoteFailure("does not stream events as the chat API has them") from error
        except httpx2.RequestError as error:
            raise RemoteFailure("broke the connection off") from error

    async def _stream(self, question: Question, started: float) -> RemoteFinished:
        settings, answer, first = self._settings, Answer(question.request), None
        # Files of media are read: not in the loop that other answers come in on.
        body = await asyncio.to_thread(body_of, question, settings)
        async with self._client.sse(
            f"{(settings.base_url or '').rstrip('/')}/chat/completions",
            method="POST",
            content=json.dumps(body).encode(),
            headers=self._headers(),
            max_event_size=MOST_CHARACTERS,
        ) as events:
            _check_status(events.response.status_code, settings)
            async for event in events:
                if event.data == "[DONE]":
                    break
                text = answer.take(event.data)
                first = first or time.monotonic()
                if text:
                    delta = Delta(
                        id=question.id,
                        text=text,
                        completion_tokens=answer.pieces,
                        submodel=REMOTE,
                    )
                    self._put_event(RemoteEvent(delta))
        now = time.monotonic()
        timings = Timings(
            prefill_ms=round(((first or now) - started) * 1000, 1),
            decode_ms=round((now - (first or now)) * 1000, 1),
        )
        return answer.finished(question.id, settings.model or "", timings)

    def _headers(self) -> dict[str, str]:
        try:
            key = self._key()
        except ConfigError as error:
            log.error("%s", error)
            raise RemoteFailure(f"is not asked: {KEY} cannot be read") from error
        headers = {"Content-Type": "application/json"}
        return headers if key is None else headers | {"Authorization": f"Bearer {key}"}


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"remote.ca_file: cannot read {ca_file}: {error}") from error


def _check_status(status: int, settings: RemoteSettings) -> None:
    """Raise RemoteFailure unless the server has taken the request; its own words are not read."""
    if status == 200:
        return
    if status in (401, 403):
        keyless = settings.api_key_file is None
        advice = f"asks for a key: set {KEY}" if keyless else f"refuses the key: correct {KEY}"
        raise RemoteFailure(f"{advice} ({status})")
    if status == 404:
        raise RemoteFailure("does not know remote.model, or remote.base_url is wrong (404)")
    if status == 429:
        raise RemoteFailure("has too much to do (429)")
    if 300 <= status < 400:
        raise RemoteFailure(f"redirects: write the final address into remote.base_url ({status})")
    if 400 <= status < 500:
        raise RemoteFailure(f"does not take this request ({status})", is_down=False)
    raise RemoteFailure(f"has failed ({status})")
