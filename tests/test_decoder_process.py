"""Whatever happens in the decoder process, the caller gets arrays or one of our errors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from support.media import clip, encoded, photo, tone, video

from nestd.bundle.errors import Internal, RequestError, TooLarge, UnsupportedMedia
from nestd.daemon.prompt import decoder_process
from nestd.daemon.prompt.audio import audio_windows
from nestd.daemon.prompt.decoder_messages import LENGTH, Deadline, receive_header, receive_into
from nestd.daemon.prompt.decoder_process import Decoder, DecoderOptions
from nestd.daemon.prompt.image import pixel_values
from nestd.daemon.prompt.media import MediaFormat, MediaLimits
from nestd.daemon.prompt.video import video_frames

PICTURE = encoded(photo(120, 90), "JPEG")
CLIP = clip(tone(31, 8000, 2), "WAV", 8000)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder() as made:
        yield made


def during(decoder: Decoder, act: Any, medium: bytes = PICTURE) -> RequestError:
    """Stop the worker, ask it, do `act` to it, and return the error that comes of it."""
    decoder.image(PICTURE, 256)
    pid = decoder.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(decoder.image, medium, 256)
        time.sleep(0.1)
        act(pid)
        with pytest.raises(RequestError) as caught:
            answer.result(30)
    return caught.value


@pytest.mark.parametrize("size", [64, 512])
def test_the_process_gives_what_decoding_in_place_gives(decoder: Decoder, size: int) -> None:
    """Whatever square a bundle was converted for."""
    limits = MediaLimits()
    np.testing.assert_array_equal(
        decoder.image(PICTURE, size), pixel_values(PICTURE, MediaFormat.JPEG, size, limits)
    )
    ours, theirs = decoder.audio(CLIP), audio_windows(CLIP, MediaFormat.WAV, limits)
    assert [window.samples for window in ours] == [480_000, 16_000]
    for window, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(window.input_features, other.input_features, atol=1e-5)
        np.testing.assert_array_equal(window.input_features_mask, other.input_features_mask)


def test_a_video_comes_frame_by_frame(decoder: Decoder) -> None:
    pytest.importorskip("av")
    data = video("mp4", "libx264")
    ours = decoder.video(data, 256, "video/mp4")
    theirs = list(video_frames(data, MediaFormat.MP4, 256, decoder.limits))
    assert [frame.seconds for frame in ours] == [frame.seconds for frame in theirs]
    for frame, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(frame.pixel_values, other.pixel_values)


def test_one_worker_serves_until_it_is_closed(decoder: Decoder) -> None:
    assert decoder.pid is None
    decoder.image(PICTURE, 256)
    first = decoder.pid
    decoder.audio(CLIP, "audio/wav")
    assert decoder.pid == first
    decoder.close()
    assert decoder.pid is None
    decoder.image(PICTURE, 256)
    assert decoder.pid != first


def test_a_refused_medium_leaves_the_worker_running(decoder: Decoder) -> None:
    with pytest.raises(UnsupportedMedia, match="cut short"):
        decoder.image(PICTURE[:-200], 256)
    pid = decoder.pid
    with pytest.raises(TooLarge, match="too many pixels"):
        decoder.image(encoded(Image.new("1", (20_000, 20_000)), "PNG"), 256)
    assert decoder.image(PICTURE, 256).shape == (3, 256, 256)
    assert decoder.pid == pid


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL])
def test_a_crash_is_unsupported_media_and_the_next_medium_is_decoded(
    decoder: Decoder, number: signal.Signals
) -> None:
    error = during(decoder, lambda pid: (os.kill(pid, number), os.kill(pid, signal.SIGCONT)))
    assert isinstance(error, UnsupportedMedia)
    assert "crashed the decoder" in str(error)
    assert decoder.image(PICTURE, 256).shape == (3, 256, 256)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])
def test_a_worker_that_the_kernel_kills_is_too_large(
    decoder: Decoder, number: signal.Signals
) -> None:
    error = during(decoder, lambda pid: (os.kill(pid, number), os.kill(pid, signal.SIGCONT)))
    assert isinstance(error, TooLarge)
    assert decoder.image(PICTURE, 256).shape == (3, 256, 256)


def test_a_worker_that_hangs_is_killed() -> None:
    with Decoder(options=DecoderOptions(timeout_seconds=1.5)) as decoder:
        stopped: list[int] = []
        error = during(decoder, stopped.append)
        assert isinstance(error, TooLarge)
        assert "longer than 1.5 s" in str(error)
        assert not psutil.pid_exists(stopped[0])
        assert decoder.image(PICTURE, 256).shape == (3, 256, 256)


def test_a_picture_beyond_the_memory_limit_is_too_large() -> None:
    large = encoded(Image.new("RGBA", (5000, 5000)), "PNG")
    with Decoder(options=DecoderOptions(memory_bytes=64 * 1024 * 1024)) as decoder:
        with pytest.raises(TooLarge, match="too much memory"):
            decoder.image(large, 256)
        assert decoder.image(PICTURE, 256).shape == (3, 256, 256)


def test_an_idle_worker_ends_and_the_next_medium_starts_another() -> None:
    with Decoder(options=DecoderOptions(idle_seconds=0.2)) as decoder:
        decoder.image(PICTURE, 256)
        process = psutil.Process(decoder.pid)
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        decoder.image(PICTURE, 256)
        assert decoder.pid != process.pid


def test_a_worker_that_ends_for_being_idle_as_a_medium_comes_is_replaced(decoder: Decoder) -> None:
    decoder.image(PICTURE, 256)
    first, running = decoder.pid, decoder._channel
    assert running is not None
    asked = iter([True])

    def exchange(*arguments: Any) -> Any:
        if next(asked, False):
            running.shutdown(socket.SHUT_RDWR)  # the worker reads its end and exits with 0
        return original(*arguments)

    original, decoder._exchange = decoder._exchange, exchange  # type: ignore[method-assign]
    assert decoder.image(PICTURE, 256).shape == (3, 256, 256)
    assert decoder.pid != first


def test_the_worker_ends_with_its_parents_socket(decoder: Decoder) -> None:
    decoder.image(PICTURE, 256)
    process = psutil.Process(decoder.pid)
    assert decoder._channel is not None
    decoder._channel.close()
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_worker_has_limits_and_no_secrets(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTD_MQTT__PASSWORD", "secret")
    decoder.image(PICTURE, 256)
    process = psutil.Process(decoder.pid)
    assert not any(name.startswith("NESTD") for name in process.environ())
    assert process.rlimit(psutil.RLIMIT_AS)[0] < 1 << 30
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CPU)[0] < 60
    score = Path(f"/proc/{decoder.pid}/oom_score_adj").read_text(encoding="ascii")
    assert int(score) == 1000


def test_a_worker_that_does_not_start_is_our_fault_not_the_mediums(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_process, "environment", lambda: {"PYTHONHOME": os.devnull})
    with pytest.raises(Internal, match="does not start"):
        decoder.image(PICTURE, 256)
    assert decoder.pid is None


GOOD = {"shape": [3, 256, 256], "value": 0.0, "body_bytes": 3 * 256 * 256 * 4}


def framed(header: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return LENGTH.pack(len(text)) + text + body


@pytest.mark.parametrize(
    "answer",
    [
        framed({"end": True}),
        framed({**GOOD, "shape": [3, 256, 255]}),
        framed({**GOOD, "shape": [3, 10**9, 10**9], "body_bytes": 12 * 10**18}),
        framed({**GOOD, "shape": "wide"}),
        framed({**GOOD, "body_bytes": 10**15}),
        framed({**GOOD, "value": float("nan")}),
        framed({**GOOD, "value": "x"}),
        framed({**GOOD, "value": None}),
        framed({"body_bytes": 0}),
        framed(GOOD, np.full((3, 256, 256), np.nan, np.float32).tobytes()),
        framed(GOOD, bytes(GOOD["body_bytes"])) * 2,  # type: ignore[arg-type]
        framed({"error": "too_large"}),
        framed(b"not JSON"),
        framed(b"[1]"),
        framed(b"[" * 60_000),
        b"\xff\xff\xff\xff",
    ],
)
def test_a_hostile_worker_gets_nothing_past_the_border(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(decoder, "_running", lambda: ours)
    monkeypatch.setattr(decoder, "_channel", ours)

    def play() -> None:
        header = receive_header(theirs, Deadline(10))
        receive_into(theirs, bytearray(header["body_bytes"]), Deadline(10))
        with contextlib.suppress(BrokenPipeError):  # not read to the end
            theirs.sendall(answer)

    with ours, theirs:
        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(UnsupportedMedia, match="made the decoder fail"):
            decoder.image(PICTURE, 256)
        thread.join()


def test_calls_from_several_threads_take_turns(decoder: Decoder) -> None:
    with ThreadPoolExecutor(4) as pool:
        pictures = [pool.submit(decoder.image, PICTURE, size) for size in (256, 512, 768) * 3]
        assert [picture.result().shape[1] for picture in pictures] == [256, 512, 768] * 3
