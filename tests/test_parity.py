"""The bundle computes what transformers computes, at every size, and what int8 costs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestd.bundle.manifest import Bundle, Submodel
from nestd.bundle.submodels import published_slices
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.messages import EngineOptions

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
pytest.importorskip("transformers")

from support.checkpoints import save_checkpoint, text_config, text_model  # noqa: E402
from support.decoder import Decoder  # noqa: E402
from support.slicing import sliced_model  # noqa: E402
from support.tiny import NARROW, WINDOW  # noqa: E402

pytestmark = pytest.mark.parity

PROMPT, DECODE = 3 * WINDOW, 64
TOLERANCE = 2e-4
SHAPES = {"E2B-like": (30, 10), "E4B-like": (35, 15)}
# Cut from another checkpoint: layers renumbered, so that the kinds come in no regular pattern.
CUT_KINDS = [f"{kind}_attention" for kind in 2 * ("sliding", "full", "sliding", "sliding")]


def token_ids(count: int, seed: int = 1) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(5, 300, count)


def reference(model: Any, ids: Any, cache: Any = None) -> tuple[Any, Any]:
    """Return (logits [S, vocab], cache) of transformers with use_cache=True."""
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(ids))[None], past_key_values=cache, use_cache=True)
    return out.logits[0].numpy(), out.past_key_values


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Tiny:
    """A model of one shape and its bundles, made once."""

    def __init__(self, root: Path, layers: int, shared: int, **changes: Any) -> None:
        self.model = text_model(text_config(layers, shared, **changes))
        self.checkpoint = save_checkpoint(self.model, root / "checkpoint")
        self.root = root
        self._graphs: dict[int, Graphs] = {}

    def graphs(self, bits: int) -> Graphs:
        if bits not in self._graphs:
            options = ConvertOptions(bits=bits)  # type: ignore[arg-type]
            bundle = convert(str(self.checkpoint), self.root / f"b{bits}", options, io.StringIO())
            self._graphs[bits] = Graphs(bundle, EngineOptions(threads=2))
        return self._graphs[bits]

    def full(self, bits: int) -> Submodel:
        return self.graphs(bits).bundle.manifest.submodels[-1]


@pytest.fixture(scope="module", params=SHAPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp(request.param), *SHAPES[request.param])


def decode(
    graphs: Graphs, ids: Any, submodel: Submodel, prompt: int, chunk: int
) -> tuple[list[Any], KVCache]:
    """Prefill `prompt` ids in chunks, run the rest one by one; return logits from the prompt on."""
    cache = graphs.new_cache(len(ids))
    logits = []
    for start in range(0, prompt, chunk):
        stop = min(start + chunk, prompt)
        logits = [graphs.run(ids[start:stop], cache, submodel, need_logits=stop == prompt)]
    for index in range(prompt, len(ids)):
        logits.append(graphs.run(ids[index : index + 1], cache, submodel, need_logits=True))
    return logits, cache


@pytest.mark.parametrize("chunk", [PROMPT, WINDOW + 3, 5])
def test_float32_logits_equal_transformers_in_prefill_and_64_steps_past_the_window(
    tiny: Tiny, chunk: int
) -> None:
    ids = token_ids(PROMPT + DECODE)
    expected, _ = reference(tiny.model, ids)
    logits, _ = decode(tiny.graphs(32), ids, tiny.full(32), PROMPT, chunk)
    assert len(logits) == DECODE + 1
    np.testing.assert_allclose(logits, expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)


def test_float32_logits_equal_stepwise_decoding_of_transformers(tiny: Tiny) -> None:
    ids = token_ids(PROMPT + 8, seed=2)
    logits, _ = decode(tiny.graphs(32), ids, tiny.full(32), PROMPT, PROMPT)
    expected, cache = reference(tiny.model, ids[:PROMPT])
    np.testing.assert_allclose(logits[0], expected[-1], atol=TOLERANCE, rtol=0)
    for index in range(8):
        expected, cache = reference(tiny.model, ids[PROMPT + index : PROMPT + index + 1], cache)
        np.testing.assert_allclose(logits[1 + index], expected[-1], atol=TOLERANCE, rtol=0)


def test_a_cut_checkpoint_of_mixed_widths_equals_transformers(tmp_path: Path) -> None:
    widths = [64, 128, 64, 128, 128, 64, 96, 64]
    cut = Tiny(tmp_path, 8, 3, intermediate_size=widths, layer_types=CUT_KINDS)
    ids = token_ids(PROMPT + 8)
    expected, _ = reference(cut.model, ids)
    logits, _ = decode(cut.graphs(32), ids, cut.full(32), PROMPT, PROMPT)
    np.testing.assert_allclose(logits, expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rows", [2, 7, WINDOW + 9])
def test_the_last_rows_of_a_chunk_all_have_the_logits_of_transformers(
    tiny: Tiny, rows: int
) -> None:
    ids = token_ids(PROMPT + 2 * rows)
    expected, _ = reference(tiny.model, ids)
    batch = Decoder(tiny.graphs(32).bundle).batch(1, len(ids))
    logits = batch.step(ids[None, :PROMPT], rows)
    assert logits.shape == (1, rows, expected.shape[1])
    np.testing.assert_allclose(logits[0], expected[PROMPT - rows : PROMPT], atol=TOLERANCE, rtol=0)
    assert batch.step(ids[None, PROMPT : PROMPT + rows], 0).shape == (1, 0, expected.shape[1])
    # The last tokens are forgotten and read again, as after a guess that was wrong.
    batch.cut(0, len(ids) - rows - rows // 2)
    logits = batch.step(ids[None, batch.lengths[0] :], rows)
    np.testing.assert_allclose(logits[0], expected[-rows:], atol=TOLERANCE, rtol=0)


def test_int8_logits_keep_a_cosine_of_0_999_at_every_step(tiny: Tiny) -> None:
    ids = token_ids(PROMPT + DECODE)
    expected, _ = reference(tiny.model, ids)
    logits, _ = decode(tiny.graphs(8), ids, tiny.full(8), PROMPT, PROMPT)
    cosines = [cosine(a, b) for a, b in zip(logits, expected[PROMPT - 1 :], strict=True)]
    assert min(cosines) >= 0.999


def test_int4_stays_near_float32(tiny: Tiny) -> None:
    ids = token_ids(PROMPT + 16)
    expected, _ = reference(tiny.model, ids)
    logits, _ = decode(tiny.graphs(4), ids, tiny.full(4), PROMPT, PROMPT)
    cosines = [cosine(a, b) for a, b in zip(logits, expected[PROMPT - 1 :], strict=True)]
    assert min(cosines) >= 0.93


def test_each_part_of_the_model_matters_to_the_logits(tmp_path: Path) -> None:
    """Without this, parity on weights that have no effect would prove nothing."""
    tiny = Tiny(tmp_path, 10, 5)
    ids = token_ids(PROMPT)
    expected, _ = reference(tiny.model, ids)
    parts = ["embed_tokens_per_layer", "altup.correct_output_scale", "laurel.linear_left"]
    parts += ["altup.prediction_coefs", "altup.correction_coefs", "altup_projections.0"]
    parts += ["altup_unembed_projections.1", "per_layer_model_projection", "q_norm"]
    for part in parts:
        weights = {n: w for n, w in tiny.model.named_parameters() if part in n}
        saved = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for weight in weights.values():
                weight.copy_(weight.flip(0))
            changed, _ = reference(tiny.model, ids)
            for name, weight in weights.items():
                weight.copy_(saved[name])
        assert np.abs(changed[-1] - expected[-1]).max() > 10 * TOLERANCE, part


@pytest.fixture(scope="module")
def e4b(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("slices"), *SHAPES["E4B-like"])


@pytest.mark.parametrize("name", [item.name for item in published_slices()])
def test_each_published_slice_equals_an_independently_sliced_model(e4b: Tiny, name: str) -> None:
    graphs = e4b.graphs(32)
    submodel = graphs.bundle.manifest.submodel(name)
    small = sliced_model(e4b.model, NARROW, submodel.wide_layers, submodel.skipped_layers)
    ids = token_ids(PROMPT + 8, seed=3)
    expected, _ = reference(small, ids)
    logits, _ = decode(graphs, ids, submodel, PROMPT, 20)
    np.testing.assert_allclose(logits, expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)


def test_published_slices_differ_from_each_other(e4b: Tiny) -> None:
    graphs = e4b.graphs(32)
    ids = token_ids(PROMPT)
    results = []
    for submodel in graphs.bundle.manifest.submodels:
        logits, _ = decode(graphs, ids, submodel, PROMPT, PROMPT)
        results.append(logits[0])
    for index, one in enumerate(results):
        assert all(np.abs(one - other).max() > 10 * TOLERANCE for other in results[:index])


def test_switching_mid_answer_equals_each_step_at_its_size_on_the_same_cache(e4b: Tiny) -> None:
    """The reference runs each step on a transformers model of its own, on one cache for all."""
    graphs = e4b.graphs(32)
    plan = ["E4B"] * 3 + ["E2B"] * 5 + ["E2.98B"] * 4 + ["E4B"] * 2 + ["E1.96B"] * 6
    references = {}
    for name in set(plan):
        item = graphs.bundle.manifest.submodel(name)
        references[name] = sliced_model(e4b.model, NARROW, item.wide_layers, item.skipped_layers)
    ids = token_ids(PROMPT + len(plan), seed=4)
    cache = graphs.new_cache(len(ids))
    graphs.run(ids[:PROMPT], cache, graphs.bundle.manifest.submodel("E4B"), need_logits=False)
    _, reference_cache = reference(references["E4B"], ids[:PROMPT])
    for index, name in enumerate(plan, start=PROMPT):
        step = ids[index : index + 1]
        logits = graphs.run(step, cache, graphs.bundle.manifest.submodel(name), need_logits=True)
        expected, reference_cache = reference(references[name], step, reference_cache)
        np.testing.assert_allclose(logits, expected[-1], atol=TOLERANCE, rtol=0)


def test_a_checkpoint_with_narrow_only_layers_runs_at_its_full_size(tmp_path: Path) -> None:
    """A Mix-n-Match checkpoint has layers without a wide half."""
    widths = [128, 64, 128, 64, 64, 128, 64, 128, 64, 64]
    tiny = Tiny(tmp_path, 10, 5, intermediate_size=widths)
    ids = token_ids(PROMPT + 4)
    expected, _ = reference(tiny.model, ids)
    logits, _ = decode(tiny.graphs(32), ids, tiny.full(32), PROMPT, PROMPT)
    np.testing.assert_allclose(logits, expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)
    assert tiny.full(32).wide_layers == (0, 2, 5, 7)


def test_a_full_conditional_generation_checkpoint_converts_its_text_part(tmp_path: Path) -> None:
    from support.multimodal import conditional_generation_model

    model = conditional_generation_model()
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    bundle = convert(str(checkpoint), tmp_path / "b", ConvertOptions(bits=32), io.StringIO())
    assert bundle.manifest.source.architecture == "Gemma3nForConditionalGeneration"
    graphs = Graphs(bundle, EngineOptions(threads=2))
    ids = token_ids(PROMPT + 4)
    expected, _ = reference(model, ids)
    logits, _ = decode(graphs, ids, bundle.manifest.submodels[-1], PROMPT, PROMPT)
    np.testing.assert_allclose(logits, expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)


def test_opening_a_bundle_again_gives_the_same_logits(tiny: Tiny) -> None:
    ids = token_ids(20)
    again = Graphs(Bundle.open(tiny.graphs(8).bundle.path), EngineOptions(threads=2))
    one, _ = decode(tiny.graphs(8), ids, tiny.full(8), 20, 20)
    two, _ = decode(again, ids, tiny.full(8), 20, 20)
    np.testing.assert_array_equal(one[0], two[0])
