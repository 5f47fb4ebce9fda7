"""An lm_head at 4 bits finds the likeliest tokens, and only their logits are exact."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoder import Decoder
from support.tiny import write_checkpoint

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle
from nestd.cli.main import main
from nestd.conversion import embeddings
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions

VOCABULARY, EXACT = 2048, 32
IDS = np.random.default_rng(9).integers(5, 300, (2, 40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("screen") / "checkpoint"
    return write_checkpoint(root, vocab_size=VOCABULARY, final_logit_softcapping=None)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Bundle]:
    """With and without a screen."""
    root = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "SCREENED_ROWS", EXACT)
        return {
            screen: convert(
                str(checkpoint),
                root / str(screen),
                ConvertOptions(lm_head_screen=screen),
                io.StringIO(),
            )
            for screen in (False, True)
        }


def logits(bundle: Bundle) -> Any:
    batch = Decoder(bundle).batch(2, IDS.shape[1])
    return batch.step(IDS[:, :1], 1), [
        batch.step(IDS[:, at : at + 1], 1)[:, 0] for at in range(1, IDS.shape[1])
    ]


def test_the_likeliest_tokens_have_the_logits_of_the_whole_table(
    bundles: dict[bool, Bundle],
) -> None:
    plain, screened = (np.concatenate(logits(bundles[screen])[1]) for screen in (False, True))
    errors = np.abs(screened - plain)
    ranks = np.argsort(-screened, axis=1)
    likely = np.take_along_axis(errors, ranks[:, : EXACT // 4], axis=1)
    others = np.take_along_axis(errors, ranks[:, EXACT:], axis=1)
    # int8 activations are what is left of a difference at the top; int4 rows are below.
    assert likely.mean() < others.mean() / 5
    assert likely.max() < 0.2 * plain.std()
    best = plain.max(axis=1)
    chosen = np.take_along_axis(plain, screened.argmax(axis=1)[:, np.newaxis], axis=1)[:, 0]
    assert (best - chosen < 0.1 * plain.std()).all()


def test_several_rows_have_the_logits_that_each_has_alone(bundles: dict[bool, Bundle]) -> None:
    together = Decoder(bundles[True]).batch(1, 40).step(IDS[:1], 5)
    batch = Decoder(bundles[True]).batch(1, 40)
    batch.step(IDS[:1, :35], 0)
    for row in range(5):
        alone = batch.step(IDS[:1, 35 + row : 36 + row])
        difference = np.linalg.norm(together[0, row] - alone[0, 0])
        assert difference < 0.05 * np.linalg.norm(alone)


def test_a_token_touches_fewer_bytes(bundles: dict[bool, Bundle]) -> None:
    plain, screened = (bundles[screen].manifest for screen in (False, True))
    assert screened.quantization.lm_head_screen
    assert screened.submodels[0].decoder_bytes < plain.submodels[0].decoder_bytes
    assert screened.sections["embed_tokens"] == plain.sections["embed_tokens"]


def test_the_table_is_not_fetched_whole_when_weights_are_mapped(
    bundles: dict[bool, Bundle], tmp_path: Path
) -> None:
    options = EngineOptions(threads=1, prepared_directory=tmp_path)
    mapped = Graphs(bundles[True], options)
    (prepared,) = tmp_path.iterdir()
    parts = json.loads((prepared / "parts.json").read_text())
    rows = sum(length for _, length in parts["rows"])
    assert rows >= VOCABULARY * mapped.model.hidden_size
    submodel = bundles[True].manifest.submodels[-1]
    mapped.retain(submodel)
    resident = Graphs(bundles[True], EngineOptions(threads=1))
    one, other = (
        graphs.run(IDS[0], graphs.new_cache(64), submodel, need_logits=True)
        for graphs in (mapped, resident)
    )
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


def test_a_screen_needs_quantised_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ConvertOptions(bits=32, lm_head_screen=True)
    with pytest.raises(CheckpointError, match="leave out --bits 32"):
        convert(str(checkpoint), tmp_path / "b", options, io.StringIO())
    assert main(["convert", str(checkpoint), str(tmp_path / "c"), "--lm-head-screen"]) == 0
    capsys.readouterr()
    assert Bundle.open(tmp_path / "c").manifest.quantization.lm_head_screen
