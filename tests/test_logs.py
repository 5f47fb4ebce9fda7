"""The log: its forms, its priorities, and what never is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.clients import daemon, listening
from support.mosquitto import Mosquitto

REPLIES = "clients/log/replies"
LINES = """
import logging
from nestd.daemon.logs import about, configure
configure("info", FORM)
log = logging.getLogger("nestd.test")
log.debug("not shown")
log.info("request %s is done", "a-1", extra=about("a-1"))
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
"""


def logged(form: str, journal: bool = False, elsewhere: bool = False) -> list[str]:
    """Return the lines of a process whose standard error is a pipe, or the journal's socket."""
    reader, writer = os.pipe()
    found = os.fstat(writer)
    environment = dict(os.environ)
    environment.pop("JOURNAL_STREAM", None)
    if journal:
        environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino + elsewhere}"
    code = LINES.replace("FORM", repr(form))
    with os.fdopen(writer, "w") as stream:
        command = [sys.executable, "-c", code]
        subprocess.run(command, stderr=stream, env=environment, check=True)
    with os.fdopen(reader) as lines:
        return lines.read().splitlines()


def test_text_is_for_people() -> None:
    lines = logged("text")
    assert lines[0] == "INFO nestd.test: request a-1 is done"
    assert lines[1] == "ERROR nestd.test: it failed"


def test_json_is_one_object_a_line_and_names_the_request() -> None:
    first, second = (json.loads(line) for line in logged("json"))
    assert first["message"] == "request a-1 is done"
    assert first["request"] == "a-1"
    assert first["level"] == "info"
    assert first["time"].endswith("+00:00")
    assert "request" not in second
    assert "ZeroDivisionError" in second["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_for_the_journal_carry_their_priority(form: str) -> None:
    lines = logged(form, journal=True)
    assert lines[0].startswith("<6>")
    assert all(line.startswith("<3>") for line in lines[1:]), "of an exception, each line"
    if form == "json":
        assert json.loads(lines[0].removeprefix("<6>"))["level"] == "info"


def test_an_inherited_journal_stream_that_is_not_ours_changes_nothing() -> None:
    assert logged("text", journal=True, elsewhere=True) == logged("text")


@pytest.mark.broker
@pytest.mark.parametrize("form", ["text", "json"])
def test_prompts_and_answers_are_never_logged(mosquitto: Mosquitto, form: str) -> None:
    """Not even at level debug, not by a request that is refused or cancelled or not JSON."""
    secret = "Sesame-4711"
    topic = "nestd/v1/node/request/generate"

    def request(request_id: str, text: str = secret, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {"id": request_id, "messages": messages, "reply_to": REPLIES} | fields

    with daemon(mosquitto, "node", f"log_format={form}"), listening(mosquitto, REPLIES) as client:
        client.publish(topic, request("answered", stream=True))
        assert client.until_event("done")["text"] == secret
        client.publish(topic, request("refused", nonsense=secret))
        client.publish(topic, request("bad", temperature=secret))
        client.publish(topic, {"id": "worse", "messages": secret, "reply_to": REPLIES})
        client.publish(topic, f'{{"messages": "{secret}", '.encode())
        client.publish(topic, request("died", text="die once", stop=[secret]))
        assert client.until(lambda event: event.get("id") == "died")["event"] == "done"
    log = mosquitto.config.with_name("node.log").read_text(encoding="utf-8")
    for request_id in ("answered", "refused", "bad", "worse", "died"):
        assert f"request {request_id} " in log
    assert secret not in log
    if form == "json":
        named = {json.loads(line).get("request") for line in log.splitlines()}
        assert {"answered", "refused", "bad", "worse", "died"} <= named
