"""Real Mosquitto on a free port, with persistence in a temporary directory."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

START_SECONDS = 10.0


class Mosquitto:
    """One broker that can be stopped, killed and started again on the same port and data."""

    def __init__(self, directory: Path, *lines: str, anonymous: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.config = directory / "mosquitto.conf"
        self.config.write_text(
            "\n".join(
                [
                    f"listener {self.port} 127.0.0.1",
                    f"allow_anonymous {str(anonymous).lower()}",
                    # Started by root, it would else become a user who cannot write here.
                    "user root",
                    "persistence true",
                    f"persistence_location {directory}/",
                    "autosave_interval 1",
                    "autosave_on_changes true",
                    *lines,
                    "",
                ]
            )
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it takes connections."""
        self._process = subprocess.Popen(
            ["mosquitto", "-c", str(self.config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline, "Mosquitto does not start"
                assert self._process.poll() is None, "Mosquitto ended at once"
                time.sleep(0.02)  # there is no event to wait for
            else:
                return

    def stop(self) -> None:
        """Stop cleanly; it saves its data."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def kill(self) -> None:
        """Kill: what it has not saved is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


@pytest.fixture
def mosquitto(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mosquitto]:
    """A running broker; parametrise indirectly with more lines of configuration."""
    if shutil.which("mosquitto") is None:
        pytest.skip("Mosquitto is not installed")
    broker = Mosquitto(tmp_path, *getattr(request, "param", ()))
    broker.start()
    yield broker
    broker.stop()
