"""Conversion: what a bundle holds, and one clear sentence for everything that can be wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import write_checkpoint

from nestd.bundle.errors import BundleError, CheckpointError, ModelNotFound
from nestd.bundle.manifest import Bundle
from nestd.bundle.submodels import published_slices, slices_for
from nestd.cli.main import main
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.costs import effective_params
from nestd.conversion.model_config import read_model_config


def run(checkpoint: Path, destination: Path, options: ConvertOptions | None = None) -> Bundle:
    return convert(str(checkpoint), destination, options or ConvertOptions(), io.StringIO())


def leftovers(folder: Path) -> list[str]:
    return [item.name for item in folder.iterdir() if item.name.startswith(".")]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bundle_holds_graphs_tokenizer_template_notice_and_their_digests(
    tiny_bundle: Bundle,
) -> None:
    names = set(tiny_bundle.manifest.files)
    for graph in ("embed_tokens", "per_layer_embeddings", "decoder"):
        assert {f"{graph}.onnx", f"{graph}.data"} <= names
    assert {"tokenizer.json", "chat_template.jinja", "NOTICE"} <= names
    tiny_bundle.verify()
    assert "Gemma Terms of Use" in tiny_bundle.file("NOTICE").read_text()
    assert tiny_bundle.manifest.tokens.eos == (1, 4)


def test_a_changed_byte_is_found_by_verify(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "b"))
    data = bytearray((path / "decoder.data").read_bytes())
    data[1000] ^= 1
    (path / "decoder.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"decoder\.data does not match its sha256"):
        Bundle.open(path).verify()


@pytest.mark.parametrize("how", ["missing", "short", "version", "json", "outside"])
def test_a_damaged_bundle_says_what_to_do(tiny_bundle: Bundle, tmp_path: Path, how: str) -> None:
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "b"))
    manifest = path / "manifest.json"
    document = json.loads(manifest.read_text())
    if how == "missing":
        (path / "decoder.data").unlink()
    elif how == "short":
        os.truncate(path / "decoder.data", 100)
    elif how == "version":
        manifest.write_text(json.dumps({**document, "format_version": 99}))
    elif how == "json":
        manifest.write_text("{")
    else:
        entry = document["files"]["decoder.onnx"]
        manifest.write_text(json.dumps({**document, "files": {"../../etc/passwd": entry}}))
    expected = {
        "missing": "is missing: copy or convert",
        "short": "has 100 bytes, not",
        "version": "format version 99.*convert the checkpoint again",
        "json": "cannot read",
        "outside": "leaves the bundle",
    }
    with pytest.raises(BundleError, match=expected[how]):
        Bundle.open(path)


def test_an_unknown_submodel_lists_the_known_ones(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.manifest.submodel("FULL").name == "full"
    with pytest.raises(ModelNotFound, match="choose auto or one of nested, half, full"):
        tiny_bundle.manifest.submodel("E99B")


def test_submodels_come_from_a_file_in_the_checkpoint_or_on_the_command_line(
    checkpoint: Path, tmp_path: Path
) -> None:
    entry = {"name": "mine", "wide_layers": [9, 8], "skipped_layers": [5]}
    document = {"nested_intermediate_size": 32, "submodels": [entry]}
    (checkpoint / "submodels.yaml").write_text(json.dumps(document))
    bundle = run(checkpoint, tmp_path / "b")
    assert bundle.manifest.model.nested_intermediate_size == 32
    assert bundle.manifest.submodel("mine").wide_layers == (8, 9)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"submodels": [{**entry, "name": "other"}]}))
    options = ConvertOptions(submodels=other)
    assert run(checkpoint, tmp_path / "c", options).manifest.submodels[0].name == "other"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "x", "wide_layers": [99], "skipped_layers": []}, "layers 0 to 9"),
        ({"name": "x", "wide_layers": [], "skipped_layers": [3]}, "owns a KV cache"),
        ({"name": "x", "wide_layers": [6], "skipped_layers": [6]}, "both widens and skips"),
        ({"name": "x", "wide_layers": ["a"], "skipped_layers": []}, "must be integers"),
        ({"name": "x"}, "needs name, wide_layers"),
    ],
)
def test_a_wrong_submodel_is_refused(
    checkpoint: Path, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    (checkpoint / "submodels.yaml").write_text(json.dumps({"submodels": [entry]}))
    with pytest.raises(BundleError, match=message):
        run(checkpoint, tmp_path / "b")


def drop_weight(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, path)


def change_weight(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        weights = load_file(path)
        weights[name] = np.ascontiguousarray(change(weights[name]))
        save_file(weights, path)

    return damage


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def lying_header(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def missing_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_outside(checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda c: (c / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda c: (c / "config.json").write_text("[1]"), "does not hold a JSON"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (truncate, "is damaged or cut short"),
    "lying header": (lying_header, "is damaged or cut short"),
    "missing shard": (missing_shard, "model-00001-of-00002.safetensors is missing"),
    "shard outside": (shard_outside, "outside its directory"),
    "missing weight": (drop_weight, "lacks the weight layers.3.mlp.up_proj.weight"),
    "wrong shape": (
        change_weight("model.layers.2.mlp.down_proj.weight", lambda w: w[:, :-1]),
        r"shape \[64, 127\], config.json asks for \[64, 128\]",
    ),
    "NaN": (change_weight("model.norm.weight", lambda w: w * np.nan), "NaN or infinity"),
    "already quantised": (
        change_weight("model.norm.weight", lambda w: w.astype(np.int8)),
        "checkpoint in one of F32",
    ),
    "another architecture": (lambda c: edit_config(c, model_type="llama"), "Gemma 3n only"),
    "another activation": (lambda c: edit_config(c, hidden_activation="silu"), "'silu'"),
    "RoPE scaling": (
        lambda c: edit_config(c, rope_scaling={"rope_type": "yarn"}),
        "RoPE scaling is not part",
    ),
    "missing number": (lambda c: edit_config(c, num_hidden_layers=None), "num_hidden_layers must"),
    "wrong number": (lambda c: edit_config(c, head_dim=-1), "head_dim"),
    "too few widths": (lambda c: edit_config(c, intermediate_size=[128]), "1 entries for 10"),
    "no cache owner": (lambda c: edit_config(c, num_kv_shared_layers=10), "leaves no layer"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "bad tokenizer": (lambda c: (c / "tokenizer.json").write_text("{}"), "is damaged"),
    "bad defaults": (
        lambda c: (c / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 7}'),
        "top_p",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_gets_one_sentence_and_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_CHECKPOINTS[case]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        run(checkpoint, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()
    assert not leftovers(tmp_path)
    assert main(["convert", str(checkpoint), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nestd: ")


def test_an_existing_destination_is_not_touched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("precious")
    with pytest.raises(BundleError, match="exists already"):
        run(tiny_checkpoint, tmp_path / "b")
    assert (tmp_path / "b" / "mine").read_text() == "precious"


def test_a_nonexistent_checkpoint_says_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Hugging Face repository"):
        run(tmp_path / "nowhere", tmp_path / "b")


def test_too_small_a_disk_is_refused_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match="needs 0.0 GB.*free some space"):
        run(tiny_checkpoint, tmp_path / "b")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, iter(range(1000))

    def full(*args: Any) -> int:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BundleError, match="is full: free some space"):
        run(tiny_checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_shards_and_half_precision_convert_to_the_same_bundle(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    weights = {n: w.astype(np.float16) for n, w in load_file(whole / "model.safetensors").items()}
    save_file(weights, whole / "model.safetensors")
    sharded = Path(shutil.copytree(whole, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one, two = run(whole, tmp_path / "a"), run(sharded, tmp_path / "b")
    assert one.manifest.files["decoder.data"] == two.manifest.files["decoder.data"]


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_each_naming_of_the_text_weights_is_read(tmp_path: Path, prefix: str) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    renamed = Path(shutil.copytree(plain, tmp_path / "renamed"))
    weights = load_file(plain / "model.safetensors")
    weights = {n.replace("model.", prefix, 1): w for n, w in weights.items()}
    save_file(weights, renamed / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": text}))
    one, two = run(plain, tmp_path / "a"), run(renamed, tmp_path / "b")
    assert one.manifest.files["decoder.data"] == two.manifest.files["decoder.data"]


def test_transformers_5_checkpoints_without_unused_keys_and_with_new_rope_keys_convert(
    tmp_path: Path,
) -> None:
    old = write_checkpoint(tmp_path / "old")
    new = Path(shutil.copytree(old, tmp_path / "new"))
    config = json.loads((new / "config.json").read_text())
    del config["rope_theta"], config["rope_local_base_freq"]
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (new / "config.json").write_text(json.dumps(config))
    unused = tuple(f"model.layers.{i}.self_attn.{p}" for i in range(5, 10) for p in ("k_", "v_"))
    weights = load_file(new / "model.safetensors")
    weights = {n: w for n, w in weights.items() if not n.startswith(unused)}
    save_file(weights, new / "model.safetensors")
    one, two = run(old, tmp_path / "a"), run(new, tmp_path / "b")
    assert one.manifest.files["decoder.data"] == two.manifest.files["decoder.data"]


def test_effective_parameters_of_published_slices_match_the_published_numbers() -> None:
    """Published counts include keys and values of layers that share a cache; those never run."""
    config = json.loads((Path(__file__).parent / "recorded" / "gemma-3n-e4b.json").read_text())
    model = read_model_config(config)
    slices = slices_for(
        model.intermediate_size, model.nested_intermediate_size, model.num_kv_shared_layers
    )
    assert len(slices) == len(published_slices()) == 16
    published = {"E4B": 3.98, "E2B": 1.91, "E1.96B": 1.96, "E2.98B": 2.98, "E3.39B": 3.39}
    for item in slices:
        if item.name in published:
            shared = model.num_kv_shared_layers - len(item.skipped_layers)
            unused = shared * 2 * model.hidden_size * model.num_key_value_heads * model.head_dim
            billions = (effective_params(model, item) + unused) / 1e9
            assert billions == pytest.approx(published[item.name], rel=0.005), item.name


def contained(**changes: object) -> list[str]:
    """Return the names of the sub-models that a checkpoint cut from E4B contains."""
    config = json.loads((Path(__file__).parent / "recorded" / "gemma-3n-e4b.json").read_text())
    model = read_model_config(config | changes)
    return [
        item.name
        for item in slices_for(
            model.intermediate_size, model.nested_intermediate_size, model.num_kv_shared_layers
        )
    ]


def test_e2b_alone_holds_one_size() -> None:
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 6
    sparsity = [0.95] * 10 + [0.0] * 20
    e2b = {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30}
    assert contained(**e2b, layer_types=kinds, activation_sparsity_pattern=sparsity) == ["full"]


def test_a_mix_n_match_checkpoint_holds_the_published_sizes_within_it() -> None:
    widths = {item.name: item for item in published_slices()}

    def cut(name: str) -> list[str]:
        wide = widths[name].wide_layers
        return contained(intermediate_size=[8192 * (1 + (i in wide)) for i in range(35)])

    assert cut("E2.49B-block") == ["E2B", "E2.49B-block"]
    assert set(cut("E2.69B")) == {"E2B", "E1.96B", "E2.49B-block", "E2.54B", "E2.69B"}
    # Narrow everywhere, with no layer gone: no published size.
    assert contained(intermediate_size=[8192] * 35) == ["E2B", "full"]


def test_a_checkpoint_cut_to_other_layers_and_widths_is_as_narrow_as_its_narrowest_layer(
    tmp_path: Path,
) -> None:
    widths = [64, 128, 64, 128, 128, 64, 96, 64]
    checkpoint = write_checkpoint(
        tmp_path / "cut", num_layers=8, shared=3, intermediate_size=widths
    )
    bundle = convert(str(checkpoint), tmp_path / "bundle", ConvertOptions(), io.StringIO())
    assert bundle.manifest.model.nested_intermediate_size == 64
    assert [item.name for item in bundle.manifest.submodels] == ["nested", "half", "full"]
    assert bundle.manifest.submodel("full").wide_layers == (1, 3, 4, 6)


def test_decoder_bytes_of_submodels_add_up_to_the_file(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    whole = manifest.sections["decoder"] + manifest.sections["embed_tokens"]
    assert manifest.submodel("full").decoder_bytes == whole
    sizes = [item.decoder_bytes for item in manifest.submodels]
    assert sizes == sorted(set(sizes))


def test_a_block_size_that_onnx_runtime_refuses_is_an_error(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="power of two"):
        run(tiny_checkpoint, tmp_path / "b", ConvertOptions(block_size=48))


def test_peak_memory_of_conversion_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    """The promise is the largest tensor as float32 plus 1 GB; in fact it is far less."""
    checkpoint = write_checkpoint(
        tmp_path / "big", vocab_size=120_000, vocab_size_per_layer_input=1_000_000
    )
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size > 600e6
    code = (
        "import sys; from nestd.cli.main import main; status = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read()); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "convert", str(checkpoint), str(tmp_path / "b")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    peak = int(out.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < 0.6 * size
    shutil.rmtree(checkpoint)


def test_inspect_prints_sections_and_submodels(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_bundle.path), "--verify"]) == 0
    out = capsys.readouterr().out
    for word in ("per_layer_embeddings", "decoder", "nested", "half", "full", "sha256"):
        assert word in out
    assert main(["inspect", str(tiny_bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "bundle"
