"""One answer: its prompt in chunks, then token by token, alone or in a batch with others.

A step is the unit of everything that may happen meanwhile: between two steps the caller may cancel
the generation or change its sub-model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nestd.bundle.errors import TooLarge
from nestd.bundle.manifest import Submodel
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.kv_cache import KVCache
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import FinishReason, Sampling, Switch
from nestd.daemon.engine.prefix_cache import PrefixCache, identity
from nestd.daemon.engine.prompt_lookup import PromptLookup
from nestd.daemon.engine.sampling import Sampler
from nestd.daemon.engine.structure import Grammar
from nestd.daemon.engine.text import StreamingText

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Generation:
    """The running answer to one prompt.

    Attributes:
        submodel: what the next step runs on; assign to change it.
        finish_reason: None while the answer runs.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens chosen so far, the end token not counted.
        cached_tokens: of the prompt, which need not be read again.
        guessed_tokens: of the answer, which a guess gave without a step of their own.
        switches: the sub-models of the answer's tokens.
    """

    def __init__(
        self,
        graphs: Graphs,
        tokenizer: Tokenizer,
        prompt: EncodedPrompt,
        sampling: Sampling,
        submodel: Submodel,
        cache: KVCache,
        context_length: int,
        grammar: Grammar | None = None,
        known: PrefixCache | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        """Prepare the answer; nothing runs yet.

        Args:
            graphs: the loaded bundle.
            tokenizer: of the bundle.
            prompt: what to answer.
            sampling: how the next token is chosen.
            submodel: what the first step runs on.
            cache: an empty one, with room for `context_length`.
            context_length: tokens of prompt and answer together.
            grammar: what the text has to keep to.
            known: earlier answers' keys and values, and where to leave this one's.
            lookup: guesses tokens while the answer runs alone; None guesses none.

        Raises:
            TooLarge: the prompt leaves no room for an answer within `context_length`.
        """
        check_length(len(prompt.ids), context_length)
        self.prompt_tokens = len(prompt.ids)
        self.submodel = submodel
        self.finish_reason: FinishReason | None = None
        self.completion_tokens = 0
        self.guessed_tokens = 0
        self.switches: list[Switch] = []
        self._graphs = graphs
        self._cache = cache
        self._known = known
        self._lookup = lookup
        # All tokens so far, of which the cache holds the first ones; and what stands for them where
        # prompts are compared.
        self._tokens = np.asarray(prompt.ids, np.int64)
        self._identity = identity(self._tokens, graphs.soft(self._tokens), prompt.soft_rows)
        self._soft_rows = prompt.soft_rows
        self._max_tokens = min(sampling.max_tokens, context_length - self.prompt_tokens)
        self.cached_tokens = 0
        if known is not None:
            self.cached_tokens = known.fill(cache, self._identity, submodel.name)
            self._take_soft_rows(self._tokens[: self.cached_tokens])
        self._made_by = [submodel.name] * self.cached_tokens
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

    @property
    def tokens_read(self) -> int:
        """Of the prompt and the answer, how many are in the cache."""
        return self._cache.length

    def step(self, chunk: int = 128, guess: bool = True) -> str:
        """Run one step of this answer alone; return the new text, often "".

        That is up to `chunk` tokens of its prompt, or else all tokens that are not in the cache
        yet, and with `guess` what may follow them.
        """
        start = self._cache.length
        if not self.prefilling:
            return self._decode(self._tokens[start:], guess)
        ids = self._tokens[start : min(start + chunk, self.prompt_tokens)]
        last = start + len(ids) == self.prompt_tokens
        return self._run(ids, 1 if last else 0, self._take_soft_rows(ids))

    def cancel(self) -> str:
        """End the answer here; return the text that was held back."""
        return self._end("cancelled")

    def release(self) -> None:
        """Give the cache's slot back; its rows stay known. Nothing may run afterwards."""
        if self._known is not None:
            self._known.keep(self._identity, self._made_by, self._cache)
        self._cache.caches.free(self._cache)

    def _decode(self, pending: Ids, guess: bool) -> str:
        room = self._cache.caches.window.most_rows - len(pending)
        if room < 0:  # a schema left no choice for more tokens than a step takes
            return self._run(pending[:room], 0)
        if self._lookup is None or not guess:
            return self._run(pending, 1)
        most = min(self._max_tokens - self.completion_tokens - 1, room)
        guesses = self._lookup.propose(self._identity, most)
        before = self.guessed_tokens
        piece = self._run(np.concatenate([pending, guesses]), len(guesses) + 1)
        self._lookup.judge(self.guessed_tokens - before)
        return piece

    def _run(self, ids: Ids, rows: int, soft_rows: Floats | None = None) -> str:
        """Run `ids` and choose from the logits of the last `rows` of them; return new text."""
        if self.finish_reason:
            raise ValueError("the answer has ended")
        submodel = self.submodel
        (logits,) = self._graphs.run_batch(
            ids[np.newaxis], [self._cache], submodel, rows, soft_rows
        )
        return self._settle(ids, logits, submodel)

    def _settle(self, ids: Ids, logits: Floats, submodel: Submodel) -> str:
        """Choose tokens as far as `ids` [S], which have run, are the answer's own.

        `logits` [R, vocab] are those of the last R ids; behind the first of these R the ids are
        guesses. The cache forgets those that were wrong.
        """
        start = self._cache.length - len(ids)
        first = len(ids) - len(logits)
        right = min(first + 1, len(ids))
        piece = ""
        while self.finish_reason is None and len(self._tokens) == start + right:
            piece += self._choose(logits[right - 1 - first], submodel)
            right += _common(ids[right:], self._tokens[start + right :])
        self.guessed_tokens += max(0, right - first - 1)
        self._cache.length = start + right
        self._made_by += [submodel.name] * right
        return piece

    def _take_soft_rows(self, chunk: Ids) -> Floats | None:
        """Return the rows for the soft tokens in `chunk`, None once the prompt's are used up."""
        rows = self._soft_rows
        if rows is None:
            return None
        count = np.count_nonzero(self._graphs.soft(chunk))
        self._soft_rows = rows[count:] if count < len(rows) else None
        return rows[:count]

    def _choose(self, logits: Floats, submodel: Submodel) -> str:
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
        self._tokens = np.append(self._tokens, token)
        self._identity = np.append(self._identity, token)
        piece = self._text.push(token)
        if self._text.stopped:
            return piece + self._end("stop")
        if self.completion_tokens == self._max_tokens:
            return piece + self._end("length")
        return piece

    def _end(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        return self._text.finish()


def decode(graphs: Graphs, generations: Sequence[Generation], guess: bool) -> list[str]:
    """Run one step of answers whose prompts are read and whose sub-model is the same.

    An answer alone takes a `step` of its own. Together each runs one token; those that a grammar
    left no choice about may then have to wait for further steps.

    Returns:
        The new text of each, often "".
    """
    if len(generations) == 1:
        return [generations[0].step(guess=guess)]
    submodel = generations[0].submodel
    ids = np.array([[item._tokens[item._cache.length]] for item in generations])
    logits = graphs.run_batch(ids, [item._cache for item in generations], submodel)
    return [
        item._settle(one, rows, submodel)
        for item, one, rows in zip(generations, ids, logits, strict=True)
    ]


def check_length(tokens: int, context_length: int) -> None:
    """Raise TooLarge if a prompt leaves no room for an answer within `context_length`."""
    if tokens >= context_length:
        raise TooLarge(
            f"the prompt has {tokens} tokens and this node's context is {context_length}: shorten "
            "it, or raise engine.context_length"
        )


def _common(one: Ids, other: Ids) -> int:
    """Return the length of the common beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
