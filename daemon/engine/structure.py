"""Keeps an answer to a JSON schema, token by token (llguidance; the only file that imports it).

Before each token the grammar says which tokens may come; all others get a logit of minus infinity,
so the text is valid at every moment and streams like any other. Where only one text can come next
(the keys of an object), its tokens are taken at once, without asking the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import BadRequest, Internal
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.messages import Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The schema's own text, compiled to a lexer and a parser; above it compiling takes seconds.
MOST_SCHEMA_CHARS = 64_000
# Compact, as programs write it: every blank costs a token.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": True,
}


class Grammars:
    """Compiles structures for one bundle's tokenizer, which is read when the first one comes."""

    def __init__(self, bundle: Bundle) -> None:
        self._path: Path = bundle.file("tokenizer.json")
        self._vocabulary = bundle.manifest.model.vocab_size
        self._eos = list(bundle.manifest.tokens.eos)
        self._tokenizer: LLTokenizer | None = None

    def compile(self, structure: Structure) -> Grammar:
        """Return the grammar of one answer.

        Raises:
            BadRequest: the schema is none, is too large, or asks for what cannot be kept to.
            Internal: llguidance cannot read the bundle's tokenizer.
        """
        from llguidance import LLMatcher

        if len(structure.json_schema) > MOST_SCHEMA_CHARS:
            raise BadRequest(
                f"the schema has {len(structure.json_schema)} characters, the limit is "
                f"{MOST_SCHEMA_CHARS}: make it smaller"
            )
        matcher = LLMatcher(self._read_tokenizer(), _lark(structure), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise BadRequest(f"the schema cannot be kept to: {reason}")
        return Grammar(matcher, self._vocabulary)

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    str(self._path), n_vocab=self._vocabulary, eos_token=self._eos
                )
            except Exception as error:  # llguidance raises plain Exception and ValueError
                raise Internal(f"llguidance cannot read {self._path.name}: {error}") from error
        return self._tokenizer


class Grammar:
    """What may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._mask = np.zeros((vocabulary + 31) // 32, np.int32)

    def restrict(self, logits: npt.NDArray[np.float32]) -> None:
        """Give minus infinity to what may not come; `logits` [vocab] is overwritten."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=len(logits))
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> Sequence[int]:
        """Return and accept the tokens that come next whatever the model says, often none."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if tokens and not self._matcher.consume_tokens(tokens):
            self._check()
        return tokens

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0]
            raise Internal(f"the answer cannot be kept to its schema any longer: {reason}")


def _lark(structure: Structure) -> str:
    """Return the grammar in llguidance's Lark dialect."""
    try:
        document: Any = json.loads(structure.json_schema)
    except ValueError as error:
        raise BadRequest(f"the schema is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRequest("the schema must be a JSON object, for example {'type': 'object'}")
    schema = json.dumps(document | {"x-guidance": JSON_STYLE})
    if not structure.or_text:
        return f"start: %json {schema}"
    return f"start: json | text\njson: %json {schema}\ntext: /[^{{\\s](.|\\n)*/"
