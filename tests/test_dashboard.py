"""`nestd dashboard` as a web server: what it hands out, what it allows, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clients import PATIENCE, nestd

from nestd.bundle.errors import ConfigError
from nestd.dashboard.server import broker_origin, page_files, serve

BROKER = "ws://broker.lan:9001"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve("127.0.0.1:0", BROKER, "home/nestd") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def get(url: str) -> tuple[bytes, dict[str, str]]:
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        return response.read(), dict(response.headers)


def test_every_file_of_the_page_is_served_with_its_type(address: str) -> None:
    assert {"/", "/app.js", "/style.css", "/vendor/mqtt.min.js"} <= set(page_files())
    for path, page in page_files().items():
        data, headers = get(address + path)
        assert (data, headers["Content-Type"]) == (page.data, page.content_type)


def test_the_page_learns_broker_and_prefix(address: str) -> None:
    data, _ = get(f"{address}/settings.json")
    assert json.loads(data) == {"broker": BROKER, "prefix": "home/nestd"}


def test_the_policy_allows_own_files_and_the_one_broker_only(address: str) -> None:
    policy = get(address)[1]["Content-Security-Policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["script-src"] == rules["style-src"] == ["'self'"]
    assert rules["connect-src"] == ["'self'", BROKER]
    assert rules["frame-ancestors"] == ["'none'"]


@pytest.mark.parametrize(
    "path", ["/none", "/server.py", "/__init__.py", "/../pyproject.toml", "/vendor"]
)
def test_nothing_else_is_served(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(address + path)
    with caught.value as answer:
        assert answer.status == 404
        assert "Content-Security-Policy" in answer.headers


def test_only_reading_is_allowed(address: str) -> None:
    request = urllib.request.Request(address, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE)
    with caught.value as answer:
        assert answer.status == 501


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("ws://broker:9001", "ws://broker:9001"),
        ("wss://broker.lan/mqtt", "wss://broker.lan"),
        ("ws://192.168.1.4:9001/", "ws://192.168.1.4:9001"),
    ],
)
def test_the_origin_is_that_of_the_brokers_url(url: str, origin: str) -> None:
    assert broker_origin(url) == origin


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mqtt://broker:1883", "write ws://HOST:PORT"),
        ("broker:9001", "write ws://HOST:PORT"),
        ("ws://", "write ws://HOST:PORT"),
        ("ws://broker:port", "write ws://HOST:PORT"),
        ("ws://broker;script-src *:9001", "write ws://HOST:PORT"),
        ("ws://[::1]:9001", "the IPv4 address"),
        ("ws://me:secret@broker:9001", "the page asks for them"),
        ("mqtt://me:secret@broker:port", "the page asks for them"),
    ],
)
def test_a_url_that_is_none_of_a_broker_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        broker_origin(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("listen", ["8090", ":8090", "127.0.0.1:http", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_listened_on_is_one_clear_sentence(listen: str) -> None:
    done = subprocess.run(
        nestd("dashboard", "--listen", listen), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert listen in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_takes_the_broker_of_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "nestd.yaml"
    config.write_text("mqtt: {host: broker.lan, prefix: home}\n")
    command = nestd("dashboard", "--listen", "127.0.0.1:0", "--config", str(config))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            address = said.split()[0]
            data, _ = get(f"{address}/settings.json")
        finally:
            process.terminate()
    assert json.loads(data) == {"broker": "ws://broker.lan:9001", "prefix": "home"}
