"""llama.cpp's text GGUF and its mmproj file convert to what their safetensors convert to.

The converter is llama.cpp's own. It writes the vision tower where the audio tower's weights are
left out; with them it stops (the first test below), so what is shown of sound is shown of a
converter that knows one name more (`support.mmproj.MENDED`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.media import encoded, photo

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle
from nestd.cli.main import main
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.sources.mmproj import Mmproj
from nestd.conversion.sources.mmproj_config import TIMM, block_args
from nestd.conversion.sources.open import open_checkpoint
from nestd.daemon.engine.messages import (
    ChatMessage,
    EngineOptions,
    Event,
    Exited,
    Failed,
    Finished,
    MediaContent,
    Ready,
    Sampling,
    Start,
    TextContent,
)
from nestd.daemon.engine.process import EngineProcess

gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf extra")
torch = pytest.importorskip("torch", reason="needs the convert extra")
pytest.importorskip("optimum.exporters.onnx", reason="needs the convert extra")
pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")

from support.llama_cpp import converter, to_gguf  # noqa: E402
from support.mmproj import (  # noqa: E402
    edit_weights,
    rewritten,
    to_mmproj,
    without_audio,
    write_mmproj_checkpoint,
)

pytestmark = pytest.mark.parity

SIZE = 256
VISION = (f"vision_encoder_{SIZE}.onnx", "vision_encoder.data", "vision_hard_embeddings.npy")
AUDIO = ("audio_encoder.onnx", "audio_encoder.data", "audio_hard_embeddings.npy")
TEXT = ("decoder.data", "embed_tokens.data", "per_layer_embeddings.data")


@dataclass
class Files:
    """A checkpoint, and what llama.cpp's converter makes of it."""

    checkpoint: Path
    text: Path
    vision: Path
    folder: Path

    def both(self, kind: str) -> Path:
        """Return the mmproj file with both towers, which the mended converter writes once."""
        path = self.folder / f"both-{kind}.gguf"
        if not path.exists():
            to_mmproj(self.checkpoint, path, kind, mended=True)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("mmproj")
    checkpoint = write_mmproj_checkpoint(folder / "checkpoint")
    to_gguf(checkpoint, folder / "text.gguf", "f32")
    blind = without_audio(checkpoint, folder / "without-audio")
    to_mmproj(blind, folder / "vision.gguf", "f32")
    return Files(checkpoint, folder / "text.gguf", folder / "vision.gguf", folder)


@pytest.fixture(scope="module")
def plain(files: Files) -> Bundle:
    """The bundle of the safetensors."""
    return converted(files.checkpoint, files.folder / "plain")[0]


@pytest.fixture(scope="module")
def whole(files: Files) -> Bundle:
    """The bundle of both GGUF files, in float32."""
    return converted(files.text, files.folder / "whole", mmproj=files.both("f32"))[0]


def converted(source: Path, out: Path, **options: Any) -> tuple[Bundle, str]:
    log = io.StringIO()
    values = {"bits": 32, "image_sizes": (SIZE,), **options}
    return convert(str(source), out, ConvertOptions(**values), log), log.getvalue()


def same(a: Bundle, b: Bundle, *names: str) -> bool:
    return all(a.file(name).read_bytes() == b.file(name).read_bytes() for name in names)


