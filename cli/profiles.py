"""List the device profiles and mark the one of this machine, or show one."""

from __future__ import annotations

import argparse
from pathlib import Path

from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd profiles`."""
    parser = subparsers.add_parser("profiles", help=__doc__, description=__doc__)
    parser.add_argument("--show", metavar="NAME", help="print the file of one profile")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="read /proc and /sys below this directory"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table, or one profile's YAML after those it extends."""
    from nestd import device_profiles

    if args.show:
        for profile in device_profiles.chain(device_profiles.find(args.show)):
            print(f"### {profile.path}\n{profile.text.rstrip()}\n")
        return 0
    shipped = device_profiles.profiles()
    detected = device_profiles.detect(args.root)
    width = max(len(name) for name in shipped)
    for profile in shipped.values():
        mark = "*" if profile.name == detected.name else " "
        print(f"{mark} {profile.name:{width}}  {profile.title}")
    board = device_profiles.look(args.root)
    memory = f", {board.memory_gib:.1f} GiB" if board.memory_gib is not None else ""
    print(f"\n* detected on this machine: {board.title}{memory}")
    return 0
