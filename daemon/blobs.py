"""Blobs: large media that come in pieces, before the request that uses them (docs/mqtt.md, Blobs).

`init` announces a size, chunks come at byte offsets in any order and as often as the broker likes,
`fin` states size and sha256 and makes the blob usable until it expires. All of it is on the disk
before a call returns, so that a blob survives the daemon: `<id>.part` holds the bytes while they
come in, `<id>.json` what is known; a finished blob's bytes belong to the media store.

Ids, sizes and bytes come from strangers. This file knows no MQTT; time is wall-clock time, because
it has to mean something to the next process.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nestd.bundle.errors import BadRequest, BlobNotFound, IdReused, QueueFull, TooLarge
from nestd.bundle.manifest import sha256_file
from nestd.daemon.media_store import MediaStore, no_disk, write_durably
from nestd.daemon.mqtt.contract import BlobFin, BlobId, BlobInit, Sha256
from nestd.daemon.settings import MediaSettings

log = logging.getLogger(__name__)

# Chunks of a blob may leave so many gaps at once; without a bound, single bytes at every second
# offset would make a list of millions.
MOST_RANGES = 256
_IDS: TypeAdapter[str] = TypeAdapter(BlobId)

Range = tuple[int, int]


class Blob(BaseModel):
    """What is known of one blob; ranges are [first byte, first byte behind).

    Attributes:
        announced: the sha256 of `init`, if it had one.
        expires_at: Unix time.
        received: what has come in, in order, not touching.
        sha256: of a finished blob, else None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, Field(gt=0)]
    content_type: str | None
    announced: Sha256 | None
    reply_to: str | None
    expires_at: float
    received: tuple[Range, ...] = ()
    sha256: Sha256 | None = None

    def missing(self) -> list[Range]:
        """Return the ranges that have not come in."""
        edges = [0, *(edge for item in self.received for edge in item), self.size]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in pairs if start < end]


