"""A GGUF file of the architecture gemma3n, as llama.cpp's converter and Ollama's write it.

Source of names and layout: llama.cpp, conversion/gemma.py (Gemma3NModel) and
gguf-py/gguf/tensor_mapping.py; Ollama, convert/convert_gemma3n.go. Both store the text decoder
only; llama.cpp puts the towers into a second file (`mmproj`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources.gguf_file import GgufFile
from nestd.conversion.sources.tensors import TensorInfo

ARCHITECTURE: Final = "gemma3n"
TOWERS_ARCHITECTURE: Final = "clip"
MODEL_TENSORS: Final = {
    "token_embd": "embed_tokens",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
    "output_norm": "norm",
}
# One tensor [streams - 1, hidden, hidden] here, one each in Hugging Face's checkpoint.
STACKED_TENSORS: Final = {
    "altup_proj": "altup_projections",
    "altup_unembd_proj": "altup_unembed_projections",
}
LAYER_TENSORS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
CORRECT_SCALE: Final = "altup_correct_scale"
PER_LAYER_TABLE: Final = "embed_tokens_per_layer.weight"


class Gguf(GgufFile):
    """Reads the text decoder of one file."""

    def __init__(self, path: Path, header: Any = None) -> None:  # noqa: ANN401  (gguf.GGUFReader)
        """Take the header in, or read it where it is not given.

        Raises:
            CheckpointError: it is damaged or cut short, or of another architecture.
        """
        super().__init__(path, header)
        kind = self.keys.get("general.architecture")
        if kind == TOWERS_ARCHITECTURE:
            raise CheckpointError(
                f"{path} holds towers without a text decoder: give the text model's GGUF file, and "
                "this one with --mmproj"
            )
        if kind != ARCHITECTURE:
            raise CheckpointError(
                f"{path} holds a model of the architecture {kind!r}; nestd converts Gemma 3n only "
                f"({ARCHITECTURE})"
            )
        self._infos: dict[str, TensorInfo] = {}
        for name, info in self.stored.items():
            self._add(name.removesuffix(".weight"), info)

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors of the decoder by their Hugging Face name."""
        return {f"model.{name}": info for name, info in self._infos.items()}

    def cut_per_layer_table(self, rows: int) -> None:
        """Leave out what lies behind `rows`.

        llama.cpp fills the table up with zeros for the ids of media, which have no row in it.
        """
        info = self._infos.get(PER_LAYER_TABLE)
        if info is not None and info.shape[0] > rows:
            nbytes = info.nbytes // info.shape[0] * rows
            cut = replace(info, shape=(rows, *info.shape[1:]), nbytes=nbytes)
            self._infos[PER_LAYER_TABLE] = cut

    def _add(self, base: str, info: TensorInfo) -> None:
        """Take one tensor in under its Hugging Face name; what nestd has no use for is left."""
        if base in MODEL_TENSORS:
            self._infos[f"{MODEL_TENSORS[base]}.weight"] = info
        elif base in STACKED_TENSORS and len(info.shape) == 3:
            for number, piece in enumerate(self.pieces(info)):
                self._infos[f"{STACKED_TENSORS[base]}.{number}.weight"] = piece
        elif match := re.fullmatch(r"blk\.(\d+)\.(\w+)", base):
            layer, part = match.groups()
            if part == CORRECT_SCALE:  # a bare parameter in Hugging Face's checkpoint
                self._infos[f"layers.{layer}.altup.correct_output_scale"] = info
            elif part in LAYER_TENSORS:
                self._infos[f"layers.{layer}.{LAYER_TENSORS[part]}.weight"] = info
