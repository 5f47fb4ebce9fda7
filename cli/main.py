"""The `nestd` command: wires the command files together and nothing else.

Each module named in `COMMANDS` has a docstring (the command's help), `add_parser(subparsers)` which
adds its parser and returns it, and `run(args) -> int` which returns the exit status. They import
what they need inside `run`, so `nestd --help` stays quick.

Exit status: 0 done, 1 the command's own "no", 2 an error, which is printed on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol

from nestd.bundle.errors import NestdError

# To add a command: write cli/<name>.py and add its name here.
COMMANDS: tuple[str, ...] = (
    "ask",
    "bench",
    "check_config",
    "convert",
    "dashboard",
    "doctor",
    "inspect",
    "install",
    "plan",
    "profiles",
    "run",
    "schema",
    "uninstall",
    "watch",
)


class Subparsers(Protocol):
    """What argparse's `add_subparsers()` returns, as far as a command needs it."""

    def add_parser(
        self,
        name: str,
        *,
        help: str | None = None,  # noqa: A002  (argparse's own name)
        description: str | None = None,
    ) -> argparse.ArgumentParser:
        """Add the parser of the command `name`."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each leaves its `run` in `args.run`."""
    parser = argparse.ArgumentParser(
        prog="nestd",
        description="Runs Gemma 3n as one elastic model on small boards.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"nestd.cli.{name}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
    except NestdError as error:
        print(f"nestd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has gone. Python would complain once more at exit.
        sys.stderr.close()
        return 141
    return int(status)
