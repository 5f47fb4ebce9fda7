"""Requests with a medium in them: a picture in place of a number, a clip in place of the words.

A pictured request is one of the grammar's whose only number a picture shows: "set a timer for",
[picture of 47], "minutes"; its split is that of data.py. A spoken request is a clip and nothing
else. Pictures and sounds have splits of their own.

The prompt's text is what the chat template gives, each medium expanded as transformers'
Gemma3nProcessor does it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import grammar as g
import words as w
from data import Split, split_of, to_text
from grammar import Pair
from tokenizer import AUDIO_TOKENS, BOS, IMAGE_TOKENS
from tokenizers import Tokenizer

IMAGE: Final = "\n\n<start_of_image>" + "<image_soft_token>" * IMAGE_TOKENS + "<end_of_image>\n\n"
AUDIO: Final = "\n\n<start_of_audio>" + "<audio_soft_token>" * AUDIO_TOKENS + "<end_of_audio>\n\n"


SPOKEN_DEVICES: Final = (
    "lamp", "fan", "heater", "tv", "humidifier", "sprinkler", "kettle", "socket",
)  # fmt: skip


@dataclass(frozen=True)
class Pictured:
    """A request with a picture of `number` between `before` and `after`."""

    before: str
    number: int
    after: str
    command: str

    @property
    def content(self) -> str:
        """The user turn, the picture expanded."""
        return f"{self.before}{IMAGE}{self.after}"


@dataclass(frozen=True)
class Spoken:
    """A request that a clip says."""

    words: str
    command: str

    @property
    def content(self) -> str:
        """The user turn, the clip expanded."""
        return AUDIO


def encode_user(tokenizer: Tokenizer, content: str) -> list[int]:
    """The ids of one user turn, up to where the model answers."""
    text = f"<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n"
    return [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]


def pictured(split: Split, seed: int) -> Iterator[Pictured]:
    """Yield the endless stream of one split.

    A third of the numbers have one digit. A number is drawn anew, with as many digits as the
    grammar gave it: the grammar's own are mostly multiples of five, which could be guessed.
    """
    rng = random.Random(f"pictured-{split}-{seed}")
    while True:
        single = rng.randrange(3) == 0
        while True:
            family = rng.choice([g.level, g.thermostat, g.timer, g.openings])
            request, command = family(rng)
            text = to_text(command)
            numbers, values = re.findall(r"\d+", request), re.findall(r"(?<=:)\d+(?=[,}])", text)
            if (
                len(numbers) == 1
                and numbers == values
                and len(numbers[0]) <= 3
                and (len(numbers[0]) == 1) is single
                and not re.search(r"\d[.:]\d|[.][0-9]|:\d\d\"|CO2|PM2", request + text)
                and split_of(request, command) == split
            ):
                break
        old = numbers[0]
        number = rng.randint(10 ** (len(old) - 1) if len(old) > 1 else 0, 10 ** len(old) - 1)
        if command.get("device") == "thermostat":
            number = int(old)  # the grammar's are uniform here, and no room has 90 degrees
        before, after = (part.strip() for part in request.split(old))
        yield Pictured(before, number, after, text.replace(f":{old}", f":{number}"))


def spoken(split: Split, seed: int) -> Iterator[Spoken]:
    """Yield the endless stream of one split; both say all commands, in other voices."""
    rng = random.Random(f"spoken-{split}-{seed}")
    while True:
        said, command = _spoken_pair(rng)
        yield Spoken(said, to_text(command))


def vocabulary() -> list[str]:
    """Every word that a clip may say, but articles, sorted."""
    stream = spoken("train", 0)
    return sorted({word for _ in range(20_000) for word in key_words(next(stream).words)})


def key_words(said: str) -> list[str]:
    """The words of a request that the tower has to hear."""
    return [word for word in said.split() if word not in ("a", "the")]


def _spoken_pair(rng: random.Random) -> Pair:
    """A request of two words and perhaps an article, one of twenty."""
    if rng.random() < 0.8:
        device, action = rng.choice(SPOKEN_DEVICES), rng.choice(["on", "off"])
        return f"{w.DEVICES[device][0]} {action}", {"action": action, "device": device}
    device, action = rng.choice(["curtains", "gate"]), rng.choice(["open", "close"])
    return f"{action} the {device}", {"action": action, "device": device}
