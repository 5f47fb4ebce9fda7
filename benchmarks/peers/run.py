"""nestd beside llama.cpp, mistral.rs and transformers on random weights of one shape, one command.

    python benchmarks/peers/run.py WORK --llama-python LLAMA_VENV/bin/python --bits 4 8 --keep-less

Makes what is missing in WORK: a random checkpoint of E4B's shapes (tens of GB with all that comes
from it), its bundles, its GGUF files; --bundle and --gguf give what is there already. nestd's E2B
is a sub-model of E4B's bundle, llama.cpp's a GGUF file cut out of the same checkpoint. "nestd,
fewer bytes" is nestd with --sparse-rows and --lm-head-screen. --bits 16 is transformers in
bfloat16.

Every run is a process of its own; the peers take turns, so that a slow minute is everybody's.
Writes docs/peers/peers.json, .md and .svg after each round; rows of an earlier run stay
unless they are measured again. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from artefacts import FEWER_BYTES, HERE, Artefacts
from peers_report import plot, table

from nestd.bundle.manifest import Bundle
from nestd.cli.bench_measure import Task, in_child, read_bandwidth, watched

sys.path.append(str(HERE.parent))
from real_shape import machine

PEERS = ("nestd", FEWER_BYTES, "llama.cpp", "llama.cpp, not repacked", "mistral.rs", "transformers")


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table.

    `measure` runs it once and returns its run, peak memory and version; `token_bytes` of weights
    are read for a decoded token, where that is known.
    """

    peer: str
    size: str
    bits: int
    weights: str
    disk_bytes: int
    measure: Callable[[], dict[str, Any]]
    token_bytes: int | None = None

    @property
    def key(self) -> list[object]:
        return [self.peer, self.size, self.bits]


def contenders(
    bits: int, size: str, artefacts: Artefacts, args: argparse.Namespace
) -> Iterator[Contender]:
    """Yield the rows for one width and size; whatever they need is made first."""
    if bits == 16:
        if "transformers" in args.peers:
            yield transformers(size, artefacts, args)
        return
    if "nestd" in args.peers:
        yield nestd(size, bits, artefacts, args)
    if FEWER_BYTES in args.peers:
        yield nestd(size, bits, artefacts, args, FEWER_BYTES)
    if "llama.cpp" in args.peers:
        yield llama_cpp(size, bits, artefacts, args)
    if "llama.cpp, not repacked" in args.peers:
        yield llama_cpp(size, bits, artefacts, args, "--no-repack")
    if "mistral.rs" in args.peers:
        yield mistralrs(size, bits, artefacts, args)


def nestd(
    size: str, bits: int, artefacts: Artefacts, args: argparse.Namespace, peer: str = "nestd"
) -> Contender:
    bundle = Bundle.open(artefacts.bundle(bits, fewer_bytes=peer == FEWER_BYTES))
    task = Task(
        kind="prepare",
        bundle=bundle.path,
        prepared=args.prepared,
        submodel=bundle.manifest.submodel(size).name,
        threads=args.threads,
        prompts=args.prompt,
        decode=args.decode,
    )
    prepared, _ = in_child(task)

    def measure() -> dict[str, Any]:
        run, peak = in_child(task.model_copy(update={"kind": "run"}))
        software = f"nestd {version('nestd')}, onnxruntime {version('onnxruntime')}"
        return {"run": run, "peak": peak.model_dump(), "version": software}

    files = sum(file.bytes for file in bundle.manifest.files.values())
    weights = f"int{bits}, blocks of {bundle.manifest.quantization.block_size}"
    token_bytes = bundle.manifest.submodel(size).bytes_per_token
    disk_bytes = files + prepared["disk_bytes"]
    return Contender(peer, size, bits, weights, disk_bytes, measure, token_bytes)


def llama_cpp(
    size: str, bits: int, artefacts: Artefacts, args: argparse.Namespace, *options: str
) -> Contender:
    path = artefacts.gguf(size, bits)
    command = [artefacts.llama_python, str(HERE / "llama_cpp_bench.py"), str(path), *options]
    measure = partial(foreign, [*command, *settings(args)])
    peer = "llama.cpp, not repacked" if options else "llama.cpp"
    return Contender(peer, size, bits, f"Q{bits}_0", path.stat().st_size, measure)


def mistralrs(size: str, bits: int, artefacts: Artefacts, args: argparse.Namespace) -> Contender:
    if args.mistralrs_python is None:
        raise SystemExit("mistral.rs needs --mistralrs-python, or leave it out of --peers")
    path = args.mistralrs_checkpoint or artefacts.mistralrs()
    script = str(HERE / "mistralrs_bench.py")
    command = [args.mistralrs_python, script, str(path), size, "--bits", str(bits)]
    disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    measure = partial(foreign, [*command, *settings(args)])
    return Contender("mistral.rs", size, bits, f"Q{bits}_0 made while it loads", disk, measure)


