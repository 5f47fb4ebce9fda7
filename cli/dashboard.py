"""Serve a page that shows the nodes of a broker live and asks them, over MQTT in the browser.

The page speaks to the broker itself, over a WebSocket; this command only hands out files, and knows
no password. Exit status: 0 ended by Ctrl-C, 2 the address or the broker's URL cannot be used.
"""

from __future__ import annotations

import argparse

from nestd.cli.arguments import add_config
from nestd.cli.main import Subparsers

LISTEN = "127.0.0.1:8090"
WEBSOCKET_PORT = 9001


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd dashboard`."""
    summary = "Serve a page that shows the nodes of a broker live and asks them."
    parser = subparsers.add_parser("dashboard", help=summary, description=__doc__)
    parser.add_argument(
        "--listen",
        default=LISTEN,
        metavar="ADDRESS:PORT",
        help=f"where the page is served; default: {LISTEN}, which only this machine reaches",
    )
    parser.add_argument(
        "--broker",
        metavar="URL",
        help="the broker's WebSocket listener as the browser reaches it, ws:// or wss://; "
        f"default: the configured host, port {WEBSOCKET_PORT}",
    )
    add_config(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from nestd.daemon.config import load_settings
    from nestd.dashboard.server import serve

    settings = load_settings(args.config, None, {})
    broker = args.broker or f"ws://{settings.mqtt.host}:{WEBSOCKET_PORT}"
    with serve(args.listen, broker, settings.mqtt.prefix) as server:
        host, port = server.server_address[:2]
        print(f"http://{host!s}:{port} shows the nodes of {broker}; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
