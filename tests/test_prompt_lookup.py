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
from nestd.daemon.engine.prompt_lookup import MOST_GUESSED, PRICE, PromptLookup, lookup
from nestd.daemon.engine.structure import Grammars
from nestd.daemon.prompt.template import Prompt


@pytest.fixture(scope="module")
def graphs(exact_bundle: Bundle) -> Graphs:
    return Graphs(exact_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(exact_bundle: Bundle) -> Prompt:
    return Prompt(exact_bundle)


class Optimist(PromptLookup):
    """Never loses heart: guesses at every step."""

    def judge(self, accepted: int) -> None:
        del accepted
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


def play(found: PromptLookup, length: int, accepted: int) -> int:
    """Run one step on a text that repeats itself; return how many tokens were guessed."""
    guessed = len(found.propose(np.zeros(length, np.int64), 100))
    found.judge(min(accepted, guessed))
    return guessed


def test_right_guesses_become_longer() -> None:
    found = PromptLookup()
    sizes = [play(found, 100 + step, 100) for step in range(6)]
    assert sizes == [2, 4, 8, 16, MOST_GUESSED, MOST_GUESSED]


def test_wrong_guesses_cost_less_than_half_a_percent() -> None:
    found = PromptLookup()
    guessed = [play(found, 100 + step, 0) for step in range(1000)]
    assert PRICE * sum(guessed) < 0.005 * 1000


def test_guesses_that_were_right_long_ago_do_not_pay_for_wrong_ones_now() -> None:
    found = PromptLookup()
    for step in range(300):
        play(found, 100 + step, 100)
    guessed = [play(found, 400 + step, 0) for step in range(100)]
    assert PRICE * sum(guessed) < 10


def test_guesses_that_are_seldom_right_are_dropped() -> None:
    found = PromptLookup()
    steps = [play(found, 100 + step, 1 if step % 8 == 0 else 0) for step in range(200)]
    assert sum(1 for size in steps if size) < 20
