"""Arguments that several commands share: configuration, single settings, and the broker."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `nestd --help` stays quick
    from nestd.daemon.config import Settings
    from nestd.daemon.mqtt.transport import PahoTransport


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config."""
    parser.add_argument("--config", type=Path, help="instead of /etc/nestd/nestd.yaml")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add --profile."""
    parser.add_argument("--profile", help="a device profile's name or path; default: detected")


def add_assignments(parser: argparse.ArgumentParser, example: str) -> None:
    """Add --set, which leaves a list in `args.settings`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help=f"override one value, for example {example}",
    )


def add_broker(parser: argparse.ArgumentParser) -> None:
    """Add --host and --port."""
    parser.add_argument("--host", help="the MQTT broker")
    parser.add_argument("--port", type=int, help="the broker's port")


def add_media(parser: argparse.ArgumentParser) -> None:
    """Add --image, --audio, --video and --detail; `args.media` has kinds and files in order."""
    parser.set_defaults(media=[])
    for kind in ("image", "audio", "video"):
        parser.add_argument(
            f"--{kind}",
            action="append",
            metavar="FILE",
            dest="media",
            type=partial(_medium, kind),
            help=f"show this {kind} before the prompt; may come several times",
        )
    parser.add_argument(
        "--detail",
        choices=("low", "auto", "high"),
        help="the size that pictures and frames are scaled to; default: the node's choice",
    )


def _medium(kind: str, path: str) -> tuple[str, Path]:
    return kind, Path(path)


def client_transport(
    args: argparse.Namespace, client_id: str | None = None
) -> tuple[Settings, str, PahoTransport]:
    """Return the settings, where answers come to and a transport, not connected yet.

    Without a `client_id` it is one that nobody else has. `args` come from a parser with
    `add_broker` and `add_config`.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from nestd.client.connection import new_client_id
    from nestd.daemon.config import load_settings
    from nestd.daemon.mqtt.connect import client_options
    from nestd.daemon.mqtt.topics import answers_to
    from nestd.daemon.mqtt.transport import PahoTransport

    settings = load_settings(args.config, None, {"mqtt.host": args.host, "mqtt.port": args.port})
    client_id = client_id or new_client_id()
    address = answers_to(client_id, settings.mqtt.username)
    return settings, address, PahoTransport(client_options(settings, client_id))
