"""docs/mqtt.md names every key and its examples run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel
from support.clients import PATIENCE, daemon
from support.mosquitto import Mosquitto

from nestd.bundle.errors import RequestError
from nestd.daemon.mqtt import contract, node_contract

TEXT = (Path(__file__).parents[1] / "docs" / "mqtt.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "model",
    [
        contract.Request,
        contract.Accepted,
        contract.Delta,
        contract.Done,
        contract.Error,
        contract.CancelRequest,
        contract.SubmodelRequest,
        contract.ModalityRequest,
        contract.MediaPart,
        contract.BlobInit,
        contract.BlobFin,
        contract.ControlReply,
        node_contract.Availability,
        node_contract.State,
        contract.Switch,
        node_contract.Health,
        contract.Usage,
        contract.Timings,
    ],
    ids=lambda model: model.__name__,
)
def test_every_key_is_documented(model: type[contract.Request]) -> None:
    missing = [name for name in model.model_fields if not re.search(rf"[`\"]{name}[`\"]", TEXT)]
    assert missing == []


def test_every_error_is_documented() -> None:
    for error in RequestError.__subclasses__():
        assert f"`{error.code}`" in TEXT
        assert str(error.status) in TEXT


def test_json_examples_are_valid() -> None:
    kinds: dict[str, type[BaseModel]] = {
        "accepted": contract.Accepted,
        "delta": contract.Delta,
        "done": contract.Done,
        "error": contract.Error,
    }
    found = set()
    for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL):
        for item in re.split(r"\n(?=\{)", block.strip()):
            document = json.loads(item)
            if "messages" in document:
                contract.Request.model_validate(document)
            elif "ok" in document:
                contract.ControlReply.model_validate(document)
            else:
                kinds[document["event"]].model_validate(document)
                found.add(document["event"])
    assert found == set(kinds)


@pytest.mark.broker
def test_shell_examples_get_their_answers(mosquitto: Mosquitto) -> None:
    tool = re.compile(r"^(mosquitto_\w+)", re.MULTILINE)
    with daemon(mosquitto, "kitchen", "bundle=media", "mqtt.pools=[house]"):
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL):
            script = tool.sub(rf"\1 -p {mosquitto.port}", block)
            script = script.replace("mosquitto_rr", f"mosquitto_rr -W {PATIENCE:.0f}")
            result = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
            assert result.returncode == 0, (block, result.stderr)
            assert result.stdout, block
            for line in result.stdout.splitlines():
                document = json.loads(line)
                assert document.get("ok", True), document
                assert document.get("event", "done") == "done", document
