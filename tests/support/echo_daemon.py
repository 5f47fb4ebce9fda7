"""A daemon process with real MQTT and real signals, and an engine that echoes.

python tests/support/echo_daemon.py PORT NODE [KEY=VALUE ...]

`bundle=media` among the settings gives it encoders.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nestd.bundle.errors import NestdError
from nestd.daemon.config import load_settings, parse_assignments
from nestd.daemon.logs import configure
from nestd.daemon.mqtt.connect import blob_options, node_options
from nestd.daemon.mqtt.transport import PahoTransport
from nestd.daemon.node import Parts
from nestd.daemon.service import Daemon
from support.engine import EchoEngine, small_manifest
from support.node import FakeBoard


def main() -> int:
    port, node, *assignments = sys.argv[1:]
    overrides = {"mqtt.port": port, "node": node, "mqtt.reconnect_min_s": 0.2, "limits.queue": 4}
    overrides["engine.parallel_requests"] = 1
    settings = load_settings(None, "generic", overrides | parse_assignments(assignments), {})
    configure("debug", settings.log_format)
    options = node_options(settings)
    uploads = blob_options(settings)
    parts = Parts(
        make_transport=lambda make_will: PahoTransport(options, make_will),
        make_engine=EchoEngine,
        make_blob_transport=lambda: PahoTransport(uploads),
        board=FakeBoard(),
    )
    try:
        Daemon(settings, small_manifest(settings.bundle is not None), parts).run()
    except NestdError as error:
        logging.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
