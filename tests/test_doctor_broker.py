"""What `nestd doctor` says about brokers: real Mosquitto with and without rights, TLS, limits."""

from __future__ import annotations

import datetime
import json
import os
import threading
from pathlib import Path

import pytest
from support.clients import echo_daemon, listening, wait_for_line
from support.mosquitto import Mosquitto
from support.node import settings_for_tests
from support.pki import Authority
from support.secured import Secured

from nestd.daemon.doctor import reach, rights
from nestd.daemon.doctor.finding import Finding
from nestd.daemon.mqtt.connect import node_options
from nestd.daemon.settings import Settings

pytestmark = pytest.mark.broker


def examine(settings: Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in rights.examine(settings)}


def outcomes(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.outcome for name, finding in found.items()}


ALL_WELL = dict.fromkeys(
    ("login", "strangers", "read rights", "write rights", "packet limit", "last will"), "ok"
)


def test_an_open_broker_on_this_machine_passes(mosquitto: Mosquitto) -> None:
    settings = settings_for_tests(mqtt__port=mosquitto.port, mqtt__pools=["house"])
    assert reach.network(node_options(settings)).outcome == "ok"
    assert outcomes(examine(settings)) == ALL_WELL


def test_mqtt_3_tells_less(mosquitto: Mosquitto) -> None:
    found = examine(settings_for_tests(mqtt__port=mosquitto.port, mqtt__protocol="3.1.1"))
    silent = {"write rights": "skipped", "packet limit": "skipped"}
    assert outcomes(found) == ALL_WELL | silent


@pytest.mark.parametrize("username", [None, "kitchen"])
def test_a_broker_elsewhere_that_lets_in_everybody_is_warned_of(
    mosquitto: Mosquitto, username: str | None
) -> None:
    # An address of this machine that does not look like one.
    settings = settings_for_tests(
        mqtt__host="127.1", mqtt__port=mosquitto.port, mqtt__username=username
    )
    assert outcomes(examine(settings)) == ALL_WELL | {"strangers": "warning"}


def test_the_examples_rights_pass_for_a_node(secured: Secured) -> None:
    settings = secured.settings("kitchen")
    assert reach.handshake(node_options(settings)).outcome == "ok"
    assert outcomes(examine(settings)) == ALL_WELL


def test_a_login_that_may_not_read_is_found_though_mosquitto_grants_subscriptions(
    secured: Secured,
) -> None:
    acl = secured.directory / "etc/acl"
    acl.write_text("user kitchen\ntopic write nestd/v1/kitchen/#\ntopic write clients/#\n")
    secured.stop()
    secured.start()
    found = examine(secured.settings("kitchen"))
    assert outcomes(found) == ALL_WELL | {"read rights": "failed", "last will": "failed"}
    assert "request/health does not come back" in found["read rights"].seen


def test_a_login_that_may_not_write_is_found(secured: Secured) -> None:
    acl = secured.directory / "etc/acl"
    acl.write_text("user kitchen\ntopic read nestd/v1/kitchen/#\n")
    secured.stop()
    secured.start()
    found = examine(secured.settings("kitchen"))
    assert found["read rights"].outcome == "skipped"
    assert found["write rights"].outcome == "failed"
    assert "Not authorized" in found["write rights"].seen
    assert found["last will"].outcome == "failed"


def test_a_wrong_password_is_the_only_finding(secured: Secured) -> None:
    (secured.directory / "kitchen.password").write_text("wrong\n")
    found = examine(secured.settings("kitchen"))
    assert outcomes(found) == {"login": "failed"}
    assert "mqtt.password_file" in str(found["login"].remedy)


@pytest.mark.parametrize("mosquitto", [("max_packet_size 20000",)], indirect=True)
def test_a_packet_limit_that_the_broker_names_is_compared(mosquitto: Mosquitto) -> None:
    found = examine(settings_for_tests(mqtt__port=mosquitto.port))
    assert outcomes(found) == ALL_WELL | {"packet limit": "warning"}
    assert "takes 20 KB" in found["packet limit"].seen


@pytest.mark.parametrize("mosquitto", [("message_size_limit 20000",)], indirect=True)
def test_a_packet_limit_that_the_broker_keeps_to_itself_is_found(mosquitto: Mosquitto) -> None:
    found = examine(settings_for_tests(mqtt__port=mosquitto.port))
    assert outcomes(found) == ALL_WELL | {"packet limit": "warning"}
    assert "is refused" in found["packet limit"].seen


def test_a_node_that_runs_is_not_disturbed(mosquitto: Mosquitto) -> None:
    with (
        listening(mosquitto, "nestd/v1/node/availability") as others,
        echo_daemon(mosquitto) as process,
    ):
        wait_for_line(process, "connected (connection 1)")
        others.until(lambda event: event["state"] == "online")
        assert process.stderr is not None
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        found = examine(settings_for_tests(mqtt__port=mosquitto.port))
        assert outcomes(found) == ALL_WELL | {"last will": "skipped"}
        assert others.nothing_more(0.3)
        assert process.poll() is None
        process.kill()
        drain.join()


def test_nothing_stays_at_the_broker(mosquitto: Mosquitto) -> None:
    examine(settings_for_tests(mqtt__port=mosquitto.port))
    with listening(mosquitto, "#") as afterwards:
        assert afterwards.nothing_more(0.3)


# TLS


def handshake(broker: Mosquitto, **mqtt: object) -> Finding:
    keys = {f"mqtt__{key}": value for key, value in mqtt.items()}
    settings = settings_for_tests(mqtt__port=broker.port, mqtt__tls="true", **keys)
    return reach.handshake(node_options(settings))


def test_tls_tells_its_version_and_when_the_certificate_ends(
    secured: Secured, tmp_path: Path
) -> None:
    good = handshake(secured, ca_file=str(secured.ca_file))
    assert good.outcome == "ok"
    assert good.seen.startswith("TLSv1.")
    wrong = handshake(secured, ca_file=str(Authority(tmp_path / "other").file))
    assert wrong.outcome == "failed"
    assert "set mqtt.ca_file" in wrong.seen


def test_a_certificate_that_ends_soon_is_warned_of(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    pair = authority.issue("localhost", not_after=soon)
    broker = Mosquitto(tmp_path, *authority.lines(pair))
    broker.start()
    try:
        finding = handshake(broker, ca_file=str(authority.file))
    finally:
        broker.stop()
    assert finding.outcome == "warning"
    assert "for 3 days" in finding.seen


def test_a_file_that_is_no_certificate_is_told(mosquitto: Mosquitto, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(json.dumps({"pid": os.getpid()}))
    finding = handshake(mosquitto, ca_file=str(tmp_path / "ca.pem"))
    assert finding.outcome == "failed"
    assert "PEM" in finding.seen


def test_a_client_certificate_that_is_missing_is_found(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    own = authority.issue("kitchen")
    broker = Mosquitto(tmp_path, *authority.lines(authority.issue("localhost"), clients=True))
    broker.start()
    keys = {
        "mqtt__port": broker.port,
        "mqtt__tls": "true",
        "mqtt__ca_file": str(authority.file),
    }
    try:
        without = examine(settings_for_tests(**keys))
        keys |= {"mqtt__cert_file": str(own.certificate), "mqtt__key_file": str(own.key)}
        found = examine(settings_for_tests(**keys))
    finally:
        broker.stop()
    assert outcomes(without) == {"login": "failed"}
    assert "set mqtt.cert_file and mqtt.key_file" in without["login"].seen
    assert outcomes(found) == ALL_WELL | {"strangers": "skipped"}
