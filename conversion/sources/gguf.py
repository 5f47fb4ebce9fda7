"""A GGUF file of the architecture gemma3n, as llama.cpp's converter and Ollama's write it.

Source of names and layout: llama.cpp, conversion/gemma.py (Gemma3NModel) and
gguf-py/gguf/tensor_mapping.py; Ollama, convert/convert_gemma3n.go. Both store the text decoder
only; llama.cpp puts the towers into a second file (mmproj), which is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources.tensors import Floats, TensorInfo

MAGIC: Final = b"GGUF"
ARCHITECTURE: Final = "gemma3n"
# As gguf-py can decode them.
FLOATS: Final = ("F32", "F16", "BF16")
QUANTISED: Final = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
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


def is_gguf(path: Path) -> bool:
    """Say whether the file begins as a GGUF file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Any:  # noqa: ANN401  (gguf.GGUFReader, which has no types)
    """Return the header of a file.

    Raises:
        CheckpointError: it is damaged or cut short, or the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"to read {path}, install gguf: pip install 'nestd[gguf]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}): download it again"
        ) from error


def architecture(path: Path) -> str | None:
    """Return what kind of model a GGUF file holds; CheckpointError if it is damaged."""
    field = read_header(path).fields.get("general.architecture")
    return None if field is None else str(field.contents())


class Gguf:
    """Reads the tensors of one file; only the header is kept.

    Attributes:
        keys: the metadata by key, as Python values.
        types: types of the quantised tensors.
    """

    dtypes = (*FLOATS, *QUANTISED)

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: it is damaged or cut short, or of another architecture.
        """
        header = read_header(path)
        from gguf import GGMLQuantizationType, quants

        self._path = path
        self._quants, self._types = quants, GGMLQuantizationType
        self.keys: Mapping[str, Any] = {
            name: field.contents() for name, field in header.fields.items()
        }
        kind = self.keys.get("general.architecture")
        if kind != ARCHITECTURE:
            raise CheckpointError(
                f"{path} holds a model of the architecture {kind!r}; nestd converts Gemma 3n only "
                f"({ARCHITECTURE})"
            )
        self._offsets: dict[str, int] = {}
        self._infos: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
            if offset + nbytes > path.stat().st_size:
                raise CheckpointError(f"{path} is cut short: download it again")
            info = TensorInfo(path.name, tensor.name, shape, tensor.tensor_type.name, nbytes)
            self._add(tensor.name.removesuffix(".weight"), info, offset)
        self.types = sorted({info.dtype for info in self._infos.values()} - set(FLOATS))

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors of the decoder by their Hugging Face name."""
        return {f"model.{name}": info for name, info in self._infos.items()}

    def rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of a tensor, dequantised."""
        row_bytes = info.nbytes // info.shape[0]
        data = np.fromfile(
            self._path,
            np.uint8,
            count=(stop - start) * row_bytes,
            offset=self._offsets[info.name] + start * row_bytes,
        )
        # Blocks run along the last axis, so that axis comes last here too.
        lines = (stop - start) * (info.elements // info.shape[0] // info.shape[-1])
        if len(info.shape) == 1:
            lines = 1
        floats = self._quants.dequantize(data.reshape(lines, -1), self._types[info.dtype])
        result: Floats = floats.reshape(stop - start, *info.shape[1:])
        return result

    def _add(self, base: str, info: TensorInfo, offset: int) -> None:
        """Take one tensor in under its Hugging Face name; what nestd has no use for is left."""
        self._offsets[info.name] = offset
        if base in MODEL_TENSORS:
            self._infos[f"{MODEL_TENSORS[base]}.weight"] = info
        elif base in STACKED_TENSORS and len(info.shape) == 3:
            for number in range(info.shape[0]):
                piece = TensorInfo(
                    info.file,
                    f"{info.name}[{number}]",
                    info.shape[1:],
                    info.dtype,
                    info.nbytes // info.shape[0],
                )
                self._offsets[piece.name] = offset + number * piece.nbytes
                self._infos[f"{STACKED_TENSORS[base]}.{number}.weight"] = piece
        elif match := re.fullmatch(r"blk\.(\d+)\.(\w+)", base):
            layer, part = match.groups()
            if part == CORRECT_SCALE:  # a bare parameter in Hugging Face's checkpoint
                self._infos[f"layers.{layer}.altup.correct_output_scale"] = info
            elif part in LAYER_TENSORS:
                self._infos[f"layers.{layer}.{LAYER_TENSORS[part]}.weight"] = info
