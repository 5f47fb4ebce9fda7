"""nestd on emulated ARM CPUs, one of each class; scripts/test-arm64 makes what they run on.

QEMU executes every instruction that a board would, so numerics and the choice of kernels are true;
its speed says nothing. The broker and the client run on the host.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.clients import running_node
from support.mosquitto import Mosquitto
from support.step_logits import step_logits

from nestd.bundle.manifest import Bundle
from nestd.client.connection import Client
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine import prepare
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.transport import PahoTransport

ROOT = Path(__file__).parents[1]
ARM64 = ROOT / ".arm64"
POCKET = ROOT / "examples" / "pocket"
STEP_LOGITS = str(Path(__file__).parent / "support" / "step_logits.py")
NESTD = "import sys; from nestd.cli.main import main; sys.exit(main())"
PATIENCE = 120.0
# Long enough that a switch comes in its middle.
SIXTY_FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 60, "maxItems": 60}

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(not ARM64.is_dir(), reason="scripts/test-arm64 has not been run"),
]


@dataclass(frozen=True, slots=True)
class Cpu:
    """A QEMU model, and how far logits at 8 and 4 bits may be from x86's (relative L2 distance)."""

    name: str
    cpu_class: str
    linear: str
    distance: dict[int, float]

    def python(self, *arguments: str) -> list[str]:
        return [str(ARM64 / f"python-{self.name}"), *arguments]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(self.python(*arguments), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


CPUS = [
    # Pi 4. Other arithmetic than x86: one scale a channel at 8 bits, float32 activations at 4.
    Cpu("cortex-a72", "armv8.0", "MatMulInteger", {8: 0.03, 4: 0.05}),
    # Pi 5. Activations are rounded in another way: to unsigned bytes at 8 bits, by row at 4.
    Cpu("cortex-a76", "arm-dotprod", "MatMulNBits", {8: 0.03, 4: 0.05}),
    # The same arithmetic as x86 at 8 bits, to the last digits; KleidiAI as above at 4.
    Cpu("neoverse-n2", "arm-i8mm", "MatMulNBits", {8: 1e-5, 4: 0.05}),
]


SPARSE = "8 bits, sparse rows"
FORMS = {"8 bits": 8, "4 bits": 4, "32 bits": 32, SPARSE: 8}


@pytest.fixture(scope="module", params=CPUS, ids=lambda cpu: cpu.name)
def cpu(request: pytest.FixtureRequest) -> Cpu:
    found: Cpu = request.param
    return found


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """pocket's text in several forms, converted on x86."""
    root = tmp_path_factory.mktemp("pocket")
    return {
        form: convert(
            str(POCKET / "checkpoint"),
            root / f"pocket{number}",
            ConvertOptions(
                bits=bits,  # type: ignore[arg-type]
                modalities=("text",),
                sparse_rows=form == SPARSE,
            ),
            io.StringIO(),
        )
        for number, (form, bits) in enumerate(FORMS.items())
    }


def test_the_class_is_detected(cpu: Cpu) -> None:
    code = "from nestd.daemon.engine.cpu_class import detect; print(detect().name)"
    assert cpu.run("-c", code).split() == [cpu.cpu_class]


def test_a_conversion_on_arm_gives_the_same_weights(
    pocket: dict[str, Bundle], tmp_path: Path
) -> None:
    source, made_path = str(POCKET / "checkpoint"), str(tmp_path / "made")
    CPUS[0].run("-c", NESTD, "convert", source, made_path, "--modalities", "text")
    made, wanted = Bundle.open(Path(made_path)), pocket["8 bits"]
    different = {
        name for name, file in made.manifest.files.items() if file != wanted.manifest.files[name]
    }
    # NumPy's float32 power differs in the last digit, and with it the angles of RoPE.
    assert different <= {"decoder.data"}
    decoders = [without_rope(bundle.file("decoder.onnx")) for bundle in (made, wanted)]
    assert decoders[0] == decoders[1]


def without_rope(path: Path) -> onnx.ModelProto:
    """A graph with its weights, without the tables of RoPE."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("rope."):
            tensor.Clear()
    return model


@pytest.fixture(scope="module")
def x86_logits(
    pocket: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    root = tmp_path_factory.mktemp("x86")
    return {form: step_logits(bundle.path, root) for form, bundle in pocket.items()}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_x86_within_the_rounding_of_the_class(
    cpu: Cpu,
    pocket: dict[str, Bundle],
    x86_logits: dict[str, np.ndarray],
    tmp_path: Path,
    form: str,
) -> None:
    cpu.run(STEP_LOGITS, str(pocket[form].path), str(tmp_path), str(tmp_path / "logits.npy"))
    error = np.linalg.norm(np.load(tmp_path / "logits.npy") - x86_logits[form], axis=1)
    # Sums of float32 in another order differ in the last digits, and behind sparse rows, which end
    # in such sums, an activation may then round to the next of its 8 bits.
    allowed = max(cpu.distance.get(FORMS[form], 1e-5), 0.01 if form == SPARSE else 0.0)
    assert (error / np.linalg.norm(x86_logits[form], axis=1)).max() < allowed
    if form == "8 bits":
        assert_mapped(next(tmp_path.glob("*/decoder.onnx")), cpu.linear)


def assert_mapped(path: Path, linear: str) -> None:
    """All matrices of a prepared decoder are `linear`s that lie rearranged in its file."""
    model = onnx.load(path, load_external_data=False)
    # The value of an entry begins with the operator that the rearranged copy is for.
    packed = Counter(
        entry.value.partition("+")[0]
        for tensor in prepare._initializers(model.graph)
        for entry in tensor.external_data
        if entry.key.startswith("prepacked_")
    )
    assert packed[linear] > 100
    assert packed.keys() & {"MatMulNBits", "MatMulInteger"} == {linear}


@contextmanager
def node(cpu: Cpu, mosquitto: Mosquitto, bundle: Bundle, directory: Path) -> Iterator[Client]:
    """A client of a node on `cpu`; its engine and media decoder are emulated as well."""
    config = (
        f"profile: generic\nnode: arm\nbundle: {bundle.path}\n"
        f"mqtt: {{port: {mosquitto.port}}}\nstate_directory: {directory / 'state'}\n"
        "engine: {context_length: 480, prefill_chunk: 32, threads: 1}\n"
    )
    options = TransportOptions("127.0.0.1", mosquitto.port, client_id="test", clean_start=True)
    with running_node(directory, config, cpu.python("-c", NESTD)):
        client = Client(PahoTransport(options), "test", "nestd")
        client.connect("arm", "arm", PATIENCE)
        yield client
        client.close()


def ask(client: Client, content: Any, **fields: Any) -> Iterator[dict[str, Any]]:
    """Send a request of one user turn, greedy; return its events."""
    request = {"id": uuid.uuid4().hex, "messages": [{"role": "user", "content": content}]}
    return client.ask({"temperature": 0, "stream": True} | request | fields, PATIENCE)


def done(events: Iterator[dict[str, Any]]) -> dict[str, Any]:
    *_, last = events
    assert last["event"] == "done", last
    return last


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def medium(kind: str, name: str) -> dict[str, Any]:
    data = (POCKET / "samples" / name).read_bytes()
    return {"type": kind, "data": base64.b64encode(data).decode()}


def test_a_node_answers_switches_keeps_to_a_schema_sees_and_hears(
    cpu: Cpu, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with node(cpu, mosquitto, Bundle.open(POCKET / "bundle"), tmp_path) as client:
        for submodel in ("P0.7M", "P2.7M"):
            answer = done(ask(client, "turn the lamp in the kitchen on", submodel=submodel))
            command = {"action": "on", "device": "lamp", "room": "kitchen"}
            assert json.loads(answer["text"]) == command
            assert answer["submodel"] == submodel

        schema = {"type": "json_schema", "json_schema": SIXTY_FLAGS}
        events = ask(client, "any", submodel="P2.7M", response_format=schema, max_tokens=300)
        running = next(event for event in events if event["event"] == "delta")["id"]
        client.control("submodel", {"submodel": "P0.7M", "id": running})
        answer = done(events)
        assert [item["submodel"] for item in answer["switches"]] == ["P2.7M", "P0.7M"]
        flags = json.loads(answer["text"])
        assert len(flags) == 60
        assert {type(flag) for flag in flags} == {bool}

        picture = medium("image", "handwritten-7.png")
        answer = done(ask(client, [text("set a timer for"), picture, text("minutes")]))
        assert json.loads(answer["text"]) == {"action": "timer", "minutes": 7}
        answer = done(ask(client, [medium("audio", "heater-on.wav")]))
        assert json.loads(answer["text"]) == {"action": "on", "device": "heater"}
