"""Check this machine, its broker and its bundle, and say what to do about what is amiss."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from nestd.cli.arguments import add_assignments, add_broker, add_config, add_profile
from nestd.cli.main import Subparsers

if TYPE_CHECKING:
    from nestd.daemon.doctor.finding import Finding


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd doctor`."""
    parser = subparsers.add_parser("doctor", help=__doc__, description=__doc__)
    add_config(parser)
    add_profile(parser)
    parser.add_argument("--bundle", type=Path, help="the bundle directory")
    add_broker(parser)
    add_assignments(parser, "mqtt.tls=true")
    parser.add_argument("--quick", action="store_true", help="do not read the whole bundle")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if a check has failed, warnings are 0."""
    from nestd.daemon.config import parse_assignments
    from nestd.daemon.doctor.examination import examine

    overrides: dict[str, object] = {
        "bundle": None if args.bundle is None else str(args.bundle),
        "mqtt.host": args.host,
        "mqtt.port": args.port,
    }
    findings = []
    named = overrides | parse_assignments(args.settings)
    for finding in examine(args.config, args.profile, named, args.quick):
        findings.append(finding)
        if not args.json:
            print(_lines(finding), flush=True)
    counts: Counter[str] = Counter(finding.outcome for finding in findings)
    healthy = not counts["failed"]
    if args.json:
        checks = [asdict(finding) for finding in findings]
        print(json.dumps({"healthy": healthy, "checks": checks}, indent=1, ensure_ascii=False))
    else:
        print(f"\n{', '.join(f'{counts[name]} {name}' for name in _outcomes())}")
    return 0 if healthy else 1


def _outcomes() -> tuple[str, ...]:
    from nestd.daemon.doctor.finding import Outcome

    return get_args(Outcome)


def _lines(finding: Finding) -> str:
    first, *more = finding.seen.splitlines()
    lines = [f"{finding.outcome:<8} {finding.name}: {first}", *(f"{'':9}{line}" for line in more)]
    if finding.remedy is not None:
        lines.append(f"{'':9}-> {finding.remedy}")
    return "\n".join(lines)
