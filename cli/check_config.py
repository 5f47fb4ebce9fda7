"""Print the effective configuration and where each value comes from, or every mistake in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nestd.cli.arguments import add_assignments, add_config, add_profile
from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd check-config`."""
    parser = subparsers.add_parser("check-config", help=__doc__, description=__doc__)
    add_config(parser)
    add_profile(parser)
    add_assignments(parser, "mqtt.host=broker.lan")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        help="read /proc, /sys and /etc below this directory",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one line per value; a ConfigError leaves with status 2."""
    from nestd.daemon.config import explain_settings, parse_assignments

    explained = explain_settings(
        args.config, args.profile, parse_assignments(args.settings), root=args.root
    )
    for line in explained.lines():
        print(line)
    return 0
