"""A tiny multimodal checkpoint that llama.cpp's converter takes, and what it writes of it.

The converter of llama-cpp-python 0.3.36 cannot write Gemma 3n's audio tower: its table of names has
A_ENC_CONV1D_NORM for Gemma 4 only, and stops at `conv_0.norm.weight` of Gemma 3n. `MENDED` adds the
name that is missing and runs the converter otherwise as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from support.llama_cpp import converter
from support.multimodal import conditional_generation_model
from support.sentencepiece import TURNS, write_tokenizer
from support.tiny_media import CHAT_TEMPLATE

VOCABULARY = 512
VISION_OFFSET, AUDIO_OFFSET = VOCABULARY - 20, VOCABULARY - 10
BEGINS = ("<start_of_image>", "<start_of_audio>")
BEHIND = {
    VISION_OFFSET: "<end_of_image>",
    VISION_OFFSET + 1: "<image_soft_token>",
    AUDIO_OFFSET: "<end_of_audio>",
    AUDIO_OFFSET + 1: "<audio_soft_token>",
    VOCABULARY - 1: "<last>",
}
TOKENS = {"<start_of_image>": 6, "<start_of_audio>": 7} | {
    name: id_ for id_, name in BEHIND.items()
}
# Each kind of block of MobileNet-V5, and stages of several.
MODEL_ARGS = {
    "block_args": [
        ["er_r1_k3_s2_e4_c32", "er_r1_k3_s1_e2_c32"],
        ["uir_r1_a3_k5_s2_e4_c64", "uir_r1_a5_k0_s1_e3_c64"],
        ["uir_r1_a5_k5_s2_e6_c64", "mqa_r1_k3_h2_v2_s1_d32_c64", "uir_r1_a0_k0_s1_e2_c64"],
        ["uir_r1_a5_k5_s2_e2_c64", "mqa_r1_k3_h3_s1_d16_c64", "uir_r1_a0_k0_s1_e2_c64"],
    ],
    "stem_size": 8,
    "msfa_output_resolution": 4,
}
MENDED = """
import runpy, sys
from pathlib import Path
script = Path(sys.argv[1])
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
from gguf.constants import MODEL_TENSOR
from gguf.tensor_mapping import TensorNameMap
TensorNameMap.block_mappings_cfg[MODEL_TENSOR.A_ENC_CONV1D_NORM] += (
    "model.audio_tower.subsample_conv_projection.conv_{bid}.norm",
)
sys.argv = sys.argv[1:]
runpy.run_path(str(script), run_name="__main__")
"""
Array = npt.NDArray[np.float32]
Change = Callable[[str, Array], Array | None]
# The converter writes it as F16 whatever it is asked for.
FORCED_TO_F16 = "model.audio_tower.subsample_conv_projection.input_proj_linear.weight"


def write_mmproj_checkpoint(path: Path) -> Path:
    """Write a random Gemma3nForConditionalGeneration with a SentencePiece tokenizer; return it."""
    sizes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VISION_OFFSET}
    model = conditional_generation_model(TOKENS, MODEL_ARGS, **sizes, altup_coef_clip=120.0)
    model.save_pretrained(path)
    edit_weights(path, lambda name, value: rounded(value) if name == FORCED_TO_F16 else value)
    write_tokenizer(path, symbols=(*TURNS, *BEGINS), behind=BEHIND)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": CHAT_TEMPLATE})
    )
    (path / "chat_template.jinja").unlink(missing_ok=True)
    # llama.cpp's image_size // image_seq_length is all that its file says of the number of tokens.
    preprocessor = {"size": {"height": 64, "width": 64}, "image_seq_length": 16}
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    generation = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def without_audio(checkpoint: Path, path: Path) -> Path:
    """Write a copy that lacks the weights of the audio tower, not its config; return it."""
    shutil.copytree(checkpoint, path)
    edit_weights(path, lambda name, value: None if "audio" in name else value)
    return path


def to_mmproj(checkpoint: Path, out: Path, kind: str, mended: bool = False) -> None:
    """Write the towers as a user of llama.cpp does; `mended` with the missing name (`MENDED`)."""
    script = str(converter() / "convert_hf_to_gguf.py")
    command = [sys.executable, *(["-c", MENDED] if mended else []), script, str(checkpoint)]
    options = ["--mmproj", "--outfile", str(out), "--outtype", kind]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def edit_weights(checkpoint: Path, change: Change) -> None:
    """Change each weight, or leave it out where `change` returns None."""
    path = checkpoint / "model.safetensors"
    changed = {name: change(name, value) for name, value in load_file(path).items()}
    save_file({name: value for name, value in changed.items() if value is not None}, path)


def rounded(value: Array) -> Array:
    """Return what is left of the numbers in half precision."""
    return value.astype(np.float16).astype(np.float32)


def rewritten(
    path: Path, out: Path, change: Change = lambda _, data: data, **keys: str | int
) -> Path:
    """Write a copy of a float32 GGUF file with other tensors or keys (`clip__x` for `clip.x`)."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    changes = {name.replace("__", "."): value for name, value in keys.items()}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = changes.get(field.name, field.contents())
        writer.add_key_value(field.name, value, field.types[0], sub)
    for tensor in reader.tensors:
        data = change(tensor.name, np.array(tensor.data))
        if data is not None:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
