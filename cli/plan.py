"""Explain which sub-model, encoders, threads and context the policy would choose, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nestd.cli.arguments import add_config, add_profile
from nestd.cli.main import Subparsers

if TYPE_CHECKING:
    from nestd.daemon.elastic.resources import Snapshot


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd plan`."""
    parser = subparsers.add_parser(
        "plan",
        help=__doc__,
        description=f"{__doc__} Without --profile this machine is looked at, and the options "
        "replace what it says; with --profile only the options count.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_config(parser)
    add_profile(parser)
    parser.add_argument("--memory", metavar="SIZE", help="memory that is free, for example 3G")
    parser.add_argument("--battery", type=float, metavar="PERCENT", help="discharging, charged so")
    parser.add_argument("--temperature", type=float, metavar="CELSIUS")
    parser.add_argument("--pressure", type=float, metavar="PERCENT", help="PSI some avg10")
    parser.add_argument("--watts", type=float)
    parser.add_argument("--under-voltage", action="store_true", help="the supply is too weak")
    parser.add_argument(
        "--need", action="append", default=[], choices=["vision", "audio"], help="for a request"
    )
    parser.add_argument("--submodel", default="auto", help="that the request asks for")
    parser.add_argument("--effort", default="auto", choices=["low", "auto", "high"])
    parser.add_argument(
        "--remote",
        choices=["never", "allowed", "required"],
        help="whether the request may go to the remote server; default: as configured",
    )
    parser.add_argument("--json", action="store_true", help="the request wants a JSON answer")
    parser.add_argument("--prompt-tokens", type=int, help="length of the request's prompt")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    from nestd.bundle.manifest import Bundle
    from nestd.daemon.config import load_settings
    from nestd.daemon.elastic.explain import explain
    from nestd.daemon.elastic.plan import RequestMix
    from nestd.daemon.elastic.policy import PolicyState, check_names, decide
    from nestd.daemon.elastic.task import Task

    settings = load_settings(args.config, args.profile)
    manifest = Bundle.open(args.bundle).manifest
    check_names(settings, manifest)
    snapshot = _snapshot(args, settings.sysroot)
    mix = RequestMix(frozenset(args.need), settings.elastic.submodel)
    plan = decide(snapshot, settings, manifest, mix, PolicyState()).plan
    assert plan is not None
    task = Task(args.submodel, args.effort, args.prompt_tokens, bool(args.need), json=args.json)
    consent = args.remote or settings.remote.default
    for line in explain(snapshot, settings, manifest, plan, task, consent):
        print(line)
    return 0


def _snapshot(args: argparse.Namespace, sysroot: Path) -> Snapshot:
    from dataclasses import replace

    from nestd.bundle.errors import ConfigError
    from nestd.daemon.elastic.resources import Sampler, Snapshot
    from nestd.daemon.units import parse_bytes

    snapshot = Snapshot(time=0.0) if args.profile else Sampler(sysroot).sample()
    memory, power, thermal = snapshot.memory, snapshot.power, snapshot.thermal
    if args.memory is not None:
        try:
            free = parse_bytes(args.memory)
        except ValueError as error:
            raise ConfigError(f"--memory {args.memory}: {error}") from None
        memory = replace(memory, available_bytes=free, limit_free_bytes=None)
    if args.pressure is not None:
        memory = replace(memory, pressure_some_percent=args.pressure)
    if args.battery is not None:
        power = replace(power, on_battery=True, battery_percent=args.battery)
    if args.watts is not None:
        power = replace(power, watts=args.watts, watts_scope="as given")
    if args.under_voltage:
        power = replace(power, under_voltage=True)
    if args.temperature is not None:
        thermal = replace(thermal, celsius=args.temperature)
    return replace(snapshot, memory=memory, power=power, thermal=thermal)
