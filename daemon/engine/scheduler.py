"""What each step of the engine runs: a chunk of one prompt, or a token of many answers.

Answers of one sub-model run together, in one run of the decoder. Where there are answers of several
sub-models, and prompts to read, they take turns: one step of each sub-model's answers, one chunk of
one prompt, and so on; prompts take turns too. While answers run, a chunk is only as long as they
may be kept waiting, by the measured speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nestd.daemon.engine.generate import Generation, decode
from nestd.daemon.engine.graphs import Graphs

# A chunk costs a read of all weights, however short it is.
LEAST_CHUNK = 8
# Of the time that answers may be held up, so much is planned for: measured, a chunk and a step
# took up to 12 % longer than those before.
PLANNED = 0.88
# What a rate was at its last reading counts half at the next.
PAST = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one answer: its new text, and the sub-model that made it."""

    generation: Generation
    piece: str
    submodel: str


class Rate:
    """Tokens a second of the last second or so of work."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long."""
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> float | None:
        """Return the rate, None before any work; what comes next counts more."""
        if not self._seconds:
            return None
        rate = self._tokens / self._seconds
        self._tokens *= PAST
        self._seconds *= PAST
        return rate


class ChunkLength:
    """How many tokens of a prompt can be read within a given time.

    A chunk takes some time however short it is, about that of a decoding step, and some for each
    token. By the speed of any longer chunk, with a step's time kept back, a shorter one takes less
    than is allowed.
    """

    def __init__(self, most_tokens: int, most_seconds: float) -> None:
        self._most_tokens = most_tokens
        self._most_seconds = most_seconds
        self._tokens_per_second: dict[str, float] = {}

    def tokens(self, submodel: str, step_seconds: float) -> int:
        """Return the length of the next chunk; the least one before anything was measured."""
        speed = self._tokens_per_second.get(submodel, 0.0)
        fitting = int(speed * (PLANNED * self._most_seconds - step_seconds))
        return min(self._most_tokens, max(LEAST_CHUNK, fitting))

    def note(self, submodel: str, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if seconds > 0:
            self._tokens_per_second[submodel] = tokens / seconds


class Scheduler:
    """The running answers.

    Attributes:
        running: in the order in which they were added.
        prefill, decode: what all of them together get done in their steps.
    """

    def __init__(
        self,
        graphs: Graphs,
        prefill_chunk: int,
        max_stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: the loaded bundle; the longest chunk; how long a chunk may hold answers up."""
        self._graphs = graphs
        self._prefill_chunk = prefill_chunk
        self._chunk_length = ChunkLength(prefill_chunk, max_stall_seconds)
        self._clock = clock
        self._step_seconds = 0.0  # of the last decoding step
        self._steps = 0
        # The last step of each sub-model's answers, of prompts (None), and of each prompt.
        self._turns: dict[str | None, int] = {}
        self._prompt_turns: dict[Generation, int] = {}
        self.running: list[Generation] = []
        self.prefill = Rate()
        self.decode = Rate()

    def add(self, generation: Generation) -> None:
        """Let an answer run from the next step on."""
        self.running.append(generation)

    def remove(self, generation: Generation) -> None:
        """Take an answer out, ended or not, and give its memory back."""
        self.running.remove(generation)
        self._prompt_turns.pop(generation, None)
        generation.release()

    def step(self) -> list[Progress]:
        """Run the next step; return what became of the answers that had a part in it."""
        prompts = [item for item in self.running if item.prefilling]
        groups: dict[str, list[Generation]] = {}
        for item in self.running:
            if not item.prefilling:
                groups.setdefault(item.submodel.name, []).append(item)
        turn = min([*groups, *([None] if prompts else [])], key=lambda it: self._turns.get(it, 0))
        self._steps += 1
        self._turns[turn] = self._steps
        if turn is not None:
            return self._decode(groups[turn], turn)
        prompt = min(prompts, key=lambda item: self._prompt_turns.get(item, 0))
        self._prompt_turns[prompt] = self._steps
        return self._prefill(prompt, alone=not groups)

    def _prefill(self, prompt: Generation, alone: bool) -> list[Progress]:
        submodel = prompt.submodel.name
        most = (
            self._prefill_chunk
            if alone
            else self._chunk_length.tokens(submodel, self._step_seconds)
        )
        before, began = prompt.tokens_read, self._clock()
        piece = prompt.step(most)
        tokens, seconds = prompt.tokens_read - before, self._clock() - began
        self.prefill.add(tokens, seconds)
        if tokens == most:  # what is left of a prompt would tell a speed that is too low
            self._chunk_length.note(submodel, tokens, seconds)
        return [Progress(prompt, piece, submodel)]

    def _decode(self, group: list[Generation], submodel: str) -> list[Progress]:
        before, began = _chosen(group), self._clock()
        # Guesses would hold up whoever else runs.
        pieces = decode(self._graphs, group, guess=len(self.running) == 1)
        self._step_seconds = self._clock() - began
        self.decode.add(_chosen(group) - before, self._step_seconds)
        return [Progress(item, piece, submodel) for item, piece in zip(group, pieces, strict=True)]


def _chosen(group: list[Generation]) -> int:
    return sum(item.completion_tokens for item in group)
