"""Draws the pictures and clips in samples/, which the demo and the tests show to pocket.

From held-out fonts, handwriting and voices, with seeds of their own.
"""

from __future__ import annotations

import random
import wave
from pathlib import Path
from typing import Final

import numpy as np
import pictures
import sounds

from nestd.daemon.prompt.audio import RATE

FOLDER: Final = Path(__file__).parent / "samples"


def picture(name: str, number: int, kind: str) -> None:
    """Draw `number` in the first held-out way of this kind."""
    seed, found = 0, ""
    while found != kind:
        image, found, _ = pictures.draw(random.Random(f"sample-{seed}"), number, "heldout")
        seed += 1
    image.save(FOLDER / name, optimize=True)


def clip(name: str, words: str) -> None:
    """Speak `words` in a held-out voice."""
    rng = random.Random(f"sample-{words}")
    sound = sounds.record(rng, sounds.utter(rng, words, "heldout"))
    with wave.open(str(FOLDER / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def main() -> None:
    """Draw all four."""
    FOLDER.mkdir(exist_ok=True)
    picture("counter-21.png", 21, "display")
    picture("handwritten-7.png", 7, "handwritten")
    clip("heater-on.wav", "heater on")
    clip("close-the-curtains.wav", "close the curtains")


if __name__ == "__main__":
    main()