def refused(source: Path, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        converted(source, out / "bundle", **options)
    assert not list(out.glob("*bundle*"))


# The same model


def test_the_converter_stops_at_the_name_of_a_norm_of_the_audio_tower(
    files: Files, tmp_path: Path
) -> None:
    """Who moves to a newer one and sees this fail: docs/sources.md and `MENDED` can shrink."""
    with pytest.raises(
        AssertionError, match=r"Can not map tensor 'model\.audio_tower.*conv_0\.norm"
    ):
        to_mmproj(files.checkpoint, tmp_path / "mmproj.gguf", "f32")
    assert "conv_{bid}.norm" not in (converter() / "gguf-py/gguf/tensor_mapping.py").read_text()


def test_eyes_come_from_an_mmproj_file_and_lacking_ears_are_said_beforehand(
    files: Files, plain: Bundle, tmp_path: Path
) -> None:
    bundle, log = converted(files.text, tmp_path / "bundle", mmproj=files.vision)
    assert bundle.manifest.modalities == ("text", "vision")
    assert bundle.manifest.vision == plain.manifest.vision
    assert same(bundle, plain, *VISION, *TEXT)
    note = "note: vision.gguf holds no audio tower, so the bundle will not hear\n"
    assert log.startswith(note)
    assert "text decoder only" not in log


def test_eyes_and_ears_of_both_files_are_those_of_the_safetensors(
    plain: Bundle, whole: Bundle
) -> None:
    assert whole.manifest.modalities == ("text", "vision", "audio")
    assert whole.manifest.vision == plain.manifest.vision
    assert whole.manifest.audio == plain.manifest.audio
    assert whole.manifest.tokens == plain.manifest.tokens
    assert whole.manifest.source.architecture == "Gemma3nForConditionalGeneration"
    assert same(whole, plain, *VISION, *AUDIO, *TEXT, "decoder.onnx", "chat_template.jinja")


def test_the_zeros_that_llama_cpp_adds_to_the_per_layer_table_are_left_out(
    files: Files, plain: Bundle, whole: Bundle
) -> None:
    """Ids of media take the row of id 0 there, as in transformers."""
    rows = gguf.GGUFReader(files.text)
    (table,) = (item for item in rows.tensors if item.name == "per_layer_token_embd.weight")
    assert table.shape[1] == plain.manifest.model.vocab_size
    expected = plain.manifest.model.vocab_size_per_layer_input
    assert whole.manifest.model.vocab_size_per_layer_input == expected < table.shape[1]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_narrower_mmproj_file_loses_its_own_rounding_and_nothing_else(
    files: Files, tmp_path: Path, kind: str
) -> None:
    """Safetensors that were rounded as the file is convert to the same bytes."""
    stored = Mmproj(files.both(kind)).tensors()

    def rounded(name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        info = stored.get(name.removeprefix("model."))
        if info is None:
            return value
        sort = gguf.GGMLQuantizationType[info.dtype]
        result: npt.NDArray[np.float32] = gguf.quants.dequantize(
            gguf.quants.quantize(value, sort), sort
        ).reshape(value.shape)
        return result

    copy = Path(shutil.copytree(files.checkpoint, tmp_path / "copy"))
    edit_weights(copy, rounded)
    expected, _ = converted(copy, tmp_path / "expected")
    bundle, log = converted(files.text, tmp_path / "bundle", mmproj=files.both(kind))
    assert same(bundle, expected, *VISION, *AUDIO)
    assert {info.dtype for info in stored.values()} == {"F32", "F16"} | {"Q8_0"} & {kind.upper()}
    assert ("quantised already (Q8_0)" in log) == (kind == "q8_0")


def test_blocks_of_a_published_tower_are_read_off_its_shapes() -> None:
    """Those of mobilenetv5_300m_enc, whose 84 blocks are strings in timm's source."""
    import inspect

    import timm
    from timm.models import mobilenetv5

    with torch.device("meta"):
        tower = timm.create_model("mobilenetv5_300m_enc")
    shapes = {f"{TIMM}{name}": tuple(value.shape) for name, value in tower.state_dict().items()}
    source = inspect.getsource(mobilenetv5._gen_mobilenet_v5).partition("else:")[2]
    published = re.findall(r"[\"']((?:er|uir|mqa)_\w+)[\"']", source)
    assert len(published) == 84
    assert [block for stage in block_args(shapes, "x") for block in stage] == published


# How it is named


def test_a_directory_with_both_files_is_told_apart_by_what_is_in_them(
    files: Files, plain: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(files.text, folder / "mmproj-misnamed.gguf")
    shutil.copyfile(files.vision, folder / "a.bin")
    rewritten(files.vision, folder / "qwen.gguf", clip__vision__projector_type="qwen2vl_merger",
              clip__audio__projector_type="qwen2a")  # fmt: skip
    read: list[Path] = []
    header = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or header(path))
    bundle, log = converted(folder, tmp_path / "bundle")
    assert bundle.manifest.modalities == ("text", "vision")
    assert same(bundle, plain, *VISION)
    assert "note: qwen.gguf holds another model's towers, left aside\n" in log
    assert sorted(read) == sorted(folder.iterdir()), "each header is read once"


def test_the_command_line_takes_it_as_llama_cpp_does(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(files.text), "--mmproj", str(files.vision), str(tmp_path / "b")]
    assert main([*arguments, "--image-sizes", str(SIZE), "--modalities", "text,vision"]) == 0
    assert Bundle.open(tmp_path / "b").manifest.modalities == ("text", "vision")
    assert "a picture of 256 pixels is 16 tokens" in capsys.readouterr().out


def test_a_picture_is_answered_from_such_a_bundle_as_from_the_safetensors(
    plain: Bundle, whole: Bundle, tmp_path: Path
) -> None:
    data = encoded(photo(SIZE, SIZE, 3), "PNG")
    path = tmp_path / "picture"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    picture = MediaContent.model_validate({"type": "image", "path": path, "sha256": digest})
    content = (picture, TextContent(text="is the garage open"))
    answers = [answer(bundle, content) for bundle in (plain, whole)]
    assert answers[0] == answers[1]
    assert answers[0][0] > 16


def answer(bundle: Bundle, content: tuple[MediaContent | TextContent, ...]) -> tuple[int, str]:
    """Return the tokens of the prompt and the text that an engine process gives."""
    events: SimpleQueue[Event] = SimpleQueue()
    engine = EngineProcess(bundle.path, EngineOptions(threads=1), events.put)
    engine.start()
    try:
        messages = (ChatMessage(role="user", content=content),)
        assert isinstance(event := events.get(timeout=60), Ready), event
        sampling = Sampling(max_tokens=6)
        engine.send(Start(id="a", messages=messages, submodel="full", sampling=sampling))
        while not isinstance(event := events.get(timeout=60), Finished | Failed | Exited):
            pass
        assert isinstance(event, Finished), event
        return event.prompt_tokens, event.text
    finally:
        engine.stop(10)


# Bad sources


def test_eyes_without_an_mmproj_file_are_refused_with_where_to_get_it(
    files: Files, tmp_path: Path
) -> None:
    message = r"text\.gguf holds no vision encoder.*--mmproj \(llama\.cpp's `convert_hf_to_gguf"
    refused(files.text, tmp_path, message, modalities=("text", "vision"))


def test_ears_that_an_mmproj_file_lacks_are_refused_if_asked_for(
    files: Files, tmp_path: Path
) -> None:
    message = r"holds no audio encoder.*give an mmproj file that holds it"
    options = {"mmproj": files.vision, "modalities": ("text", "audio")}
    refused(files.text, tmp_path, message, **options)


@pytest.fixture
def model(files: Files, tmp_path: Path) -> Path:
    """A directory with both files."""
    (tmp_path / "model").mkdir()
    shutil.copyfile(files.text, tmp_path / "model" / "text.gguf")
    shutil.copyfile(files.vision, tmp_path / "model" / "mmproj.gguf")
    return tmp_path / "model"


def test_another_models_mmproj_file_is_refused(files: Files, tmp_path: Path) -> None:
    other = rewritten(files.vision, tmp_path / "o.gguf", clip__vision__projector_type="gemma3")
    message = r"holds the towers of another model \(projector gemma3, gemma3na\): take the mmproj"
    refused(files.text, tmp_path, message, mmproj=other)


def test_two_mmproj_files_in_a_directory_are_refused_unless_one_is_named(
    files: Files, model: Path, tmp_path: Path
) -> None:
    shutil.copyfile(files.vision, model / "second.gguf")
    message = r"several mmproj files of Gemma 3n \(mmproj\.gguf, second\.gguf\): name one with --mm"
    refused(model, tmp_path, message)
    with open_checkpoint(model, model / "second.gguf") as checkpoint:
        assert any(name.startswith("vision_tower.") for name in checkpoint.encoders)


def test_two_text_models_in_a_directory_are_refused(
    files: Files, model: Path, tmp_path: Path
) -> None:
    shutil.copyfile(files.text, model / "other.gguf")
    refused(model, tmp_path, r"several Gemma 3n models \(other\.gguf, text\.gguf\): give the one")


@pytest.mark.parametrize("left", [0.001, 0.2, 0.9])
def test_an_mmproj_file_that_is_cut_short_says_so(
    files: Files, model: Path, tmp_path: Path, left: float
) -> None:
    data = files.vision.read_bytes()
    (model / "mmproj.gguf").write_bytes(data[: int(left * len(data))])
    refused(model, tmp_path, r"mmproj\.gguf is .*cut short.*download it again")
    refused(files.text, tmp_path, "cut short", mmproj=model / "mmproj.gguf")


def test_towers_of_another_width_than_the_text_models_are_refused(
    files: Files, tmp_path: Path
) -> None:
    def narrow(name: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return data[:48] if name == "mm.input_projection.weight" else data

    other = rewritten(files.vision, tmp_path / "other.gguf", narrow)
    message = r"other\.gguf makes vision tokens of 48 numbers, .*text\.gguf takes 64: take the mm"
    refused(files.text, tmp_path, message, mmproj=other)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("mm.embedding.weight", r"of rank 2 for embed_vision\.embedding\.weight, and has none"),
        ("v.blk.1.0.pw_proj.conv.weight", r"block 1\.0 of the vision tower is missing or of no"),
        ("v.msfa.norm.weight", r"o\.gguf lacks the weight vision_tower\.timm_model\.msfa\.norm"),
        ("v.", r"o\.gguf holds no tower"),
    ],
)
def test_a_tensor_that_an_mmproj_file_lacks_is_named(
    files: Files, tmp_path: Path, lost: str, message: str
) -> None:
    def drop(name: str, data: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        return None if name.startswith(lost) else data

    refused(
        files.text, tmp_path, message, mmproj=rewritten(files.vision, tmp_path / "o.gguf", drop)
    )


def test_a_number_of_picture_tokens_that_is_no_square_is_refused(
    files: Files, tmp_path: Path
) -> None:
    other = rewritten(files.vision, tmp_path / "o.gguf", clip__vision__patch_size=5)
    refused(files.text, tmp_path, "make 12 tokens, which is no square", mmproj=other)
    other = rewritten(files.vision, tmp_path / "o.gguf", clip__vision__patch_size=0)
    refused(files.text, tmp_path, "patch_size is 0, which is no positive whole", mmproj=other)


def test_a_text_file_without_the_tokens_of_pictures_is_refused(
    files: Files, tmp_path: Path
) -> None:
    """Those that llama.cpp wrote before it saw pictures end where the media's ids begin."""
    text = tmp_path / "old.gguf"
    text.write_bytes(files.text.read_bytes().replace(b"<image_soft_token>", b"<image_hard_token>"))
    message = r"old\.gguf has no token <image_soft_token>: take a text GGUF file"
    refused(text, tmp_path, message, mmproj=files.vision)


def test_a_directory_with_towers_alone_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "text.gguf").unlink()
    refused(model, tmp_path, r"holds no text model of Gemma 3n \(mmproj\.gguf\): give the dir")


def test_files_in_each_others_place_are_refused(files: Files, tmp_path: Path) -> None:
    refused(files.vision, tmp_path, "holds towers without a text decoder: give the text model's")
    refused(files.text, tmp_path, "is no mmproj file, but a model of the arch", mmproj=files.text)
    refused(files.text, tmp_path, "is no GGUF file: give --mmproj", mmproj=tmp_path / "absent")
    refused(files.checkpoint, tmp_path, "goes with a GGUF file, and", mmproj=files.vision)
    assert json.loads((files.checkpoint / "config.json").read_text())["model_type"] == "gemma3n"
