"""Sampling agrees with transformers' processors, and with arithmetic where they are missing."""

from __future__ import annotations

import numpy as np
import pytest

from nestd.daemon.engine.messages import Sampling
from nestd.daemon.engine.sampling import Sampler, candidates


def logits(seed: int = 0, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def test_temperature_zero_takes_the_likeliest_token() -> None:
    values = logits()
    assert Sampler(Sampling(temperature=0), []).sample(values) == int(values.argmax())


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed, top_k=0, top_p=1), [])
        return [sampler.sample(logits(i)) for i in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_draws_follow_the_probabilities() -> None:
    values = logits(size=8)
    sampler = Sampler(Sampling(temperature=1.5, seed=1, top_k=0, top_p=1), [])
    counts = np.bincount([sampler.sample(values.copy()) for _ in range(20000)], minlength=8)
    expected = np.exp(values / 1.5) / np.exp(values / 1.5).sum()
    np.testing.assert_allclose(counts / 20000, expected, atol=0.015)


def test_top_k_keeps_only_the_likeliest() -> None:
    values = logits()
    ids, weights = candidates(values, 1.0, 5, 1.0)
    assert list(ids) == list(np.argsort(-values)[:5])
    assert weights.sum() == pytest.approx(1)


def test_top_p_keeps_the_smallest_set_that_reaches_the_sum() -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert list(candidates(values, 1.0, 0, 0.75)[0]) == [0, 1]
    assert list(candidates(values, 1.0, 0, 0.01)[0]) == [0]
    assert list(candidates(values, 1.0, 0, 1.0)[0]) == [0, 1, 2, 3]


def test_the_lowest_and_the_highest_draw_pick_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    values = logits(3, 262144)
    sampler = Sampler(Sampling(temperature=1, top_k=0, top_p=1), [])
    values[[0, -1]] = -np.inf  # as a grammar does to tokens that may not come
    for draw, token in ((0.0, 1), (float(np.nextafter(1.0, 0)), len(values) - 2)):
        monkeypatch.setattr(sampler, "_random", type("Draw", (), {"random": lambda _, d=draw: d})())
        assert sampler.sample(values.copy()) == token


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 0.9), (1.0, 0.95), (2.0, 0.6)])
def test_top_p_of_a_large_vocabulary_equals_a_sort_of_all_of_it(
    temperature: float, top_p: float
) -> None:
    values = logits(1, 50_000)
    order = np.argsort(-values, kind="stable")
    weights = np.exp((values[order].astype(np.float64) - values.max()) / temperature)
    weights /= weights.sum()
    expected = order[: np.searchsorted(np.cumsum(weights), top_p) + 1]
    ids, found = candidates(values, temperature, 0, top_p)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(found, weights[: len(ids)] / weights[: len(ids)].sum(), rtol=1e-5)


def test_a_temperature_next_to_zero_takes_the_likeliest_token() -> None:
    values = logits(2)
    for top_k in (0, 5):
        sampler = Sampler(Sampling(temperature=1e-60, top_k=top_k, seed=1), [])
        assert sampler.sample(values.copy()) == int(values.argmax())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 10, 0.9), (1.3, 0, 0.5)])
def test_candidates_equal_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = logits(seed)
    scores = torch.tensor(values)[None]
    processors = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k:
        processors.append(transformers.TopKLogitsWarper(top_k))
    processors.append(transformers.TopPLogitsWarper(top_p))
    for processor in processors:
        scores = processor(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    ids, weights = candidates(values, temperature, top_k, top_p)
    mine = np.zeros_like(expected)
    mine[ids] = weights
    np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values, prompt = logits(4), [3, 7, 7, 20]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.8)
    expected = processor(torch.tensor([prompt]), torch.tensor(values)[None])[0].numpy()
    mine = values.copy()
    token = Sampler(Sampling(temperature=0, repetition_penalty=1.8), prompt).sample(mine)
    np.testing.assert_allclose(mine, expected, rtol=1e-6)
    assert token == int(expected.argmax())


def test_repetition_penalty_counts_the_answer_too() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=5), [])
    values = np.array([1.0, 0.9, 0.8], np.float32)
    assert [sampler.sample(values.copy()) for _ in range(3)] == [0, 1, 2]
