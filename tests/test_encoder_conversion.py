"""The encoders in a bundle: the numbers of transformers' own towers, for every size and length."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from nestd.bundle.errors import CheckpointError, ConfigError
from nestd.bundle.manifest import Bundle
from nestd.cli.main import main
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.quantize import MINIMUM_BLOCK

torch = pytest.importorskip("torch", reason="needs the convert extra")
pytest.importorskip("optimum.exporters.onnx", reason="needs the convert extra")

from support.media import photo  # noqa: E402
from support.multimodal import conditional_generation_model, save_multimodal_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity

SIZES = (64, 96, 256)
TOLERANCE = 2e-4
BANDS = 128
FloatArray = npt.NDArray[np.float32]


@dataclass
class Tiny:
    """A random model, its checkpoint, and its bundles of 32 and 8 bits."""

    model: Any
    checkpoint: Path
    bundles: dict[int, Bundle]

    def session(self, bits: int, graph: str) -> ort.InferenceSession:
        return ort.InferenceSession(self.bundles[bits].file(f"{graph}.onnx"))

    def image_features(self, pixels: FloatArray) -> FloatArray:
        with torch.no_grad():
            return self.model.get_image_features(torch.from_numpy(pixels)).numpy()

    def audio_features(
        self, frames: FloatArray, mask: npt.NDArray[np.bool_]
    ) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        with torch.no_grad():
            features, padding = self.model.model.get_audio_features(
                torch.from_numpy(frames), ~torch.from_numpy(mask)
            )
        return features.numpy(), ~padding.numpy()


def run(checkpoint: Path, destination: Path, **options: Any) -> Bundle:
    values = {"image_sizes": SIZES[:1], **options}
    return convert(str(checkpoint), destination, ConvertOptions(**values), io.StringIO())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("multimodal")
    model = conditional_generation_model()
    checkpoint = save_multimodal_checkpoint(model, folder / "checkpoint")
    bundles = {
        bits: run(checkpoint, folder / str(bits), bits=bits, image_sizes=SIZES) for bits in (32, 8)
    }
    return Tiny(model, checkpoint, bundles)


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))


def pictures(size: int, count: int = 2) -> FloatArray:
    """Pictures whose tokens differ, which those of noise do not."""
    images = [np.asarray(photo(size, size, seed), np.float32) / 255 for seed in range(count)]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def sound(frames: int, *lengths: int) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Mel frames of clips of `lengths` frames, each padded to `frames`."""
    random = np.random.default_rng(frames)
    mel = random.standard_normal((len(lengths), frames, BANDS), dtype=np.float32)
    return mel, np.arange(frames) < np.array(lengths)[:, None]


