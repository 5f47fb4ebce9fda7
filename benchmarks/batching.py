"""Several answers at once, and guessed tokens: throughput, stalls, fairness, cost of a guess.

    python benchmarks/batching.py BUNDLE PREPARED --submodel E4B

Writes benchmarks/results/batching.json and .md; --results names another directory. Measured in a
process of its own with the engine process's settings, without daemon and MQTT, as rounds in turn:

- decoding 1, 2, 4 and 8 streams: tokens a second of all together, in the time in which all decode;
- the same with every other stream on the smallest sub-model, so that the two sizes take turns;
- how evenly they got on: the fewest and the most tokens of a stream in that time;
- the longest pause of a running answer while a long prompt joins, for each --stall, and how long
  that prompt takes then and alone;
- a step that checks k guessed tokens, by the step for one token: so many tokens it must bring;
- an answer to a prompt that repeats itself, with guesses and without. With random weights an answer
  repeats nothing, so there this shows what guessing costs where it does not help.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from real_shape import machine

from nestd.daemon.engine.process import environment

STREAMS = (1, 2, 4, 8)
GUESSES = (0, 2, 4, 8, 16)
PROMPT, LONG_PROMPT = 64, 2000
RESULTS = Path(__file__).parent / "results"


class Bench:
    """A loaded bundle and the answers that run on it."""

    def __init__(self, bundle_path: Path, prepared: Path, args: argparse.Namespace) -> None:
        from nestd.bundle.manifest import Bundle
        from nestd.daemon.engine.graphs import Graphs
        from nestd.daemon.engine.messages import EngineOptions
        from nestd.daemon.prompt.template import Prompt

        bundle = Bundle.open(bundle_path)
        options = EngineOptions(threads=args.threads, prepared_directory=prepared)
        self.graphs = Graphs(bundle, options)
        self.tokenizer = Prompt(bundle).tokenizer
        self.submodel = bundle.manifest.submodel(
            args.submodel or bundle.manifest.submodels[-1].name
        )
        self.smallest = bundle.manifest.submodels[0]
        self.chunk = options.prefill_chunk
        self.long_prompt = args.long_prompt
        self.tokens = args.tokens
        self.context = args.long_prompt + args.tokens
        self.caches = self.graphs.new_caches(max(STREAMS), self.context)
        self.random = np.random.default_rng(0)

    def scheduler(self, max_stall_seconds: float = 0.25) -> Any:
        from nestd.daemon.engine.scheduler import Scheduler

        return Scheduler(self.graphs, self.chunk, max_stall_seconds)

    def add(self, scheduler: Any, ids: Any, tokens: int, lookup: bool = False) -> Any:
        """Let an answer of `tokens` tokens to the prompt `ids` run; no end token ends it."""
        from nestd.daemon.engine.generate import Generation
        from nestd.daemon.engine.media import EncodedPrompt
        from nestd.daemon.engine.messages import Sampling
        from nestd.daemon.engine.prompt_lookup import PromptLookup

        generation = Generation(
            self.graphs,
            self.tokenizer,
            EncodedPrompt(list(ids)),
            Sampling(max_tokens=tokens, temperature=0.0 if lookup else 1.0, seed=1),
            self.submodel,
            self.caches.new(),
            self.context,
            lookup=PromptLookup() if lookup else None,
        )
        generation._eos = frozenset()
        scheduler.add(generation)
        return generation

    def ids(self, count: int) -> Any:
        return self.random.integers(5, self.graphs.model.vocab_size_per_layer_input, count)

    def end(self, scheduler: Any) -> None:
        for generation in list(scheduler.running):
            scheduler.remove(generation)

    def streams(self, count: int, two_sizes: bool = False) -> dict[str, float]:
        """Decode `count` streams; all have begun before the time is taken."""
        scheduler = self.scheduler()
        running = [self.add(scheduler, self.ids(PROMPT), 4 * self.tokens) for _ in range(count)]
        for item in running[1::2] if two_sizes else []:
            item.submodel = self.smallest
        while any(item.prefilling for item in running):
            scheduler.step()
        before = [item.completion_tokens for item in running]
        start = time.monotonic()
        for _ in range(self.tokens):
            scheduler.step()
        seconds = time.monotonic() - start
        made = [item.completion_tokens - old for item, old in zip(running, before, strict=True)]
        self.end(scheduler)
        return {"rate": sum(made) / seconds, "least": min(made), "most": max(made)}

    def stall(self, max_stall_seconds: float) -> dict[str, float]:
        """Return the longest pauses of three answers, before and while a long prompt joins."""
        scheduler = self.scheduler(max_stall_seconds)
        running = [self.add(scheduler, self.ids(PROMPT), self.tokens) for _ in range(3)]
        while any(item.prefilling for item in running):
            scheduler.step()
        pauses = []
        for _ in range(8):
            start = time.monotonic()
            scheduler.step()
            pauses.append(time.monotonic() - start)
        joined = self.add(scheduler, self.ids(self.long_prompt - 8), 2)
        began = last = time.monotonic()
        longest, tokens = 0.0, running[0].completion_tokens
        while joined.prefilling and running[0].finish_reason is None:
            scheduler.step()
            if running[0].completion_tokens > tokens:
                tokens, now = running[0].completion_tokens, time.monotonic()
                longest, last = max(longest, now - last), now
        read = joined.tokens_read / (time.monotonic() - began)
        self.end(scheduler)
        return {"undisturbed": max(pauses), "longest": longest, "prompt_rate": read}

    def prompt_alone(self) -> dict[str, float]:
        """Return the speed of reading the long prompt while nothing else runs."""
        scheduler = self.scheduler()
        joined = self.add(scheduler, self.ids(self.long_prompt - 8), 2)
        start = time.monotonic()
        while joined.prefilling:
            scheduler.step()
        read = joined.tokens_read / (time.monotonic() - start)
        self.end(scheduler)
        return {"prompt_rate": read}

    def check(self, guesses: int) -> dict[str, float]:
        """Return the seconds of a step that checks so many guesses after 128 tokens."""
        cache = self.caches.new()
        self.graphs.run(self.ids(128), cache, self.submodel, need_logits=False)
        times = []
        for _ in range(8):
            ids = self.ids(guesses + 1)[np.newaxis]
            start = time.monotonic()
            self.graphs.run_batch(ids, [cache], self.submodel, guesses + 1)
            times.append(time.monotonic() - start)
            cache.length = 128
        self.caches.free(cache)
        return {"seconds": statistics.median(times)}

    def lookup(self, guess: bool) -> dict[str, float]:
        """Answer a prompt that repeats itself."""
        scheduler = self.scheduler()
        ids = np.tile(np.random.default_rng(7).integers(5, 200, 24), 6)
        answer = self.add(scheduler, ids, self.tokens, lookup=guess)
        while answer.prefilling:
            scheduler.step()
        start = time.monotonic()
        while answer.finish_reason is None:
            scheduler.step()
        rate = (answer.completion_tokens - 1) / (time.monotonic() - start)
        guessed = answer.guessed_tokens
        self.end(scheduler)
        return {"rate": rate, "guessed": guessed}


def measure(bundle: Path, prepared: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the median of each figure over the rounds; runs in a process of its own."""
    bench = Bench(bundle, prepared, args)
    cases: dict[str, Any] = {f"streams {n}": (bench.streams, n) for n in STREAMS}
    cases |= {f"two sizes {n}": (bench.streams, n, True) for n in STREAMS[1:]}
    cases |= {f"stall {bound:g}": (bench.stall, bound) for bound in args.stall}
    cases["prompt alone"] = (bench.prompt_alone,)
    cases |= {f"check {k}": (bench.check, k) for k in GUESSES}
    cases |= {"lookup off": (bench.lookup, False), "lookup on": (bench.lookup, True)}
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.runs):
        for name, (function, *values) in cases.items():
            rounds.setdefault(name, []).append(function(*values))
    return {"submodel": bench.submodel.name} | {
        name: {key: statistics.median(item[key] for item in items) for key in items[0]}
        for name, items in rounds.items()
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    figures, board = report["figures"], report["machine"]
    one, step = figures["streams 1"]["rate"], figures["check 0"]["seconds"]
    off, on = figures["lookup off"], figures["lookup on"]
    lines = [
        "# Several answers at once",
        "",
        f"{report['bundle']}, {figures['submodel']}; {board['cpu']}, {board['threads']} threads,",
        f"commit {board['commit']}. Medians of {report['runs']} rounds, all cases in turn;",
        f"prompts of {PROMPT} tokens, one of {report['long_prompt']} joins.",
        "",
        "| streams | tokens/s together | by one stream | fewest, most tokens of a stream |",
        "|---|---|---|---|",
    ]
    cases = [(str(count), f"streams {count}") for count in STREAMS]
    cases += [(f"{count}, of two sizes", f"two sizes {count}") for count in STREAMS[1:]]
    for name, case in cases:
        item = figures[case]
        lines.append(
            f"| {name} | {item['rate']:.1f} | {item['rate'] / one:.2f} | "
            f"{item['least']:.0f}, {item['most']:.0f} |"
        )
    lines += [
        "",
        "| `max_stall_s` | longest pause, ms | undisturbed | joining prompt, tokens/s (alone) |",
        "|---|---|---|---|",
    ]
    alone = figures["prompt alone"]["prompt_rate"]
    for bound in report["stalls"]:
        item = figures[f"stall {bound:g}"]
        lines.append(
            f"| {bound:g} | {1000 * item['longest']:.0f} | {1000 * item['undisturbed']:.0f} | "
            f"{item['prompt_rate']:.0f} ({alone:.0f}) |"
        )
    lines += ["", "| guesses checked | step, ms | by a step for one token |", "|---|---|---|"]
    for guesses in GUESSES:
        seconds = figures[f"check {guesses}"]["seconds"]
        lines.append(f"| {guesses} | {1000 * seconds:.1f} | {seconds / step:.2f} |")
    lines += [
        "",
        f"A repeating prompt: {off['rate']:.1f} tokens/s without guesses, {on['rate']:.1f} with;",
        f"{on['guessed']:.0f} tokens were guessed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--submodel", help="the largest by default")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded by each stream")
    parser.add_argument("--long-prompt", type=int, default=LONG_PROMPT)
    parser.add_argument("--stall", type=float, nargs="+", default=[0.1, 0.25, 1.0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.bundle, args.prepared, args)))
        return
    result = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--measure"],
        check=True,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    report = {
        "machine": machine(args.threads),
        "bundle": args.bundle.name,
        "runs": args.runs,
        "long_prompt": args.long_prompt,
        "stalls": args.stall,
        "figures": json.loads(result.stdout),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "batching.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.results / "batching.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
