"""docs/asyncapi.yaml is current, valid, and tells what the node does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from support.node import REPLY, Node

from nestd.cli.main import main
from nestd.daemon.mqtt.asyncapi import channels, document
from nestd.daemon.mqtt.schemas import PUBLIC
from nestd.daemon.mqtt.topics import Verb

FILE = Path(__file__).parents[1] / "docs" / "asyncapi.yaml"
SPECS, VERSION = "@asyncapi/specs", "6.11.1"


def test_the_committed_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert FILE.read_text(encoding="utf-8") == capsys.readouterr().out, (
        "write it anew: nestd schema > docs/asyncapi.yaml"
    )


@pytest.fixture(scope="module")
def published_schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """AsyncAPI's own JSON schema of version 3.0 documents, brought by npm at test time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestd-tests"
    kept = cache / f"asyncapi-3.0.0-{VERSION}.json"
    if not kept.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"npm, which brings the AsyncAPI schema ({SPECS}), is not installed")
        work = tmp_path_factory.mktemp("specs")
        pack = [npm, "pack", f"{SPECS}@{VERSION}", "--silent", "--pack-destination", str(work)]
        done = subprocess.run(pack, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"npm could not fetch {SPECS}: {done.stderr.strip()}", pytrace=False)
        (archive,) = work.glob("*.tgz")
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/schemas/3.0.0-without-$id.json")
            assert member is not None
            kept.write_bytes(member.read())
    schema: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return schema


def test_it_is_a_valid_asyncapi_document(published_schema: dict[str, Any]) -> None:
    written = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(published_schema).validate(written)


def test_every_reference_leads_somewhere() -> None:
    root = document()

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for value in node for ref in references(value)] if type(node) is list else []

    found = references(root)
    assert found
    for reference in found:
        node = root
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_message_and_every_verb_is_in_it() -> None:
    table = channels()
    told = {model for channel in table.values() for model in channel.models}
    assert told == set(PUBLIC)
    addresses = {channel.address for channel in table.values()}
    for verb in get_args(Verb):
        assert f"{{prefix}}/v1/{{node}}/request/{verb}" in addresses


def test_quality_of_service_and_retained_are_what_the_node_does() -> None:
    node = Node().start()
    node.ask()
    node.engine.finish()
    node.settle()
    table = channels()
    for name in ("availability", "state", "info", "health"):
        address = table[name].address.replace("{prefix}", "nestd").replace("{node}", "node")
        message = next(m for m in node.transport.published if m.topic == address)
        assert (message.qos, message.retain) == (table[name].qos, table[name].retain), name
    done = next(m for m in node.transport.published if m.topic == REPLY and b'"done"' in m.payload)
    assert (done.qos, done.retain) == (table["events"].qos, table["events"].retain)
    granted = {item.topic_filter: item.qos for item in node.transport.subscriptions}
    for name in ("generate", "cancel", "submodel", "modality", "health_request"):
        address = table[name].address.replace("{prefix}", "nestd").replace("{node}", "node")
        assert granted[address] == table[name].qos, name
