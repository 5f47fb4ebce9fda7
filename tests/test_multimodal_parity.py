"""A request with pictures and sound gives the ids and logits of transformers' whole chain."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.media import clip, encoded, photo, tone

from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt, MediaReader
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, MediaContent, TextContent
from nestd.daemon.prompt.template import Prompt

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
transformers = pytest.importorskip("transformers")

from support.multimodal import (  # noqa: E402
    conditional_generation_model,
    save_multimodal_checkpoint,
)
from support.tiny_media import CHAT_TEMPLATE, multimodal_tokenizer  # noqa: E402

pytestmark = pytest.mark.parity

SIZE = 256
TOLERANCE = 2e-4
DECODE = 12
CHUNK = 50  # ends within pictures and clips
NAMED = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
    "boa_token": "<start_of_audio>",
    "audio_token": "<audio_soft_token>",
    "eoa_token": "<end_of_audio>",
}
Turn = tuple[str, Sequence[str]]
# Words are text; a name of MEDIA stands for that medium.
CONVERSATIONS: dict[str, list[Turn]] = {
    "a picture": [("user", ["cat", "what is it"])],
    "text before a picture": [("user", ["what is it", "cat"])],
    "a clip": [("user", ["say what you hear", "beep"])],
    "two pictures, a clip and text": [("user", ["cat", "and", "dog", "beep", "which"])],
    # Of one length: transformers pads the shorter of a batch, which shifts its last tokens by 5e-4.
    "two clips": [("user", ["beep", "hum", "which is louder"])],
    "a picture in an earlier turn": [
        ("system", ["be brief"]),
        ("user", ["cat", "what is it"]),
        ("assistant", ["a cat"]),
        ("user", ["are you sure"]),
    ],
}
PICTURES = {"cat": photo(300, 200, seed=1), "dog": photo(256, 256, seed=2)}
SOUNDS = {"beep": tone(2.0), "hum": tone(2.0, hertz=120.0)}


@pytest.fixture(scope="module")
def model() -> Any:
    return conditional_generation_model()


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("multimodal")
    checkpoint = save_multimodal_checkpoint(model, root / "checkpoint")
    options = ConvertOptions(bits=32, image_sizes=(SIZE,))
    return convert(str(checkpoint), root / "bundle", options, io.StringIO())


@pytest.fixture(scope="module")
def processor() -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=multimodal_tokenizer(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=NAMED,
    )
    size = {"height": SIZE, "width": SIZE}
    pictures = transformers.SiglipImageProcessor(size=size, resample=2, do_normalize=False)
    return transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        pictures,
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=16,
    )


def reference_inputs(processor: Any, turns: Sequence[Turn]) -> Any:
    """Return what transformers' own processor makes of the turns."""
    messages, pictures, sounds = [], [], []
    for role, items in turns:
        content = []
        for item in items:
            if item in PICTURES:
                pictures.append(Image.open(io.BytesIO(encoded(PICTURES[item], "PNG"))))
                content.append({"type": "image"})
            elif item in SOUNDS:
                sounds.append(SOUNDS[item][:, 0])
                content.append({"type": "audio"})
            else:
                content.append({"type": "text", "text": item})
        messages.append({"role": role, "content": content})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(
        text=text,
        images=pictures or None,
        audio=sounds or None,
        add_special_tokens=False,
        return_tensors="pt",
    )


def ours(turns: Sequence[Turn], folder: Path) -> list[ChatMessage]:
    """Return the turns as the daemon gives them to the engine."""
    messages = []
    for role, items in turns:
        content: list[TextContent | MediaContent] = []
        for item in items:
            if item in PICTURES:
                content.append(medium(folder, "image", encoded(PICTURES[item], "PNG")))
            elif item in SOUNDS:
                data = clip(SOUNDS[item], "WAV", subtype="FLOAT")
                content.append(medium(folder, "audio", data))
            else:
                content.append(TextContent(text=item))
        messages.append(ChatMessage.model_validate({"role": role, "content": content}))
    return messages


def medium(folder: Path, kind: str, data: bytes) -> MediaContent:
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest
    path.write_bytes(data)
    return MediaContent.model_validate({"type": kind, "path": path, "sha256": digest})


def read(bundle: Bundle, messages: Sequence[ChatMessage]) -> EncodedPrompt:
    reader = MediaReader(bundle, Prompt(bundle), EngineOptions(threads=2))
    try:
        return reader.read(messages, lambda _: None, lambda: False)
    finally:
        reader.close()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_equal_transformers_multimodal_forward(
    name: str, bundle: Bundle, model: Any, processor: Any, tmp_path: Path
) -> None:
    inputs = reference_inputs(processor, CONVERSATIONS[name])
    inputs.pop("token_type_ids")
    prompt = read(bundle, ours(CONVERSATIONS[name], tmp_path))
    assert prompt.ids == inputs["input_ids"][0].tolist()

    rows = prompt.soft_rows
    assert rows is not None
    graphs = Graphs(bundle, EngineOptions(threads=2))
    ids = np.array(prompt.ids)
    cache = graphs.new_cache(len(ids) + DECODE)
    full = bundle.manifest.submodels[-1]
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        count = int(graphs.soft(chunk).sum())
        last = start + CHUNK >= len(ids)
        logits = graphs.run(chunk, cache, full, last, rows[:count] if count else None)
        rows = rows[count:]

    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    for _ in range(DECODE):
        expected = out.logits[0, -1].numpy()
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
        token = int(expected[:300].argmax())
        logits = graphs.run(np.array([token]), cache, full, need_logits=True)
        with torch.no_grad():
            out = model(
                torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
            )


def test_a_token_with_a_hard_embedding_that_is_no_medium_has_transformers_logits(
    bundle: Bundle, model: Any
) -> None:
    vision, audio = bundle.manifest.vision, bundle.manifest.audio
    assert vision is not None
    assert audio is not None
    ids = np.array([2, 40, vision.end, 50, audio.end, audio.first_hard_id + 9, 60])
    graphs = Graphs(bundle, EngineOptions(threads=2))
    full = bundle.manifest.submodels[-1]
    logits = graphs.run(ids, graphs.new_cache(16), full, need_logits=True)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
