"""What the remote server's thread is asked, and what it tells the main loop."""

from __future__ import annotations

from dataclasses import dataclass

from nestd.daemon.engine.messages import ChatMessage, Delta, Finished
from nestd.daemon.mqtt.contract import Request

# Stands in the place of a sub-model's name.
REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Question:
    """One request for the server.

    Attributes:
        id: the book's, as an engine would get it.
        prompt: all turns, behind what the conversation knows already.
        max_tokens: of the answer; the node's limit or less.
    """

    id: str
    request: Request
    prompt: tuple[ChatMessage, ...]
    max_tokens: int


class RemoteFinished(Finished):
    """The server's whole answer; not `counted`: it told no numbers of tokens."""

    model: str
    counted: bool


@dataclass(frozen=True, slots=True)
class RemoteFailed:
    """The server did not answer request `id`; `message` quotes nothing of what it said.

    `is_down`: others would fare no better for a while.
    """

    id: str
    message: str
    is_down: bool


@dataclass(frozen=True, slots=True)
class RemoteEvent:
    """An event of the server's thread."""

    event: Delta | RemoteFinished | RemoteFailed
