"""The client for asyncio.

It is the other client in a thread of its own, which does one thing after the other: requests of one
`AsyncClient` wait for each other. A node answers one at a time anyway; to ask several nodes at
once, open several.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from nestd.client.connection import Client, Event
from nestd.client.open import Broker, enter
from nestd.daemon.mqtt.topics import Verb

_Result = TypeVar("_Result")
FINAL = ("done", "error")


class AsyncClient:
    """A connected client; `connect_async` makes one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nestd-client")

    async def ask(self, fields: dict[str, Any], timeout: float) -> AsyncIterator[Event]:
        """Send a request and yield its events, `done` or `error` last.

        Who leaves early (break with `aclose()`, or a cancelled task) cancels the request at the
        node, too; not in a pool, where nobody knows which node has it.

        Raises:
            BrokerError: neither came within `timeout` seconds, or the broker threw us out.
        """
        fields = {"id": uuid.uuid4().hex} | fields
        events = self._client.ask(fields, timeout)
        ended = False
        try:
            while (event := await self._run(next, events, None)) is not None:
                ended = event["event"] in FINAL
                yield event
        finally:
            if not ended and self._client.pool is None:
                self._client.send("cancel", {"id": fields["id"]})

    async def control(self, verb: Verb, fields: dict[str, Any]) -> Event:
        """Send a control request and return the reply; BrokerError if none came."""
        return await self._run(self._client.control, verb, fields)

    async def close(self) -> None:
        """Disconnect."""
        await self._run(self._client.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:  # noqa: ANN401
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def open(self, node: str | None, pool: str | None) -> None:
        """Connect; see `nestd.client.open.connect`."""
        await self._run(enter, self._client, node, pool)


@asynccontextmanager
async def connect_async(
    broker: Broker | None = None, *, node: str | None = None, pool: str | None = None
) -> AsyncIterator[AsyncClient]:
    """Like `nestd.client.connect`, for asyncio."""
    client = AsyncClient((broker or Broker()).client())
    try:
        await client.open(node, pool)
        yield client
    finally:
        await client.close()
