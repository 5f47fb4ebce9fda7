"""Structured answers: valid JSON of the schema, even of a model that knows nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestd.bundle.errors import BadRequest
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling, Structure
from nestd.daemon.engine.structure import MOST_SCHEMA_CHARS, Grammar, Grammars
from nestd.daemon.prompt.template import Prompt

LAMP = {
    "type": "object",
    "properties": {
        "device": {"type": "string", "enum": ["lamp", "heater"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 99},
        "on": {"type": "boolean"},
    },
    "required": ["device", "level", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Bundle) -> Graphs:
    return Graphs(tiny_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(tiny_bundle: Bundle) -> Prompt:
    return Prompt(tiny_bundle)


@pytest.fixture(scope="module")
def grammars(tiny_bundle: Bundle) -> Grammars:
    return Grammars(tiny_bundle)


def answer(
    graphs: Graphs,
    prompt: Prompt,
    grammars: Grammars,
    schema: Any,
    or_text: bool = False,
    **sampling: Any,
) -> Generation:
    ids = prompt.encode([ChatMessage(role="user", content="set the lamp")])
    options = {"max_tokens": 200, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1}
    structure = Structure(json_schema=json.dumps(schema), or_text=or_text)
    return Generation(
        graphs,
        prompt.tokenizer,
        EncodedPrompt(ids),
        Sampling.model_validate(options | sampling),
        graphs.bundle.manifest.submodel("full"),
        graphs.new_cache(480),
        480,
        grammars.compile(structure),
    )


def finish(generation: Generation) -> list[str]:
    pieces = []
    while generation.finish_reason is None:
        pieces.append(generation.step())
    return pieces


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0, 10.0]))
@settings(max_examples=25, deadline=None)
def test_every_answer_of_any_model_is_json_of_the_schema(
    graphs: Graphs, prompt: Prompt, grammars: Grammars, seed: int, temperature: float
) -> None:
    generation = answer(graphs, prompt, grammars, LAMP, seed=seed, temperature=temperature)
    finish(generation)
    assert generation.finish_reason == "stop"
    document = json.loads(generation.text)
    assert list(document) == ["device", "level", "on"]
    assert document["device"] in ("lamp", "heater")
    assert 0 <= document["level"] <= 99
    assert isinstance(document["on"], bool)


def test_pieces_of_a_structured_answer_join_to_it(
    graphs: Graphs, prompt: Prompt, grammars: Grammars
) -> None:
    generation = answer(graphs, prompt, grammars, LAMP)
    assert "".join(finish(generation)) == generation.text


def test_what_can_only_be_one_text_costs_no_steps(
    graphs: Graphs, prompt: Prompt, grammars: Grammars
) -> None:
    generation = answer(graphs, prompt, grammars, LAMP)
    steps = len(finish(generation))
    assert generation.completion_tokens == len(generation.text)  # a token is a byte here
    assert steps < generation.completion_tokens / 2


def test_taking_forced_tokens_at_once_changes_no_answer(
    graphs: Graphs, prompt: Prompt, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = answer(graphs, prompt, grammars, LAMP, temperature=0)
    finish(quick)
    monkeypatch.setattr(Grammar, "forced", lambda _: ())
    slow = answer(graphs, prompt, grammars, LAMP, temperature=0)
    finish(slow)
    assert quick.text == slow.text


def test_an_answer_may_be_text_instead_where_that_is_allowed(
    graphs: Graphs, prompt: Prompt, grammars: Grammars
) -> None:
    texts = []
    for seed in range(12):
        generation = answer(
            graphs, prompt, grammars, LAMP, or_text=True, seed=seed, max_tokens=60, temperature=8.0
        )
        finish(generation)
        texts.append(generation.text)
    assert any(not text.startswith("{") for text in texts)
    for text in texts:
        if text.startswith("{"):
            assert json.loads(text)["device"] in ("lamp", "heater")


def test_an_answer_that_is_cut_off_says_so(
    graphs: Graphs, prompt: Prompt, grammars: Grammars
) -> None:
    generation = answer(graphs, prompt, grammars, LAMP, max_tokens=5)
    finish(generation)
    assert generation.finish_reason == "length"
    assert generation.completion_tokens == 5


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "nonsense"}', "Invalid type"),
        ('{"$ref": "#/missing"}', "does not exist"),
        ("[1]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"type": "string", "pattern": "(?=a)"}', "regex"),
        ('{"enum": ["' + "x" * MOST_SCHEMA_CHARS + '"]}', "make it smaller"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "schema"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_a_bad_request(
    grammars: Grammars, schema: str, words: str
) -> None:
    with pytest.raises(BadRequest, match=words):
        grammars.compile(Structure(json_schema=schema))
