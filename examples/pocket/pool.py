"""Pictures and clips, made once by all cores and kept in a folder: training goes over them again.

A pool is a function of split, seed and count alone. Pictures are pixels as the daemon's
preprocessing gives them, before the division by 255; clips are its log-mel windows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pictures
import sounds
from data import Split
from media import Pictured, Spoken, pictured, spoken
from pictures import GRID, SIZE

from nestd.daemon.prompt.audio import BINS, mel
from nestd.daemon.prompt.image import squash

FOLDER: Final = Path(tempfile.gettempdir()) / "pocket"
CHUNK: Final = 250
FRAMES: Final = 192  # of 12 soft tokens
LONGEST_TIMER: Final = 599  # minutes; beyond ten hours the language model knows whole hours only

Work = Callable[[Split, int, int], tuple[npt.NDArray[Any], ...]]


@dataclass(frozen=True)
class Pictures:
    """`pixels` uint8 [n, 3, 256, 256], digits in their `cells` [n, 16], and what is asked.

    `handwritten` [n] tells which numbers are, `requests` has one around each picture.
    """

    pixels: npt.NDArray[np.uint8]
    cells: npt.NDArray[np.int64]
    handwritten: npt.NDArray[np.bool_]
    requests: list[Pictured]


@dataclass(frozen=True)
class Clips:
    """`features` float16 [n, 192, 128], of which the first `frames` [n] count, and the requests."""

    features: npt.NDArray[np.float16]
    frames: npt.NDArray[np.int64]
    requests: list[Spoken]


def picture_pool(split: Split, seed: int, count: int) -> Pictures:
    """Return `count` pictures: a third shows one digit, half two, the rest three.

    In training most have digits in the other rows too, so that one picture teaches more.
    """
    made = _made("pictures", _pictures, split, seed, count)
    pixels, cells, numbers, handwritten = (np.concatenate(part) for part in zip(*made, strict=True))
    requests = _around(split, seed, [int(number) for number in numbers])
    return Pictures(pixels, cells, handwritten, requests)


def clip_pool(split: Split, seed: int, count: int) -> Clips:
    """Return `count` clips of the requests that `media.spoken` yields."""
    made = _made("clips", _clips, split, seed, count)
    features, frames = (np.concatenate(part) for part in zip(*made, strict=True))
    return Clips(features, frames, list(islice(spoken(split, seed), len(frames))))


def _around(split: Split, seed: int, numbers: list[int]) -> list[Pictured]:
    """Return a request for each number: one whose own has as many digits, replaced.

    A thermostat's is not replaced, no room has 90 degrees; and three digits take the place of a
    timer's two, because other numbers are percentages, and stay below the longest timer.
    """
    stream, result = pictured(split, seed), []
    waiting: defaultdict[str, list[Pictured]] = defaultdict(list)
    for number in numbers:
        place = "timer" if number > 99 else f"{len(str(number))} digits"
        fitting = waiting[f"thermostat {number}"] or waiting[place]
        while not fitting:
            request = next(stream)
            if '"thermostat"' in request.command:
                waiting[f"thermostat {request.number}"].append(request)
            elif '"timer"' in request.command and len(str(request.number)) == 2:
                waiting["timer"].append(request)
            else:
                waiting[f"{len(str(request.number))} digits"].append(request)
        request = fitting.pop()
        command = request.command.replace(f":{request.number}", f":{number}")
        result.append(replace(request, number=number, command=command))
    return result


def _made(kind: str, work: Work, split: Split, seed: int, count: int) -> list[tuple[Any, ...]]:
    jobs = [(split, seed, chunk) for chunk in range(-(-count // CHUNK))]
    FOLDER.mkdir(exist_ok=True)
    files = [FOLDER / f"{kind}-{split}-{seed}-{chunk}.npz" for _, _, chunk in jobs]
    missing = [
        (work, job, file) for job, file in zip(jobs, files, strict=True) if not file.exists()
    ]
    with Pool() as workers:
        workers.starmap(_keep, missing, chunksize=1)
    result = []
    for file in files:
        with np.load(file) as content:
            result.append(tuple(content.values()))
    return result


def _keep(work: Work, job: tuple[Split, int, int], file: Path) -> None:
    partial = file.with_suffix(".part.npz")
    np.savez(partial, *work(*job))
    partial.rename(file)


def _pictures(split: Split, seed: int, chunk: int) -> tuple[npt.NDArray[Any], ...]:
    rng = random.Random(f"pictures-{split}-{seed}-{chunk}")
    pixels = np.zeros((CHUNK, 3, SIZE, SIZE), np.uint8)
    cells = np.zeros((CHUNK, GRID * GRID), np.int64)
    numbers, handwritten = np.zeros(CHUNK, np.int64), np.zeros(CHUNK, np.bool_)
    for i in range(CHUNK):
        low, high = rng.choice([(0, 9)] * 2 + [(10, 99)] * 3 + [(100, LONGEST_TIMER)])
        numbers[i] = rng.randint(low, high)
        crowded = split == "train" and rng.random() < 0.75
        picture, kind, cells[i] = pictures.draw(rng, int(numbers[i]), split, crowded)
        pixels[i] = np.rint(squash(picture, SIZE) * 255)
        handwritten[i] = kind == "handwritten"
    return pixels, cells, numbers, handwritten


def _clips(split: Split, seed: int, chunk: int) -> tuple[npt.NDArray[Any], ...]:
    rng = random.Random(f"clips-{split}-{seed}-{chunk}")
    features, frames = np.zeros((CHUNK, FRAMES, BINS), np.float16), np.zeros(CHUNK, np.int64)
    requests = islice(spoken(split, seed), chunk * CHUNK, (chunk + 1) * CHUNK)
    for i, request in enumerate(requests):
        window = mel(sounds.record(rng, sounds.utter(rng, request.words, split))).input_features
        features[i, : len(window)], frames[i] = window, len(window)
    return features, frames


def main() -> None:
    """Make the pools that training takes, which is then quick to start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["pictures", "clips"])
    parser.add_argument("split", choices=["train", "heldout"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make = picture_pool if options.kind == "pictures" else clip_pool
    make(options.split, options.seed, options.count)


if __name__ == "__main__":
    main()
