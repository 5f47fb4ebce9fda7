"""nestd and llama.cpp answer alike from one GGUF file.

Runs where llama-cpp-python is installed (it is compiled, so CI has it not); docs/sources.md has the
figures. Whatever the file says, llama.cpp gives the first 20 layers caches of their own, per-layer
embeddings a width of 256 and LAuReL a rank of 64: hence real layer counts at other tiny widths. The
feed-forward is as wide as the real one: for the cutoff of its first layers llama.cpp divides the
variance by one less than the width (transformers by the width), which a narrow one would show.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="GGUF files need the gguf extra")
pytest.importorskip("torch", reason="llama.cpp's converter needs torch")
pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")

TOKENS = 200
WIDTH = 8192
PROMPT = "turn the light in the kitchen on"


@pytest.mark.parametrize(("layers", "shared"), [(30, 10), (35, 15)])
def test_200_greedy_tokens_agree_but_where_two_logits_are_as_good_as_equal(
    layers: int, shared: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.llama_cpp import to_gguf
    from support.sentencepiece import write_sentencepiece_checkpoint

    checkpoint = write_sentencepiece_checkpoint(
        tmp_path / "checkpoint",
        num_layers=layers,
        shared=shared,
        hidden_size_per_layer_input=256,
        laurel_rank=64,
        intermediate_size=[WIDTH] * layers,
    )
    file = tmp_path / "model.gguf"
    to_gguf(checkpoint, file, "f32")
    bundle = convert(str(file), tmp_path / "bundle", ConvertOptions(bits=32), io.StringIO())
    theirs = llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=2, logits_all=True, n_gpu_layers=0, verbose=False
    )
    prompt = theirs.tokenize(PROMPT.encode(), add_bos=True)

    graphs, ids, ours = Graphs(bundle, EngineOptions(threads=2)), list(prompt), []
    cache = graphs.new_cache(len(prompt) + TOKENS)
    full = bundle.manifest.submodels[-1]
    pending = np.array(prompt, np.int64)
    for _ in range(TOKENS):
        logits = graphs.run(pending, cache, full, need_logits=True)
        assert logits is not None
        ours.append(logits.copy())
        ids.append(int(logits.argmax()))
        pending = np.array(ids[-1:], np.int64)

    theirs.eval(ids[:-1])
    their_logits = theirs.scores[len(prompt) - 1 : len(ids) - 1]
    error = np.abs(np.array(ours) - their_logits).max(axis=1)
    different = np.flatnonzero(np.argmax(ours, axis=1) != np.argmax(their_logits, axis=1))
    agreed = f"{layers} layers: {TOKENS - len(different)} of {TOKENS} tokens, logits within "
    bounds = f"{error.max():.4f} (median {np.median(error):.4f}) of {np.abs(ours).max():.1f}"
    report = [agreed + bounds]
    for at in different:
        second, first = np.sort(their_logits[at])[-2:]
        report.append(
            f"  token {at}: llama.cpp's first two are {first - second:.5f} apart, "
            f"logits there within {error[at]:.5f}"
        )
        assert first - second < 2 * error[at]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(report) + "\n")
    # Another model would not come near.
    assert np.median(error) < 0.02 * np.abs(ours).max()
