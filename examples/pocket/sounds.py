"""pocket's sounds: a spoken request by espeak-ng, in many voices, with room and noise, by seed.

A voice is an accent of English and a variant, which changes the timbre. The held-out split has
variants that are never trained, and noise of its own seeds. Needs the program: Debian's espeak-ng.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from nestd.daemon.prompt.audio import RATE, waveform
from nestd.daemon.prompt.media import MediaFormat, MediaLimits

Split = Literal["train", "heldout"]
Sound = npt.NDArray[np.float32]
LONGEST: Final = int(1.9 * RATE)  # samples; 12 soft tokens are 1.92 s
SILENCE: Final = (0.05, 0.25), (0.3, 0.45)  # seconds before and after the words

ACCENTS: Final = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan")
# Left out: whispering, robots, and voices made to be odd.
VARIANTS: Final[dict[Split, tuple[str, ...]]] = {
    "train": (
        "Alex", "Alicia", "Andrea", "Annie", "Denis", "Gene", "Henrique", "Jacky", "Lee", "Marco",
        "Michael", "Nguyen", "adam", "anika", "antonio", "aunty", "belinda", "boris", "caleb",
        "david", "edward", "f1", "f2", "f3", "f5", "grandma", "gustave", "iven", "iven3", "john",
        "klatt", "klatt3", "linda", "m1", "m2", "m3", "m5", "m6", "m8", "max", "miguel", "norbert",
        "pablo", "quincy", "robert", "sandro", "steph", "travis", "victor", "zac",
    ),
    "heldout": ("Andy", "Diogo", "Mario", "Mike", "benjamin", "ed", "f4", "iven2", "m4", "m7",
                "michel", "paul", "pedro", "rob", "shelby", "steph2"),
}  # fmt: skip
WHOLE: Final = MediaLimits(pixels=1, audio_seconds=30, video_seconds=1)


@dataclass(frozen=True)
class Voice:
    """Who speaks; speed in words a minute, pitch from 0 to 99."""

    name: str
    speed: int
    pitch: int


def is_available() -> bool:
    """Is espeak-ng installed?"""
    return shutil.which("espeak-ng") is not None


def pick_voice(rng: random.Random, split: Split) -> Voice:
    """Return a random voice of one split."""
    name = f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS[split])}"
    return Voice(name, rng.randint(140, 200), rng.randint(30, 70))


def speak(text: str, voice: Voice) -> Sound:
    """Return `text` as espeak-ng says it: float32 [samples], mono, 16 kHz, full scale 1."""
    command = ["espeak-ng", "--stdout", "-v", voice.name, "-s", str(voice.speed),
               "-p", str(voice.pitch), text]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True)
    return waveform(done.stdout, MediaFormat.WAV, WHOLE)


def utter(rng: random.Random, text: str, split: Split) -> Sound:
    """Return `text` in a random voice of the split, one that has the time to say it all."""
    while True:
        speech = speak(text, pick_voice(rng, split))
        if len(speech) <= LONGEST - sum(most for _, most in SILENCE) * RATE:
            return speech


def record(rng: random.Random, speech: Sound) -> Sound:
    """Return `speech` as a microphone in a room hears it: echo, level, silence around, noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    before, after = (int(rng.uniform(*span) * RATE) for span in SILENCE)
    loudest = max(float(np.abs(speech).max()), 1e-4)
    sound = np.pad(speech / loudest, (before, after)).astype(np.float32)
    if rng.random() < 0.4:
        sound = _echo(rng, sound)
    strength = float(np.sqrt(np.mean(sound**2)))
    ratio = 10 ** (rng.uniform(15, 35) / 20)
    sound = sound + _noise(rng, noise, len(sound)) * np.float32(strength / ratio)
    level = rng.uniform(0.08, 0.9) / float(np.abs(sound).max())
    return (sound * np.float32(level)).astype(np.float32)


def _echo(rng: random.Random, sound: Sound) -> Sound:
    for _ in range(rng.randint(1, 3)):
        delay = int(rng.uniform(0.01, 0.07) * RATE)
        sound = sound + np.float32(rng.uniform(0.1, 0.4)) * np.pad(sound, (delay, 0))[: len(sound)]
    return sound


def _noise(rng: random.Random, noise: np.random.Generator, samples: int) -> Sound:
    """Return noise with a root mean square of 1: white, coloured, or a hum above a little of it."""
    kind = rng.randrange(3)
    white = noise.standard_normal(samples, np.float32)
    if kind == 1:
        spectrum = np.fft.rfft(white)
        falling = np.maximum(np.arange(len(spectrum)), 20.0) ** -rng.uniform(0.3, 1.0)
        white = np.fft.irfft(spectrum * falling, samples).astype(np.float32)
    elif kind == 2:
        time = np.arange(samples) / RATE
        pitch = rng.choice([50, 60, 100, 120]) * rng.uniform(0.98, 1.02)
        hum = sum(np.sin(2 * np.pi * pitch * n * time + n) / n for n in range(1, 8))
        white = (0.3 * white + hum).astype(np.float32)
    return white / np.float32(np.sqrt(np.mean(white**2)))
