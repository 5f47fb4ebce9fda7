"""An answer, step by step, on a real bundle with random weights."""

from __future__ import annotations

import numpy as np
import pytest

from nestd.bundle.errors import TooLarge
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling
from nestd.daemon.prompt.template import Prompt

CONTEXT = 256


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Bundle) -> Graphs:
    return Graphs(tiny_bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def prompt(tiny_bundle: Bundle) -> Prompt:
    return Prompt(tiny_bundle)


def generation(
    graphs: Graphs,
    prompt: Prompt,
    text: str = "turn the light on",
    submodel: str = "full",
    context: int = CONTEXT,
    **sampling: object,
) -> Generation:
    ids = prompt.encode([ChatMessage(role="user", content=text)])
    return Generation(
        graphs,
        prompt.tokenizer,
        EncodedPrompt(ids),
        Sampling.model_validate({"max_tokens": 40, **sampling}),
        graphs.bundle.manifest.submodel(submodel),
        graphs.new_cache(context),
        context,
    )


def finish(answer: Generation, chunk: int = 8) -> list[str]:
    pieces = []
    while answer.finish_reason is None:
        pieces.append(answer.step(chunk))
    return pieces


def test_pieces_join_to_the_answer(graphs: Graphs, prompt: Prompt) -> None:
    answer = generation(graphs, prompt)
    assert "".join(finish(answer)) == answer.text
    assert answer.finish_reason in ("stop", "length")
    assert answer.completion_tokens <= 40


def test_chunk_size_does_not_change_the_answer(graphs: Graphs, prompt: Prompt) -> None:
    texts = ["".join(finish(generation(graphs, prompt), chunk)) for chunk in (3, 16, 128)]
    assert len(set(texts)) == 1


def test_greedy_decoding_follows_the_logits_of_the_graph(graphs: Graphs, prompt: Prompt) -> None:
    answer = generation(graphs, prompt, max_tokens=10)
    finish(answer)
    ids = prompt.encode([ChatMessage(role="user", content="turn the light on")])
    expected: list[int] = []
    submodel = graphs.bundle.manifest.submodel("full")
    for _ in range(10):
        cache = graphs.new_cache(CONTEXT)
        logits = graphs.run(np.array(ids + expected), cache, submodel, need_logits=True)
        assert logits is not None
        expected.append(int(logits.argmax()))
        if expected[-1] in graphs.bundle.manifest.tokens.eos:
            expected.pop()
            break
    assert answer.text == prompt.tokenizer.decode(expected)


def test_sizes_give_different_answers(graphs: Graphs, prompt: Prompt) -> None:
    names = [item.name for item in graphs.bundle.manifest.submodels]
    texts = set()
    for name in names:
        answer = generation(graphs, prompt, submodel=name)
        finish(answer)
        texts.add(answer.text)
    assert len(texts) == len(names) == 3


def test_a_switch_between_two_tokens_is_recorded_and_changes_the_rest(
    graphs: Graphs, prompt: Prompt
) -> None:
    plain = generation(graphs, prompt, temperature=0, stop=["\x00never"])
    finish(plain)
    answer = generation(graphs, prompt, temperature=0)
    while answer.completion_tokens < 5:
        answer.step()
    answer.submodel = graphs.bundle.manifest.submodel("nested")
    finish(answer)
    assert [(item.token, item.submodel) for item in answer.switches] == [(0, "full"), (5, "nested")]
    assert answer.text != plain.text


def test_max_tokens_ends_the_answer_with_reason_length(graphs: Graphs, prompt: Prompt) -> None:
    answer = generation(graphs, prompt, max_tokens=3)
    finish(answer)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 3)


def test_an_answer_ends_where_the_context_is_full(graphs: Graphs, prompt: Prompt) -> None:
    probe = generation(graphs, prompt)
    answer = generation(
        graphs, prompt, context=probe.prompt_tokens + 4, max_tokens=1000, temperature=3, top_k=0
    )
    finish(answer)
    assert answer.completion_tokens <= 4


def test_a_prompt_longer_than_the_context_is_too_large(graphs: Graphs, prompt: Prompt) -> None:
    with pytest.raises(TooLarge, match="shorten it"):
        generation(graphs, prompt, text="x" * CONTEXT)


def test_cancelling_ends_the_answer_at_once_and_keeps_its_text(
    graphs: Graphs, prompt: Prompt
) -> None:
    answer = generation(graphs, prompt)
    while answer.completion_tokens < 4:
        answer.step()
    text = answer.text + answer.cancel()
    assert (answer.finish_reason, answer.text) == ("cancelled", text)
    with pytest.raises(ValueError, match="ended"):
        answer.step()


def test_cancelling_during_prefill_stops_before_the_next_chunk(
    graphs: Graphs, prompt: Prompt
) -> None:
    answer = generation(graphs, prompt, text="x" * 100)
    answer.step(8)
    assert answer.prefilling
    answer.cancel()
    assert (answer.finish_reason, answer.completion_tokens) == ("cancelled", 0)


def test_ids_outside_the_vocabulary_are_refused(graphs: Graphs) -> None:
    submodel = graphs.bundle.manifest.submodels[0]
    for ids in ([-1], [320], []):
        with pytest.raises(ValueError, match="vocabulary|do not fit"):
            graphs.run(np.array(ids, np.int64), graphs.new_cache(4), submodel, need_logits=True)


def test_ids_behind_the_per_layer_vocabulary_read_row_zero(graphs: Graphs) -> None:
    """As Gemma3nModel does for image and audio positions."""
    rows = graphs._per_layer_embeddings.run(None, {"input_ids": np.array([[0, 300, 319, 5]])})[0]
    np.testing.assert_array_equal(rows[0, 1], rows[0, 0])
    np.testing.assert_array_equal(rows[0, 2], rows[0, 0])
    assert np.abs(rows[0, 3] - rows[0, 0]).max() > 0
