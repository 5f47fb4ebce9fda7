"""Undo `nestd install`; configuration and bundles stay unless they are purged."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd uninstall`."""
    parser = subparsers.add_parser("uninstall", help=__doc__, description=__doc__)
    parser.add_argument(
        "--purge",
        action="store_true",
        help="remove configuration, bundles, prepared weights, state and user as well",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="the system below this directory"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Stop the service and remove what was installed."""
    from nestd.bundle.errors import ConfigError
    from nestd.cli.appliance import UNIT, Tree
    from nestd.cli.install import do

    live = args.root == Path("/")
    if live and not args.dry_run and os.geteuid() != 0:
        raise ConfigError("this needs root: sudo nestd uninstall")
    tree = Tree(args.root, args.dry_run, print)
    # dpkg's own scripts set this when they call us for the files that dpkg does not know.
    if tree.packaged and os.environ.get("DPKG_MAINTSCRIPT_PACKAGE") != "nestd":
        raise ConfigError("nestd came as a Debian package: apt remove nestd, or apt purge nestd")
    systemd_runs = live and Path("/run/systemd/system").is_dir()
    if not tree.packaged and (args.root / UNIT).exists():
        where = [] if live else [f"--root={args.root}"]
        now = ["--now"] if systemd_runs else []
        do(["systemctl", *where, "disable", *now, "nestd"], args.dry_run)
    tree.remove(args.purge)
    if args.purge:
        tree.purge()
    tree.save()
    if systemd_runs:
        do(["systemctl", "daemon-reload"], args.dry_run)
    if live and args.purge and not tree.packaged:
        do(["userdel", "nestd"], args.dry_run)
    return 0
