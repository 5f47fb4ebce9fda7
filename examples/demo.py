"""The demo: one bundle, four sizes, one broker, no reload.

    python examples/demo.py [--once] [--work DIRECTORY]

Converts pocket (the small Gemma 3n of examples/pocket), starts an MQTT broker and the daemon, asks
over MQTT at different sizes, switches size in the middle of an answer, shows it a picture and lets
it hear a clip, unloads its encoders, and stops everything. Uses Mosquitto where it is installed,
else the broker that the `demo` extra brings along; and where torch is missing, which encoders need
to be converted, the bundle that lies beside pocket's checkpoint.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nestd.bundle.manifest import Bundle
from nestd.cli.ask import summary
from nestd.client.connection import Client, new_client_id
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

POCKET = Path(__file__).parent / "pocket"
PATIENCE = 60.0
QUESTIONS = (
    "turn on the lamp in the kitchen",
    "I want the drapes in the attic open at half past five in the afternoon",
    "turn off the water pump in the living room, sorry, I mean the greenhouse at quarter to 11 pm",
)
LONG_QUESTION = (
    "when the air humidity in the bedroom is more than 70 percent and the PM2.5 in the living room "
    "gets above 20 micrograms move the curtains in the children's room to 30%"
)
# What stands before the medium, the file, what stands behind it.
MEDIA = (
    ("image", "set the thermostat in the office to", "counter-21.png", "degrees"),
    ("image", "set a timer for", "handwritten-7.png", "minutes"),
    ("audio", "", "close-the-curtains.wav", ""),
)
# pocket answers within a twentieth of a second, so a switch may come when the answer is over.
SWITCH_ATTEMPTS = 10
BROKER = """
id = 0
[router]
id = 0
max_connections = 20
max_outgoing_packet_count = 200
max_segment_size = 10485760
max_segment_count = 10
[v5.1]
name = "v5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 2000000
max_inflight_count = 100
dynamic_filters = true
"""


def main() -> None:
    """Run the demo; exits with 1 if any question was not answered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="ask one question only")
    parser.add_argument("--work", type=Path, help="where the bundle goes; default: a new directory")
    args = parser.parse_args()
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        bundle = convert(work)
        port = stack.enter_context(broker(work))
        stack.enter_context(daemon(bundle, port, work))
        client = stack.enter_context(connect(port))
        sizes = [item.name for item in bundle.manifest.submodels]
        if args.once:
            answered = [ask(client, QUESTIONS[0], sizes[-1])]
        else:
            spread = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
            pairs = zip(QUESTIONS, spread, strict=True)
            answered = [ask(client, question, size) for question, size in pairs]
            answered.append(ask_and_switch(client, LONG_QUESTION, sizes[-1], sizes[0]))
            say(f"loaded before the first picture: {loaded(client)}")
            answered += [ask_about(client, *medium, sizes[-1]) for medium in MEDIA]
            answered.append(unload(client))
        if not all(answered):
            print((work / "nestd.log").read_text(encoding="utf-8"), file=sys.stderr)
    say("stopped; nothing is left running")
    sys.exit(0 if all(answered) else 1)


def say(text: str) -> None:
    """Print a line of the demo's own."""
    print(f"\n== {text}", flush=True)


def convert(work: Path) -> Bundle:
    """Convert pocket; without torch copy the bundle that was made of it."""
    path, checkpoint = work / "pocket", POCKET / "checkpoint"
    shutil.rmtree(path, ignore_errors=True)
    if find_spec("torch") is None:
        say("torch is not installed, which encoders need to be converted: taking pocket's bundle")
        shutil.copytree(POCKET / "bundle", path)
    else:
        say("nestd convert examples/pocket/checkpoint: all sizes into one bundle")
        options = ["--image-sizes", "256"]
        subprocess.run([nestd(), "convert", str(checkpoint), str(path), *options], check=True)
    return Bundle.open(path)


def nestd() -> str:
    """Return the command of this Python's environment."""
    return str(Path(sys.executable).with_name("nestd"))


@contextmanager
def broker(work: Path) -> Iterator[int]:
    """Run an MQTT broker on a free port of this machine and yield the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    mosquitto = shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin:/usr/bin:/usr/local/bin")
    if mosquitto:
        say(f"starting Mosquitto on port {port}")
        config = work / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
        )
        with running([mosquitto, "-c", str(config)], work / "broker.log"):
            wait_for_port(port)
            yield port
        return
    from iotcore import Broker

    say(f"starting the iotcore broker on port {port}")
    config = work / "broker.toml"
    config.write_text(BROKER.format(port=port), encoding="utf-8")
    with Broker(config_path=str(config)):
        yield port


@contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    """Run a process in the background, its output in `log`."""
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


def wait_for_port(port: int) -> None:
    """Return when something listens there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}")


