"""pocket's data: an endless, seeded stream of (request, command) examples in two disjoint splits.

The split is decided by the *skeleton* of a command: its text with every number replaced by `#`. One
skeleton in ten is held out, so a held-out request asks for a combination of action, device, room,
condition ... that no training example asks for in any wording or with any number. Commands of fewer
than three slots are the vocabulary and always train. Two-part commands are held out when either
part is, and train only when both parts are.

Run as a script it prints examples: `python data.py heldout 20 --seed 7`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import words as w
from grammar import Command, clean_pair

Split = Literal["train", "heldout"]
HELD_OUT_SHARE = 10  # one skeleton in this many


@dataclass(frozen=True)
class Example:
    """One noisy request and the exact text pocket should answer."""

    request: str
    command: str


def to_text(command: Command) -> str:
    """The one spelling of a command: compact JSON, slots in the grammar's order."""
    return json.dumps(command, ensure_ascii=False, separators=(",", ":"))


def split_of(request: str, command: Command) -> Split:
    """Which split a clean pair belongs to; a function of nothing but the pair."""
    if command["action"] == "all":
        parts = [split_of(request, part) for part in command["of"]]
        return "heldout" if "heldout" in parts else "train"
    if len(command) == 2:
        return "train"
    # All off-topic requests share one command, so these are split by their words.
    key = request if command["action"] == "unknown" else re.sub(r"\d+", "#", to_text(command))
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0 else "train"


def _typo(rng: random.Random, request: str) -> str:
    """One slip of the finger in one long lower-case word."""
    spots = [match.span() for match in re.finditer(r"[a-z]{5,}", request)]
    if not spots:
        return request
    start, end = rng.choice(spots)
    at = rng.randrange(start + 1, end - 1)  # first and last letter stay
    kind = rng.randrange(3)
    if kind == 0:
        return request[:at] + request[at + 1 :]
    if kind == 1:
        return request[:at] + request[at] + request[at:]
    return request[:at] + request[at + 1] + request[at] + request[at + 2 :]


def add_noise(rng: random.Random, request: str) -> str:
    """Politeness, chatter, case, punctuation and typos; never changes the meaning."""
    if rng.random() < 0.35:
        request = rng.choice(w.POLITE_BEFORE) + request
    if rng.random() < 0.15:
        request += rng.choice(w.POLITE_AFTER)
    if rng.random() < 0.06:
        request = rng.choice(w.CHATTER) + request
    style = rng.random()
    if style < 0.4:
        request = request[0].upper() + request[1:]
    elif style < 0.65:
        request = request.lower()
    for chance in (0.1, 0.03):
        if rng.random() < chance:
            request = _typo(rng, request)
    if style < 0.4 or rng.random() < 0.2:
        request += rng.choice([".", ".", "!", "?"])
    return request


def examples(split: Split, seed: int) -> Iterator[Example]:
    """Yield the endless stream of one split."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        request, command = clean_pair(rng)
        if split_of(request, command) == split:
            yield Example(add_noise(rng, request), to_text(command))


def main() -> None:
    """Print examples as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("split", choices=["train", "heldout"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stream = examples(options.split, options.seed)
    for _ in range(options.count):
        example = next(stream)
        line = {"request": example.request, "command": json.loads(example.command)}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
