"""The remote rung against a server of somebody else: `transformers serve` with a tiny model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.chat_servers import transformers_serve
from support.node import Node, until

if TYPE_CHECKING:
    Server = tuple[str, subprocess.Popen[bytes]]

for library in ("httpx2", "accelerate", "fastapi", "openai", "torch", "transformers", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} is not installed (extras remote and serving)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.chat_model import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with transformers_serve(tmp_path_factory.mktemp("serve") / "log") as running:
        yield running


def node_for(server: Server, model: Path) -> Node:
    return Node(
        remote__enabled=True,
        remote__base_url=server[0],
        remote__allow_http=True,
        remote__model=str(model),
        remote__pause_s=0,
    ).start()


def answer(node: Node, **fields: Any) -> dict[str, Any]:
    node.ask(**fields)
    until(node, lambda: node.kinds()[-1] in ("done", "error"))
    return node.last()


def words(node: Node, attempt: int = 1) -> str:
    """Return what the deltas of an attempt said, in one piece."""
    deltas = [event for event in node.events() if event["event"] == "delta"]
    return "".join(event["text"] for event in deltas if event["attempt"] == attempt)


def test_answers_stream_are_repeatable_and_go_on(server: Server, model: Path) -> None:
    node = node_for(server, model)
    asked = {"effort": "high", "remote": "allowed", "max_tokens": 12, "temperature": 0.0}
    first = answer(node, id="a", conversation="hall", **asked)
    assert first["event"] == "done", first
    assert first["remote_model"] == str(model)
    assert len(first["text"].split()) == 12
    assert node.kinds().count("delta") > 2
    assert words(node) == first["text"]
    assert first["usage"] is None, "transformers 4.57 tells no figures"
    assert answer(node, id="b", **asked)["text"] == first["text"]
    turn = [{"role": "user", "content": "and the door"}]
    second = answer(node, id="c", conversation="hall", messages=turn, **asked)
    assert second["conversation"]["turn"] == 2
    assert len(second["text"].split()) == 12
    node.daemon.node.remote.close()


def test_a_model_that_the_server_does_not_have_is_a_failure(server: Server) -> None:
    node = node_for(server, Path("/nowhere/such-a-model"))
    error = answer(node, id="a", remote="required")
    assert error["code"] == "remote_unavailable"
    assert "the remote server has failed (500)" in error["message"]
    node.daemon.node.remote.close()


def test_the_server_is_killed_in_the_middle_of_an_answer(model: Path, tmp_path: Path) -> None:
    with transformers_serve(tmp_path / "log") as (url, process):
        node = node_for((url, process), model)
        long = {"remote": "allowed", "effort": "high", "max_tokens": 1000, "temperature": 0.0}
        mid = node.ask(id="a", **long)
        until(node, lambda: node.kinds().count("delta") > 3)
        process.kill()
        until(node, lambda: node.engine.starts)
        node.engine.delta("From here")
        node.engine.finish("From here.")
        until(node, lambda: node.kinds()[-1] == "done")
        done = node.last()
        assert (done["attempt"], done["submodel"], done["text"]) == (2, "full", "From here.")
        assert len(words(node).split()) > 3
        assert words(node, attempt=2) == "From here"
        assert "the remote server broke the connection off" in done["switches"][0]["reason"]
        node.settle()
        assert node.transport.acknowledged == [mid]

        node.ask(id="b", remote="required")
        until(node, lambda: node.kinds()[-1] == "error")
        assert node.last()["code"] == "remote_unavailable"
        assert "cannot be reached" in node.last()["message"]
        node.daemon.node.remote.close()
