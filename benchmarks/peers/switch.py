"""Another size in the middle of an answer: nestd's one loaded engine beside llama.cpp's reload.

    python benchmarks/peers/switch.py BUNDLE WORK E4B.gguf E2B.gguf --llama-python PYTHON

BUNDLE is an int4 one of E4B's shape, the GGUF files come from gguf_checkpoint.py and the same
checkpoint; PYTHON is an environment with llama-cpp-python. Rounds alternate between nestd and
llama.cpp (with its weights repacked, the default, and without), each idle while the other runs.
Writes benchmarks/results/switch.json and .md. Weights are random: only
time and memory mean anything. Where other work wants the cores too, set OMP_WAIT_POLICY=passive:
llama.cpp's threads otherwise spin for each other and become several times slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nestd_peer import Nestd

sys.path.append(str(Path(__file__).parents[1]))
from real_shape import RESULTS, machine
from switch_table import table

PROMPTS = (128, 512)


class LlamaCpp:
    """The process of llama_cpp_peer.py."""

    def __init__(self, args: argparse.Namespace, repack: bool) -> None:
        script = Path(__file__).with_name("llama_cpp_peer.py")
        command = [args.llama_python, script, args.large, args.small]
        command += ["--threads", str(args.threads), "--answer", str(args.answer)]
        command += ["--after", str(args.after)]
        command.append("--repack" if repack else "--no-repack")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.about = self._read()

    def round(self, prompt_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{prompt_tokens}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama_cpp_peer.py has ended")
        return dict(json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("work", type=Path, help="prepared weights are kept here")
    parser.add_argument("large", type=Path, help="E4B's GGUF file")
    parser.add_argument("small", type=Path, help="E2B's GGUF file")
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer", type=int, default=32, help="tokens before a switch")
    parser.add_argument("--after", type=int, default=8, help="tokens after each switch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(args.threads),
        "note": args.note,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load averages": [os.getloadavg()[0]],
        "answer tokens": args.answer,
        "file bytes": {
            name: path.stat().st_size
            for name, path in vars(args).items()
            if name in ("large", "small")
        },
    }
    nestd = Nestd(
        args.bundle, args.work, args.threads, args.answer, args.after
    )  # prepares what is missing
    loads = []
    for _ in range(args.rounds):
        nestd.close()
        nestd = Nestd(args.bundle, args.work, args.threads, args.answer, args.after)
        loads.append(nestd.load_ms)
    peers = {
        "nestd": nestd,
        "llama.cpp": LlamaCpp(args, repack=True),
        "llama.cpp, not repacked": LlamaCpp(args, repack=False),
    }
    report["versions"] = {
        "onnxruntime": version("onnxruntime"),
        "llama-cpp-python": peers["llama.cpp"].about["version"],
        "llama.cpp system": peers["llama.cpp"].about["system"],
    }
    report["nestd start, ms"] = loads
    report["runs"] = {name: {str(prompt): [] for prompt in PROMPTS} for name in peers}
    for peer in peers.values():
        peer.round(PROMPTS[0])  # not counted: files into the cache
    for number in range(args.rounds):
        for prompt in PROMPTS:
            for name, peer in peers.items():
                report["runs"][name][str(prompt)].append(peer.round(prompt))
        report["rounds"] = number + 1
        report["load averages"].append(os.getloadavg()[0])
        write(report)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    for peer in peers.values():
        peer.close()
    print(table(report))


def write(report: dict[str, Any]) -> None:
    """Write what has been measured so far: a run takes long."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "switch.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "switch.md").write_text(table(report))


if __name__ == "__main__":
    main()
