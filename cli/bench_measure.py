"""What `nestd bench` measures; each run of the engine is a process of its own, seen from outside.

A process of its own because memory that one run has left behind would count for the next, and
because the engine, too, is one. Greedy decoding after random ids: what a text means changes no
figure. The engine's interface is used in `Session` and `load` only.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil

from nestd import device_profiles
from nestd.bundle.errors import BundleError, NestdError
from nestd.bundle.manifest import Bundle, Submodel
from nestd.cli.bench_operators import Figures, Phase, profile
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import EngineOptions
from nestd.daemon.engine.prepare import prepared_decoder
from nestd.daemon.engine.process import environment

WARM_UP_TOKENS = 16
POLL_SECONDS = 0.05  # what looks on should cost the measured process nothing
BANDWIDTH_BYTES = 1 << 29
BANDWIDTH_PASSES = 5


class Memory(Figures):
    """Resident bytes of a process: all, anonymous, and mapped from files."""

    rss: int
    anonymous: int
    file: int


class Rate(Figures):
    """Tokens per second of reading one prompt, and of the answer after it."""

    prompt_tokens: int
    prefill: float
    decode: float


class Run(Figures):
    """One process: load, warm up, read prompts and answer.

    Attributes:
        load_seconds: until the weights are loaded, Python's own start not counted.
        first_token_seconds: until the first token after a prompt of WARM_UP_TOKENS, loading
            included.
        rates: for each length of prompt.
        steady: memory after the last answer, its cache included.
    """

    load_seconds: float
    first_token_seconds: float
    rates: tuple[Rate, ...]
    steady: Memory


class Preparation(Figures):
    """Prepared weights: their bytes on disk, and the seconds it took; None if they were there."""

    disk_bytes: int
    seconds: float | None


class Task(Figures):
    """What a child process is asked for."""

    kind: Literal["prepare", "run", "profile"]
    bundle: Path
    prepared: Path
    submodel: str
    threads: int
    prompts: tuple[int, ...]
    decode: int


class Session:
    """One sequence and its cache; assign `submodel` to change what the next step runs on."""

    def __init__(self, graphs: Graphs, submodel: Submodel, capacity: int) -> None:
        self.submodel = submodel
        self._graphs = graphs
        self._cache = graphs.new_cache(capacity)
        self._chunk = EngineOptions().prefill_chunk

    def read(self, ids: npt.NDArray[np.int64]) -> int:
        """Append `ids` [S] in the engine's chunks; return the likeliest next id."""
        logits = None
        for first in range(0, len(ids), self._chunk):
            chunk = ids[first : first + self._chunk]
            last = first + self._chunk >= len(ids)
            logits = self._graphs.run(chunk, self._cache, self.submodel, need_logits=last)
        assert logits is not None
        return int(logits.argmax())

    def answer(self, token: int, count: int) -> None:
        """Append `token` and the likeliest ids after it, `count` steps."""
        for _ in range(count):
            token = self.read(np.array([token]))


def prepare(task: Task) -> Preparation:
    """Prepare the weights, unless they are there."""
    known = set(task.prepared.iterdir()) if task.prepared.is_dir() else set()
    start = time.perf_counter()
    path = prepared_decoder(Bundle.open(task.bundle), task.prepared, task.threads)
    seconds = time.perf_counter() - start
    return Preparation(
        disk_bytes=sum(file.stat().st_size for file in path.iterdir()),
        seconds=None if path in known else seconds,
    )


def run(task: Task) -> Run:
    """Load and measure; for a process of its own."""
    start = time.perf_counter()
    graphs, submodel, ids = load(task)
    loaded = time.perf_counter()
    warm_up = Session(graphs, submodel, WARM_UP_TOKENS + 1)
    token = warm_up.read(ids[:WARM_UP_TOKENS])
    first_token = time.perf_counter()
    warm_up.answer(token, 1)
    rates = []
    for count in task.prompts:
        session = Session(graphs, submodel, count + task.decode)
        begin = time.perf_counter()
        token = session.read(ids[:count])
        read = time.perf_counter()
        session.answer(token, task.decode)
        end = time.perf_counter()
        prefill, decode = count / (read - begin), task.decode / (end - read)
        rates.append(Rate(prompt_tokens=count, prefill=prefill, decode=decode))
    return Run(
        load_seconds=loaded - start,
        first_token_seconds=first_token - start,
        rates=tuple(rates),
        steady=resident("self"),
    )


