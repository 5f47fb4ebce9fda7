"""A video becomes a few frames at uniform times, each prepared like a picture."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from support.media import clip, tone, video

from nestd.bundle.errors import ModalityUnavailable, TooLarge, UnsupportedMedia
from nestd.daemon.prompt.media import MediaFormat, MediaLimits
from nestd.daemon.prompt.video import VideoFrame, sample_points, video_frames

MP4, MATROSKA, AVI = MediaFormat.MP4, MediaFormat.MATROSKA, MediaFormat.AVI
LIMITS = MediaLimits(video_frames=5, video_frames_per_second=2)
CASES = [
    ("mp4", "libx264", MP4),
    ("mp4", "mpeg4", MP4),
    ("mov", "mjpeg", MP4),
    ("matroska", "libx264", MATROSKA),
    ("webm", "libvpx", MATROSKA),
    ("avi", "mpeg4", AVI),
]


def brightness(frame: VideoFrame) -> float:
    """Return the brightness of the lower half, 0 to 255."""
    return float(frame.pixel_values[:, 160:250, 20:230].mean() * 255)


def decode(data: bytes, kind: MediaFormat, limits: MediaLimits = LIMITS) -> list[VideoFrame]:
    return list(video_frames(data, kind, 256, limits))


@pytest.mark.parametrize(
    ("frames", "seconds", "limits", "taken"),
    [
        (1, 0.0, LIMITS, [0]),
        (10, 9.0, MediaLimits(video_frames=5), [1, 3, 5, 7, 9]),
        (10, 9.0, MediaLimits(video_frames=1), [5]),
        (10, 9.0, MediaLimits(video_frames=100), list(range(9))),
        (3, 100.0, MediaLimits(video_frames=8), [0, 1, 2]),
        (100, 3.3, MediaLimits(video_frames=8), [16, 50, 83]),
        (100, 0.2, MediaLimits(video_frames=8), [50]),
    ],
)
def test_the_frame_in_the_middle_of_each_equal_part_is_taken(
    frames: int, seconds: float, limits: MediaLimits, taken: list[int]
) -> None:
    points = sample_points(list(range(frames)), seconds, limits)
    # With nine parts of ten frames the middles are not frames' own times.
    assert len(points) == len(taken)
    assert all(abs(point - right) <= 1 for point, right in zip(points, taken, strict=True))


@pytest.mark.parametrize(("container", "codec", "kind"), CASES)
def test_frames_are_sampled_at_uniform_times(container: str, codec: str, kind: MediaFormat) -> None:
    pytest.importorskip("av")
    frames = decode(video(container, codec), kind)
    np.testing.assert_allclose([frame.seconds for frame in frames], [0.3, 0.9, 1.5, 2.1, 2.7])
    for frame, number in zip(frames, (9, 27, 45, 63, 81), strict=True):
        assert frame.pixel_values.shape == (3, 256, 256)
        assert frame.pixel_values.dtype == np.float32
        assert brightness(frame) == pytest.approx(2 * number, abs=6)
        assert frame.pixel_values[0, 40:80].mean() > 0.85  # red above
        assert frame.pixel_values[2, 40:80].mean() < 0.15


def test_frames_are_decoded_when_they_are_asked_for() -> None:
    pytest.importorskip("av")
    data = video("mp4", "libx264")
    frames = video_frames(data, MP4, 256, LIMITS)
    assert next(frames).seconds == pytest.approx(0.3)
    frames.close()  # type: ignore[attr-defined]


def test_a_phones_rotation_is_applied() -> None:
    pytest.importorskip("av")
    data = video("mp4", "libx264", frames=5)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    # A quarter clockwise (ISO/IEC 14496-12, 8.3.2): the red upper half comes to the right.
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (frame,) = decode(data[:at] + turned + data[at + 36 :], MP4, MediaLimits(video_frames=1))
    assert frame.pixel_values[0, :, 150:].mean() > 0.85
    assert frame.pixel_values[0, :, :100].mean() < 0.15


def test_a_video_over_a_limit_is_refused() -> None:
    pytest.importorskip("av")
    data = video("mp4", "libx264")
    with pytest.raises(TooLarge, match="3 s long: send at most 2 s"):
        decode(data, MP4, MediaLimits(video_seconds=2))
    with pytest.raises(TooLarge, match="64 x 48 pixels"):
        decode(data, MP4, MediaLimits(pixels=1000))


def test_a_length_that_lies_to_be_short_is_found_out() -> None:
    pytest.importorskip("av")
    data = bytearray(video("matroska", "libx264"))
    at = data.index(b"\x44\x89\x88")  # Duration, a float of 8 bytes, in milliseconds
    struct.pack_into(">d", data, at + 3, 10.0)
    with pytest.raises(TooLarge, match="3 s long"):
        decode(bytes(data), MATROSKA, MediaLimits(video_seconds=2))


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("container", "codec", "kind"), CASES)
def test_a_truncated_video_gives_whole_frames_or_an_error(
    container: str, codec: str, kind: MediaFormat, part: float
) -> None:
    pytest.importorskip("av")
    data = video(container, codec)
    try:
        frames = decode(data[: int(len(data) * part)], kind)
    except UnsupportedMedia:
        return
    assert 1 <= len(frames) <= 5
    assert all(np.isfinite(frame.pixel_values).all() for frame in frames)


def test_a_container_without_pictures_is_refused() -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with (
        av.open(file, "w", format="matroska") as target,
        av.open(io.BytesIO(clip(tone(0.5), "WAV"))) as source,
    ):
        stream = target.add_stream("pcm_s16le", rate=16_000)
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    with pytest.raises(UnsupportedMedia, match="no pictures"):
        decode(file.getvalue(), MATROSKA)


def test_no_other_demuxer_is_tried_than_that_of_the_format() -> None:
    pytest.importorskip("av")
    with pytest.raises(UnsupportedMedia):
        decode(video("avi", "mpeg4"), MATROSKA)


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModalityUnavailable, match=r"install nestd\[video\]"):
        decode(b"anything", MP4)
