"""Mosquitto as examples/mosquitto sets it up; the password of NAME is `pw-NAME`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestd.daemon.doctor.rights import Login
from nestd.daemon.mqtt.packets import Connected
from nestd.daemon.settings import Settings
from support.mosquitto import Mosquitto
from support.node import settings_for_tests
from support.pki import Authority

EXAMPLE = Path(__file__).parents[2] / "examples" / "mosquitto"
LOGINS = ("kitchen", "attic", "phone", "tablet", "ha", "fleet")
# The fixture has its own.
_REPLACED = ("#", "listener ", "allow_anonymous ", "persistence ", "autosave_interval ")


class Secured(Mosquitto):
    """The broker, and how to log in to it."""

    def __init__(self, directory: Path) -> None:
        etc = directory / "etc"
        authority = Authority(etc / "certs")
        self.ca_file = authority.file
        pair = authority.issue("localhost")
        pair.certificate.rename(etc / "certs/broker.pem")
        pair.key.rename(etc / "certs/broker.key")
        shutil.copy(EXAMPLE / "acl", etc / "acl")
        for name in LOGINS:
            create = () if (etc / "passwords").exists() else ("-c",)
            command = ["mosquitto_passwd", *create, "-b", str(etc / "passwords"), name]
            subprocess.run([*command, f"pw-{name}"], check=True, capture_output=True)
            (directory / f"{name}.password").write_text(f"pw-{name}\n")
        text = (EXAMPLE / "mosquitto.conf").read_text().replace("/etc/mosquitto", str(etc))
        lines = [line for line in text.splitlines() if line and not line.startswith(_REPLACED)]
        super().__init__(directory, *lines, anonymous=False)
        self.directory = directory

    def keys(self, login: str) -> dict[str, str]:
        """Return the settings of `mqtt` for this login."""
        return {
            "port": str(self.port),
            "tls": "true",
            "ca_file": str(self.ca_file),
            "username": login,
            "password_file": str(self.directory / f"{login}.password"),
        }

    def settings(self, login: str, node: str = "kitchen", **overrides: object) -> Settings:
        keys = {f"mqtt__{key}": value for key, value in self.keys(login).items()}
        return settings_for_tests(**({"node": node} | keys | overrides))

    def login(self, name: str) -> Login:
        login = Login(self.settings(name, node=name), "test")
        assert isinstance(login.first(), Connected)
        return login


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    """A running broker with the rights of examples/mosquitto."""
    if shutil.which("mosquitto") is None or shutil.which("mosquitto_passwd") is None:
        pytest.skip("Mosquitto is not installed")
    broker = Secured(tmp_path)
    broker.start()
    yield broker
    broker.stop()
