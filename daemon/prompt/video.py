"""MP4, Matroska (WebM) and AVI -> a few frames, each prepared like a picture.

Gemma 3n sees a video as a sequence of pictures. The time from the first frame to the end of the
last is cut into n equal parts and the frame shown in the middle of each is taken, where
n = seconds x `video_frames_per_second`, at least 1 and at most `video_frames`. Only what those
frames need is decoded: between two of them the reader jumps to the nearest key frame. Sound in the
file is ignored.

PyAV (FFmpeg's libraries, about 33 MB) is the optional extra `video`.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import ModalityUnavailable, RequestError, TooLarge, UnsupportedMedia
from nestd.daemon.prompt.image import squash
from nestd.daemon.prompt.media import MediaFormat, MediaLimits, broken, check_pixels

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame as AvFrame
    from av.video.stream import VideoStream

# FFmpeg's names. Naming the format keeps it from trying others, some of which open further files.
DEMUXERS = {MediaFormat.MP4: "mp4", MediaFormat.MATROSKA: "matroska", MediaFormat.AVI: "avi"}
# No camera of a board is faster; a file with more packets per second is made to keep us busy.
MOST_PACKETS_PER_SECOND = 240


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame: when it is shown (seconds from the start) and float32 [3, size, size]."""

    seconds: float
    pixel_values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Timeline:
    """When frames are shown and which are key frames; ascending, in units of the stream's clock."""

    shown: list[int]
    keys: list[int]


def video_frames(
    data: bytes, kind: MediaFormat, size: int, limits: MediaLimits
) -> Iterator[VideoFrame]:
    """Yield the sampled frames of one video in order, decoding each when it is asked for.

    Args:
        data: the encoded file.
        kind: its format, from `media.check`; no other demuxer is tried.
        size: side of the square, as for a picture.
        limits: `pixels` and `video_seconds` are compared with the headers before anything is
            decoded, and again with what the packets and frames say.

    Raises:
        ModalityUnavailable: PyAV is not installed.
        TooLarge: too long, too large frames, or not enough memory.
        UnsupportedMedia: broken, cut short, without pictures, or of a codec that FFmpeg lacks.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ModalityUnavailable(
            "this node takes no video: install nestd[video], or send pictures"
        ) from error
    try:
        with _open(data, kind) as container:
            timeline = _timeline(container, _stream(container, limits), limits)
        # Opened anew: after a broken index not every demuxer finds back to the start.
        with _open(data, kind) as container:
            stream = _stream(container, limits)
            yield from _sample(container, stream, timeline, size, limits)
    except RequestError:
        raise
    except MemoryError as error:  # PyAV's own derives from it
        raise TooLarge("the video needs too much memory: send a smaller one") from error
    except Exception as error:  # PyAV's errors derive from several built-in ones
        raise broken(f"{kind} video", error) from error


def sample_points(shown: list[int], seconds: float, limits: MediaLimits) -> list[int]:
    """Return the times of `shown` (ascending) to take, by the rule in the module's docstring.

    `seconds` is the length of the whole; the result has no time twice.
    """
    wanted = round(seconds * limits.video_frames_per_second)
    count = max(1, min(wanted, limits.video_frames, len(shown)))
    if len(shown) == 1:
        return shown
    # The last frame is shown about as long as the others.
    length = (shown[-1] - shown[0]) * len(shown) / (len(shown) - 1)
    middles = (shown[0] + length * (part + 0.5) / count for part in range(count))
    taken = {shown[max(0, bisect.bisect_right(shown, middle) - 1)] for middle in middles}
    return sorted(taken)


def _open(data: bytes, kind: MediaFormat) -> InputContainer:
    import av

    return av.open(io.BytesIO(data), "r", format=DEMUXERS[kind], metadata_errors="replace")


def _stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    """Return the video stream after comparing the headers with the limits."""
    if not container.streams.video:
        raise UnsupportedMedia("the video has no pictures: send sound as an audio part")
    stream = container.streams.video[0]
    check_pixels(stream.width, stream.height, limits)
    _check_seconds((container.duration or 0) / 1e6, limits)
    # More threads would hold more frames in memory and compete with the engine.
    stream.codec_context.thread_count = 1
    return stream


def _timeline(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> Timeline:
    """Read the packets, without decoding: headers may lie about length, or not state it."""
    shown: set[int] = set()
    keys: list[int] = []
    most = int(limits.video_seconds * MOST_PACKETS_PER_SECOND)
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.is_discard:
            continue
        shown.add(time)
        if packet.is_keyframe:
            keys.append(time)
        if len(shown) > most:
            raise TooLarge(f"the video has more than {most} frames: send a shorter one")
    if not shown:
        raise UnsupportedMedia("the video has no frames: send it again whole")
    return Timeline(sorted(shown), sorted(keys))


def _sample(
    container: InputContainer,
    stream: VideoStream,
    timeline: Timeline,
    size: int,
    limits: MediaLimits,
) -> Iterator[VideoFrame]:
    from PIL import Image

    if stream.time_base is None:
        raise UnsupportedMedia("the video has no clock: send it again whole")
    tick = float(stream.time_base)
    start = timeline.shown[0]
    seconds = (timeline.shown[-1] - start) * tick
    _check_seconds(seconds, limits)
    frames = container.decode(stream)
    position = start
    for target in sample_points(timeline.shown, seconds, limits):
        nearest = bisect.bisect_right(timeline.keys, target) - 1
        if nearest >= 0 and timeline.keys[nearest] > position:
            container.seek(timeline.keys[nearest], stream=stream)
            frames = container.decode(stream)
        frame = _advance(frames, target)
        position = target
        check_pixels(frame.width, frame.height, limits)
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
        if frame.rotation:
            # Counter-clockwise, as Pillow turns too; phones record portrait this way.
            picture = picture.rotate(frame.rotation, expand=True)
        yield VideoFrame((target - start) * tick, squash(picture, size))


def _advance(frames: Iterator[AvFrame], target: int) -> AvFrame:
    for frame in frames:
        time = frame.dts if frame.pts is None else frame.pts
        if time is not None and time >= target:
            return frame
    raise UnsupportedMedia("the video is cut short: send it again whole")


def _check_seconds(seconds: float, limits: MediaLimits) -> None:
    if seconds > limits.video_seconds:
        raise TooLarge(
            f"the video is {seconds:.0f} s long: send at most {limits.video_seconds:g} s"
        )