class Blobs:
    """All blobs of this node."""

    def __init__(
        self, directory: Path, store: MediaStore, limits: MediaSettings, longest_s: float
    ) -> None:
        self._directory = directory
        self._store = store
        self._limits = limits
        self._longest_s = longest_s
        self._blobs: dict[str, Blob] = {}

    # Uploading

    def init(self, blob_id: str, wanted: BlobInit, reply_to: str, now: float) -> Blob:
        """Announce a blob, or say what is there of one that was announced just so before.

        Raises:
            BadRequest: the id cannot be one.
            IdReused: another blob has this id.
            TooLarge, QueueFull: over a limit of one blob, of all blobs, or of the disk.
        """
        _check_id(blob_id)
        known = self._blobs.get(blob_id)
        if known is not None:
            if (known.size, known.announced) != (wanted.size, wanted.sha256):
                raise IdReused(f"another blob has the id {blob_id!r}: take a new one")
            return known
        if wanted.size > self._limits.max_bytes:
            raise TooLarge(
                f"the blob would have {wanted.size} bytes: send at most {self._limits.max_bytes}"
            )
        if len(self._blobs) >= self._limits.max_blobs:
            soonest = min((blob.expires_at for blob in self._blobs.values()), default=now)
            raise QueueFull(
                f"the node holds {len(self._blobs)} blobs already: try again later",
                round(1000 * max(1.0, soonest - now)),
            )
        self._store.check_room(wanted.size)
        lifetime = min(wanted.expires_in or self._limits.blob_expiry_s, self._longest_s)
        blob = Blob(
            size=wanted.size,
            content_type=wanted.content_type,
            announced=wanted.sha256,
            reply_to=reply_to,
            expires_at=now + lifetime,
        )
        try:
            self._store.prepare()
            self._directory.mkdir(exist_ok=True)
            self._part(blob_id).touch()
            self._save(blob_id, blob)
        except OSError as error:
            raise no_disk(error) from error
        self._count_reserved()
        return blob

    def chunk(self, blob_id: str, offset: str, data: bytes) -> None:
        """Write one chunk.

        Raises:
            BadRequest: the offset is no number, the chunk is empty or too long, or there are too
                many gaps.
            BlobNotFound: nobody has announced the blob, or it has expired.
        """
        _check_id(blob_id)
        if not (offset.isascii() and offset.isdigit() and len(offset) <= 12):
            raise BadRequest(
                f"the last level of the topic is {offset[:32]!r}: write init, fin or a byte offset"
            )
        blob = self._get(blob_id)
        start, end = int(offset), int(offset) + len(data)
        if not data or end > blob.size:
            raise BadRequest(
                f"a chunk of {len(data)} bytes at {start} is no part of the {blob.size} bytes that "
                "were announced"
            )
        if blob.sha256 is not None:
            return  # a chunk that came twice
        received = _merge(blob.received, (start, end))
        if len(received) > MOST_RANGES:
            raise BadRequest(f"there are over {MOST_RANGES} gaps: send larger chunks, in order")
        try:
            with self._part(blob_id).open("r+b") as file:
                file.seek(start)
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
            self._save(blob_id, blob.model_copy(update={"received": received}))
        except OSError as error:
            raise no_disk(error) from error

    def fin(self, blob_id: str, stated: BlobFin) -> Blob:
        """Finish a blob.

        Raises:
            BlobNotFound: nobody has announced the blob, or it has expired.
            BadRequest: bytes are missing, or it is not what `stated` says.
        """
        _check_id(blob_id)
        blob = self._get(blob_id)
        announced = blob.sha256 or blob.announced
        if stated.size != blob.size or announced not in (None, stated.sha256):
            raise BadRequest(
                f"fin and init disagree about the blob {blob_id!r}: send it anew under another id"
            )
        if blob.sha256 is not None:
            return blob
        missing = blob.missing()
        if missing:
            total = sum(end - start for start, end in missing)
            raise BadRequest(
                f"{total} of {blob.size} bytes are missing, the first at {missing[0][0]}: send the "
                "missing ranges, then fin again"
            )
        part = self._part(blob_id)
        try:
            found = sha256_file(part)
            if found != stated.sha256:
                self._save(blob_id, blob.model_copy(update={"received": ()}))
                raise BadRequest(
                    f"the sha256 of what came is {found}, not {stated.sha256}: send all chunks "
                    "again, then fin"
                )
            # The state first: a process that is killed in between finishes the move when it starts.
            blob = blob.model_copy(update={"sha256": found})
            self._save(blob_id, blob)
            part.replace(self._store.path(found))
        except OSError as error:
            raise no_disk(error) from error
        self._store.adopt(blob_id, found)
        self._count_reserved()
        return blob

    # Using

    def find(self, blob_id: str) -> Blob | None:
        """Return what is known of a blob, or None."""
        return self._blobs.get(blob_id)

    def use(self, blob_id: str, owner: object) -> tuple[str, Blob]:
        """Keep a finished blob's bytes for `owner` too; return their sha256 and the blob.

        Raises:
            BlobNotFound: there is no such blob, or not all of it.
        """
        blob = self._get(blob_id)
        if blob.sha256 is None:
            raise BlobNotFound(
                f"the blob {blob_id!r} is not finished: send the rest and fin, and wait for its "
                "reply"
            )
        self._store.keep(owner, blob.sha256)
        return blob.sha256, blob

    @property
    def ids(self) -> frozenset[str]:
        """Of all blobs: the owners that the media store knows them by."""
        return frozenset(self._blobs)

    # Time and restarts

    def load(self, now: float) -> None:
        """Read what an earlier process has left, and delete what is of no use any more."""
        for file in sorted(self._directory.glob("*.json")):
            blob_id = file.stem
            try:
                blob = Blob.model_validate_json(file.read_bytes())
                if blob.sha256 is not None:
                    part = self._part(blob_id)
                    if part.exists():
                        part.replace(self._store.path(blob.sha256))
                    self._store.adopt(blob_id, blob.sha256)
            except (OSError, ValidationError) as error:
                log.warning("the blob %s is lost: %s", blob_id, error)
                self._delete(blob_id)
            else:
                self._blobs[blob_id] = blob
        for file in self._directory.glob("*"):
            if file.stem not in self._blobs:
                file.unlink()
        self.expire(now)
        self._count_reserved()

    def expire(self, now: float) -> None:
        """Forget what has expired; requests that use it keep their own hold on the bytes."""
        expired = [name for name, blob in self._blobs.items() if blob.expires_at <= now]
        for blob_id in expired:
            self._delete(blob_id)
        if expired:
            self._count_reserved()

    def _get(self, blob_id: str) -> Blob:
        blob = self._blobs.get(blob_id)
        if blob is None:
            raise BlobNotFound(
                f"there is no blob {blob_id!r}: send init and its chunks first, or again if it has "
                "expired"
            )
        return blob

    def _part(self, blob_id: str) -> Path:
        return self._directory / f"{blob_id}.part"

    def _save(self, blob_id: str, blob: Blob) -> None:
        write_durably(self._directory / f"{blob_id}.json", blob.model_dump_json().encode())
        self._blobs[blob_id] = blob

    def _delete(self, blob_id: str) -> None:
        self._blobs.pop(blob_id, None)
        self._part(blob_id).unlink(missing_ok=True)
        (self._directory / f"{blob_id}.json").unlink(missing_ok=True)

    def _count_reserved(self) -> None:
        unfinished = (blob.size for blob in self._blobs.values() if blob.sha256 is None)
        self._store.reserved = sum(unfinished)


def _check_id(blob_id: str) -> None:
    try:
        _IDS.validate_python(blob_id)
    except ValidationError:
        raise BadRequest(
            "the blob's id in the topic must be 1 to 64 of the characters A-Z a-z 0-9 _ -"
        ) from None


def _merge(ranges: tuple[Range, ...], fresh: Range) -> tuple[Range, ...]:
    """Return `ranges` with `fresh` in them, in order, those that touch made one."""
    merged: list[Range] = []
    for start, end in sorted((*ranges, fresh)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
