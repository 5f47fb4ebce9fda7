"""What the engine process and the decoder process say to each other.

A message is a length (4 bytes, big endian), that many bytes of JSON (an object), and then the raw
bytes whose number `body_bytes` in the JSON gives. The decoder says `{"ready": true}` once.
A request is `{kind, format, size}` with the encoded file as its body. The answer is one message for
each array, `{shape, value}` with float32 in the machine's byte order, where `value` is an audio
window's samples or a frame's seconds, and then `{"end": true}`; or instead of any of them
`{error, message}` with a wire code of `nestd.bundle.errors`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

Buffer = bytes | bytearray | memoryview

LENGTH = struct.Struct(">I")
# Of the JSON: a header larger than this is not one of ours.
MOST_HEADER_BYTES = 65536


class ChannelClosed(Exception):
    """The other side has ended."""


class Deadline:
    """A point in time that all steps of one exchange share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def apply(self, channel: socket.socket) -> None:
        """Let the next operation on `channel` end by then; TimeoutError if it is past."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(left)


def send(
    channel: socket.socket, header: dict[str, Any], body: Buffer = b"", seconds: float = 60.0
) -> None:
    """Send one message.

    Raises:
        ChannelClosed: the other side has ended.
        TimeoutError: it does not read.
    """
    raw = _flat(body)
    text = json.dumps({**header, "body_bytes": raw.nbytes}).encode()
    channel.settimeout(seconds)
    try:
        channel.sendall(LENGTH.pack(len(text)) + text)
        if raw.nbytes:
            channel.sendall(raw)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosed from error


def receive_header(channel: socket.socket, deadline: Deadline) -> dict[str, Any]:
    """Return the JSON of the next message; its body follows by `receive_into`.

    Raises:
        ChannelClosed: the other side has ended.
        TimeoutError: nothing came in time.
        ValueError: it is no message.
    """
    prefix = bytearray(LENGTH.size)
    receive_into(channel, prefix, deadline)
    (length,) = LENGTH.unpack(prefix)
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    text = bytearray(length)
    receive_into(channel, text, deadline)
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header


def receive_into(channel: socket.socket, target: Buffer, deadline: Deadline) -> None:
    """Fill `target` (contiguous, writable) from `channel`; errors as `receive_header`."""
    view = _flat(target)
    while view.nbytes:
        deadline.apply(channel)
        try:
            count = channel.recv_into(view)
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if not count:
            raise ChannelClosed
        view = view[count:]


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")
