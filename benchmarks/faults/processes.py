"""The processes that the harness breaks: Mosquitto, and a node that runs pocket."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

PATIENCE = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Broker:
    """Mosquitto with persistence, on one port and one directory for its whole life."""

    def __init__(self, directory: Path, *lines: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._config = directory / "mosquitto.conf"
        settings = (
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "user root",
            "set_tcp_nodelay true",
            "persistence true",
            f"persistence_location {directory}/",
            "max_queued_messages 10000",
            *lines,
        )
        self._config.write_text("\n".join(settings) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["mosquitto", "-c", str(self._config)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it: SIGTERM lets it save, SIGKILL does not."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None


class Node:
    """`nestd run`, restarted by the harness as systemd would."""

    def __init__(
        self, directory: Path, bundle: Path, port: int, name: str = "node", **settings: object
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._log = directory / f"{name}.log"
        self._config = directory / f"{name}.yaml"
        document = {
            "node": name,
            "bundle": str(bundle),
            "state_directory": str(directory / "state"),
            "health_interval_s": 1,
            "mqtt": {"host": "127.0.0.1", "port": port, "reconnect_min_s": 0.1},
            **settings,
        }
        self._config.write_text(yaml.safe_dump(document))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("nestd")), "run"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--config", str(self._config)], stdout=log, stderr=log
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def engine(self) -> psutil.Process | None:
        """The engine's process, None while there is none."""
        try:
            for child in self.process().children():
                if "nestd.daemon.engine.worker" in child.cmdline():
                    return child
        except psutil.Error:
            pass  # it ended while we looked
        return None

    def kill_engine(self, dice: random.Random, longest_wait: float) -> None:
        """SIGKILL the engine, at a random moment within `longest_wait` seconds of its life."""
        deadline = time.monotonic() + PATIENCE
        while (engine := self.engine()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("the daemon starts no engine")
            time.sleep(0.01)
        time.sleep(dice.uniform(0, longest_wait))
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def pocket_bundle(directory: Path, modalities: Sequence[str] = ("text",)) -> Path:
    """Convert pocket, once for a directory."""
    bundle = directory / "pocket"
    if not bundle.is_dir():
        checkpoint = Path(__file__).parents[2] / "examples" / "pocket" / "checkpoint"
        nestd = str(Path(sys.executable).with_name("nestd"))
        command = [nestd, "convert", str(checkpoint), str(bundle)]
        command += ["--modalities", ",".join(modalities)]
        subprocess.run(command, check=True, capture_output=True)
    return bundle
