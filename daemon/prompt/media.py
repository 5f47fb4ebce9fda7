"""Untrusted media: which format the bytes are, and the limits that hold before they are decoded.

The format is read from the first bytes alone: the type of the part and its `content_type` are only
compared with it, and a contradiction is an error, never a reason to try another decoder. Nothing
here decodes; that happens in the decoder process (`decoder_process.py`).

A file may be valid in two formats (a polyglot). It is decoded as what its first bytes say, by that
format's decoder only, and what lies behind the medium is ignored, because phones append to JPEGs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from nestd.bundle.errors import TooLarge, UnsupportedMedia

MediaKind = Literal["image", "audio", "video"]


class MediaFormat(StrEnum):
    """The formats that are accepted; the values are for sentences."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WebP"
    WAV = "WAV"
    FLAC = "FLAC"
    OGG = "OGG"
    MP3 = "MP3"
    MP4 = "MP4"
    MATROSKA = "Matroska"
    AVI = "AVI"


FORMATS: dict[MediaKind, tuple[MediaFormat, ...]] = {
    "image": (MediaFormat.JPEG, MediaFormat.PNG, MediaFormat.WEBP),
    "audio": (MediaFormat.WAV, MediaFormat.FLAC, MediaFormat.OGG, MediaFormat.MP3),
    "video": (MediaFormat.MP4, MediaFormat.MATROSKA, MediaFormat.AVI),
}
CONTENT_TYPES = {
    "image/jpeg": MediaFormat.JPEG,
    "image/jpg": MediaFormat.JPEG,
    "image/png": MediaFormat.PNG,
    "image/webp": MediaFormat.WEBP,
    "audio/wav": MediaFormat.WAV,
    "audio/wave": MediaFormat.WAV,
    "audio/x-wav": MediaFormat.WAV,
    "audio/vnd.wave": MediaFormat.WAV,
    "audio/flac": MediaFormat.FLAC,
    "audio/x-flac": MediaFormat.FLAC,
    "audio/ogg": MediaFormat.OGG,
    "audio/opus": MediaFormat.OGG,
    "audio/vorbis": MediaFormat.OGG,
    "application/ogg": MediaFormat.OGG,
    "audio/mpeg": MediaFormat.MP3,
    "audio/mp3": MediaFormat.MP3,
    "video/mp4": MediaFormat.MP4,
    "video/quicktime": MediaFormat.MP4,
    "video/webm": MediaFormat.MATROSKA,
    "video/x-matroska": MediaFormat.MATROSKA,
    "video/x-msvideo": MediaFormat.AVI,
    "video/avi": MediaFormat.AVI,
}
# Says nothing about the bytes.
UNTYPED = "application/octet-stream"

# What people send and nestd does not take, to name it in the error.
_REFUSED = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"\xff\xf1", "AAC"),
    (b"\xff\xf9", "AAC"),
    (b"<svg", "SVG"),
    (b"data:", "a data: URL instead of its base64 text"),
)
_RIFF = {b"WAVE": MediaFormat.WAV, b"WEBP": MediaFormat.WEBP, b"AVI ": MediaFormat.AVI}
# Brands of ISO files that hold no video (ISO/IEC 14496-12; the registry at mp4ra.org).
_STILL_OR_SOUND = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIF",
    b"avif": "AVIF",
    b"M4A ": "M4A (AAC)",
    b"M4B ": "M4B (AAC)",
}


@dataclass(frozen=True)
class MediaLimits:
    """What one medium may be. Over a limit is 413.

    Attributes:
        bytes: of the encoded file.
        pixels: width x height of an image or a frame; 50 million hold a phone's full picture.
        audio_seconds: of all windows of a clip together.
        video_seconds: from the first frame to the last.
        video_frames: that are taken from a video; a longer one is sampled more thinly.
        video_frames_per_second: the rate of sampling where `video_frames` allows it.
    """

    bytes: int = 32 * 1024 * 1024
    pixels: int = 50_000_000
    audio_seconds: float = 300.0
    video_seconds: float = 600.0
    video_frames: int = 8
    video_frames_per_second: float = 1.0


