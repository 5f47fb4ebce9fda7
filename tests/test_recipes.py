"""The recipes of docs/recipes and examples/recipes, on a real node, broker and (tiny) encoders.

The model is random: what it says is nonsense, so only what the protocol promises is asserted.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import jinja2
import jsonschema
import pytest
import yaml
from support.clients import PATIENCE, Listener, listening, running_node
from support.media import clip, encoded, photo, tone, video
from support.mosquitto import Mosquitto
from support.shell import shell
from support.tiny import write_checkpoint
from support.tiny_media import add_media

from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.mqtt.contract import Request

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker with the node `kitchen`, which sees, hears and has a context for whole pages."""
    if shutil.which("mosquitto_rr", path=os.environ["PATH"]) is None:
        pytest.skip("Mosquitto and its clients are not installed")
    work = tmp_path_factory.mktemp("house")
    checkpoint = write_checkpoint(work / "checkpoint", max_position_embeddings=4096)
    text = convert(str(checkpoint), work / "text", ConvertOptions(), io.StringIO())
    bundle = add_media(text, work / "media")
    broker = Mosquitto(work)
    broker.start()
    config = (
        f"profile: generic\nnode: kitchen\nbundle: {bundle.path}\n"
        f"mqtt: {{port: {broker.port}}}\nstate_directory: {work / 'state'}\n"
        "engine: {context_length: 4096, threads: 1}\nmedia: {max_video_frames: 2}\n"
    )
    with listening(broker, "nestd/v1/kitchen/state") as states, running_node(work, config):
        states.until(lambda state: state.get("phase") == "ready")
        yield broker
    broker.stop()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder as the pages suppose it: a clone, and files of one's own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    picture, sound = encoded(photo(300, 200), "JPEG"), clip(tone(2.0), "WAV")
    for name, data in {
        "snapshot.jpg": picture,
        "scans/receipt.jpg": picture,
        "photos/beach.jpg": picture,
        "photos/dog.png": encoded(photo(200, 200, 1), "PNG"),
        "note.wav": sound,
        "meeting.wav": clip(tone(31.0, rate=8000), "WAV", rate=8000),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def film(path: Path) -> None:
    """Write a video, or skip: PyAV is the extra `video`."""
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(video("mp4", "mpeg4"))


def run(house: Mosquitto, home: Path, script: str, *words: str, said: str = "") -> str:
    """Run a recipe's program and return what it prints."""
    broker = ("--host", "127.0.0.1", "--port", str(house.port), "--node", "kitchen")
    command = [sys.executable, str(RECIPES / script), *broker, *words]
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, cwd=home, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The pages


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_get_their_answers(page: Path, house: Mosquitto, home: Path) -> None:
    commands = blocks(page, "sh")
    assert commands or page.stem == "index"
    if "video" in page.stem:
        film(home / "door.mp4")
        film(home / "recordings" / "door.mp4")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in commands:
        here = block.replace("-h broker.lan", f"-h 127.0.0.1 -p {house.port}")
        here = here.replace("--host broker.lan", f"--host 127.0.0.1 --port {house.port}")
        assert "broker.lan" not in here
        printed = shell(here, home, environment)
        if "mosquitto_sub" in block:
            assert json.loads(printed)["event"] == "done", printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_home_assistant_would_send_is_a_request(page: Path) -> None:
    def actions(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "action" in node:
                yield node
            node = list(node.values())
        for item in node if isinstance(node, list) else ():
            yield from actions(item)

    environment = jinja2.Environment(autoescape=False)
    environment.filters["to_json"] = json.dumps
    for block in blocks(page, "yaml"):
        for action in actions(yaml.safe_load(block)):
            assert re.match(r"[a-z_]+\.", action["action"]), action
            if action["action"] == "mqtt.publish":
                variables = {"context": {"id": "1"}, "question": 'is it "warm"?'}
                payload = environment.from_string(action["data"]["payload"]).render(variables)
                Request.model_validate_json(payload)


def test_the_automation_switches_for_a_call_and_for_nothing_else() -> None:
    (block,) = blocks(ROOT / "docs" / "recipes" / "assistant.md", "yaml")
    (automation,) = yaml.safe_load(block)["automation"]
    environment = jinja2.Environment(autoescape=False)

    def render(template: str, answer: dict[str, Any]) -> str:
        return environment.from_string(template).render(trigger={"payload_json": answer})

    call = {"name": "set_light", "arguments": {"room": "hall", "on": False}}
    (condition,), (action,) = automation["conditions"], automation["actions"]
    assert render(condition, {"event": "done", "tool_call": call}) == "True"
    assert render(action["action"], {"tool_call": call}) == "light.turn_off"
    assert render(action["target"]["entity_id"], {"tool_call": call}) == "light.hall"
    for other in ({"event": "done", "tool_call": None}, {"event": "error", "code": "loading"}):
        assert render(condition, other) == "False"


# The programs


def test_a_snapshot_on_a_topic_becomes_a_retained_caption(house: Mosquitto, home: Path) -> None:
    broker = ("--host", "127.0.0.1", "--port", str(house.port), "--node", "kitchen")
    command = [sys.executable, str(RECIPES / "caption_snapshots.py"), *broker, "cameras/+/snapshot"]
    with (
        listening(house, "captions/#") as captions,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program,
    ):
        try:
            assert program.stdout is not None
            assert "waiting" in program.stdout.readline()
            caption = caption_of(captions, (home / "snapshot.jpg").read_bytes())
        finally:
            program.terminate()
    assert isinstance(caption["caption"], str)
    assert caption["submodel"] in ("nested", "half", "full")
    with listening(house, "captions/cameras/door/snapshot") as late:
        assert set(late.until(lambda _: True)) == set(caption), "it is retained"


def caption_of(captions: Listener, picture: bytes) -> dict[str, Any]:
    """Publish as a camera does, again and again: the program may not have subscribed yet."""
    for _ in range(int(PATIENCE)):
        captions.publish("cameras/door/snapshot", picture)
        with suppress(Empty):
            caption: dict[str, Any] = json.loads(captions.received.get(timeout=1).payload)
            return caption
    pytest.fail("no caption came")


def test_each_video_gets_a_text_beside_it_once(house: Mosquitto, home: Path) -> None:
    film(home / "recordings" / "door.mp4")
    (home / "recordings" / "broken.mp4").write_bytes(b"no video at all")
    told = run(house, home, "describe_videos.py", "recordings")
    assert "broken.mp4: unsupported_media" in told
    assert (home / "recordings" / "door.mp4.txt").is_file()
    assert not (home / "recordings" / "broken.mp4.txt").exists()
    assert "door.mp4" not in run(house, home, "describe_videos.py", "recordings")


def test_a_recording_of_31_seconds_becomes_two_lines_with_times(
    house: Mosquitto, home: Path
) -> None:
    lines = run(house, home, "transcribe.py", "--language", "English", "meeting.wav")
    assert re.findall(r"^\[(\d\d:\d\d)\]", lines, re.MULTILINE) == ["00:00", "00:30"]


def test_a_spoken_note_becomes_one_object(house: Mosquitto, home: Path) -> None:
    note = json.loads(run(house, home, "translate.py", "--from", "Spanish", "note.wav"))
    assert note["language"] == "Spanish"
    assert set(note) == {"language", "transcript", "translation"}


def test_what_is_read_from_a_scan_keeps_to_the_form(house: Mosquitto, home: Path) -> None:
    form = RECIPES / "receipt.json"
    run(house, home, "read_documents.py", "--form", str(form), "scans")
    result = json.loads((home / "scans" / "receipt.jpg.json").read_text(encoding="utf-8"))
    jsonschema.validate(result, json.loads(form.read_text(encoding="utf-8")))


def test_the_assistant_switches_a_light_and_then_answers(house: Mosquitto, home: Path) -> None:
    with listening(house, "home/+/light/set") as lights:
        said = run(
            house, home, "assistant.py", "--tool-choice", "set_light", said="it is dark here\n"
        )
        light = lights.received.get(timeout=PATIENCE)
    assert light.topic.split("/")[1] in ("attic", "hall", "kitchen")
    assert light.payload in (b"ON", b"OFF")
    call, *_answer = said.splitlines()
    assert light.payload.decode() in call


def test_pictures_are_captioned_once_and_found_by_number(house: Mosquitto, home: Path) -> None:
    captioned = run(house, home, "find_pictures.py", "index", "photos")
    assert {"beach.jpg.txt", "dog.png.txt"} <= {file.name for file in (home / "photos").iterdir()}
    assert captioned.count(": ") >= 2
    assert run(house, home, "find_pictures.py", "index", "photos") == ""
    found = run(house, home, "find_pictures.py", "search", "photos", "a dog")
    for line in found.splitlines():
        name, _, caption = line.partition("\t")
        assert caption == (home / f"{name}.txt").read_text(encoding="utf-8").strip()


def test_a_program_says_in_a_line_what_is_wrong(house: Mosquitto, home: Path) -> None:
    command = [sys.executable, str(RECIPES / "transcribe.py"), "--port", str(house.port)]
    command += ["--node", "attic", "note.wav"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == (
        "transcribe.py: the node 'attic' is not online on this broker: online are kitchen\n"
    )
