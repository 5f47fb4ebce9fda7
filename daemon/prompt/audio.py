"""WAV, FLAC, OGG and MP3 -> log-mel windows, as the checkpoint's own feature extractor makes them.

The steps are those of transformers' Gemma3nProcessor: librosa's loading (soundfile, the mean of
all channels, soxr's HQ resampling to 16 kHz) and Gemma3nAudioFeatureExtractor, whose output `mel`
reproduces bit for bit.

The extractor drops what lies behind 30 s. Here a longer clip becomes consecutive windows of 30 s,
without overlap; only the last one is padded, and only as the extractor pads it (to a multiple of
128 samples). A rest of less than 0.1 s behind a whole window is dropped: it is an encoder's padding
and would cost a window.

soundfile and soxr are imported when the first clip comes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import RequestError, TooLarge, UnsupportedMedia
from nestd.daemon.prompt.media import MediaFormat, MediaLimits, broken

if TYPE_CHECKING:
    from soundfile import SoundFile

RATE = 16_000
WINDOW = 30 * RATE
DROPPED_REST = RATE // 10
BINS = 128
FRAME = 512
HOP = 160
FFT = 1024
PREEMPHASIS = 0.97
FLOOR = 1e-5
PAD_TO = 128

# What microphones and converters make; beyond, a header lies or the file is no recording.
LOWEST_RATE, HIGHEST_RATE, MOST_CHANNELS = 4_000, 384_000, 32
# Full scale is 1; decoders overshoot a little, a file with samples as integers does by thousands.
LOUDEST = 16.0
BLOCK = 1 << 16
# What libsndfile says of a FLAC stream that does not state its length.
UNKNOWN = 2**63 - 1

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AudioWindow:
    """At most 30 s of a clip.

    Attributes:
        input_features: float32 [frames, 128], frames <= 2997.
        samples: of sound in it, without padding.
    """

    input_features: FloatArray
    samples: int

    @property
    def input_features_mask(self) -> npt.NDArray[np.bool_]:
        """Whether each frame begins within the sound: bool [frames]."""
        return np.arange(len(self.input_features)) * HOP < self.samples


def audio_windows(data: bytes, kind: MediaFormat, limits: MediaLimits) -> list[AudioWindow]:
    """Decode one clip to its windows, at least one.

    Raises:
        TooLarge: longer than `limits.audio_seconds`.
        UnsupportedMedia: broken, cut short, empty, or not a recording.
    """
    return [mel(part) for part in split(waveform(data, kind, limits))]


def split(sound: FloatArray) -> list[FloatArray]:
    """Return consecutive windows of 30 s of `sound` [samples]; the last one has the rest."""
    parts = [sound[start : start + WINDOW] for start in range(0, len(sound), WINDOW)]
    if len(parts) > 1 and len(parts[-1]) < DROPPED_REST:
        parts.pop()
    return parts


def waveform(data: bytes, kind: MediaFormat, limits: MediaLimits) -> FloatArray:
    """Return the clip as float32 [samples], mono, 16 kHz, never empty.

    Args:
        data: the encoded file.
        kind: its format, from `media.check`; bytes that libsndfile reads as another are refused.
        limits: `audio_seconds` is compared with the header first and then with what is decoded.

    Raises:
        TooLarge: too long.
        UnsupportedMedia: broken, cut short, empty, or not a recording.
    """
    import soundfile

    _check_whole(data, kind)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            if clip.format.removesuffix("EX") != kind:  # WAVEX is WAV with a longer header
                raise UnsupportedMedia(f"the clip is {kind} and {clip.format} at once: send one")
            # Forward only: soundfile would seek after each block, which a FLAC stream of unknown
            # length refuses at its end.
            clip.seekable = lambda: False
            return _decode(clip, kind, limits)
    except RequestError:
        raise
    except MemoryError as error:
        raise TooLarge("the clip needs too much memory: send a shorter one") from error
    except Exception as error:  # libsndfile's errors, and what soundfile makes of odd headers
        raise broken(f"{kind} clip", error) from error


def mel(sound: FloatArray) -> AudioWindow:
    """Return the log-mel of float32 [samples], at most 30 s at 16 kHz.

    Bit for bit what Gemma3nAudioFeatureExtractor of transformers 4.57 gives with the same NumPy,
    save that a clip too short for one frame is padded to one, where the extractor gives none.
    """
    samples = len(sound)
    if not 0 < samples <= WINDOW:
        raise ValueError(f"a window has 1 to {WINDOW} samples, not {samples}")
    padded = _padded(samples)
    sound = np.pad(sound.astype(np.float32, copy=False), (0, padded - samples))
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME + 1)[::HOP]
    first = frames[:, :1] * (1.0 - PREEMPHASIS)
    rest = frames[:, 1:-1] - PREEMPHASIS * frames[:, :-2]
    window, filters = _tables()
    spectrum = np.abs(np.fft.rfft(np.concatenate([first, rest], axis=-1) * window, n=FFT, axis=-1))
    features = np.log(np.maximum(spectrum @ filters, FLOOR))
    return AudioWindow(features.astype(np.float32), samples)


def frame_count(samples: int) -> int:
    """Return the frames of a window with so many samples."""
    # A frame needs one sample more than it has: the extractor's pre-emphasis looks back by one.
    return (_padded(samples) - FRAME - 1) // HOP + 1


def _padded(samples: int) -> int:
    return max(math.ceil(samples / PAD_TO) * PAD_TO, FRAME + PAD_TO)


@cache
def _tables() -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Return the periodic Hann window [512] and the HTK triangles [513, 128] of 125 to 7600 Hz."""
    position = np.arange(FRAME, dtype=np.float32)
    hann = (0.5 * (1 - np.cos(2 * np.pi * position / FRAME))).astype(np.float32)
    frequencies = np.arange(FFT // 2 + 1, dtype=np.float32) * (RATE / FFT)
    low, high = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (125.0, 7600.0))
    corners = 700.0 * (10 ** (np.linspace(low, high, BINS + 2) / 2595.0) - 1.0)
    slopes = corners[None] - frequencies[:, None]
    widths = corners[1:] - corners[:-1]
    falling, rising = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return hann, np.maximum(0.0, np.minimum(falling, rising))


