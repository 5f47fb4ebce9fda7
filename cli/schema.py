"""Print the MQTT contract as an AsyncAPI 3.0 document, for code generators and documentation."""

from __future__ import annotations

import argparse

from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd schema`."""
    return subparsers.add_parser("schema", help=__doc__, description=__doc__)


def run(args: argparse.Namespace) -> int:
    """Print the document as YAML."""
    import yaml

    from nestd.daemon.mqtt.asyncapi import document

    del args
    print(yaml.safe_dump(document(), sort_keys=False, allow_unicode=True, width=100), end="")
    return 0
