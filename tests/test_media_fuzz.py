"""Untrusted media: any bytes give arrays of the right shape with finite values, or 413 / 415."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.media import clip, encoded, photo, tone, video

from nestd.bundle.errors import TooLarge, UnsupportedMedia
from nestd.daemon.prompt.decoder_process import Decoder, DecoderOptions
from nestd.daemon.prompt.media import (
    CONTENT_TYPES,
    FORMATS,
    MediaFormat,
    MediaKind,
    MediaLimits,
    check,
    sniff,
)

# Each an operation, a place from 0 to 1, and bytes.
Changes = list[tuple[str, float, bytes]]
LIMITS = MediaLimits(
    bytes=4_000_000, pixels=4_000_000, audio_seconds=40, video_seconds=60, video_frames=3
)
PICTURES = {
    "JPEG": encoded(photo(96, 64), "JPEG"),
    "progressive JPEG": encoded(photo(96, 64), "JPEG", progressive=True),
    "CMYK JPEG": encoded(photo(96, 64).convert("CMYK"), "JPEG"),
    "PNG": encoded(photo(40, 30), "PNG"),
    "palette PNG": encoded(photo(40, 30).quantize(8), "PNG", transparency=3),
    "WebP": encoded(photo(96, 64), "WEBP"),
    "lossless WebP": encoded(photo(40, 30), "WEBP", lossless=True),
}
CLIPS = {
    "WAV": clip(tone(0.3, 8000), "WAV", 8000),
    "float WAV": clip(tone(0.3, 8000, 2), "WAV", 8000, "FLOAT"),
    "FLAC": clip(tone(0.3), "FLAC"),
    "Vorbis": clip(tone(0.5), "OGG"),
    "Opus": clip(tone(0.5), "OGG", 16_000, "OPUS"),
    "MP3": clip(tone(0.5), "MP3"),
}
CONTAINERS = [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    options = DecoderOptions(timeout_seconds=10, memory_bytes=256 * 1024 * 1024, idle_seconds=120)
    with Decoder(LIMITS, options) as made:
        yield made


def outcome(decoder: Decoder, kind: MediaKind, data: bytes) -> str:
    """Decode `data` and say how that ended; anything that may not be fails."""
    try:
        if kind == "image":
            values = decoder.image(data, 256)
            assert values.shape == (3, 256, 256)
            assert 0 <= values.min() <= values.max() <= 1
        elif kind == "audio":
            windows = decoder.audio(data)
            assert 1 <= len(windows) <= 3
            for window in windows:
                frames = len(window.input_features)
                assert window.input_features.shape == (frames, 128)
                assert window.input_features_mask.shape == (frames,)
                assert np.isfinite(window.input_features).all()
        else:
            frames_taken = decoder.video(data, 256)
            assert 1 <= len(frames_taken) <= 3
            assert all(frame.pixel_values.shape == (3, 256, 256) for frame in frames_taken)
    except (TooLarge, UnsupportedMedia) as error:
        message = str(error)
        assert 10 < len(message) < 600
        assert " at 0x" not in message
        return f"{error.status}"
    return "decoded"


@st.composite
def damage(draw: st.DrawFn) -> Changes:
    """Draw a few changes: (operation, place from 0 to 1, bytes)."""
    operation = st.sampled_from(["overwrite", "overwrite", "insert", "cut", "end"])
    # The interesting bytes are in headers: half of the places are near the start.
    place = st.one_of(st.floats(0, 0.1), st.floats(0, 1))
    values = st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]),
    )
    return draw(st.lists(st.tuples(operation, place, values), min_size=1, max_size=5))


def damaged(data: bytes, changes: Changes) -> bytes:
    for operation, place, values in changes:
        at = int(place * len(data))
        match operation:
            case "overwrite":
                data = data[:at] + values + data[at + len(values) :]
            case "insert":
                data = data[:at] + values + data[at:]
            case "cut":
                data = data[:at] + data[at + 16 * len(values) :]
            case "end":
                data = data[: max(at, 1)]
    return data


FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", PICTURES)
@FUZZ
@given(changes=damage())
def test_damaged_pictures(decoder: Decoder, name: str, changes: Changes) -> None:
    outcome(decoder, "image", damaged(PICTURES[name], changes))


@pytest.mark.parametrize("name", CLIPS)
@FUZZ
@given(changes=damage())
def test_damaged_clips(decoder: Decoder, name: str, changes: Changes) -> None:
    outcome(decoder, "audio", damaged(CLIPS[name], changes))


@pytest.mark.parametrize("container", CONTAINERS, ids="-".join)
def test_damaged_videos(decoder: Decoder, container: tuple[str, str]) -> None:
    pytest.importorskip("av")
    whole = video(*container, frames=30)

    @FUZZ
    @given(changes=damage())
    def run(changes: Changes) -> None:
        outcome(decoder, "video", damaged(whole, changes))

    run()


MAGIC = [data[:12] for data in (*PICTURES.values(), *CLIPS.values())]


@FUZZ
@given(
    kind=st.sampled_from(["image", "audio"]),
    magic=st.sampled_from([b"", *MAGIC]),
    rest=st.binary(max_size=2000),
)
@example(kind="image", magic=b"", rest=b"")
def test_noise_behind_a_magic_number(
    decoder: Decoder, kind: MediaKind, magic: bytes, rest: bytes
) -> None:
    outcome(decoder, kind, magic + rest)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def bomb(body: bytes, times: int) -> bytes:
    return zlib.compress(body * times, 9)


def wav(rate: int, channels: int, bits: int, data: bytes, code: int = 1) -> bytes:
    block = channels * bits // 8
    form = struct.pack(
        "<HHIIHH", code, channels, rate, rate * block % 2**32, block % 65536, bits % 65536
    )
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


# Name -> (type of the part, bytes, statuses that may come of it).
BROKEN: dict[str, tuple[MediaKind, bytes, set[str]]] = {
    "empty": ("image", b"", {"415"}),
    "one byte": ("image", b"\xff", {"415"}),
    "text": ("image", b"hello world", {"415"}),
    "base64 of a picture": ("image", b"/9j/4AAQSkZJRgABAQ", {"415"}),
    "too many bytes": ("image", PICTURES["JPEG"] + bytes(LIMITS.bytes), {"413"}),
    "gif": ("image", encoded(photo(9, 9).quantize(4), "GIF"), {"415"}),
    "tiff": ("image", encoded(photo(9, 9), "TIFF"), {"415"}),
    "PNG of 2^31 pixels a side": ("image", png(2**31 - 1, 2**31 - 1), {"413", "415"}),
    "PNG of 65000 pixels a side": ("image", png(65000, 65000), {"413"}),
    "PNG without width": ("image", png(0, 10), {"415"}),
    "PNG without data": ("image", png(10, 10), {"415"}),
    "PNG with another's data": ("image", png(10, 10, png_chunk(b"IDAT", b"\1\2\3")), {"415"}),
    "PNG bomb that its header hides": (
        "image",
        png(8, 8, png_chunk(b"IDAT", bomb(b"\0" * 1000, 200_000))),
        {"decoded"},  # rows beyond the header's are never inflated
    ),
    "PNG bomb in a text": (
        "image",
        png(8, 8, png_chunk(b"zTXt", b"a\0\0" + bomb(b"\0" * 1000, 100_000))),
        {"415"},
    ),
    "PNG bomb in a colour profile": (
        "image",
        png(8, 8, png_chunk(b"iCCP", b"a\0\0" + bomb(b"\0" * 1000, 100_000))),
        {"415"},
    ),
    "PNG that is large and small on disk": (
        "image",
        encoded(Image.new("L", (3000, 3000)), "PNG"),
        {"413"},
    ),
    "JPEG of markers": ("image", b"\xff\xd8\xff" + b"\xff\xe0\0\2" * 5000, {"415"}),
    "JPEG, then a zip": ("image", PICTURES["JPEG"] + b"PK\3\4" + bytes(100), {"decoded"}),
    "WebP that states 4 GB": (
        "image",
        b"RIFF\xff\xff\xff\xffWEBP" + PICTURES["WebP"][12:],
        {"415", "decoded"},
    ),
    "WebP of the largest size": (
        "image",
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6,
        {"413", "415"},
    ),
    "sound as a picture": ("image", CLIPS["WAV"], {"415"}),
    "picture as sound": ("audio", PICTURES["PNG"], {"415"}),
    "WAV without channels": ("audio", wav(16000, 0, 16, bytes(100)), {"415"}),
    "WAV of 65535 channels": ("audio", wav(16000, 65535, 8, bytes(65535)), {"415"}),
    "WAV of rate 0": ("audio", wav(0, 1, 16, bytes(100)), {"415"}),
    "WAV of rate 2^32-1": ("audio", wav(2**32 - 1, 1, 16, bytes(100)), {"415"}),
    "WAV of 0 bits": ("audio", wav(16000, 1, 0, bytes(100)), {"415"}),
    "WAV of NaN": ("audio", wav(16000, 1, 32, b"\xff" * 4000, code=3), {"415"}),
    "WAV without samples": ("audio", wav(16000, 1, 16, b""), {"415"}),
    "WAV without chunks": ("audio", b"RIFF\4\0\0\0WAVE", {"415"}),
    "WAV that is long": ("audio", wav(4000, 1, 8, bytes(41 * 4000)), {"413"}),
    "WAV, then a picture": ("audio", CLIPS["WAV"] + PICTURES["JPEG"], {"decoded"}),
    "FLAC of nothing": ("audio", b"fLaC" + bytes(200), {"415"}),
    "FLAC that states a year": (
        "audio",
        CLIPS["FLAC"][:21] + b"\xff" * 5 + CLIPS["FLAC"][26:],
        {"413", "415"},
    ),
    "OGG of nothing": ("audio", b"OggS\0\4" + bytes(200), {"415"}),
    "MP3 of one header": ("audio", b"\xff\xfb\x90\xc4" * 1000, {"415", "decoded"}),
    "ID3 bomb": ("audio", b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(1000), {"415"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(decoder: Decoder, name: str) -> None:
    kind, data, expected = BROKEN[name]
    assert outcome(decoder, kind, data) in expected


@pytest.mark.parametrize("data", [b"\0\0\0\x18ftypmp42" + bytes(500), b"\x1a\x45\xdf\xa3" * 100])
def test_broken_videos(decoder: Decoder, data: bytes) -> None:
    pytest.importorskip("av")
    assert outcome(decoder, "video", data) == "415"


def test_a_playlist_is_not_opened_as_a_video(decoder: Decoder) -> None:
    """FFmpeg would fetch what it names."""
    with pytest.raises(UnsupportedMedia, match="no known format"):
        decoder.video(b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/x.ts\n", 256)


@pytest.mark.parametrize(("stated", "found"), CONTENT_TYPES.items())
def test_the_content_type_must_agree_with_the_bytes(stated: str, found: MediaFormat) -> None:
    data = {
        MediaFormat.JPEG: PICTURES["JPEG"],
        MediaFormat.PNG: PICTURES["PNG"],
        MediaFormat.WEBP: PICTURES["WebP"],
        MediaFormat.WAV: CLIPS["WAV"],
        MediaFormat.FLAC: CLIPS["FLAC"],
        MediaFormat.OGG: CLIPS["Opus"],
        MediaFormat.MP3: CLIPS["MP3"],
        MediaFormat.MP4: b"\0\0\0\x18ftypisom",
        MediaFormat.MATROSKA: b"\x1a\x45\xdf\xa3....",
        MediaFormat.AVI: b"RIFF....AVI LIST",
    }
    kind = next(kind for kind, formats in FORMATS.items() if found in formats)
    assert check(kind, data[found], LIMITS, f"{stated.upper()}; codecs=x") is found
    assert check(kind, data[found], LIMITS, "application/octet-stream") is found
    for other in FORMATS[kind]:
        if other is not found:
            with pytest.raises(UnsupportedMedia, match=f"but the bytes are {other}"):
                check(kind, data[other], LIMITS, stated)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a....", "GIF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"\0\0\0\x18ftypM4A ", "M4A"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\xf1\x50\x80", "AAC"),
        (b"data:image/png;base64,", "data: URL"),
        (b"<svg xmlns=", "SVG"),
    ],
)
def test_known_formats_that_are_not_taken_are_named(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedMedia, match=name):
        sniff(data)


def test_an_unknown_content_type_is_an_error_that_says_what_to_send() -> None:
    with pytest.raises(UnsupportedMedia, match="say image/jpeg, or leave it out"):
        check("image", PICTURES["JPEG"], LIMITS, "image/x-unheard-of")


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_the_sentence_of_a_broken_file_names_no_object_of_ours(
    decoder: Decoder, kind: MediaKind
) -> None:
    if kind == "video":
        pytest.importorskip("av")
    head = {"image": b"\x89PNG\r\n\x1a\n", "audio": b"fLaC", "video": b"\x1a\x45\xdf\xa3"}[kind]
    ask = {"image": decoder.image, "audio": decoder.audio, "video": decoder.video}[kind]
    arguments = () if kind == "audio" else (256,)
    with pytest.raises(UnsupportedMedia) as caught:
        ask(head + bytes(100), *arguments)
    assert re.fullmatch(
        r"the \w+ \w+ is broken or cut short \([^<>]+\): send it again whole", str(caught.value)
    )


def test_an_id3_tag_before_the_sound_is_an_mp3() -> None:
    assert sniff(b"ID3\4" + bytes(20)) is MediaFormat.MP3
