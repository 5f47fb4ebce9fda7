"""Content of a request -> the engine's messages, with every medium in a file.

What a part holds (base64, a blob, the message's own payload) goes to the media store, and the
request then only refers to it. What the bytes are is judged by the engine's decoder process.
"""

from __future__ import annotations

import base64
import binascii

from nestd.bundle.errors import BadRequest, TooLarge
from nestd.bundle.manifest import Manifest
from nestd.daemon.blobs import Blobs
from nestd.daemon.engine.messages import ChatMessage, Content, MediaContent, TextContent
from nestd.daemon.media_store import MediaStore
from nestd.daemon.mqtt.contract import MediaPart, Part, Request
from nestd.daemon.mqtt.parse import RawMedium, media_parts
from nestd.daemon.requests import RequestRecord
from nestd.daemon.selection import joined_text
from nestd.daemon.settings import MediaSettings


class Contents:
    """Turns requests into what the engine takes."""

    def __init__(
        self, limits: MediaSettings, manifest: Manifest, store: MediaStore, blobs: Blobs
    ) -> None:
        self._limits = limits
        self._sizes = manifest.vision.sizes if manifest.vision else ()
        self._store = store
        self._blobs = blobs

    def take(self, record: RequestRecord, request: Request, medium: RawMedium | None) -> None:
        """Give `record` the request and its messages; the store keeps the media for `record`.

        Raises:
            BadRequest: a medium outside a user's turn, or text that is not base64.
            BlobNotFound: a blob is unknown or unfinished.
            TooLarge, QueueFull: too many media, one too large, or no room for them.
        """
        count = sum(1 for _ in media_parts(request.messages))
        if count > self._limits.max_per_request:
            raise TooLarge(
                f"the request has {count} media: send at most {self._limits.max_per_request}"
            )
        messages: list[ChatMessage] = []
        for message in request.messages:
            if isinstance(message.content, str):
                messages.append(ChatMessage(role=message.role, content=message.content))
                continue
            content = tuple(self._content(part, record, medium) for part in message.content)
            media = any(isinstance(part, MediaContent) for part in content)
            if media and message.role != "user":
                raise BadRequest(
                    f"a medium is in a {message.role}'s turn: put it into a user's turn"
                )
            messages.append(
                ChatMessage(role=message.role, content=content if media else joined_text(content))
            )
        record.messages = tuple(messages)
        # Else the base64 text would wait in memory with the request.
        record.request = request.model_copy(update={"messages": ()})

    def is_other(self, record: RequestRecord) -> bool:
        """Say whether a blob that `record` used has other content now under the same id."""
        blobs = ((sha256, self._blobs.find(name)) for name, sha256 in record.blobs.items())
        return any(blob is not None and blob.sha256 not in (None, sha256) for sha256, blob in blobs)

    def image_size(self, wish: str = "auto") -> int | None:
        """Return the pixels that `detail` means here; None where the bundle sees nothing."""
        if not self._sizes:
            return None
        if wish == "auto":
            wanted = self._limits.image_size
            return max((s for s in self._sizes if s <= wanted), default=min(self._sizes))
        return min(self._sizes) if wish == "low" else max(self._sizes)

    def _content(self, part: Part, record: RequestRecord, medium: RawMedium | None) -> Content:
        if not isinstance(part, MediaPart):
            return TextContent(text=part.text)
        content_type = part.content_type
        if part.blob is not None:
            sha256, blob = self._blobs.use(part.blob, record)
            record.blobs[part.blob] = sha256
            content_type = content_type or blob.content_type
        elif part.data is not None:
            sha256 = self._keep(_decoded(part, self._limits.max_bytes), part, record)
        else:
            assert medium is not None, "read_request has compared parts and payload"
            sha256 = self._keep(medium.data, part, record)
            content_type = content_type or medium.content_type
        # Each frame costs as many tokens as a picture, so a video looks at small ones.
        wish = "low" if part.type == "video" and part.detail == "auto" else part.detail
        return MediaContent(
            type=part.type,
            path=self._store.path(sha256),
            sha256=sha256,
            content_type=content_type,
            size=None if part.type == "audio" else self.image_size(wish),
        )

    def _keep(self, data: bytes, part: MediaPart, record: RequestRecord) -> str:
        if len(data) > self._limits.max_bytes:
            raise _too_large(part, len(data), self._limits.max_bytes)
        return self._store.add(record, data)


def _decoded(part: MediaPart, most_bytes: int) -> bytes:
    text = part.data or ""
    if len(text) // 4 * 3 > most_bytes + 2:  # base64 has four characters for three bytes
        raise _too_large(part, len(text) // 4 * 3, most_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(
            f"the data of the {part.type} is not base64 ({error}): send the bare base64 text, "
            "without line breaks and without data: in front"
        ) from error


def _too_large(part: MediaPart, count: int, most: int) -> TooLarge:
    return TooLarge(f"the {part.type} has {count} bytes: send at most {most}")