def _decode(clip: SoundFile, kind: MediaFormat, limits: MediaLimits) -> FloatArray:
    """Read `clip` block by block: memory depends on what is there, not on what the header says."""
    import soxr

    rate, channels = clip.samplerate, clip.channels
    stated = 0 if clip.frames == UNKNOWN else clip.frames
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or not 1 <= channels <= MOST_CHANNELS:
        raise UnsupportedMedia(
            f"the clip says {rate} Hz and {channels} channels: send {LOWEST_RATE} to "
            f"{HIGHEST_RATE} Hz and at most {MOST_CHANNELS} channels"
        )
    allowed = int(limits.audio_seconds * rate)
    too_long = TooLarge(f"the clip is too long: send at most {limits.audio_seconds:g} s of audio")
    if stated > allowed:
        raise too_long
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    parts: list[FloatArray] = []
    read = 0
    while len(block := clip.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)):
        read += len(block)
        if read > allowed:
            raise too_long
        loudest = float(np.abs(block).max())
        if not loudest <= LOUDEST:  # NaN compares false
            raise UnsupportedMedia(
                f"the clip has samples that are not numbers or beyond {LOUDEST:g} times full "
                "scale: send samples between -1 and 1"
            )
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))
        parts.append(mono if rate == RATE else resampler.resample_chunk(mono))
    if rate != RATE:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    # A stated length is exact in FLAC and in an MP3's Xing header, which counts whole frames.
    if stated - read > (4 * 1152 if kind is MediaFormat.MP3 else 0):
        raise UnsupportedMedia(f"the {kind} clip is cut short: send it again whole")
    sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(sound):
        raise UnsupportedMedia("the clip has no samples: send one with sound")
    return sound


def _check_whole(data: bytes, kind: MediaFormat) -> None:
    """Refuse WAV and OGG files that end early, which libsndfile reads without a word."""
    if kind is MediaFormat.OGG:
        cut = _ogg_is_cut(data)
    else:
        cut = kind is MediaFormat.WAV and _wav_is_cut(data)
    if cut:
        raise UnsupportedMedia(f"the {kind} clip is cut short: send it again whole")


def _ogg_is_cut(data: bytes) -> bool:
    """Does `data` lack the whole page that ends its stream (RFC 3533, section 6)?"""
    last = data.rfind(b"OggS")
    header = data[last : last + 27]
    if len(header) < 27 or not header[5] & 0x04:
        return True
    segments = data[last + 27 : last + 27 + header[26]]
    return last + 27 + header[26] + sum(segments) > len(data)


def _wav_is_cut(data: bytes) -> bool:
    """Walk the chunks: does `data` end before the samples do?"""
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"data":
            # A program that records into a pipe writes a huge size that it never corrects.
            return at + size > len(data) and size < 0x7FFFF000
        at += size + size % 2
    return True