@contextmanager
def daemon(bundle: Bundle, port: int, work: Path) -> Iterator[None]:
    """Run `nestd run` with the bundle."""
    say(f"nestd run --bundle {bundle.manifest.name}")
    config = work / "nestd.yaml"
    config.write_text(
        f"node: demo\nbundle: {bundle.path}\nstate_directory: {work / 'state'}\n"
        f"mqtt: {{host: 127.0.0.1, port: {port}}}\n",
        encoding="utf-8",
    )
    command = [nestd(), "run", "--config", str(config)]
    try:
        with running(command, work / "nestd.log"):
            yield
    except BaseException:
        print((work / "nestd.log").read_text(encoding="utf-8"), file=sys.stderr)
        raise


@contextmanager
def connect(port: int) -> Iterator[Client]:
    """Connect as an application would."""
    name = new_client_id()
    options = TransportOptions("127.0.0.1", port, client_id=name, clean_start=True)
    client = Client(PahoTransport(options), name, "nestd")
    client.connect("demo", "demo", PATIENCE)
    try:
        yield client
    finally:
        client.close()


def ask(client: Client, question: str, size: str) -> bool:
    """Ask at one size, print the answer as it streams; return whether it was answered."""
    say(f"{size}: {question}")
    return show(client, client.ask(request(question, size), PATIENCE)) is not None


def ask_and_switch(client: Client, question: str, first: str, second: str) -> bool:
    """Ask at one size and change to another as soon as the first piece of the answer is there.

    Returns whether one answer was made at both sizes.
    """
    say(f"{first}, then {second} in the middle of the answer: {question}")
    for _ in range(SWITCH_ATTEMPTS):
        fields = request(question, first)
        done = show(client, switching(client, fields, second))
        if done is None:
            return False
        if len(done["switches"]) > 1:
            return True
        print("    (the answer was over before the switch came: once more)")
    return False


def ask_about(client: Client, kind: str, before: str, file: str, after: str, size: str) -> bool:
    """Ask with a picture or a clip; return whether it was answered."""
    say(f"{size}: {before} [{file}] {after}")
    data = (POCKET / "samples" / file).read_bytes()
    medium = {"type": kind, "data": base64.b64encode(data).decode()}
    parts = [{"type": "text", "text": before}, medium, {"type": "text", "text": after}]
    content = [part for part in parts if part.get("text") != ""]
    done = show(client, client.ask(request(content, size), PATIENCE))
    print(f"    loaded: {loaded(client)}")
    return done is not None


def unload(client: Client) -> bool:
    """Unload the encoders; return whether they have gone."""
    say('request/modality {"modality": "all", "unload": true}')
    client.control("modality", {"modality": "all", "unload": True})
    deadline = time.monotonic() + PATIENCE
    while client.state()["modalities"] != ["text"] and time.monotonic() < deadline:
        time.sleep(0.05)
    print(f"    loaded: {loaded(client)}")
    return bool(client.state()["modalities"] == ["text"])


def loaded(client: Client) -> str:
    """Say which modalities are loaded, from the node's retained state."""
    return ", ".join(client.state()["modalities"])


def switching(client: Client, fields: dict[str, Any], size: str) -> Iterator[dict[str, Any]]:
    """Ask, switch the running answer to `size` at its first delta, and yield all events."""
    switched = False
    for event in client.ask(fields, PATIENCE):
        if event["event"] == "delta" and not switched:
            client.send("submodel", {"id": fields["id"], "submodel": size})
            switched = True
        yield event


def request(question: str | list[dict[str, str]], size: str) -> dict[str, Any]:
    """Return the request's JSON."""
    return {
        "id": f"demo-{time.monotonic_ns()}",
        "messages": [{"role": "user", "content": question}],
        "submodel": size,
        "stream": True,
        "temperature": 0,
    }


def show(client: Client, events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Print an answer while it comes, then size, speed and memory; return `done`, None if none."""
    print("   ", end="")
    for event in events:
        if event["event"] == "delta":
            print(event["text"], end="", flush=True)
        elif event["event"] == "done":
            health = client.control("health", {})["data"]
            memory = (health["rss_bytes"] + health["engine_rss_bytes"]) / 1e6
            print(f"\n    {summary(event)} [{memory:.0f} MB resident]", flush=True)
            return event
        elif event["event"] == "error":
            print(f"    {event['code']}: {event['message']}")
    return None


if __name__ == "__main__":
    main()