def relative_error(value: FloatArray, expected: FloatArray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def centred_cosine(value: FloatArray, expected: FloatArray) -> float:
    """The cosine without the mean token: a random network's tokens are nearly parallel."""
    mean = expected.reshape(-1, expected.shape[-1]).mean(0)
    a, b = value - mean, expected - mean
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("size", SIZES)
def test_image_features_equal_those_of_transformers(tiny: Tiny, size: int) -> None:
    pixels = pictures(size)
    (features,) = tiny.session(32, f"vision_encoder_{size}").run(None, {"pixel_values": pixels})
    assert features.shape == (2, 16, 64)
    np.testing.assert_allclose(features, tiny.image_features(pixels), atol=TOLERANCE, rtol=0)


def test_audio_features_equal_those_of_transformers_at_every_length(tiny: Tiny) -> None:
    session = tiny.session(32, "audio_encoder")
    chunks = [16 * 12 * count + extra for count in (2, 3, 8, 15) for extra in range(-2, 18, 3)]
    for frames in [*range(1, 201), *chunks, 2996, 2997]:
        mel, mask = sound(frames, frames)
        features, kept = session.run(None, {"input_features": mel, "input_features_mask": mask})
        expected, expected_mask = tiny.audio_features(mel, mask)
        assert features.shape[1] == (frames - 1) // 16 + 1, frames
        np.testing.assert_allclose(
            features, expected, atol=TOLERANCE, rtol=0, err_msg=f"{frames} frames"
        )
        np.testing.assert_array_equal(kept, expected_mask)


def test_clips_of_several_lengths_in_one_batch_have_their_own_masks(tiny: Tiny) -> None:
    mel, mask = sound(400, 400, 131, 1)
    session = tiny.session(32, "audio_encoder")
    features, kept = session.run(None, {"input_features": mel, "input_features_mask": mask})
    expected, expected_mask = tiny.audio_features(mel, mask)
    np.testing.assert_allclose(features, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(kept, expected_mask)
    assert kept.sum(1).tolist() == [25, 9, 1]


@pytest.mark.parametrize("size", SIZES)
def test_eight_bits_keep_the_image_features(tiny: Tiny, size: int) -> None:
    pixels = pictures(size)
    (features,) = tiny.session(8, f"vision_encoder_{size}").run(None, {"pixel_values": pixels})
    expected = tiny.image_features(pixels)
    assert relative_error(features, expected) < 0.03
    assert centred_cosine(features, expected) > 0.97


def test_eight_bits_keep_the_audio_features(tiny: Tiny) -> None:
    mel, mask = sound(500, 500)
    session = tiny.session(8, "audio_encoder")
    features, _ = session.run(None, {"input_features": mel, "input_features_mask": mask})
    expected, _ = tiny.audio_features(mel, mask)
    assert relative_error(features, expected) < 0.03
    assert centred_cosine(features, expected) > 0.97


@pytest.mark.parametrize("modality", ["vision", "audio"])
def test_hard_embeddings_are_those_of_the_embedder(tiny: Tiny, modality: str) -> None:
    embedder = getattr(tiny.model.model, f"embed_{modality}")
    bundle = tiny.bundles[8]
    config = getattr(bundle.manifest, modality)
    ids = torch.arange(config.first_hard_id, config.first_hard_id + config.hard_ids)
    with torch.no_grad():
        expected = embedder(input_ids=ids).numpy()
    rows = np.load(bundle.file(f"{modality}_hard_embeddings.npy"))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE, rtol=0)


def test_the_manifest_names_the_tokens_and_the_bytes_of_each_encoder(tiny: Tiny) -> None:
    bundle, config = tiny.bundles[8], tiny.model.config
    manifest = bundle.manifest
    assert manifest.modalities == ("text", "vision", "audio")
    assert manifest.vision is not None
    assert manifest.vision.sizes == SIZES
    assert manifest.vision.count == 16
    assert manifest.audio is not None
    assert (manifest.audio.begin, manifest.audio.soft_token, manifest.audio.end) == (
        config.boa_token_id,
        config.audio_token_id,
        config.eoa_token_id,
    )
    for name in ("vision_encoder", "audio_encoder"):
        assert manifest.sections[name] == manifest.files[f"{name}.data"].bytes
    bundle.verify()


def test_one_weight_file_serves_every_size_and_is_page_aligned(tiny: Tiny, tmp_path: Path) -> None:
    alone = run(tiny.checkpoint, tmp_path / "b", image_sizes=(256,), modalities=("text", "vision"))
    data = tiny.bundles[8].manifest.files["vision_encoder.data"]
    assert alone.manifest.files["vision_encoder.data"].sha256 == data.sha256
    for graph in ("vision_encoder_256", "audio_encoder"):
        path = tiny.bundles[8].file(f"{graph}.onnx")
        assert path.stat().st_size < 300_000
        model = onnx.load(path, load_external_data=False)
        offsets = [
            int(entry.value)
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "offset"
        ]
        assert offsets
        assert not any(offset % 4096 for offset in offsets)


def test_every_wide_enough_matrix_of_an_encoder_has_eight_bits(tiny: Tiny) -> None:
    for graph in ("vision_encoder_64", "audio_encoder"):
        path = tiny.bundles[8].file(f"{graph}.onnx")
        model = onnx.load(path)
        weights = {item.name: item.dims for item in model.graph.initializer}
        kinds = {node.op_type for node in model.graph.node}
        assert {"MatMulNBits", "RMSNormalization"} <= kinds
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert (attributes["bits"], attributes["accuracy_level"]) == (8, 4)
            elif node.op_type == "MatMul" and node.input[1] in weights:
                assert weights[node.input[1]][0] % MINIMUM_BLOCK or len(weights) < 2


def test_modalities_are_chosen_and_what_is_left_out_is_not_there(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = run(tiny.checkpoint, tmp_path / "text", modalities=("text",))
    assert not [name for name in text.manifest.files if "encoder" in name or "hard" in name]
    assert text.manifest.vision is None
    sound_only = run(tiny.checkpoint, tmp_path / "audio", modalities=("text", "audio"))
    assert sound_only.manifest.modalities == ("text", "audio")
    assert "vision_encoder.data" not in sound_only.manifest.files


def test_the_command_line_chooses_modalities_sizes_and_width(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(tiny.checkpoint), str(tmp_path / "b")]
    options = ["--modalities", "vision,text", "--image-sizes", "64,32", "--encoder-bits", "32"]
    assert main([*arguments, *options]) == 0
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.modalities == ("text", "vision")
    assert bundle.manifest.vision is not None
    assert bundle.manifest.vision.sizes == (32, 64)
    assert (
        bundle.manifest.sections["vision_encoder"]
        == (tiny.bundles[32].manifest.sections["vision_encoder"])
    )
    assert "a picture of 32, 64 pixels is 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--modalities", "vision", "give text"),
        ("--modalities", "text,smell", "give text"),
        ("--image-sizes", "big", "give whole numbers"),
    ],
)
def test_a_wrong_choice_on_the_command_line_says_what_is_right(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", option, value])
    assert message in capsys.readouterr().err


def test_without_torch_encoders_are_refused_with_a_hint_and_text_converts(
    tiny: Tiny, tmp_path: Path
) -> None:
    code = "import sys; sys.modules['torch'] = None; from nestd.cli.main import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(sys.argv[1:]))", "convert"]
    command += [str(tiny.checkpoint), str(tmp_path / "b")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'nestd[convert]'" in refused.stderr
    assert "--modalities text" in refused.stderr
    assert subprocess.run([*command, "--modalities", "text"], capture_output=True).returncode == 0


def edit_config(checkpoint: Path, section: str | None, **changes: Any) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


def edit_weights(checkpoint: Path, prefix: str, change: Any) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.startswith(prefix)]:
        value = change(weights.pop(name))
        if value is not None:
            weights[name] = np.ascontiguousarray(value)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"architecture": "hf-hub:x/y"}, "converts 'mobilenetv5_300m_enc' only"),
        ("vision_config", {"model_args": {"checkpoint_path": "/etc/passwd"}}, "has checkpoint_p"),
        ("vision_config", {"model_args": {"block_args": [["wrong"]]}}, "block strings"),
        ("vision_config", {"hidden_size": 100}, "hidden_size 100"),
        ("vision_config", {"vocab_size": 11}, "different models"),
        ("audio_config", {"conf_num_hidden_layers": 3}, "lacks the weight"),
        ("audio_config", {"hidden_size": 33}, "describes no tower|different models"),
        ("audio_config", {"input_feat_size": 80}, "have 128 bands"),
        ("audio_config", {"vocab_offset": 400}, "lies outside the hard embeddings"),
        (None, {"image_token_id": None}, "image_token_id"),
        (None, {"vision_soft_tokens_per_image": 9}, "makes 4 x 4 soft tokens"),
        (None, {"audio_config": None}, "no audio_config"),
    ],
)
def test_a_config_that_does_not_fit_is_named_before_work_starts(
    checkpoint: Path, tmp_path: Path, section: str | None, changes: dict[str, Any], message: str
) -> None:
    edit_config(checkpoint, section, **changes)
    with pytest.raises(CheckpointError, match=message):
        run(checkpoint, tmp_path / "b")
    assert not list(tmp_path.glob("*b*"))


