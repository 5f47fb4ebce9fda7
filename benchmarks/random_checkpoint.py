"""Write a random-weight checkpoint of the real Gemma 3n text shapes, streamed to disk.

    python benchmarks/random_checkpoint.py E4B /path/to/checkpoint

Names and shapes come from transformers' own class on the meta device (needs the `convert` extra);
weights are bfloat16 in shards of about 2 GB. No run of the weights is ever repeated at the same
alignment, so that a benchmark reads as many distinct bytes as with real weights; their values mean
nothing, so only speed, memory and bytes may be measured on them.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

SHAPES = {"E2B": (30, 10, 8192), "E4B": (35, 15, 16384)}
SHARD_BYTES = 2 << 30
POOL = 1 << 24  # random numbers that all weights are cut from, at ever new offsets


def config(name: str) -> Gemma3nTextConfig:
    layers, shared, width = SHAPES[name]
    return Gemma3nTextConfig(
        num_hidden_layers=layers,
        num_kv_shared_layers=shared,
        intermediate_size=[width] * layers,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * (layers - 10),
        layer_types=[
            "full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(layers)
        ],
    )


def shapes(text: Gemma3nTextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Gemma3nForCausalLM(text)
    names = model.state_dict().items()
    return {name: tuple(value.shape) for name, value in names if name != "lm_head.weight"}


def shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def write_shard(path: Path, shard: dict[str, tuple[int, ...]], pool: np.ndarray) -> None:
    header, offset = {}, 0
    for name, shape in shard.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shard.items():
            count = math.prod(shape)
            scale = np.float32(shape[-1] ** -0.5)
            if "q_norm" in name:
                file.write(
                    (np.ones(count) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16).tobytes()
                )
                continue
            if "norm" in name or "correct_output_scale" in name:
                file.write(np.ones(count, ml_dtypes.bfloat16).tobytes())
                continue
            values = (pool * scale).astype(ml_dtypes.bfloat16)
            shift = zlib.crc32(name.encode()) % 9973
            while count > 0:
                piece = values[shift : shift + count]
                file.write(piece.tobytes())
                count -= len(piece)
                shift = (shift * 7 + 13) % 9973


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: the benchmark measures the model, not the tokenizer."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))


def write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write shards of random weights and their index to the directory `path`."""
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
    weight_map = {}
    parts = list(shards(tensors))
    for number, shard in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_shard(path / file, shard, pool)
        weight_map |= dict.fromkeys(shard, file)
    # transformers wants the key, whatever is in it.
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(name: str, path: Path) -> None:
    path.mkdir(parents=True)
    text = config(name)
    document = text.to_dict() | {"architectures": ["Gemma3nForCausalLM"]}
    (path / "config.json").write_text(json.dumps(document, indent=1))
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": 0})
    )
    write_tokenizer(path)
    write_weights(path, shapes(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    write_checkpoint(args.shape, args.path)


if __name__ == "__main__":
    main()
