"""The rights of examples/mosquitto/acl on real Mosquitto: who may do what, and who may not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.clients import echo_daemon, nestd, wait_for_line
from support.secured import Secured

from nestd.daemon.doctor.rights import Login
from nestd.daemon.mqtt.topics import answers_to

pytestmark = pytest.mark.broker

REQUEST = "nestd/v1/kitchen/request/generate"
MOMENT = 0.5  # what does not come within it does not come


@contextmanager
def listener(broker: Secured, name: str, *filters: str) -> Iterator[Login]:
    with closing(broker.login(name)) as login:
        login.subscribe(list(filters))
        yield login


def test_a_program_asks_a_node_and_gets_its_answer(secured: Secured, tmp_path: Path) -> None:
    settings = [f"mqtt.{key}={value}" for key, value in secured.keys("kitchen").items()]
    config = tmp_path / "phone.yaml"
    lines = [f"  {key}: {value}" for key, value in secured.keys("phone").items()]
    config.write_text("\n".join(["mqtt:", *lines, ""]))
    command = nestd("ask", "--config", str(config), "--node", "kitchen", "one two three")
    with echo_daemon(secured, "kitchen", *settings) as process:
        wait_for_line(process, "connected (connection 1)")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "one two three" in done.stdout


def test_nobody_hears_the_requests_and_answers_of_others(secured: Secured) -> None:
    with (
        listener(secured, "tablet", "#", "clients/#", "nestd/#") as spy,
        listener(secured, "phone", "clients/phone/#") as phone,
        listener(secured, "kitchen", "nestd/v1/kitchen/#") as kitchen,
    ):
        assert phone.publish(REQUEST, b"a secret question") is None
        assert kitchen.hear(REQUEST, b"secret") is not None
        assert kitchen.publish("clients/phone/a/replies", b"a secret answer") is None
        assert phone.hear("clients/phone/a/replies", b"secret") is not None
        assert spy.hear(REQUEST, b"secret", MOMENT) is None
        assert spy.hear("clients/phone/a/replies", b"secret", MOMENT) is None


def test_a_client_id_gives_no_right_to_the_answers_of_a_login(secured: Secured) -> None:
    """The client id is what a client says of itself; `clients/<login>/...` is the login's."""
    with listener(secured, "tablet", f"clients/{answers_to('nestd-phone-test', None)}/#") as spy:
        with closing(secured.login("kitchen")) as kitchen:
            assert kitchen.publish("clients/nestd-phone-test/replies", b"hello") is None
        assert spy.hear("clients/nestd-phone-test/replies", b"hello", MOMENT) is None


@pytest.mark.parametrize("name", ["phone", "fleet", "attic"])
@pytest.mark.parametrize("last", ["availability", "state", "info", "health", "response/generate"])
def test_nobody_speaks_in_the_name_of_a_node(secured: Secured, name: str, last: str) -> None:
    topic = f"nestd/v1/kitchen/{last}"
    with (
        listener(secured, "kitchen", "nestd/v1/kitchen/#") as kitchen,
        closing(secured.login(name)) as other,
    ):
        assert "Not authorized" in str(other.publish(topic, b'{"state": "offline"}'))
        assert kitchen.hear(topic, b"offline", MOMENT / 2) is None


def test_a_program_cannot_forge_answers_or_steer_nodes(secured: Secured) -> None:
    with closing(secured.login("phone")) as phone:
        for topic in (
            "clients/tablet/a/replies",
            "nestd/v1/kitchen/request/submodel",
            "nestd/v1/kitchen/request/modality",
            "homeassistant/device/kitchen/config",
        ):
            assert "Not authorized" in str(phone.publish(topic, b"{}")), topic


def test_whoever_looks_after_the_fleet_reads_what_nodes_say_and_sends_nothing(
    secured: Secured,
) -> None:
    with (
        listener(secured, "fleet", "nestd/#") as fleet,
        closing(secured.login("kitchen")) as kitchen,
    ):
        for last in ("availability", "state", "info", "health"):
            assert kitchen.publish(f"nestd/v1/kitchen/{last}", b"says") is None
            assert fleet.hear(f"nestd/v1/kitchen/{last}", b"says") is not None
        assert "Not authorized" in str(fleet.publish(REQUEST, b"{}"))


def test_a_node_takes_the_requests_of_its_pool_and_offers_itself_to_home_assistant(
    secured: Secured,
) -> None:
    pool = "nestd/v1/pool/house/request/generate"
    with (
        listener(secured, "kitchen", f"$share/house/{pool}") as kitchen,
        closing(secured.login("phone")) as phone,
    ):
        assert phone.publish(pool, b"to the pool") is None
        assert kitchen.hear(pool, b"pool") is not None
        assert kitchen.publish("homeassistant/device/kitchen/config", b"{}") is None


def test_home_assistant_is_offered_nodes_steers_them_and_hears_its_own_answers(
    secured: Secured,
) -> None:
    device = "homeassistant/device/kitchen/config"
    with (
        listener(secured, "ha", "homeassistant/#", "clients/#") as ha,
        listener(secured, "kitchen", "nestd/v1/kitchen/#", "homeassistant/status") as kitchen,
    ):
        assert kitchen.publish(device, b"{}") is None
        assert ha.hear(device, b"{}") is not None
        assert ha.publish("homeassistant/status", b"online") is None
        assert kitchen.hear("homeassistant/status", b"online") is not None
        assert ha.publish("nestd/v1/kitchen/request/submodel", b"steer") is None
        assert kitchen.hear("nestd/v1/kitchen/request/submodel", b"steer") is not None
        assert kitchen.publish("clients/ha/answers", b"hello") is None
        assert ha.hear("clients/ha/answers", b"hello") is not None
        assert "Not authorized" in str(ha.publish("nestd/v1/kitchen/state", b"{}"))


def test_nobody_comes_in_without_a_password(secured: Secured) -> None:
    anonymous = secured.settings("kitchen", mqtt__username=None, mqtt__password_file=None)
    with closing(Login(anonymous, "test")) as login:
        event = login.first()
    assert "not authori" in str(event).lower(), event


def test_the_shell_example_gets_its_answer_with_a_login(secured: Secured) -> None:
    if shutil.which("jq") is None or shutil.which("mosquitto_rr") is None:
        pytest.skip("jq or mosquitto_rr is not installed")
    settings = [f"mqtt.{key}={value}" for key, value in secured.keys("kitchen").items()]
    broker = ["-h", "localhost", "-p", str(secured.port), "--cafile", str(secured.ca_file)]
    login = ["-u", "phone", "-P", "pw-phone"]
    script = str(Path(__file__).parents[1] / "examples/mosquitto_rr.sh")
    with echo_daemon(secured, "kitchen", *settings) as process:
        wait_for_line(process, "connected (connection 1)")
        command = ["bash", script, "kitchen", "one two", *broker, *login]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "one two\n"), done.stderr
