"""Run the daemon: requests in and answers out over MQTT."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nestd.cli.arguments import add_assignments, add_broker, add_config, add_profile
from nestd.cli.main import Subparsers

if TYPE_CHECKING:  # `nestd --help` stays quick
    from nestd.bundle.manifest import Bundle
    from nestd.daemon.config import Explained
    from nestd.daemon.mqtt.packets import TransportOptions


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd run`."""
    parser = subparsers.add_parser("run", help=__doc__, description=__doc__)
    add_config(parser)
    add_profile(parser)
    parser.add_argument("--bundle", type=Path, help="the bundle directory")
    add_broker(parser)
    parser.add_argument("--node", help="this node's name in topics; default: the host name")
    add_assignments(parser, "limits.queue=4")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT; at systemd's SIGHUP start again in the same process."""
    from nestd.bundle.trust import authenticate
    from nestd.cli.notice import show_once
    from nestd.daemon.engine.process import EngineProcess
    from nestd.daemon.logs import configure
    from nestd.daemon.mqtt.transport import PahoTransport
    from nestd.daemon.node import Parts
    from nestd.daemon.notify import Notifier
    from nestd.daemon.service import Daemon

    explained, bundle, mqtt_options, uploads = _read(args)
    settings, options = explained.settings, explained.settings.engine_options()
    configure(settings.log_level, settings.log_format)
    notifier = Notifier()
    authenticate(
        bundle,
        settings.bundle_sha256,
        settings.bundle_signers,
        before_each=lambda _name: notifier.extend(time.monotonic()),
    )
    show_once(bundle, settings.state_path, logging.getLogger(__name__).info)
    daemon = Daemon(
        settings,
        bundle.manifest,
        Parts(
            make_transport=lambda make_will: PahoTransport(mqtt_options, make_will),
            make_engine=lambda on_event: EngineProcess(bundle.path, options, on_event),
            make_blob_transport=lambda: PahoTransport(uploads),
            config=explained.redacted(),
            check_configuration=lambda: _read(args),
            notifier=notifier,
        ),
    )
    logging.getLogger(__name__).info(
        "node %s, profile %s, broker %s:%d",
        settings.node_name,
        settings.profile,
        settings.mqtt.host,
        settings.mqtt.port,
    )
    if daemon.run():
        # Until the new image has its handler, another SIGHUP would end it; exec keeps "ignored".
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 (this program)
    return 0


def _read(
    args: argparse.Namespace,
) -> tuple[Explained, Bundle, TransportOptions, TransportOptions]:
    """Return the configuration, the bundle that it names, and how to connect, twice.

    Raises:
        ConfigError, BundleError: the node cannot start with it.
    """
    from nestd.bundle.errors import ConfigError
    from nestd.bundle.manifest import Bundle
    from nestd.daemon.config import explain_settings, parse_assignments
    from nestd.daemon.mqtt.connect import blob_options, node_options

    overrides: dict[str, object] = {
        "bundle": None if args.bundle is None else str(args.bundle),
        "mqtt.host": args.host,
        "mqtt.port": args.port,
        "node": args.node,
    }
    explained = explain_settings(
        args.config, args.profile, overrides | parse_assignments(args.settings)
    )
    settings = explained.settings
    if settings.bundle is None:
        raise ConfigError(
            "no bundle is named: use --bundle DIRECTORY, or `bundle:` in the configuration file"
        )
    return explained, Bundle.open(settings.bundle), node_options(settings), blob_options(settings)
