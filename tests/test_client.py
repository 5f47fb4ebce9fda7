"""nestd.client on real Mosquitto; what `nestd ask` does with it is in test_mosquitto.py."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from support.clients import PATIENCE, daemon
from support.mosquitto import Mosquitto

from nestd.bundle.errors import BrokerError
from nestd.client import Broker, connect, connect_async

pytestmark = pytest.mark.broker


def request(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": True}


def broker(mosquitto: Mosquitto) -> Broker:
    return Broker(host="127.0.0.1", port=mosquitto.port)


def test_a_program_asks_and_controls(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), connect(broker(mosquitto), node="node") as client:
        events = list(client.ask(request("one two"), PATIENCE))
        assert [event["event"] for event in events] == ["accepted", "delta", "delta", "done"]
        assert client.control("submodel", {"submodel": "small"})["ok"]


def test_a_program_looks_at_the_state_of_the_moment_again_and_again(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto), connect(broker(mosquitto), node="node") as client:
        assert client.state()["submodel_wanted"] == "auto"
        client.control("submodel", {"submodel": "small"})
        deadline = time.monotonic() + PATIENCE
        while client.state()["submodel_wanted"] == "auto" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.state()["submodel_wanted"] == "small"


def test_the_only_node_needs_no_name_and_a_missing_one_is_said(mosquitto: Mosquitto) -> None:
    with daemon(mosquitto):
        with connect(broker(mosquitto)) as client:
            assert list(client.ask(request("hi"), PATIENCE))[-1]["text"] == "hi"
        with (
            pytest.raises(BrokerError, match="'attic' is not online"),
            connect(broker(mosquitto), node="attic"),
        ):
            pass


def test_asyncio_goes_on_while_an_answer_streams(mosquitto: Mosquitto) -> None:
    async def scenario() -> tuple[list[str], bool]:
        async with connect_async(broker(mosquitto), node="node") as client:
            kinds = [event["event"] async for event in client.ask(request("one two"), PATIENCE)]
            return kinds, bool((await client.control("health", {}))["ok"])

    with daemon(mosquitto):
        kinds, healthy = asyncio.run(scenario())
    assert kinds == ["accepted", "delta", "delta", "done"]
    assert healthy


def test_a_cancelled_task_cancels_its_request_at_the_node(mosquitto: Mosquitto) -> None:
    async def scenario() -> str:
        async with connect_async(broker(mosquitto), node="node") as client:
            started = asyncio.Event()

            async def wait_for_ever() -> None:
                async for _ in client.ask(request("wait"), PATIENCE):
                    started.set()

            task = asyncio.create_task(wait_for_ever())
            await started.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # The node answers one at a time, so this one is answered only if that one has ended.
            events = [event async for event in client.ask(request("next"), PATIENCE)]
            return str(events[-1]["text"])

    with daemon(mosquitto):
        assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE)) == "next"


def test_the_documented_programs_run(
    mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "client.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with daemon(mosquitto, "kitchen"):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            here = f'Broker(host="127.0.0.1", port={mosquitto.port})'
            exec(block.replace('Broker(host="broker.lan")', here), names)
    assert capsys.readouterr().out.count("done turn the light on") == 2