def run_profiled(task: Task) -> dict[str, Phase]:
    """Return what each operator took in one prompt and in its answer."""
    graphs, submodel, ids = load(task)
    (count,) = task.prompts

    def work() -> None:
        Session(graphs, submodel, WARM_UP_TOKENS).read(ids[:WARM_UP_TOKENS])
        session = Session(graphs, submodel, count + task.decode)
        session.answer(session.read(ids[:count]), task.decode)

    prepared = prepared_decoder(graphs.bundle, task.prepared, task.threads)
    phases = {"prefill": -(-count // EngineOptions().prefill_chunk), "decode": task.decode}
    return profile(graphs, prepared, work, phases)


def load(task: Task) -> tuple[Graphs, Submodel, npt.NDArray[np.int64]]:
    """Return the loaded graphs, the sub-model and the ids of the longest prompt."""
    bundle = Bundle.open(task.bundle)
    options = EngineOptions(threads=task.threads, prepared_directory=task.prepared)
    graphs = Graphs(bundle, options)
    model = bundle.manifest.model
    texts = min(model.vocab_size, model.vocab_size_per_layer_input)
    ids = np.random.default_rng(0).integers(0, texts, max(WARM_UP_TOKENS, *task.prompts, 1))
    return graphs, bundle.manifest.submodel(task.submodel), ids


def in_child(task: Task) -> tuple[Any, Memory]:
    """Run `task` in a child process; return its JSON, and its peak memory.

    Raises:
        BundleError: the child says why it cannot, or ends without a word.
    """
    command = [sys.executable, "-m", "nestd.cli.bench_measure", task.model_dump_json()]
    answer, peak = watched(command, environment())
    if "error" in answer:
        raise BundleError(answer["error"])
    return answer, peak


def watched(
    command: Sequence[str], env: dict[str, str] | None = None
) -> tuple[dict[str, Any], Memory]:
    """Run a command that prints one JSON object; return it, and the command's peak memory.

    Anonymous and file-backed bytes are the most that was seen of each, every 50 ms, so together
    they may be more than the peak of all.

    Raises:
        BundleError: it has failed; what it said is on stderr.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    peak = Memory(rss=0, anonymous=0, file=0)
    output: str | None = None
    while output is None:
        try:
            output, _ = process.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            status = _status(process.pid)
            now = _memory(status)
            peak = Memory(
                rss=max(peak.rss, 1024 * status.get("VmHWM", 0)),
                anonymous=max(peak.anonymous, now.anonymous),
                file=max(peak.file, now.file),
            )
    if process.returncode:
        raise BundleError(f"the measurement has failed with status {process.returncode}, see above")
    return dict(json.loads(output)), peak


def resident(pid: int | str) -> Memory:
    """Return the memory of a process; zeros once it has ended."""
    return _memory(_status(pid))


def _memory(status: dict[str, int]) -> Memory:
    rss, anonymous, file = (1024 * status.get(key, 0) for key in ("VmRSS", "RssAnon", "RssFile"))
    return Memory(rss=rss, anonymous=anonymous, file=file)


def _status(pid: int | str) -> dict[str, int]:
    """Return the sizes in /proc/PID/status, in KiB; a process that has just ended has none."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    return {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}


def read_bandwidth(threads: int) -> float:
    """Return the bytes per second that `threads` threads read: the best of several passes.

    Each thread takes NumPy's maximum over its part of a buffer of float32 that is far larger than
    the caches (512 MB, less where memory is short). That needs no more arithmetic than a core has
    while it waits, but it is not the fastest possible reader: a share of it can exceed 1.
    """
    size = min(BANDWIDTH_BYTES, psutil.virtual_memory().available // 8) // threads // 4
    parts = np.ones((threads, size), np.float32)  # written: untouched pages are all the same one
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_PASSES):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - start)
    return parts.nbytes / min(seconds)


def cpu_name() -> str:
    """Return the processor's name, or the board's where Linux does not tell one (ARM)."""
    board = device_profiles.look()
    match = re.search(r"^model name\s*: (.+)$", board.cpuinfo, re.MULTILINE)
    return match[1] if match else board.device_tree.partition("\n")[0] or platform.machine()


def main() -> None:
    """Entry point of a child process: a task in, one JSON object out."""
    task = Task.model_validate_json(sys.argv[1])
    try:
        if task.kind == "prepare":
            answer: dict[str, Any] = prepare(task).model_dump()
        elif task.kind == "run":
            answer = run(task).model_dump()
        else:
            phases = run_profiled(task)
            answer = {name: phase.model_dump() for name, phase in phases.items()}
    except NestdError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
