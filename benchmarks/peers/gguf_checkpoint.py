"""Write a Gemma 3n text checkpoint, or one of its sub-models, as a GGUF file for llama.cpp.

    python benchmarks/peers/gguf_checkpoint.py CHECKPOINT OUT.gguf --type q4_0 --submodel E2B

Needs `pip install gguf llama-cpp-python` and nothing of nestd, so it runs in an environment of its
own. Tensors and keys are those of llama.cpp's converter (`Gemma3NModel`); its own quantiser then
makes the file, with the mix of types that it takes for this type by default. There is no
vocabulary: the benchmark speaks in token ids. Takes
15 GB of disk beside OUT and 7 GB of memory while it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import yaml

SLICES = Path(__file__).parents[2] / "bundle" / "published_slices.yaml"
TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
# 4 x 4 and 4 x 16: llama.cpp wants them in float32, as it wants vectors.
FLOAT32 = ("altup_correct_coef.weight", "altup_predict_coef.weight", "_norm.weight")

BFloat16 = npt.NDArray[np.uint16]  # NumPy has no bfloat16: its bits


class Shape(NamedTuple):
    """What a sub-model keeps of the checkpoint: its layers, and rows of each feed-forward."""

    layers: list[int]
    width: int


def submodel_shape(name: str) -> Shape:
    """Return the shape of a published sub-model whose layers are all of one width."""
    document = yaml.safe_load(SLICES.read_text())
    (item,) = (item for item in document["slices"] if item["name"] == name)
    layers = [i for i in range(document["base"]["layers"]) if i not in item["skipped_layers"]]
    if item["wide_layers"] not in ([], layers):
        raise SystemExit(f"llama.cpp's Gemma 3n has one width for all layers, {name} has two")
    width = document["base"]["ffn_full" if item["wide_layers"] else "ffn_nested"]
    return Shape(layers, width)


def read_checkpoint(path: Path) -> dict[str, BFloat16]:
    """Return the tensors of the shards by name, mapped."""
    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        data = np.memmap(shard, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}, expected BF16")
            first, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[first:end], "<u2").reshape(entry["shape"])
    return tensors


def cut(name: str, value: BFloat16, config: dict[str, Any], shape: Shape) -> BFloat16:
    """Return what `shape` keeps of a tensor, padded as llama.cpp's converter pads it."""
    if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
        return value[: shape.width]
    if ".mlp.down_proj." in name:
        return np.ascontiguousarray(value[:, : shape.width])
    per_layer = config["hidden_size_per_layer_input"]
    if "per_layer_model_projection" in name:
        return value.reshape(-1, per_layer, value.shape[1])[shape.layers].reshape(
            -1, value.shape[1]
        )
    if "embed_tokens_per_layer" in name:
        # The ids of pictures and sound have no rows here.
        rows = np.zeros((config["vocab_size"], len(shape.layers), per_layer), np.uint16)
        np.take(value.reshape(len(value), -1, per_layer), shape.layers, 1, rows[: len(value)])
        return rows.reshape(len(rows), -1)
    return value


def convert(
    tensors: dict[str, BFloat16], config: dict[str, Any], shape: Shape
) -> Iterator[tuple[str, BFloat16]]:
    """Yield the tensors of `shape` under their GGUF names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, len(shape.layers))
    stacks: dict[str, list[BFloat16]] = defaultdict(list)
    for name, value in sorted(tensors.items()):
        base = name.removesuffix(".weight")
        if match := re.match(r"(model\.altup_(?:unembed_)?projections)\.\d+", base):
            stacks[match[1]].append(value)
            continue
        if match := re.match(r"model\.layers\.(\d+)\.", base):
            if int(match[1]) not in shape.layers:
                continue
            base = base.replace(match[1], str(shape.layers.index(int(match[1]))), 1)
        yield gguf_name(names, base), cut(name, value, config, shape)
    for base, values in stacks.items():
        yield gguf_name(names, base), np.stack(values)


def gguf_name(names: gguf.TensorNameMap, base: str) -> str:
    found = names.get_name(base)
    if found is None:
        raise SystemExit(f"llama.cpp has no name for {base}")
    return f"{found}.weight"


def write_keys(writer: gguf.GGUFWriter, config: dict[str, Any], shape: Shape) -> None:
    """Write what llama.cpp's converter writes for this architecture."""
    skipped = config["num_hidden_layers"] - len(shape.layers)
    writer.add_block_count(len(shape.layers))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length([shape.width] * len(shape.layers))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    kinds = [config["layer_types"][layer] for layer in shape.layers]
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    sparsity = [config["activation_sparsity_pattern"][layer] for layer in shape.layers]
    normal = statistics.NormalDist()
    scales = [normal.inv_cdf(part) if part else -math.inf for part in sparsity]
    writer.add_activation_sparsity_scale(scales)
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"] - skipped)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def write_gguf(checkpoint: Path, out: Path, shape: Shape) -> None:
    """Write the tensors of `shape` in bfloat16."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "gemma3n")
    write_keys(writer, config, shape)
    for name, bits in convert(read_checkpoint(checkpoint), config, shape):
        if bits.ndim < 2 or name.endswith(FLOAT32):
            writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--submodel", default="E4B", help="a published one of one width")
    args = parser.parse_args()
    plain = args.out.with_suffix(".bf16.gguf")
    try:
        write_gguf(args.checkpoint, plain, submodel_shape(args.submodel))
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = TYPES[args.type]
        params.nthread = 2
        files = (str(plain).encode(), str(args.out).encode())
        if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
            raise SystemExit(f"llama.cpp could not quantise {plain}")
    finally:
        plain.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
