"""Print the effective configuration and where each value comes from, or every mistake in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd check-config`."""
    parser = subparsers.add_parser("check-config", help=__doc__, description=__doc__)
    parser.add_argument("--config", type=Path, help="instead of /etc/nestd/nestd.yaml")
    parser.add_argument("--profile", help="a device profile's name or path; default: detected")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="override one value, for example mqtt.host=broker.lan",
    )
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
