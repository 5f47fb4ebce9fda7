"""The log: text or JSON lines on standard error, with priorities where the journal reads it.

    text    INFO nestd.daemon.replies: request light-1 is done: 7 tokens on E2B
    json    {"time": ..., "level": "info", "logger": ..., "message": ..., "request": "light-1"}

A line about a request names its id: in its words and, in JSON, as `request`, which callers pass
with `extra=about(request_id)`. Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

Format = Literal["text", "json"]
TEXT = "%(levelname)s %(name)s: %(message)s"


def about(request_id: str | None) -> dict[str, str | None]:
    """Return the `extra` of a log line about one request."""
    return {"request": request_id}


def configure(level: str, form: Format, stream: TextIO | None = None) -> None:
    """Let the process log to `stream`, standard error by default."""
    stream = sys.stderr if stream is None else stream
    formatter = JsonFormatter() if form == "json" else logging.Formatter(TEXT)
    handler = logging.StreamHandler(stream)
    is_journal = journal_reads(stream, os.environ)
    handler.setFormatter(PriorityFormatter(formatter) if is_journal else formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def journal_reads(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Say whether `stream` goes to systemd's journal.

    JOURNAL_STREAM names the device and inode of the socket that systemd gave us; it is inherited
    by programs whose output goes elsewhere, so both are compared. Source: systemd.exec(5).
    """
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdigit() and inode.isdigit()):
        return False
    found = os.fstat(stream.fileno())
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = getattr(record, "request", None)
        if request is not None:
            fields["request"] = request
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class PriorityFormatter(logging.Formatter):
    """Begins each line with its priority, as the journal takes it: `<3>` for an error.

    Source: sd-daemon(3).
    """

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or the lines of an exception."""
        prefix = f"<{_priority(record.levelno)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).splitlines())


def _priority(level: int) -> int:
    """Return the syslog priority of a level of the logging module."""
    for least, priority in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4)):
        if level >= least:
            return priority
    return 6 if level >= logging.INFO else 7
