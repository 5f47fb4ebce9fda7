"""Guessed tokens: found where they came before, kept only if right, and dropped where they lose."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling, Structure
from nestd.daemon.engine.prompt_lookup import MOST_GUESSED, PromptLookup, lookup
from nestd.daemon.engine.structure import Grammars
from nestd.daemon.prompt.template import Prompt


@pytest.fixture(scope="module")
def graphs(exact_bundle: Bundle) -> Graphs:
    return Graphs(exact_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(exact_bundle: Bundle) -> Prompt:
    return Prompt(exact_bundle)


class Clock:
    """Stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Optimist(PromptLookup):
    """Guesses at every step, as after guesses that paid."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self._plain_seconds = 1.0
        self._size = 8


def answer(
    graphs: Graphs,
    prompt: Prompt,
    text: str,
    lookup: PromptLookup | None,
    structure: Structure | None = None,
    **sampling: object,
) -> Generation:
    ids = prompt.encode([ChatMessage(role="user", content=text)])
    generation = Generation(
        graphs,
        prompt.tokenizer,
        EncodedPrompt(ids),
        Sampling.model_validate({"max_tokens": 120} | sampling),
        graphs.bundle.manifest.submodel("full"),
        graphs.new_cache(480),
        480,
        Grammars(graphs.bundle).compile(structure) if structure else None,
        lookup=lookup,
    )
    while generation.finish_reason is None:
        generation.step()
    return generation


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


@pytest.mark.parametrize(
    ("text", "most", "guess"),
    [
        ("the lamp is on. the l", 5, "amp i"),
        ("abcX abcY abc", 1, "Y"),  # the latest place
        ("abcXYZ abc", 6, "XYZ ab"),
        ("aaaaaa", 2, "aa"),
        ("abcXYZ abd", 4, ""),
        ("abc", 4, ""),
        ("abcX abc", 0, ""),
    ],
)
def test_what_followed_before_is_guessed(text: str, most: int, guess: str) -> None:
    assert bytes(lookup(ids(text), most).astype(np.uint8)).decode() == guess


def test_soft_tokens_are_never_guessed() -> None:
    sequence = np.array([5, 6, 7, 8, -3, -4, 5, 6, 7])
    assert lookup(sequence, 4).tolist() == [8]


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_answers_are_the_same_with_and_without_guesses(
    graphs: Graphs, prompt: Prompt, temperature: float
) -> None:
    guessed = 0
    for seed in range(8):
        text = f"lamp {seed} on, lamp {seed} off, lamp {seed} on"
        fields = {"temperature": temperature, "seed": seed}
        plain = answer(graphs, prompt, text, None, **fields)
        quick = answer(graphs, prompt, text, Optimist(), **fields)
        assert quick.text == plain.text
        assert quick.completion_tokens == plain.completion_tokens
        assert quick.finish_reason == plain.finish_reason
        assert plain.guessed_tokens == 0
        guessed += quick.guessed_tokens
    assert guessed > 20


def test_a_structured_answer_is_the_same_with_and_without_guesses(
    graphs: Graphs, prompt: Prompt
) -> None:
    item = {
        "type": "object",
        "properties": {"device": {"enum": ["lamp", "heater"]}, "on": {"type": "boolean"}},
        "required": ["device", "on"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 4, "maxItems": 4}
    structure = Structure(json_schema=json.dumps(schema))
    texts, guessed = set(), 0
    for seed in range(4):
        fields = {"temperature": 1.0, "seed": seed, "max_tokens": 200}
        plain = answer(graphs, prompt, "lamps", None, structure, **fields)
        quick = answer(graphs, prompt, "lamps", Optimist(), structure, **fields)
        assert quick.text == plain.text
        assert len(json.loads(plain.text)) == 4
        texts.add(plain.text)
        guessed += quick.guessed_tokens
    assert len(texts) > 1
    assert guessed > 0


def test_guessing_never_goes_beyond_the_tokens_that_are_allowed(
    graphs: Graphs, prompt: Prompt
) -> None:
    for most in range(1, 12):
        quick = answer(graphs, prompt, "on on on on", Optimist(), max_tokens=most)
        assert quick.completion_tokens <= most


def play(lookup: PromptLookup, clock: Clock, length: int, accepted: int, seconds: float) -> int:
    """Run one step on a text that repeats itself; return how many tokens were guessed."""
    guessed = len(lookup.propose(np.zeros(length, np.int64), 100))
    clock.now += seconds if guessed else 1.0
    lookup.judge(min(accepted, guessed))
    return guessed


def test_the_first_step_of_an_answer_is_measured_without_a_guess() -> None:
    clock = Clock()
    found = PromptLookup(clock)
    assert play(found, clock, 50, 0, 1.0) == 0
    assert play(found, clock, 51, 0, 1.0) > 0


def test_right_guesses_become_longer() -> None:
    clock = Clock()
    found = PromptLookup(clock)
    sizes = [play(found, clock, 100 + step, 100, 1.5) for step in range(6)]
    assert sizes == [0, 2, 4, 8, MOST_GUESSED, MOST_GUESSED]


def test_guesses_that_bring_nothing_cost_less_than_two_percent() -> None:
    clock = Clock()
    found = PromptLookup(clock)
    for step in range(1000):
        play(found, clock, 100 + step, 0, 1.5)
    assert clock.now < 1000 * 1.02


def test_guesses_that_are_often_right_but_too_slow_are_dropped() -> None:
    clock = Clock()
    found = PromptLookup(clock)
    steps = [play(found, clock, 100 + step, 1, 3.0) for step in range(200)]
    assert sum(1 for size in steps if size) < 8