def transformers(size: str, artefacts: Artefacts, args: argparse.Namespace) -> Contender:
    path = args.checkpoint or artefacts.checkpoint(size)
    command = [sys.executable, str(HERE / "transformers_bench.py"), str(path)]
    disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    measure = partial(foreign, [*command, *settings(args)])
    return Contender("transformers", size, 16, "bfloat16", disk, measure)


def settings(args: argparse.Namespace) -> list[str]:
    lengths = [str(count) for count in args.prompt]
    return ["--decode", str(args.decode), "--threads", str(args.threads), "--prompt", *lengths]


def foreign(command: list[str]) -> dict[str, Any]:
    """Run a script of another environment once."""
    answer, peak = watched(command)
    return {**answer, "peak": peak.model_dump()}


def measure_all(bits: int, size: str, artefacts: Artefacts, args: argparse.Namespace) -> None:
    """Measure one width and size, all rows in turn, and write after each round.

    One size at a time: files of both would push each other out of the page cache.
    """
    rows = [
        (
            contender,
            {
                "key": contender.key,
                "peer": contender.peer,
                "size": contender.size,
                "bits": bits,
                "weights": contender.weights,
                "disk_bytes": contender.disk_bytes,
                "machine": machine(args.threads),
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
                "token_bytes": contender.token_bytes,
                "read_bytes_per_second": [],
                "decode_tokens": args.decode,
                "load averages": [],
                "runs": [],
                "peaks": [],
            },
        )
        for contender in contenders(bits, size, artefacts, args)
    ]
    for number in range(args.runs):
        for contender, row in rows:
            row["load averages"].append(os.getloadavg()[0])
            # Before every run: other tenants of a server take their part of its memory bus.
            row["read_bytes_per_second"].append(read_bandwidth(args.threads))
            measured = contender.measure()
            row["version"] = measured["version"]
            row["runs"].append(measured["run"])
            row["peaks"].append(measured["peak"])
            print(f"{contender.key}: {measured['run']['rates']}", file=sys.stderr)
        write([row for _, row in rows], args.out, args.name)
        print(f"{size}, {bits} bits: round {number + 1} of {args.runs}", file=sys.stderr)


def write(rows: list[dict[str, Any]], out: Path, name: str) -> None:
    """Write the results: these rows in place of earlier ones of the same key."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    names = [row["key"] for row in rows]
    rows = [*(row for row in known if row["key"] not in names), *rows]
    rows.sort(key=lambda row: (row["size"], row["bits"], PEERS.index(row["peer"])))
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(table(rows, name), encoding="utf-8")
    plot(rows, out / f"{name}.svg")


def given_bundle(text: str) -> tuple[int, Path]:
    bits, _, path = text.partition("=")
    return int(bits), Path(path)


def given_gguf(text: str) -> tuple[tuple[str, int], Path]:
    name, _, path = text.partition("=")
    size, _, bits = name.partition("-")
    return (size, int(bits)), Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--llama-python", help="of an environment with gguf and llama-cpp-python")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=["nestd", FEWER_BYTES, "llama.cpp"]
    )
    parser.add_argument("--sizes", nargs="+", default=["E4B", "E2B"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8, 16), default=[4])
    parser.add_argument(
        "--bundle", action="append", default=[], type=given_bundle, metavar="BITS=DIR"
    )
    parser.add_argument(
        "--gguf", action="append", default=[], type=given_gguf, metavar="SIZE-BITS=FILE"
    )
    parser.add_argument("--checkpoint", type=Path, help="for transformers, of the only one --sizes")
    parser.add_argument("--mistralrs-python", help="of an environment with mistralrs")
    parser.add_argument("--mistralrs-checkpoint", type=Path, help="from mistralrs_checkpoint.py")
    parser.add_argument("--prepared", type=Path, help="default: WORK/prepared")
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--keep-less", action="store_true", help="remove what is no longer needed")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "peers")
    parser.add_argument("--name", default="peers", help="of the results' files")
    args = parser.parse_args()
    own_prepared = args.prepared is None
    args.prepared = args.prepared or args.work / "prepared"
    artefacts = Artefacts(args.work, args.llama_python, dict(args.bundle), dict(args.gguf))
    for bits in args.bits:
        for size in args.sizes:
            measure_all(bits, size, artefacts, args)
        if args.keep_less:
            artefacts.drop(bits)
            if own_prepared:
                shutil.rmtree(args.prepared, ignore_errors=True)
    if args.keep_less:
        artefacts.drop_checkpoints()
    print((args.out / f"{args.name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
