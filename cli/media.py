"""Media files for a request: in its JSON where they fit, else uploaded as blobs before it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestd.bundle.errors import ConfigError, ModalityUnavailable, TooLarge
from nestd.client.connection import CHUNK_BYTES, Client

# Around the request's fields in a packet: topic, properties, the id, the parts' own keys.
MARGIN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Medium:
    """A file, and the part that it becomes once its bytes are in it."""

    part: dict[str, Any]
    data: bytes


def read_media(files: Sequence[tuple[str, Path]], detail: str | None) -> list[Medium]:
    """Read the files, each with its type.

    Raises:
        ConfigError: one cannot be read.
    """
    media = []
    for kind, path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        part = {"type": kind} if detail is None else {"type": kind, "detail": detail}
        media.append(Medium(part, data))
    return media


def add_to(
    fields: dict[str, Any],
    media: Sequence[Medium],
    client: Client,
    timeout: float,
    pool_bytes: int,
) -> dict[str, Any]:
    """Return the request `fields` with `media` before the text of its last message.

    What is too large for one message goes to the node first, within `timeout` seconds a blob. Of a
    pool nobody knows which node will answer: all must fit into a message of `pool_bytes`.

    Raises:
        BrokerError: the node does not answer.
        RequestError: the node takes no media, or refuses a blob.
    """
    limit = pool_bytes
    if client.pool is None:
        info = client.info()
        if info["media"] is None:
            raise ModalityUnavailable("this node takes text only: ask another one with --node")
        limit = info["limits"]["request_bytes"]
    if client.maximum_packet_size is not None:
        limit = min(limit, client.maximum_packet_size)
    chunk_bytes = min(CHUNK_BYTES, limit // 2)
    room = limit - len(json.dumps(fields)) - MARGIN_BYTES
    content: list[dict[str, Any]] = []
    for medium in media:
        text = base64.b64encode(medium.data).decode()
        if len(text) <= room:
            room -= len(text)
            content.append(medium.part | {"data": text})
        elif client.pool is not None:
            raise TooLarge(
                f"the {medium.part['type']} does not fit into a message of {limit} bytes: ask one "
                "node with --node, which takes it in pieces"
            )
        else:
            blob = client.upload(medium.data, chunk_bytes, timeout)
            content.append(medium.part | {"blob": blob})
    *before, last = fields["messages"]
    content.append({"type": "text", "text": last["content"]})
    return fields | {"messages": [*before, last | {"content": content}]}