def sniff(data: bytes) -> MediaFormat:
    """Return the format that the first bytes of `data` say.

    Raises:
        UnsupportedMedia: it is none that nestd takes.
    """
    head = data[:16]
    if head.startswith(b"\xff\xd8\xff"):
        return MediaFormat.JPEG
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return MediaFormat.PNG
    if head.startswith(b"RIFF") and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head.startswith(b"fLaC"):
        return MediaFormat.FLAC
    if head.startswith(b"OggS"):
        return MediaFormat.OGG
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return MediaFormat.MATROSKA
    if head[4:8] == b"ftyp" and head[8:12] not in _STILL_OR_SOUND:
        return MediaFormat.MP4
    if head.startswith(b"ID3") or _is_mp3_frame(head):
        return MediaFormat.MP3
    name = _STILL_OR_SOUND.get(head[8:12]) if head[4:8] == b"ftyp" else None
    name = name or next((name for magic, name in _REFUSED if head.startswith(magic)), None)
    accepted = "; ".join(f"{kind}: {_names(formats)}" for kind, formats in FORMATS.items())
    raise UnsupportedMedia(
        f"the medium is {name or 'of no known format'}: send one of these ({accepted})"
    )


def check(
    kind: MediaKind, data: bytes, limits: MediaLimits, content_type: str | None = None
) -> MediaFormat:
    """Return the format of `data` after comparing it with what the part says it is.

    Args:
        kind: the type of the content part.
        data: the encoded file.
        limits: `bytes` counts here, the others when the header is read.
        content_type: as the client gave it; parameters are ignored.

    Raises:
        TooLarge: more bytes than allowed.
        UnsupportedMedia: empty, of no accepted format, or not what the part says.
    """
    if not data:
        raise UnsupportedMedia(f"the {kind} is empty: send its bytes")
    if len(data) > limits.bytes:
        raise TooLarge(f"the {kind} has {len(data)} bytes: send at most {limits.bytes}")
    found = sniff(data)
    if found not in FORMATS[kind]:
        raise UnsupportedMedia(
            f"the part's type is {kind} but its bytes are {found}: send {_names(FORMATS[kind])}, "
            "or correct the type"
        )
    stated = (content_type or UNTYPED).partition(";")[0].strip().lower()
    if stated != UNTYPED and CONTENT_TYPES.get(stated) is not found:
        right = next(name for name, value in CONTENT_TYPES.items() if value is found)
        raise UnsupportedMedia(
            f"content_type is {stated[:64]!r} but the bytes are {found}: "
            f"say {right}, or leave it out"
        )
    return found


def broken(medium: str, error: Exception) -> UnsupportedMedia:
    """Return the error for a `medium` ("JPEG picture") whose decoder raised `error`."""
    # Libraries name the object that they read from, with its address in memory.
    noise = r"(: )?'?<[^<>]*>'?|^Error opening |^\[Errno \d+\] "
    reason = re.sub(noise, "", str(error)).strip(" .:") or type(error).__name__
    return UnsupportedMedia(
        f"the {medium} is broken or cut short ({reason[:200]}): send it again whole"
    )


def check_pixels(width: int, height: int, limits: MediaLimits) -> None:
    """Refuse a picture of this size before it is decoded.

    Raises:
        TooLarge: more pixels than allowed.
        UnsupportedMedia: no pixels at all.
    """
    if width < 1 or height < 1:
        raise UnsupportedMedia(f"the picture is {width} x {height} pixels: send one with content")
    if width * height > limits.pixels:
        raise TooLarge(
            f"the picture is {width} x {height} pixels: send at most {limits.pixels} in all"
        )


def _is_mp3_frame(head: bytes) -> bool:
    """Tell an MPEG audio frame header of layer III from other bytes (ISO/IEC 11172-3, 2.4.1.3)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return False
    reserved_version = head[1] & 0x18 == 0x08
    free_or_bad_rate = head[2] >> 4 in (0, 15)
    return not (reserved_version or free_or_bad_rate or head[2] & 0x0C == 0x0C)


def _names(formats: tuple[MediaFormat, ...]) -> str:
    return ", ".join(formats[:-1]) + f" or {formats[-1]}"
