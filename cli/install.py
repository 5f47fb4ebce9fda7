"""Make this machine a node that starts at boot: user, directories, systemd unit, configuration."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestd.cli.arguments import add_assignments
from nestd.cli.main import Subparsers

if TYPE_CHECKING:  # `nestd --help` stays quick
    from nestd.cli.appliance import File
    from nestd.daemon.config import Settings

# The unit has ProtectHome= and PrivateTmp=: it sees nothing there.
HIDDEN = ("home", "root", "run/user", "tmp", "var/tmp")
LOW_MEMORY_GIB = 5.0
CREDENTIAL = "nestd.mqtt-password"
HEADER = """\
# Written by `nestd install`. All keys: docs/configuration.md.
# After a change: `nestd check-config`, then `systemctl reload nestd`.
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd install`."""
    parser = subparsers.add_parser("install", help=__doc__, description=__doc__)
    parser.add_argument(
        "--profile", default="auto", help="a device profile's name or path; auto (default) detects"
    )
    parser.add_argument("--broker", metavar="HOST[:PORT]", help="the MQTT broker")
    parser.add_argument("--username", help="of this node at the broker")
    parser.add_argument(
        "--password-file",
        type=Path,
        help="its first line is the password; kept for root only, handed over as a credential",
    )
    parser.add_argument("--node", help="this node's name in topics; default: the host name")
    parser.add_argument("--bundle", type=Path, help="the bundle directory, best in /var/lib/nestd")
    add_assignments(parser, "mqtt.tls=true")
    parser.add_argument(
        "--drop-in",
        action="append",
        default=[],
        dest="drop_ins",
        help="one more of the drop-ins in docs/systemd.md; may come several times",
    )
    parser.add_argument("--enable", action="store_true", help="start now and at every boot")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="install into the system below this directory"
    )
    parser.add_argument("--command", type=Path, help="what the unit starts; default: this nestd")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the files, then let systemd know. Doing it again changes nothing that is right."""
    from nestd.bundle.errors import ConfigError
    from nestd.cli.appliance import CONFIG, File, Tree
    from nestd.daemon.config import explain_settings

    live = args.root == Path("/")
    if live and not args.dry_run and os.geteuid() != 0:
        raise ConfigError("this needs root: sudo nestd install")
    tree = Tree(args.root, args.dry_run, print)
    wanted = _wanted(args)
    profile = None if args.profile == "auto" else args.profile
    explained = explain_settings(None, profile, wanted, environ={}, root=args.root)
    # All that may be wrong is found before the first file is written.
    files = [] if tree.packaged else _unit(args)
    files += _drop_ins(args, explained.settings)
    if args.password_file is not None:
        files.append(_password(args.password_file))
    if wanted or not (args.root / CONFIG).exists():
        files.append(File(CONFIG, _config(args.root / CONFIG, wanted)))
    for file in files:
        tree.put(file)
    tree.save()

    has_bundle = explained.settings.bundle is not None
    for command in _commands(args, live, tree.packaged, has_bundle):
        do(command, args.dry_run)
    if not has_bundle:
        print("no bundle yet: put one into /var/lib/nestd, name it with --bundle, then start nestd")
    return 0


def _commands(
    args: argparse.Namespace, live: bool, packaged: bool, has_bundle: bool
) -> list[list[str]]:
    """Return what lets systemd know; the users and directories of a package are dpkg's matter."""
    from nestd.cli.appliance import SYSUSERS, TMPFILES

    if not live:
        # The user and the directories are made when that system boots.
        return [["systemctl", f"--root={args.root}", "enable", "nestd"]] if args.enable else []
    commands = []
    if not packaged:
        commands += [["systemd-sysusers", f"/{SYSUSERS}"]]
        commands += [["systemd-tmpfiles", "--create", f"/{TMPFILES}"]]
    running = Path("/run/systemd/system").is_dir()
    if running:
        commands += [["systemctl", "daemon-reload"], ["systemctl", "try-restart", "nestd"]]
    if args.enable:
        now = ["--now"] if running and has_bundle else []
        commands += [["systemctl", "enable", *now, "nestd"]]
    return commands


def _wanted(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings that the command line names, by dotted key."""
    from nestd.daemon.config import parse_assignments

    host, port = _broker(args.broker) if args.broker else (None, None)
    profile = args.profile
    if "/" in profile:
        profile = str(_visible(Path(profile), "--profile"))
    named = {
        "profile": None if profile == "auto" else profile,
        "node": args.node,
        "bundle": None if args.bundle is None else str(_visible(args.bundle, "--bundle")),
        "mqtt.host": host,
        "mqtt.port": port,
        "mqtt.username": args.username,
        "mqtt.password_file": None if args.password_file is None else CREDENTIAL,
    }
    given = {key: value for key, value in named.items() if value is not None}
    return given | parse_assignments(args.settings)


def _broker(text: str) -> tuple[str, int | None]:
    """Return host and port of HOST, HOST:PORT, [IPv6] or [IPv6]:PORT."""
    from nestd.bundle.errors import ConfigError

    match = re.fullmatch(r"(?:\[(?P<six>[^]]+)\]|(?P<host>[^:\[\]/]+))(?::(?P<port>\d+))?", text)
    if match is None:
        raise ConfigError(f"--broker {text}: write HOST or HOST:PORT, for example broker.lan:8883")
    return match["six"] or match["host"], int(match["port"]) if match["port"] else None


def _command(args: argparse.Namespace) -> Path:
    """Return the program that the unit starts."""
    if args.command is not None:
        return Path(args.command)
    return _visible(Path(sys.executable).with_name("nestd"), "nestd")


def _visible(path: Path, what: str) -> Path:
    """Return `path`, absolute; ConfigError where a service does not see it."""
    from nestd.bundle.errors import ConfigError

    path = path.absolute()
    if any(path.is_relative_to(Path("/") / hidden) for hidden in HIDDEN):
        remedy = (
            "install it for all users: sudo PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx "
            "install nestd"
            if what == "nestd"
            else "move it to /var/lib/nestd or /etc/nestd"
        )
        raise ConfigError(f"{what} is {path}, where a system service cannot see it: {remedy}")
    return path


def _unit(args: argparse.Namespace) -> list[File]:
    """Return the unit, which starts this nestd, its user and its directories."""
    from nestd.cli.appliance import SYSUSERS, TMPFILES, UNIT, File
    from nestd.systemd import text

    return [
        File(SYSUSERS, text("nestd.sysusers")),
        File(TMPFILES, text("nestd.tmpfiles")),
        File(UNIT, text("nestd.service").replace("/usr/bin/nestd", str(_command(args)))),
    ]


def _drop_ins(args: argparse.Namespace, settings: Settings) -> list[File]:
    """Return the unit's drop-ins: those of the board, those asked for, and the memory limit."""
    from nestd.bundle.errors import ConfigError
    from nestd.cli.appliance import DROP_INS, File
    from nestd.device_profiles import chain, find, look
    from nestd.systemd import DROP_INS as SHIPPED
    from nestd.systemd import text

    unknown = set(args.drop_ins) - set(SHIPPED)
    if unknown:
        raise ConfigError(f"no drop-in is called {min(unknown)}; there are {', '.join(SHIPPED)}")
    memory_gib = look(args.root).memory_gib
    profiles = [profile.name for profile in chain(find(settings.profile))]
    boards = (name for name in SHIPPED if any(profile.startswith(name) for profile in profiles))
    chosen = {*args.drop_ins, *boards}
    if memory_gib is not None and memory_gib < LOW_MEMORY_GIB:
        chosen.add("low-memory")
    files = [File(DROP_INS / f"{name}.conf", text(f"{name}.conf")) for name in sorted(chosen)]
    if memory_gib is None:
        print("no MemTotal below --root, so no MemoryHigh: `nestd install` there adds it")
        return files
    reserve = settings.elastic.memory.reserve_bytes
    high = int(memory_gib * 1024) - reserve // 2**20
    if high <= 0:
        raise ConfigError(
            f"elastic.memory.reserve_bytes is {reserve} of {memory_gib:.1f} GiB: nothing is left"
        )
    limit = (
        f"# MemTotal without elastic.memory.reserve_bytes of the profile {settings.profile}.\n"
        f"[Service]\nMemoryHigh={high}M\n"
    )
    return [*files, File(DROP_INS / "memory.conf", limit)]


def _password(source: Path) -> File:
    from nestd.cli.appliance import PASSWORD, File
    from nestd.daemon.mqtt.connect import read_password

    return File(PASSWORD, f"{read_password(source.absolute())}\n", 0o600)


def _config(path: Path, wanted: dict[str, object]) -> str:
    """Return nestd.yaml with what it says now, if there is one, and these settings."""
    import yaml

    document: dict[str, Any] = {}
    if path.exists():
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for key, value in wanted.items():
        section = document
        *above, last = key.split(".")
        for part in above:
            # A section with all its keys commented out reads as None.
            section[part] = section.get(part) or {}
            section = section[part]
        section[last] = value
    return HEADER + (yaml.safe_dump(document, sort_keys=False) if document else "")


def do(command: list[str], dry_run: bool) -> None:
    """Run one command of the system."""
    from nestd.bundle.errors import ConfigError

    print(f"run        {' '.join(command)}", flush=True)
    if dry_run:
        return
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is missing: nestd install needs systemd") from None
    if done.returncode:
        raise ConfigError(
            f"`{' '.join(command)}` has failed; `journalctl -u nestd` may say why. The files are "
            "installed: put it right and run nestd install again"
        )
