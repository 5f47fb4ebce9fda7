"""The vocabulary of a GGUF file -> tokenizer.json.

Gemma's is a SentencePiece BPE (`llama` in GGUF): scores stand for the order of merges, which is
what Hugging Face's converter of SentencePiece models makes of them too. A byte-level BPE (`gpt2`)
brings its merges along.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nestd.bundle.errors import CheckpointError

SPACE = "▁"


class Kind(IntEnum):
    """Types of tokens (gguf.TokenType)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def write_tokenizer(keys: Mapping[str, Any], path: Path, where: str) -> None:
    """Write the tokenizer to `path`.

    Args:
        keys: the file's metadata.
        path: of tokenizer.json.
        where: the file, for errors.

    Raises:
        CheckpointError: the file has no vocabulary, or one of a kind that Gemma 3n has not.
    """
    kind = keys.get("tokenizer.ggml.model")
    tokens: list[str] | None = keys.get("tokenizer.ggml.tokens")
    kinds: list[int] | None = keys.get("tokenizer.ggml.token_type")
    if not tokens or not kinds or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{where} has no vocabulary: take a file that was converted with its tokenizer"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if kind == "llama":
        tokenizer = _sentencepiece(
            vocabulary, keys.get("tokenizer.ggml.scores") or [], kinds, tokens
        )
    elif kind == "gpt2":
        tokenizer = _byte_level(vocabulary, keys.get("tokenizer.ggml.merges") or [])
    else:
        raise CheckpointError(
            f"{where} has a vocabulary of the kind {kind!r}, which Gemma 3n has not"
        )
    for text, sort in zip(tokens, kinds, strict=True):
        if sort in (Kind.CONTROL, Kind.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif sort == Kind.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    tokenizer.save(str(path))


def _sentencepiece(
    vocabulary: dict[str, int], scores: list[float], kinds: list[int], tokens: list[str]
) -> Tokenizer:
    unknown = next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.UNKNOWN), None
    )
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, scores, kinds, tokens),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges(
    vocabulary: dict[str, int], scores: list[float], kinds: list[int], tokens: list[str]
) -> list[tuple[str, str]]:
    """Return every way to make a token of two others, the highest score first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != Kind.NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    found.sort(key=lambda item: item[:3])
    return [pair for *_, pair in found]


def _byte_level(vocabulary: dict[str, int], merges: list[str]) -> Tokenizer:
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
