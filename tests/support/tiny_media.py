"""A bundle with eyes and ears that needs no torch: the tiny text bundle and two small encoders.

The encoders are real graphs with random weights: a picture becomes the means of its 4 x 4 patches,
a clip the means of 16 frames each, times a matrix. `support.multimodal` has the real towers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nestd.bundle.manifest import (
    AudioConfig,
    Bundle,
    BundleFile,
    Manifest,
    VisionConfig,
    sha256_file,
)
from support.tiny import HIDDEN, VOCABULARY, byte_tokenizer

VISION_OFFSET, AUDIO_OFFSET, HARD_IDS = VOCABULARY - 20, VOCABULARY - 10, 10
SIZES = (256, 512)
# As in Gemma 3n, what begins a medium is an id of the text, the others lie behind it.
SPECIAL_TOKENS = {
    "<start_of_image>": 261,
    "<start_of_audio>": 262,
    "<end_of_image>": VISION_OFFSET,
    "<image_soft_token>": VISION_OFFSET + 1,
    "<end_of_audio>": AUDIO_OFFSET,
    "<audio_soft_token>": AUDIO_OFFSET + 1,
}
# Gemma 3n's own, without its whitespace.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set prefix = (system if system is string else system[0].text) + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}"
    "{% endif %}{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n'"
    " + (prefix if loop.first else '') }}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for item in message.content %}{% if item.type == 'audio' %}{{ '<audio_soft_token>' }}"
    "{% elif item.type == 'image' %}{{ '<image_soft_token>' }}"
    "{% elif item.type == 'text' %}{{ item.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
VISION = VisionConfig(
    begin=261,
    soft_token=VISION_OFFSET + 1,
    end=VISION_OFFSET,
    count=16,
    first_hard_id=VISION_OFFSET,
    hard_ids=HARD_IDS,
    sizes=SIZES,
)
AUDIO = AudioConfig(
    begin=262,
    soft_token=AUDIO_OFFSET + 1,
    end=AUDIO_OFFSET,
    count=188,
    first_hard_id=AUDIO_OFFSET,
    hard_ids=HARD_IDS,
)
_HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
_VISION_GRAPH = """
vision (float[batch,3,{size},{size}] pixel_values) => (float[batch,16,{hidden}] image_features)
{{
  patches = AveragePool <kernel_shape=[{patch},{patch}], strides=[{patch},{patch}]> (pixel_values)
  shape = Constant <value_ints=[0,3,16]> ()
  flat = Reshape (patches, shape)
  rows = Transpose <perm=[0,2,1]> (flat)
  wide = MatMul (rows, first)
  image_features = MatMul (wide, second)
}}
"""
_AUDIO_GRAPH = """
audio (float[batch,frames,128] input_features, bool[batch,frames] input_features_mask)
  => (float[batch,tokens,{hidden}] audio_features, bool[batch,tokens] audio_features_mask)
{{
  bins = Transpose <perm=[0,2,1]> (input_features)
  pooled = AveragePool <kernel_shape=[16], strides=[16], ceil_mode=1> (bins)
  rows = Transpose <perm=[0,2,1]> (pooled)
  wide = MatMul (rows, first)
  audio_features = MatMul (wide, second)
  sound = Cast <to=1> (input_features_mask)
  one = Constant <value_ints=[1]> ()
  channel = Unsqueeze (sound, one)
  some = MaxPool <kernel_shape=[16], strides=[16], ceil_mode=1> (channel)
  flat = Squeeze (some, one)
  audio_features_mask = Cast <to=9> (flat)
}}
"""


def multimodal_tokenizer() -> Tokenizer:
    """Return the byte-level tokenizer with the six tokens of media at their ids."""
    vocabulary = byte_tokenizer().get_vocab() | SPECIAL_TOKENS
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{i}>": i for i in range(VOCABULARY) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in vocabulary if token.startswith("<")]
    tokenizer.add_special_tokens([token for token in special if len(token.content) > 1])
    return tokenizer


def add_media(text: Bundle, path: Path) -> Bundle:
    """Copy the bundle `text` to `path`, with encoders, soft tokens and a template for them."""
    shutil.copytree(text.path, path)
    random = np.random.default_rng(5)
    sections = dict(text.manifest.sections)
    for size in SIZES:
        graph = _VISION_GRAPH.format(size=size, patch=size // 4, hidden=HIDDEN)
        _save(path / f"vision_encoder_{size}.onnx", graph, 3, seed=1)
    _save(path / "audio_encoder.onnx", _AUDIO_GRAPH.format(hidden=HIDDEN), 128, seed=2)
    for name in ("vision", "audio"):
        table = random.standard_normal((HARD_IDS, HIDDEN)).astype(np.float32)
        np.save(path / f"{name}_hard_embeddings.npy", table)
        sections[f"{name}_encoder"] = (path / f"{name}_encoder.data").stat().st_size
    multimodal_tokenizer().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    files = {
        file.name: BundleFile(bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    update = {
        "name": path.name,
        "modalities": ("text", "vision", "audio"),
        "sections": sections,
        "vision": VISION,
        "audio": AUDIO,
        "files": files,
    }
    manifest = Manifest.model_validate(text.manifest.model_copy(update=update).model_dump())
    (path / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    return Bundle.open(path)


def _save(path: Path, graph: str, width: int, seed: int) -> None:
    model = onnx.parser.parse_model(_HEADER + graph)
    random = np.random.default_rng(seed)
    # Wide enough that ONNX Runtime maps the file instead of copying it.
    for name, shape in (("first", (width, 2048)), ("second", (2048, HIDDEN))):
        weight = random.standard_normal(shape).astype(np.float32) / np.float32(shape[0] ** 0.5)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    data = f"{path.name.split('_')[0]}_encoder.data"
    path.with_name(data).unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=0)
