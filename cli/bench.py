"""Measure a bundle on this machine: speed, loading, memory, and where a token's time goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nestd.cli.main import Subparsers

if TYPE_CHECKING:
    from nestd.bundle.manifest import Bundle
    from nestd.cli.bench_measure import Task
    from nestd.cli.bench_report import Report

PROMPTS = (128, 512, 2048)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd bench`."""
    parser = subparsers.add_parser(
        "bench",
        help=__doc__,
        description=f"{__doc__} Each run is a process of its own with the weights mapped, as the "
        "daemon runs them; figures are medians. docs/benchmarks.md says what each one means.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--prepared",
        type=Path,
        metavar="DIR",
        help="where prepared weights are, or will be kept; default: made anew and removed again",
    )
    parser.add_argument(
        "--submodel", nargs="+", metavar="NAME", help="default: the largest of the bundle"
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        type=positive,
        metavar="TOKENS",
        help="default: 128, 512 and 2048, as far as the model reads so much",
    )
    parser.add_argument("--decode", type=positive, default=64, metavar="TOKENS")
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--threads", type=positive, help="default: the physical cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument(
        "--profile-ops", action="store_true", help="also show what each operator takes"
    )
    return parser


def positive(text: str) -> int:
    """Return a number above 0; argparse says so where it is none."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and print; what is wrong with the arguments is raised before anything runs."""
    import tempfile

    from nestd.bundle.manifest import Bundle
    from nestd.cli.bench_report import measure, text

    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory(prefix="nestd-bench-") as directory:
        tasks = checked(bundle, args.prepared or Path(directory), args)
        report = measure(bundle, tasks, args.runs, args.profile_ops)
    print(text(report))
    if args.json is not None:
        write(args.json, report)
    return 0


def checked(bundle: Bundle, prepared: Path, args: argparse.Namespace) -> list[Task]:
    """Return what to run.

    Raises:
        ModelNotFound: the bundle has no such sub-model.
        ConfigError: the model cannot read so long a prompt, or the report cannot be written.
    """
    import psutil

    from nestd.bundle.errors import ConfigError
    from nestd.cli.bench_measure import Task

    longest = bundle.manifest.model.max_position_embeddings
    fitting = [count for count in PROMPTS if count + args.decode <= longest]
    prompts = args.prompt or fitting or PROMPTS
    if max(prompts) + args.decode > longest:
        raise ConfigError(
            f"a prompt of {max(prompts)} tokens and --decode {args.decode} are more than the "
            f"{longest} tokens of this model: choose shorter ones"
        )
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no directory {args.json.parent}")
    return [
        Task(
            kind="run",
            bundle=bundle.path,
            prepared=prepared,
            submodel=bundle.manifest.submodel(name).name,
            threads=args.threads or psutil.cpu_count(logical=False) or 1,
            prompts=tuple(prompts),
            decode=args.decode,
        )
        for name in args.submodel or [bundle.manifest.submodels[-1].name]
    ]


def write(path: Path, report: Report) -> None:
    """Write the report as JSON; ConfigError where that is impossible."""
    from nestd.bundle.errors import ConfigError

    try:
        path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from error
