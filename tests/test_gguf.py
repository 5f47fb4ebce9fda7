"""GGUF files of llama.cpp and the store of Ollama convert to what their safetensors convert to."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.quantize import dequantize
from nestd.conversion.sources.gguf import Gguf
from nestd.conversion.sources.open import open_checkpoint
from nestd.conversion.sources.resolve import resolve

gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf extra")

SENTENCES = (
    "turn the light in the bathroom on", "Zoë, José — 21,5 °C", "日本語 🎉\n\t", " two  spaces ",
    "<start_of_turn>user\nhello<end_of_turn>\n", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="llama.cpp's converter needs torch")
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    from support.sentencepiece import write_sentencepiece_checkpoint

    return write_sentencepiece_checkpoint(tmp_path_factory.mktemp("gguf") / "checkpoint")


@pytest.fixture(scope="module")
def written(checkpoint: Path) -> Callable[[str], Path]:
    """Return the GGUF file of a type, which llama.cpp's converter writes once."""
    from support.llama_cpp import to_gguf

    def write(kind: str) -> Path:
        path = checkpoint.parent / f"{kind}.gguf"
        if not path.exists():
            to_gguf(checkpoint, path, kind)
        return path

    return write


def converted(source: Path | str, out: Path, **options: object) -> tuple[Bundle, str]:
    log = io.StringIO()
    return convert(str(source), out, ConvertOptions(**options), log), log.getvalue()  # type: ignore[arg-type]


def test_a_file_of_llama_cpp_holds_the_same_model(
    checkpoint: Path, written: Callable[[str], Path], tmp_path: Path
) -> None:
    plain, _ = converted(checkpoint, tmp_path / "plain", bits=32)
    other, log = converted(written("f32"), tmp_path / "other", bits=32)
    for name in ("decoder.data", "embed_tokens.data", "per_layer_embeddings.data"):
        assert (plain.path / name).read_bytes() == (other.path / name).read_bytes()
    assert other.manifest.model == plain.manifest.model.model_copy(
        update={"rms_norm_eps": float(np.float32(1e-6))}
    )
    assert "text decoder only" in log
    assert "quantised" not in log


def test_its_tokenizer_gives_the_same_ids_and_text(
    checkpoint: Path, written: Callable[[str], Path]
) -> None:
    theirs = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with open_checkpoint(written("f32")) as opened:
        ours = Tokenizer.from_file(str(opened.assets / "tokenizer.json"))
    for text in SENTENCES:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_blocks_of_q8_0_are_carried_over_as_they_are(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, log = converted(written("q8_0"), tmp_path / "bundle", bits=8, block_size=32)
    source = Gguf(written("q8_0"))
    info = source.tensors()["model.embed_tokens.weight"]
    assert info.dtype == "Q8_0"
    rows, columns = info.shape
    data = np.fromfile(bundle.path / "embed_tokens.data", np.uint8)
    packed = data[: rows * columns].reshape(rows, columns)
    at = -(-packed.size // 4096) * 4096
    scales = data[at : at + rows * columns // 32 * 4].view(np.float32).reshape(rows, -1)
    assert np.array_equal(dequantize(packed, scales, 8), source.rows(info, 0, rows))
    assert "quantised already (Q8_0)" in log
    assert "--block-size 32 keeps" in log


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "BF16", "F16"])
def test_rows_of_each_type_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    sort = gguf.GGMLQuantizationType[kind]
    random = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[sort]
    values = random.standard_normal((6, 512)).astype(np.float32)
    if kind in ("Q4_K", "Q6_K"):  # gguf-py only reads these: any bytes are some numbers
        data = random.integers(0, 100, (6, 512 // block * size), np.uint8)
    else:
        data = gguf.quants.quantize(values, sort)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3n")
    writer.add_tensor("token_embd.weight", data, raw_dtype=sort)
    _close(writer)
    reader = Gguf(path)
    info = reader.tensors()["model.embed_tokens.weight"]
    assert info.shape == (6, 512)
    expected = gguf.quants.dequantize(data, sort)
    assert np.array_equal(reader.rows(info, 2, 5), expected[2:5])


# Bad sources


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    _close(writer)
    with pytest.raises(CheckpointError, match="architecture 'llama'; nestd converts Gemma 3n only"):
        converted(tmp_path / "model.gguf", tmp_path / "bundle")


@pytest.mark.parametrize("left", [0.2, 0.9])
def test_a_file_that_is_cut_short_says_so(
    written: Callable[[str], Path], tmp_path: Path, left: float
) -> None:
    data = written("q8_0").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[: int(left * len(data))])
    with pytest.raises(CheckpointError, match="cut short"):
        converted(tmp_path / "model.gguf", tmp_path / "bundle")


def test_a_file_without_a_vocabulary_is_refused_before_any_work(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    with open_checkpoint(written("f32")) as opened:
        assert opened.config["model_type"] == "gemma3n_text"
    reader = gguf.GGUFReader(written("f32"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3n")
    for field in reader.fields.values():
        if field.name.startswith("gemma3n."):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    _close(writer)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        converted(tmp_path / "model.gguf", tmp_path / "bundle")


def test_towers_that_a_file_lacks_are_named_before_any_work(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    """llama.cpp keeps them in a file of their own (mmproj)."""
    with pytest.raises(CheckpointError, match=r"f32\.gguf holds no vision encoder"):
        converted(written("f32"), tmp_path / "bundle", modalities=("text", "vision"))
    assert not (tmp_path / "bundle").exists()


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 not what its name says")
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        converted(tmp_path / "model.gguf", tmp_path / "bundle")


# Ollama


@pytest.fixture
def store(written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of Ollama with the model gemma3n:tiny."""
    path = tmp_path / "models"
    data = written("q8_0").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    (path / "blobs").mkdir(parents=True)
    (path / "blobs" / f"sha256-{digest}").write_bytes(data)
    manifest = path / "manifests" / "registry.ollama.ai" / "library" / "gemma3n" / "tiny"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"layers": [layer | {"size": len(data)}]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(path))
    return path


@pytest.mark.usefixtures("store")
def test_a_model_of_ollama_converts_by_its_name(tmp_path: Path) -> None:
    bundle, _ = converted("ollama:gemma3n:tiny", tmp_path / "bundle")
    assert bundle.manifest.source.checkpoint == "ollama:gemma3n:tiny"
    assert bundle.manifest.modalities == ("text",)


def test_a_blob_of_ollama_that_is_cut_short_says_what_to_do(store: Path) -> None:
    (blob,) = (store / "blobs").iterdir()
    size = blob.stat().st_size
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"1000 bytes of {size}: ollama pull gemma3n:tiny"):
        resolve("ollama:gemma3n:tiny")
    blob.unlink()
    with pytest.raises(CheckpointError, match="is missing: ollama pull gemma3n:tiny"):
        resolve("ollama:gemma3n:tiny")


def test_a_model_that_ollama_has_not_is_named_with_the_store(store: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no model gemma3n:e4b in {store}"):
        resolve("ollama:gemma3n:e4b")
    shutil.rmtree(store)
    with pytest.raises(CheckpointError, match="no model gemma3n:tiny"):
        resolve("ollama:gemma3n:tiny")
    with pytest.raises(CheckpointError, match="no name of an Ollama model"):
        resolve("ollama:../../etc/passwd:x")


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
