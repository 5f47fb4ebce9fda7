"""Decodes untrusted media in a process of its own, which may crash, hang or run out of memory.

`Decoder` starts `decoder_worker.py` when the first medium comes. The worker has a memory limit, a
CPU limit, no secrets in its environment and nothing open but its socket; it ends by itself when it
has been idle. Whatever it does, the caller gets arrays of the stated shapes with finite values or a
`RequestError` with one sentence, and the next medium gets a new worker where the old one died. The
arrays are checked as if the worker were hostile, since a codec's hole would make it so.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import (
    InsufficientMemory,
    Internal,
    ModalityUnavailable,
    RequestError,
    TooLarge,
    UnsupportedMedia,
    request_error,
)
from nestd.daemon.prompt.audio import BINS, WINDOW, AudioWindow, frame_count
from nestd.daemon.prompt.decoder_messages import (
    ChannelClosed,
    Deadline,
    receive_header,
    receive_into,
    send,
)
from nestd.daemon.prompt.media import MediaKind, MediaLimits, check
from nestd.daemon.prompt.video import VideoFrame

FloatArray = npt.NDArray[np.float32]

# Importing the codecs from a slow card while the board is busy.
START_SECONDS = 60.0
# What the interpreter and the codecs need; a password in NESTD_... stays out.
ENVIRONMENT = ("PYTHON", "PATH", "LD_LIBRARY_PATH", "LANG", "LC_")
# Errors that the worker may answer with.
ANSWERS = (TooLarge, UnsupportedMedia, ModalityUnavailable)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecoderOptions:
    """What one worker may use.

    Attributes:
        timeout_seconds: for one medium, from the request to the last array.
        memory_bytes: of address space beyond what the idle worker has.
        idle_seconds: after which the worker ends and gives its memory back.
    """

    timeout_seconds: float = 30.0
    memory_bytes: int = 640 * 1024 * 1024
    idle_seconds: float = 30.0


class Decoder:
    """Asks the decoder process. Calls block, and calls from several threads take turns."""

    def __init__(
        self, limits: MediaLimits | None = None, options: DecoderOptions | None = None
    ) -> None:
        self.limits = limits or MediaLimits()
        self._options = options or DecoderOptions()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while there is none."""
        return self._process.pid if self._process else None

    def image(self, data: bytes, size: int, content_type: str | None = None) -> FloatArray:
        """Return `pixel_values`, float32 [3, size, size] from 0 to 1.

        Raises:
            RequestError: TooLarge or UnsupportedMedia for the medium; Internal or
                InsufficientMemory where no worker starts.
        """
        parts = self._ask("image", data, size, content_type, most=1)
        (pixels, _) = parts[0]
        return pixels

    def audio(self, data: bytes, content_type: str | None = None) -> list[AudioWindow]:
        """Return the clip's windows of at most 30 s, at least one; errors as `image`."""
        most = math.ceil(self.limits.audio_seconds * 16_000 / WINDOW) + 1
        parts = self._ask("audio", data, 0, content_type, most=most)
        return [AudioWindow(features, int(samples)) for features, samples in parts]

    def video(self, data: bytes, size: int, content_type: str | None = None) -> list[VideoFrame]:
        """Return the sampled frames, at least one; errors as `image`.

        Raises:
            ModalityUnavailable: PyAV is not installed.
        """
        most = self.limits.video_frames
        parts = self._ask("video", data, size, content_type, most=most)
        return [VideoFrame(seconds, pixels) for pixels, seconds in parts]

    def close(self) -> None:
        """End the worker; the next medium starts another."""
        with self._lock:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, kind: MediaKind, data: bytes, size: int, content_type: str | None, most: int
    ) -> list[tuple[FloatArray, float]]:
        """Return 1 to `most` arrays with their values."""
        request = {
            "kind": kind,
            "format": check(kind, data, self.limits, content_type),
            "size": size,
        }
        with self._lock:
            try:
                try:
                    return self._exchange(request, data, most)
                except ChannelClosed:
                    if self._wait() != 0:
                        raise
                    # It had just ended for being idle: a new one has not.
                    self._kill()
                    return self._exchange(request, data, most)
            except TimeoutError as error:
                self._kill()
                raise TooLarge(
                    f"the {kind} takes longer than {self._options.timeout_seconds:g} s to decode: "
                    "send a smaller one"
                ) from error
            except ChannelClosed as error:
                code = self._wait()
                self._kill()
                _log.warning("the decoder ended with %s while decoding %s", code, request)
                raise _death(kind, code) from error
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                self._kill()
                _log.warning("the decoder's answer to %s is none: %s", request, error)
                raise UnsupportedMedia(
                    f"the {kind} made the decoder fail: encode it anew and send it again"
                ) from error

    def _exchange(
        self, request: dict[str, Any], data: bytes, most: int
    ) -> list[tuple[FloatArray, float]]:
        channel = self._running()
        deadline = Deadline(self._options.timeout_seconds)
        send(channel, request, data, self._options.timeout_seconds)
        parts: list[tuple[FloatArray, float]] = []
        while True:
            header = receive_header(channel, deadline)
            if "error" in header:
                raise _answered(header)
            if "end" in header:
                break
            if len(parts) == most:
                raise ValueError(f"more than {most} arrays")
            value = float(header["value"])
            array = np.empty(_shape(request, header["shape"], value), np.float32)
            if header["body_bytes"] != array.nbytes:
                raise ValueError(f"{header['body_bytes']} bytes for {array.shape}")
            receive_into(channel, array.data, deadline)
            if not np.isfinite(array).all():
                raise ValueError("values that are not finite")
            parts.append((array, value))
        if not parts:
            raise ValueError("no arrays")
        return parts

    def _running(self) -> socket.socket:
        """Return the channel of a worker that runs and is ready, started now if there is none."""
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self._kill()
        ours, theirs = socket.socketpair()
        options = json.dumps({"limits": asdict(self.limits), "options": asdict(self._options)})
        module = "nestd.daemon.prompt.decoder_worker"
        command = [sys.executable, "-m", module, str(theirs.fileno()), options]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment(),
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise InsufficientMemory(
                    f"the media decoder cannot be started ({error.strerror}): try again later"
                ) from error
        self._channel = ours
        try:
            receive_header(ours, Deadline(START_SECONDS))
        except (ChannelClosed, TimeoutError, ValueError) as error:
            self._kill()
            raise Internal("the media decoder does not start: see the node's log") from error
        return ours

    def _wait(self) -> int | None:
        """Return how the worker that has closed its socket ended, None if it does not end."""
        if self._process is None:
            return None
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:
            return None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None


