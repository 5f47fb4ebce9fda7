"""The remote rung in the daemon: which requests go to the server, and what its failures mean.

The deciding is pure and in `nestd.daemon.elastic.remote`; here are the facts for it: the plan, how
many requests the server has, and whether it has failed lately. A server that has is left alone for
`remote.pause_s`, so that requests do not each wait for the same time-out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nestd.bundle.errors import ConfigError, RequestError, request_error
from nestd.bundle.manifest import Manifest
from nestd.daemon.elastic.governor import Governor
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.elastic.remote import Trouble, choose_remote
from nestd.daemon.engine.messages import ChatMessage
from nestd.daemon.mqtt.contract import Request, RequestMessage
from nestd.daemon.remote.messages import Question, RemoteEvent, RemoteFailed
from nestd.daemon.requests import RequestBook, RequestRecord
from nestd.daemon.selection import sampling_of, task_of
from nestd.daemon.settings import Settings

if TYPE_CHECKING:  # it needs httpx2, which most boards do not have
    from nestd.daemon.remote.server import RemoteServer


class RemoteRung:
    """Chooses, asks and keeps count; where none is configured it says so to who requires it."""

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        book: RequestBook,
        governor: Governor,
        put_event: Callable[[RemoteEvent], None],
    ) -> None:
        """`put_event` takes the server's events, in another thread.

        Raises:
            ConfigError: the server is enabled and cannot be asked like this.
        """
        self._settings = settings
        self._manifest = manifest
        self._book = book
        self._governor = governor
        self._server = _server(settings, put_event) if settings.remote.enabled else None
        self._paused_until = float("-inf")
        self._why_paused = ""

    def start(self) -> None:
        """Begin to take requests."""
        if self._server is not None:
            self._server.start()

    def close(self) -> None:
        """Drop all that runs."""
        if self._server is not None:
            self._server.close()

    # Choosing

    def choose(
        self,
        request: Request,
        messages: Sequence[RequestMessage | ChatMessage],
        now: float,
        record: RequestRecord | None = None,
    ) -> Choice[bool] | None:
        """Say whether the server is to answer `request`, and why; None: it must not.

        `record` is the request's, once it has one.

        Raises:
            RemoteUnavailable: the request requires it, and it may not or cannot answer.
        """
        remote = self._settings.remote
        consent = request.remote or remote.default
        if consent == "never":
            return None
        wish = record.wish if record is not None else None
        trouble = self._trouble(now)
        if record is not None and record.remote_trouble is not None:
            trouble = Trouble(record.remote_trouble)
        task = task_of(request, messages, wish or request.submodel)
        return choose_remote(consent, task, self._governor.plan, self._manifest, remote, trouble)

    def requires(self, request: Request) -> bool:
        """Say whether nobody but the server may answer `request`."""
        return (request.remote or self._settings.remote.default) == "required"

    @property
    def is_full(self) -> bool:
        """It has as many requests as it may have."""
        return len(self._book.remote) >= self._settings.remote.max_concurrent

    def told(self, now: float) -> tuple[str | None, str]:
        """Return the model there, and when requests go to it, for the state topic."""
        trouble = self._trouble(now)
        reason = self._governor.plan.remote.reason if trouble is None else trouble.reason
        return self._settings.remote.model if self._server is not None else None, reason

    # Asking

    def ask(self, question_id: str, record: RequestRecord) -> None:
        """Give a request to the server."""
        assert self._server is not None
        assert record.request is not None
        limit = self._settings.limits.max_tokens
        sampling = sampling_of(record.request, self._manifest.generation, limit)
        self._server.ask(Question(question_id, record.request, record.prompt, sampling.max_tokens))

    def cancel(self, question_id: str) -> None:
        """Drop a request."""
        if self._server is not None:
            self._server.cancel(question_id)

    def failed(self, failure: RemoteFailed, now: float) -> int | None:
        """Take note of a failure; return after how many milliseconds to try again, if known."""
        if not failure.is_down:
            return None
        pause_s = self._settings.remote.pause_s
        self._why_paused = f"{failure.message}: it is left alone for {pause_s:g} s"
        self._paused_until = now + pause_s
        return round(pause_s * 1000)

    def _trouble(self, now: float) -> Trouble | None:
        left = self._paused_until - now
        return Trouble(self._why_paused, round(left * 1000)) if left > 0 else None


def with_reason(error: RequestError, remote: Choice[bool] | None) -> RequestError:
    """Return `error` with the reason why the remote server does not answer, where it might."""
    if remote is None or remote.value:
        return error
    return request_error(error.code, f"{error} ({remote.reason})", error.retry_after_ms)


def _server(settings: Settings, put_event: Callable[[RemoteEvent], None]) -> RemoteServer:
    try:
        from nestd.daemon.remote.server import RemoteServer
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise ConfigError("remote.enabled needs httpx2: pip install 'nestd[remote]'") from error
    return RemoteServer(settings.remote, put_event)
