"""Clips become the log-mel windows of the checkpoint's own feature extractor."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import soxr
from support.media import FloatArray, clip, tone

from nestd.bundle.errors import TooLarge, UnsupportedMedia
from nestd.daemon.prompt.audio import (
    RATE,
    WINDOW,
    audio_windows,
    frame_count,
    mel,
    split,
    waveform,
)
from nestd.daemon.prompt.media import MediaFormat, MediaLimits

WAV, FLAC, OGG, MP3 = MediaFormat.WAV, MediaFormat.FLAC, MediaFormat.OGG, MediaFormat.MP3
LIMITS = MediaLimits()
KINDS = [(WAV, None), (WAV, "FLOAT"), (FLAC, None), (OGG, "VORBIS"), (OGG, "OPUS"), (MP3, None)]


def noise(samples: int, seed: int = 0) -> FloatArray:
    return (np.random.default_rng(seed).normal(size=samples) * 0.1).astype(np.float32)


@pytest.mark.parity
@pytest.mark.parametrize(
    "samples",
    [513, 640, 641, 1000, 1024, 4799, 16_000, 16_001, 79_999, 300_000, WINDOW - 1, WINDOW],
)
def test_the_mel_equals_the_extractor_of_transformers_bit_for_bit(samples: int) -> None:
    transformers = pytest.importorskip("transformers")
    sound = noise(samples)
    theirs = transformers.Gemma3nAudioFeatureExtractor()([sound], return_tensors="np")
    ours = mel(sound)
    np.testing.assert_array_equal(ours.input_features, theirs["input_features"][0])
    np.testing.assert_array_equal(ours.input_features_mask, theirs["input_features_mask"][0])


@pytest.mark.parity
@pytest.mark.parametrize("sound", [np.zeros(2000, np.float32), np.ones(2000, np.float32)])
def test_silence_and_a_constant_equal_the_extractor(sound: FloatArray) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma3nAudioFeatureExtractor()([sound], return_tensors="np")
    np.testing.assert_array_equal(mel(sound).input_features, theirs["input_features"][0])


@pytest.mark.parametrize("samples", [1, 160, 512, 513, 5000, WINDOW])
def test_a_window_has_the_stated_frames(samples: int) -> None:
    window = mel(noise(samples))
    assert window.input_features.shape == (frame_count(samples), 128)
    assert window.input_features.dtype == np.float32
    assert np.isfinite(window.input_features).all()
    assert window.input_features_mask.shape == (frame_count(samples),)
    assert window.input_features_mask[0]


def test_thirty_seconds_are_2997_frames() -> None:
    assert frame_count(WINDOW) == 2997


@pytest.mark.parametrize(
    ("seconds", "windows"),
    [
        (0.01, [0.01]),
        (30, [30]),
        (30.05, [30]),  # an encoder's padding
        (30.1, [30, 0.1]),
        (75, [30, 30, 15]),
        (90, [30, 30, 30]),
    ],
)
def test_longer_sound_becomes_consecutive_windows_of_30_s(
    seconds: float, windows: list[float]
) -> None:
    sound = np.arange(round(seconds * RATE), dtype=np.float32)
    parts = split(sound)
    assert [len(part) for part in parts] == [round(part * RATE) for part in windows]
    joined = np.concatenate(parts)
    np.testing.assert_array_equal(joined, sound[: len(joined)])


def test_a_clip_of_70_s_gives_three_windows() -> None:
    windows = audio_windows(clip(tone(70, 8000), "WAV", 8000), WAV, LIMITS)
    assert [window.samples for window in windows] == [WINDOW, WINDOW, 10 * RATE]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_every_format_rate_and_channel_count_gives_the_same_sound(
    kind: MediaFormat, subtype: str | None, rate: int, channels: int
) -> None:
    if subtype == "OPUS" and rate in (22_050, 44_100):
        pytest.skip("Opus has no such rate")
    sound = tone(1.5, rate, channels)
    heard = waveform(clip(sound, kind.value, rate, subtype), kind, LIMITS)
    assert abs(len(heard) - 1.5 * RATE) < 0.15 * RATE
    middle = heard[4000:20_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) * RATE / len(middle) == pytest.approx(440, abs=2)
    loudness = np.abs(sound.mean(axis=1)).max()
    assert np.abs(middle).max() == pytest.approx(loudness, rel=0.2)


@pytest.mark.parametrize("rate", [4_000, 11_025, 44_100, 96_000, 192_000])
def test_a_lossless_clip_is_resampled_as_librosa_does(rate: int) -> None:
    sound = noise(2 * rate * 3).reshape(-1, 3)  # longer than a block
    expected = soxr.resample(sound.mean(axis=1), rate, RATE, quality="HQ")
    heard = waveform(clip(sound, "WAV", rate, "FLOAT"), WAV, LIMITS)
    assert heard.dtype == np.float32
    np.testing.assert_allclose(heard, expected, rtol=0, atol=1e-6)


def test_16_khz_mono_arrives_unchanged() -> None:
    sound = noise(100_000)
    np.testing.assert_array_equal(waveform(clip(sound, "WAV", RATE, "FLOAT"), WAV, LIMITS), sound)


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_a_clip_over_the_limit_is_refused(kind: MediaFormat, subtype: str | None) -> None:
    data = clip(tone(3), kind.value, RATE, subtype)
    with pytest.raises(TooLarge, match="at most 2 s of audio"):
        waveform(data, kind, MediaLimits(audio_seconds=2))


def test_a_length_that_lies_to_be_short_is_found_out_while_decoding() -> None:
    data = bytearray(clip(noise(3 * RATE), "FLAC"))
    # STREAMINFO: the 36 bits of total samples end 16 bytes (the MD5) before the block's end.
    data[22:26] = struct.pack(">I", 0)
    with pytest.raises(TooLarge, match="at most 2 s"):
        waveform(bytes(data), FLAC, MediaLimits(audio_seconds=2))


def test_a_flac_stream_of_unknown_length_is_accepted() -> None:
    data = bytearray(clip(noise(3 * RATE), "FLAC"))
    data[22:26] = struct.pack(">I", 0)
    assert len(waveform(bytes(data), FLAC, LIMITS)) == 3 * RATE


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 20_000.0])
def test_samples_that_are_no_sound_are_refused(bad: float) -> None:
    sound = noise(5000)
    sound[3000] = bad
    with pytest.raises(UnsupportedMedia, match="between -1 and 1"):
        waveform(clip(sound, "WAV", RATE, "FLOAT"), WAV, LIMITS)


@pytest.mark.parametrize("kind", [WAV, FLAC])
def test_a_clip_without_samples_is_refused(kind: MediaFormat) -> None:
    with pytest.raises(UnsupportedMedia):
        waveform(clip(np.zeros((0, 1), np.float32), kind.value), kind, LIMITS)


@pytest.mark.parametrize(
    ("rate", "channels"), [(1, 1), (3_999, 1), (0xFFFFFFF, 1), (16_000, 33), (16_000, 1000)]
)
def test_absurd_rates_and_channel_counts_are_refused(rate: int, channels: int) -> None:
    data = bytearray(clip(tone(0.1), "WAV"))
    assert data[12:16] == b"fmt "
    struct.pack_into("<HI", data, 22, channels, rate)
    with pytest.raises(UnsupportedMedia):
        waveform(bytes(data), WAV, LIMITS)


@pytest.mark.parametrize(("kind", "subtype"), [case for case in KINDS if case[0] is not MP3])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_clip_is_refused(kind: MediaFormat, subtype: str | None, part: float) -> None:
    data = clip(noise(3 * RATE), kind.value, RATE, subtype)
    with pytest.raises(UnsupportedMedia, match="cut short"):
        waveform(data[: int(len(data) * part)], kind, LIMITS)


def test_an_mp3_shorter_than_its_header_says_is_refused() -> None:
    data = clip(noise(3 * RATE), "MP3")
    with pytest.raises(UnsupportedMedia, match="cut short"):
        waveform(data[: len(data) // 2], MP3, LIMITS)


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_recorded_into_a_pipe_is_accepted(size: int) -> None:
    data = bytearray(clip(noise(RATE), "WAV"))
    at = data.index(b"data")
    struct.pack_into("<I", data, at + 4, size)
    assert len(waveform(bytes(data), WAV, LIMITS)) == RATE


def test_bytes_that_libsndfile_reads_as_another_format_are_refused() -> None:
    with pytest.raises(UnsupportedMedia, match="MP3 and WAV at once"):
        waveform(clip(tone(0.1), "WAV"), MP3, LIMITS)
