"""What the recipes share: the broker's options, a question with files, folders worked through."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestd.bundle.errors import NestdError, request_error
from nestd.cli.media import Medium, add_to
from nestd.client import Broker, Client, connect

PATIENCE = 600.0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows the broker and the node."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="localhost", help="the MQTT broker")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--node", help="which node to ask; default: the only one")
    return parser


@contextmanager
def node(args: argparse.Namespace) -> Iterator[Client]:
    """Connect to the node; what goes wrong is one line on standard error and exit status 1."""
    try:
        with connect(Broker(host=args.host, port=args.port), node=args.node) as client:
            yield client
    except NestdError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def ask(
    client: Client,
    turns: str | list[dict[str, str]],
    media: Sequence[Medium] = (),
    **fields: object,
) -> dict[str, Any]:
    """Send a request and return `done`; a busy node is asked again.

    Args:
        client: as `node` gives it.
        turns: what is asked, or whole messages.
        media: go before the text of the last turn.
        fields: further keys of the request (docs/mqtt.md).

    Raises:
        RequestError: the node refuses for good.
        BrokerError: no answer came.
    """
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    request: dict[str, Any] = {"messages": messages, "expires_in": PATIENCE, **fields}
    if media:
        request = add_to(request, media, client, PATIENCE, pool_bytes=0)
    deadline = time.monotonic() + PATIENCE
    while True:
        (end,) = client.ask(request, PATIENCE)  # without `stream` there is one event
        if end["event"] == "done":
            return end
        wait = end["retry_after_ms"]
        if wait is None or time.monotonic() + wait / 1000 > deadline:
            raise request_error(end["code"], end["message"])
        time.sleep(wait / 1000)


def undone(folder: Path, endings: Sequence[str], result: str) -> Iterator[tuple[Path, Path]]:
    """Yield each file with one of the endings and its result's path, where there is none yet."""
    for path in sorted(folder.iterdir()):
        beside = path.with_name(path.name + result)
        if path.suffix.lower() in endings and not beside.exists():
            yield path, beside


def save(path: Path, text: str) -> None:
    """Write a result whole or not at all, so that one cut short is done again."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
