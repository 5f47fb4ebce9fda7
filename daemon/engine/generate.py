"""One answer, step by step: prefill in chunks, then a token at a time.

A step is the unit of everything that may happen meanwhile: between two steps the caller may cancel
the generation or change its sub-model.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nestd.bundle.errors import TooLarge
from nestd.bundle.manifest import Submodel
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import FinishReason, Sampling, Switch
from nestd.daemon.engine.prefix_cache import PrefixCache, identity
from nestd.daemon.engine.sampling import Sampler
from nestd.daemon.engine.structure import Grammar
from nestd.daemon.engine.text import StreamingText


class Generation:
    """The running answer to one prompt.

    Attributes:
        submodel: what the next step runs on; assign to change it.
        finish_reason: None while the answer runs.
        completion_tokens: tokens sampled so far, the end token not counted.
        cached_tokens: of the prompt, which need not be read again.
        switches: the sub-models of the answer's tokens.
        prefill_seconds, decode_seconds: time spent in steps.
    """

    def __init__(
        self,
        graphs: Graphs,
        tokenizer: Tokenizer,
        prompt: EncodedPrompt,
        sampling: Sampling,
        submodel: Submodel,
        context_length: int,
        prefill_chunk: int,
        grammar: Grammar | None = None,
        known: PrefixCache | None = None,
    ) -> None:
        """Prepare the answer; nothing runs yet.

        Args:
            graphs: the loaded bundle.
            tokenizer: of the bundle.
            prompt: what to answer.
            sampling: how the next token is chosen.
            submodel: what the first step runs on.
            context_length: tokens of prompt and answer together.
            prefill_chunk: tokens of the prompt that one step reads.
            grammar: what the text has to keep to.
            known: earlier answers' keys and values, and where to leave this one's.

        Raises:
            TooLarge: the prompt leaves no room for an answer within `context_length`.
        """
        check_length(len(prompt.ids), context_length)
        room = context_length - len(prompt.ids)
        self.prompt_tokens = len(prompt.ids)
        self.submodel = submodel
        self.finish_reason: FinishReason | None = None
        self.completion_tokens = 0
        self.switches: list[Switch] = []
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._graphs = graphs
        self._pending = np.asarray(prompt.ids, np.int64)
        self._soft_rows = prompt.soft_rows
        self._known = known
        self._ids = identity(self._pending, graphs.soft(self._pending), prompt.soft_rows)
        self._made_by: list[str] = []
        self._chunk = prefill_chunk
        self._max_tokens = min(sampling.max_tokens, room)
        self._cache = graphs.new_cache(context_length)
        if known is not None:
            self._skip(known.fill(self._cache, self._ids, submodel.name))
        self.cached_tokens = self._cache.length
        self._sampler = Sampler(sampling, prompt.ids)
        self._text = StreamingText(tokenizer, sampling.stop)
        self._grammar = grammar
        self._eos = frozenset(graphs.bundle.manifest.tokens.eos)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text.text

    @property
    def prefilling(self) -> bool:
        """The prompt has not been read to its end."""
        return self._cache.length < self.prompt_tokens

    def step(self) -> str:
        """Run one prefill chunk or one token; return the new text, often ""."""
        if self.finish_reason:
            raise ValueError("the answer has ended")
        start = time.monotonic()
        prefilling = self.prefilling
        submodel = self.submodel
        chunk, self._pending = self._pending[: self._chunk], self._pending[self._chunk :]
        logits = self._graphs.run(
            chunk, self._cache, submodel, not len(self._pending), self._take_soft_rows(chunk)
        )
        self._made_by += [submodel.name] * len(chunk)
        piece = "" if logits is None else self._choose(logits, submodel)
        elapsed = time.monotonic() - start
        if prefilling:
            self.prefill_seconds += elapsed
        else:
            self.decode_seconds += elapsed
        return piece

    def cancel(self) -> str:
        """End the answer here; return the text that was held back."""
        return self._end("cancelled")

    def _skip(self, count: int) -> None:
        """The first `count` tokens of the prompt are in the cache already."""
        self._take_soft_rows(self._pending[:count])
        self._pending = self._pending[count:]
        self._made_by = [self.submodel.name] * count

    def _take_soft_rows(self, chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Return the rows for the soft tokens in `chunk`, None once the prompt's are used up."""
        rows = self._soft_rows
        if rows is None:
            return None
        count = np.count_nonzero(self._graphs.soft(chunk))
        self._soft_rows = rows[count:] if count < len(rows) else None
        return rows[:count]

    def _choose(self, logits: npt.NDArray[np.float32], submodel: Submodel) -> str:
        """Choose the next token, and those that a grammar leaves no choice about; return text."""
        grammar = self._grammar
        if grammar is not None:
            grammar.restrict(logits)
        token = self._sampler.sample(logits)
        if token in self._eos:
            return self._end("stop")
        piece = self._take(token, submodel)
        if grammar is None or self.finish_reason:
            return piece
        grammar.accept(token)
        for forced in grammar.forced():
            self._sampler.note(forced)
            piece += self._take(forced, submodel)
            if self.finish_reason:
                return piece
        return piece + self._end("stop") if grammar.complete else piece

    def _take(self, token: int, submodel: Submodel) -> str:
        if not self.switches or self.switches[-1].submodel != submodel.name:
            self.switches.append(Switch(token=self.completion_tokens, submodel=submodel.name))
        self.completion_tokens += 1
        self._pending = np.append(self._pending, token)
        self._ids = np.append(self._ids, token)
        piece = self._text.push(token)
        if self._text.stopped:
            return piece + self._end("stop")
        if self.completion_tokens == self._max_tokens:
            return piece + self._end("length")
        return piece

    def _end(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        if self._known is not None:
            self._known.keep(self._ids, self._made_by, self._cache)
        return self._text.finish()


def check_length(tokens: int, context_length: int) -> None:
    """Raise TooLarge if a prompt leaves no room for an answer within `context_length`."""
    if tokens >= context_length:
        raise TooLarge(
            f"the prompt has {tokens} tokens and this node's context is {context_length}: shorten "
            "it, or raise engine.context_length"
        )