@pytest.mark.parametrize("name", ["vision_tower.timm_model.msfa.ffn", "audio_tower.conformer.1"])
def test_a_missing_weight_of_a_tower_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    edit_weights(checkpoint, f"model.{name}", lambda _: None)
    with pytest.raises(CheckpointError, match=f"lacks the weight {name}"):
        run(checkpoint, tmp_path / "b")


def test_a_weight_that_is_no_number_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_weights(
        checkpoint, "model.audio_tower.conformer.1.lconv1d.linear_end", lambda v: v * np.nan
    )
    with pytest.raises(CheckpointError, match="NaN"):
        run(checkpoint, tmp_path / "b")


def test_a_tower_that_the_checkpoint_lacks_is_left_out_or_refused_if_asked_for(
    checkpoint: Path, tmp_path: Path
) -> None:
    edit_weights(checkpoint, "model.audio_tower", lambda _: None)
    assert run(checkpoint, tmp_path / "b").manifest.modalities == ("text", "vision")
    with pytest.raises(CheckpointError, match=r"holds no audio encoder.*leave audio out"):
        run(checkpoint, tmp_path / "c", modalities=("text", "audio"))


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_an_image_size_that_no_tower_takes_is_refused(
    tiny: Tiny, tmp_path: Path, size: int
) -> None:
    with pytest.raises(ConfigError, match=f"{size} is no multiple of 32 up to 2048"):
        run(tiny.checkpoint, tmp_path / "b", image_sizes=(size,))


def test_weights_named_as_in_older_checkpoints_are_read(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    language = ("model.language_model.", "language_model.model.")
    save_file(
        {
            name.replace(*language) if "language_model" in name else name.removeprefix("model."): v
            for name, v in weights.items()
        },
        path,
    )
    assert run(checkpoint, tmp_path / "b").manifest.modalities == ("text", "vision", "audio")
