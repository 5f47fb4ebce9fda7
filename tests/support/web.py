"""The dashboard beside a broker that browsers reach: Mosquitto with a WebSocket listener."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestd.dashboard.server import serve
from support.mosquitto import Mosquitto


class Web:
    """A broker that browsers reach too, and the address of the page."""

    def __init__(self, directory: Path, *lines: str, anonymous: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        websockets = (f"listener {port} 127.0.0.1", "protocol websockets")
        self.broker = Mosquitto(directory, *websockets, *lines, anonymous=anonymous)
        self.url = f"ws://127.0.0.1:{port}"
        self.page = ""

    @contextmanager
    def running(self) -> Iterator[Web]:
        self.broker.start()
        with serve("127.0.0.1:0", self.url, "nestd") as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            self.page = f"http://127.0.0.1:{server.server_address[1]}/"
            yield self
            server.shutdown()
            thread.join()
        self.broker.stop()
