"""The decoder process: takes encoded media from a socket, answers with float32 arrays.

Started by `Decoder` as `python -m nestd.daemon.prompt.decoder_worker FD OPTIONS`. It confines
itself before the first byte of a medium arrives, and ends when its socket closes or stays silent.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import Internal, RequestError
from nestd.daemon.prompt.audio import audio_windows
from nestd.daemon.prompt.decoder_messages import (
    ChannelClosed,
    Deadline,
    receive_header,
    receive_into,
    send,
)
from nestd.daemon.prompt.decoder_process import DecoderOptions
from nestd.daemon.prompt.image import pixel_values
from nestd.daemon.prompt.media import MediaFormat, MediaLimits
from nestd.daemon.prompt.video import video_frames

# Of 1000: killed before the engine (900), and far before the daemon.
OOM_SCORE_ADJ = "1000"
# What pictures and clips need. PyAV is large and comes with the first video.
LIBRARIES = (
    *("soundfile", "soxr", "PIL.ImageOps", "PIL.JpegImagePlugin", "PIL.MpoImagePlugin"),
    *("PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"),
)


def serve(channel: socket.socket, limits: MediaLimits, options: DecoderOptions) -> None:
    """Answer requests until the other side closes or is silent for `idle_seconds`."""
    send(channel, {"ready": True})
    while True:
        try:
            request = receive_header(channel, Deadline(options.idle_seconds))
            data = bytearray(request["body_bytes"])
            receive_into(channel, data, Deadline(options.timeout_seconds))
        except (ChannelClosed, TimeoutError):
            return
        _allow_cpu_seconds(options.timeout_seconds)
        try:
            _answer(channel, request, bytes(data), limits)
        except ChannelClosed:
            return


def _answer(
    channel: socket.socket, request: dict[str, Any], data: bytes, limits: MediaLimits
) -> None:
    try:
        for array, value in _decode(request, data, limits):
            send(channel, {"shape": array.shape, "value": value}, array.data)
    except ChannelClosed:
        raise
    except RequestError as error:
        send(channel, {"error": error.code, "message": str(error)})
    except MemoryError:
        send(channel, {"error": "too_large", "message": "the medium needs too much memory"})
    except Exception as error:  # noqa: BLE001 - reported to the other side, which logs it
        send(channel, {"error": Internal.code, "message": f"{type(error).__name__}: {error}"})
    else:
        send(channel, {"end": True})


def _decode(
    request: dict[str, Any], data: bytes, limits: MediaLimits
) -> Iterator[tuple[npt.NDArray[np.float32], float]]:
    kind, size = MediaFormat(request["format"]), request["size"]
    match request["kind"]:
        case "image":
            yield pixel_values(data, kind, size, limits), 0.0
        case "audio":
            for window in audio_windows(data, kind, limits):
                yield window.input_features, window.samples
        case "video":
            for frame in video_frames(data, kind, size, limits):
                yield frame.pixel_values, frame.seconds


def confine(options: DecoderOptions) -> None:
    """Take away from this process what decoding does not need."""
    # Before the memory limit, which counts from here, and before media can make an import fail.
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ, encoding="ascii")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError as error:  # no Linux
        print(f"nestd: the media decoder runs without a memory limit: {error}", file=sys.stderr)  # noqa: T201
    else:
        most = pages * resource.getpagesize() + options.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Codecs print warnings of their own, which any client could fill the log with.
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


def _allow_cpu_seconds(seconds: float) -> None:
    """Let this process use that much more CPU time; the kernel ends it with SIGXCPU beyond."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or most <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def main(arguments: list[str]) -> None:
    """Run the worker on the socket and with the options of the command line."""
    descriptor, text = arguments
    settings = json.loads(text)
    options = DecoderOptions(**settings["options"])
    with socket.socket(fileno=int(descriptor)) as channel:
        confine(options)
        serve(channel, MediaLimits(**settings["limits"]), options)


if __name__ == "__main__":
    main(sys.argv[1:])
