"""Encoded media in files, one for each content, for as long as somebody needs them.

A request that waits costs disk in place of memory, the engine reads the file, and the same picture
in ten requests is one file. Who needs a file is the caller's business: an owner is any hashable
object. What no owner needs is deleted; a daemon that starts finds only what finished blobs own.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Hashable
from contextlib import suppress
from pathlib import Path

from nestd.bundle.errors import QueueFull, RequestError

log = logging.getLogger(__name__)

RETRY_MS = 30_000


class MediaStore:
    """A directory of files named by their sha256.

    Attributes:
        reserved: bytes promised to blobs that are still coming in.
    """

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._sizes: dict[str, int] = {}
        self._owners: dict[Hashable, set[str]] = {}
        self.reserved = 0

    def path(self, sha256: str) -> Path:
        """Return where the file with this digest lies."""
        return self._directory / sha256

    def prepare(self) -> None:
        """Make the directory; only this user can read it, for it holds what people photograph."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, owner: Hashable, data: bytes) -> str:
        """Keep `data` for `owner` and return its sha256.

        Raises:
            QueueFull: no room in the store, or on the disk.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self._sizes:
            self.check_room(len(data))
            try:
                self.prepare()
                self.path(sha256).write_bytes(data)
            except OSError as error:
                with suppress(OSError):  # there may not even be a directory
                    self.path(sha256).unlink()
                raise no_disk(error) from error
            self._sizes[sha256] = len(data)
        self.keep(owner, sha256)
        return sha256

    def adopt(self, owner: Hashable, sha256: str) -> None:
        """Keep a file for `owner` that lies in the store's directory already."""
        self._sizes[sha256] = self.path(sha256).stat().st_size
        self.keep(owner, sha256)

    def keep(self, owner: Hashable, sha256: str) -> None:
        """Keep a known file for one more owner."""
        self._owners.setdefault(owner, set()).add(sha256)

    def check_room(self, count: int) -> None:
        """Raise QueueFull unless `count` more bytes fit."""
        free = self._most_bytes - sum(self._sizes.values()) - self.reserved
        if count > free:
            raise QueueFull(
                f"the node's store of media has room for {max(0, free)} bytes more, not {count}: "
                "try again later or on another node",
                RETRY_MS,
            )

    def release_all_but(self, owners: Collection[Hashable]) -> None:
        """Delete what none of `owners` needs."""
        gone = self._owners.keys() - owners
        if not gone:
            return
        for owner in gone:
            del self._owners[owner]
        for sha256 in self._sizes.keys() - set().union(*self._owners.values()):
            self.path(sha256).unlink(missing_ok=True)
            del self._sizes[sha256]

    def clear(self) -> None:
        """Delete the files of an earlier process that nobody has adopted."""
        if self._directory.is_dir():
            for file in self._directory.iterdir():
                if file.is_file() and file.name not in self._sizes:
                    file.unlink()


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file at `path` so that a power cut leaves one or the other."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def no_disk(error: OSError) -> RequestError:
    """Return the error for a client whose medium could not be written."""
    log.error("cannot store a medium: %s", error)
    return QueueFull(
        f"the node cannot store the medium ({error.strerror}): try again later or on another node",
        RETRY_MS,
    )