def environment() -> dict[str, str]:
    """Return the environment that a worker runs in."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
    # One small matrix product does not need a pool of threads with a stack each.
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _shape(request: dict[str, Any], stated: object, value: float) -> tuple[int, ...]:
    """Return the only shape that may answer `request`; ValueError if `stated` is another."""
    if request["kind"] == "audio":
        if not (1 <= value <= WINDOW and value.is_integer()):
            raise ValueError(f"a window of {value} samples")
        right: tuple[int, ...] = (frame_count(int(value)), BINS)
    else:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"a frame at {value} s")
        right = (3, request["size"], request["size"])
    if stated != list(right):
        raise ValueError(f"an array of shape {stated}, not {right}")
    return right


def _answered(header: dict[str, Any]) -> RequestError:
    error = request_error(str(header["error"]), str(header["message"])[:500])
    if not isinstance(error, ANSWERS):
        _log.error("the decoder failed: %s", error)
        return Internal("the media decoder failed: see the node's log")
    return error


def _death(kind: MediaKind, code: int | None) -> RequestError:
    # The kernel kills for memory with SIGKILL and for CPU time with SIGXCPU; others are crashes.
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return TooLarge(f"the {kind} needs too much memory or time to decode: send a smaller one")
    return UnsupportedMedia(f"the {kind} crashed the decoder: encode it anew and send it again")
