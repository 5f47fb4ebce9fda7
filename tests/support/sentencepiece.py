"""A checkpoint with a small SentencePiece tokenizer, which llama.cpp's converter wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from support.tiny import write_checkpoint

TURNS = ("<start_of_turn>", "<end_of_turn>")
TEXT = (
    "turn the light in the kitchen on", "how warm is the bathroom", "Zoë, José: 21,5 °C",
    "close the curtains in the living room at 18:30", "is the garage open, or was it closed?",
    "the washing machine is ready; tell everybody",
)  # fmt: skip


def write_sentencepiece_checkpoint(path: Path, **changes: Any) -> Path:
    """Write a random checkpoint whose tokenizer.model and tokenizer.json say the same."""
    # As in Gemma: coefficients are not clipped by a bound that they would reach.
    sizes = {"vocab_size": 512, "vocab_size_per_layer_input": 512, "altup_coef_clip": 120.0}
    write_checkpoint(path, **sizes, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    write_tokenizer(path)
    return path


def write_tokenizer(
    path: Path, symbols: Sequence[str] = TURNS, behind: Mapping[int, str] = MappingProxyType({})
) -> None:
    """Write tokenizer.model and tokenizer.json.

    Args:
        path: the directory.
        symbols: tokens with the ids from 4 on.
        behind: tokens behind tokenizer.model's, ids rising; what lies between them is unused.
    """
    import sentencepiece
    from transformers import GemmaTokenizerFast

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_prefix=str(path / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=list(symbols),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    tokenizer = GemmaTokenizerFast(
        vocab_file=str(path / "tokenizer.model"),
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(symbols),
    )
    tokenizer.add_tokens([*symbols], special_tokens=True)
    for number in range(len(tokenizer), max(behind, default=-1) + 1):
        name = behind.get(number, f"<unused{number}>")
        tokenizer.add_tokens([name], special_tokens=number in behind)
    tokenizer.save_pretrained(path)
