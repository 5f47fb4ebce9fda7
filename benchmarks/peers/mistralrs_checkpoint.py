"""Write a random checkpoint of E4B's shapes in the form that mistral.rs takes.

    python benchmarks/peers/mistralrs_checkpoint.py OUT

mistral.rs has Gemma 3n with its encoders only, and builds a vision tower of the real size whatever
config.json says, so the checkpoint has one (0.6 GB); its audio tower is small. The text part has
random_checkpoint.py's shapes. `slices.csv` holds the published MatFormer slices in mistral.rs's
form. Needs the `convert` extra.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
)

from nestd.bundle.submodels import published_slices

sys.path.append(str(Path(__file__).parents[1]))
from random_checkpoint import SHAPES, config, write_tokenizer, write_weights

COLUMNS = (
    "name",
    "# Layers",
    "# Effective Params (B)",
    "MMLU PT accuracy",
    "FFN Hidden Dims",
    "Layers Skipped",
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def composite(text: Gemma3nTextConfig) -> Gemma3nConfig:
    audio = Gemma3nAudioConfig(hidden_size=64, conf_num_attention_heads=2, conf_num_hidden_layers=2)
    return Gemma3nConfig(
        text_config=text.to_dict(),
        vision_config=Gemma3nVisionConfig().to_dict(),
        audio_config=audio.to_dict(),
    )


def shapes(document: Gemma3nConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Gemma3nForConditionalGeneration(document)
    names = model.state_dict().items()
    return {name: tuple(value.shape) for name, value in names if name != "lm_head.weight"}


def write_checkpoint(text: Gemma3nTextConfig, path: Path) -> None:
    path.mkdir(parents=True)
    document = composite(text)
    architecture = {"architectures": ["Gemma3nForConditionalGeneration"]}
    (path / "config.json").write_text(json.dumps(document.to_dict() | architecture, default=str))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 1}))
    write_tokenizer(path)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    (path / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    (path / "processor_config.json").write_text(json.dumps({"audio_seq_length": 188}))
    write_weights(path, shapes(document))


def write_slices(path: Path) -> None:
    """Write the columns that mistral.rs reads; a slice's widths are those of its kept layers."""
    layers, _, wide = SHAPES["E4B"]
    narrow = SHAPES["E2B"][2]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for item in published_slices():
            kept = [layer for layer in range(layers) if layer not in item.skipped_layers]
            widths = [wide if layer in item.wide_layers else narrow for layer in kept]
            skipped = list(item.skipped_layers) or ""
            writer.writerow([item.name, len(kept), 0, item.mmlu_percent, widths, skipped])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    write_checkpoint(config("E4B"), path)
    write_slices(path / "slices.csv")


if __name__ == "__main__":
    main()
