"""Conversations: what was said before under a client's conversation id.

A request that names a conversation brings only what is new. Its turns and the answer are kept when
it is done, in memory: an unknown id, or one that has been forgotten, begins anew, and `done` says
which turn it was. The engine keeps the keys and values (engine/prefix_cache.py) by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from nestd.bundle.errors import TooLarge
from nestd.daemon.engine.messages import ChatMessage, media_of
from nestd.daemon.media_store import MediaStore
from nestd.daemon.mqtt.contract import ConversationTurn
from nestd.daemon.requests import RequestRecord, conversation_of

Key = tuple[str, str]


@dataclass(eq=False, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: of all turns, the last answer included.
        turns: answers so far.
        used: when the last one was made.
    """

    messages: tuple[ChatMessage, ...]
    turns: int
    used: float


class Conversations:
    """The last conversations, the least recently used first to go; ids are each client's own."""

    def __init__(self, most: int, most_seconds: float, most_chars: int, store: MediaStore) -> None:
        self._most = most
        self._most_seconds = most_seconds
        self._most_chars = most_chars
        self._store = store
        self._known: OrderedDict[Key, Conversation] = OrderedDict()

    @property
    def owners(self) -> Sequence[Conversation]:
        """The conversations whose media must stay in the store."""
        return tuple(self._known.values())

    def recall(self, record: RequestRecord, now: float) -> None:
        """Set the record's prompt: what was said before, and then its messages.

        A system message among them takes the place of the first one.

        Raises:
            TooLarge: together they are longer than one prompt may be.
        """
        self._expire(now)
        record.prompt = new = record.messages
        known = self._known.get(key) if (key := conversation_of(record)) is not None else None
        if known is None:
            return
        before = known.messages
        if new[0].role == "system":
            start = 1 if before[0].role == "system" else 0
            record.prompt = (new[0], *before[start:], *new[1:])
        else:
            record.prompt = (*before, *new)
        count = sum(_characters(item) for item in record.prompt)
        if count > self._most_chars:
            raise TooLarge(
                f"the conversation has {count} characters, the limit is {self._most_chars}: begin "
                "another one under a new id"
            )

    def answered(self, record: RequestRecord, text: str, now: float) -> ConversationTurn | None:
        """Keep the record's conversation with its answer; None if it belongs to none."""
        key = conversation_of(record)
        if key is None:
            return None
        known = self._known.pop(key, None)
        conversation = Conversation(
            messages=(*record.prompt, ChatMessage(role="assistant", content=text)),
            turns=1 if known is None else known.turns + 1,
            used=now,
        )
        self._known[key] = conversation
        for medium in media_of(conversation.messages):
            self._store.keep(conversation, medium.sha256)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return ConversationTurn(id=key[1], turn=conversation.turns)

    def _expire(self, now: float) -> None:
        for key, conversation in list(self._known.items()):
            if now - conversation.used < self._most_seconds:
                return
            del self._known[key]


def _characters(message: ChatMessage) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.content if part.type == "text")
