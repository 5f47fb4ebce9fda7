"""The llama.cpp side of switch.py: another size means to free one model and load the other.

Started by switch.py in an environment of its own (`pip install llama-cpp-python`). Reads one JSON
object a line, the number of prompt tokens of a round, and answers with one. A round: load the large
model, answer a part, change to the small one, answer a part, change back. After each change the
conversation so far is read anew: the other model has no keys and values of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from resident import resident, storage_read

CONTEXT_SLACK = 16
GGML_LOG_LEVEL_ERROR = 4


class Model:
    """One loaded model and a context for `context` tokens."""

    def __init__(self, path: Path, context: int, threads: int, repack: bool) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        model_params.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def run(self, tokens: list[int]) -> int:
        """Append `tokens`; return the likeliest next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def forget(self) -> None:
        """Empty the cache: the next tokens begin a sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


class Peer:
    """Runs rounds and writes down times in milliseconds and memory in bytes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._models: dict[str, Path] = {"E4B": args.large, "E2B": args.small}

    def round(self, prompt_tokens: int) -> dict[str, Any]:
        """Run one round with a prompt of random ids."""
        tokens = np.random.default_rng(time.monotonic_ns()).integers(5, 200000, prompt_tokens)
        conversation: list[int] = tokens.tolist()
        result: dict[str, Any] = {}
        read = storage_read()
        start = time.perf_counter()
        model = self._load("E4B", prompt_tokens)
        result["load E4B"] = 1000 * (time.perf_counter() - start)
        conversation.append(model.run(conversation))
        result["step E4B"] = self._answer(model, conversation, self._args.answer)
        result["memory E4B"] = resident()
        for name in ("E2B", "E4B"):
            start = time.perf_counter()
            model.close()
            freed = time.perf_counter()
            result[f"memory freed for {name}"] = resident()
            loading = time.perf_counter()
            model = self._load(name, prompt_tokens)
            loaded = time.perf_counter()
            conversation.append(model.run(conversation))
            first = time.perf_counter()
            result[f"to {name}"] = {
                "free": 1000 * (freed - start),
                "load": 1000 * (loaded - loading),
                "prefill": 1000 * (first - loaded),
                "first token": 1000 * (first - loading + freed - start),
                "tokens read again": len(conversation) - 1,
            }
            step = self._answer(model, conversation, self._args.after)
            if name == "E2B":
                result["step E2B"] = step
            result[f"memory after {name}"] = resident()
        model.close()
        result["read from storage"] = storage_read() - read
        return result

    def _load(self, name: str, prompt_tokens: int) -> Model:
        args = self._args
        context = prompt_tokens + args.answer + 2 * args.after + CONTEXT_SLACK
        return Model(self._models[name], context, args.threads, args.repack)

    def _answer(self, model: Model, conversation: list[int], count: int) -> float:
        """Answer until `count` tokens have come from this model; return ms a token."""
        steps = count - 1
        start = time.perf_counter()
        for _ in range(steps):
            conversation.append(model.run(conversation[-1:]))
        return 1000 * (time.perf_counter() - start) / steps


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Pass on errors only."""
    if level == GGML_LOG_LEVEL_ERROR:
        sys.stderr.buffer.write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("large", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer", type=int, default=32, help="tokens before a switch")
    parser.add_argument("--after", type=int, default=8, help="tokens after each switch")
    parser.add_argument("--repack", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    peer = Peer(args)
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.round(int(line))), flush=True)


if __name__ == "__main__":
    main()
