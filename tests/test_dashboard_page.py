"""The page of `nestd dashboard` in Chromium: real broker over WebSockets, real nodes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from support.clients import Listener, daemon, listening, running_node
from support.media import encoded, photo
from support.web import Web

from nestd.bundle.manifest import Bundle

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright: pip install -e '.[browser]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PATIENCE_MS = 60_000
HOSTILE = "<img src=x onerror=document.body.dataset.hit=1>"
# The answer of a tiny model to its limit: something can be done to it while it is made.
LONG = "400"
# Counts how often the newest answer grows while it is not complete.
COUNT_GROWTH = """
() => {
  window.growth = 0;
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      if (target.closest?.(".text[aria-busy=true]")) window.growth += 1;
    }
  }).observe(document.getElementById("answers"), { subtree: true, childList: true });
}
"""
# Chooses a size for everything as soon as the next answer shows a word.
SWITCH_AT_FIRST_WORD = """
(submodel) => {
  const answers = document.getElementById("answers");
  const observer = new MutationObserver(() => {
    if (!answers.firstElementChild?.querySelector(".piece")) return;
    observer.disconnect();
    const select = document.querySelector(".node select");
    select.value = submodel;
    select.dispatchEvent(new Event("change"));
  });
  observer.observe(answers, { subtree: true, childList: true });
}
"""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    if shutil.which("mosquitto") is None:
        pytest.skip("Mosquitto is not installed")
    with Web(tmp_path).running() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # As root, which tests may be, Chromium has no sandbox; microphone and camera are made up.
        options = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*options, "--use-fake-ui-for-media-stream"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of its own; in the end nothing has failed in it and it has asked nobody else."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    playwright.expect.set_options(timeout=PATIENCE_MS)
    tab, failures, asked = context.new_page(), [], []
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.on("dialog", lambda dialog: failures.append(dialog.message))
    tab.on("console", lambda said: failures.append(said.text) if "Policy" in said.text else None)
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    context.close()
    assert failures == []
    assert [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|blob:)", url)] == []


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def config(web: Web, bundle: Bundle, directory: Path, node: str, more: str = "") -> str:
    return (
        f"profile: generic\nnode: {node}\nbundle: {bundle.path}\n"
        f"mqtt: {{port: {web.broker.port}{more}}}\nstate_directory: {directory / 'state'}\n"
        "engine: {context_length: 480, prefill_chunk: 32, threads: 1}\n"
    )


@pytest.fixture
def tiny(web: Web, page: Any, tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Any]:
    """The page, with a ready text node on it."""
    with running_node(tmp_path, config(web, tiny_bundle, tmp_path, "tiny")):
        yield opened(web, page, "tiny")


def opened(web: Web, page: Any, node: str) -> Any:
    page.goto(web.page)
    expect(page.locator(".node h2")).to_have_text(node)
    expect(page.locator(".node .pill")).to_have_text("ready")
    return page


def ask(page: Any, words: str) -> Any:
    """Ask by keyboard and return the answer's element."""
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")
    return page.locator(".answer").first


def option(page: Any, name: str, value: str) -> None:
    page.evaluate("document.querySelector('.options').open = true")
    page.fill(name, value)


def answered(answer: Any) -> Any:
    """Wait for the end of an answer that is none of an error, and return its element."""
    expect(answer.locator(".text")).to_have_attribute("aria-busy", "false")
    expect(answer.locator(".sentence.error")).to_be_hidden()
    return answer


def test_a_node_appears_with_what_it_runs_and_why(tiny: Any) -> None:
    card = tiny.locator(".node")
    names = card.locator(".step span").all_text_contents()
    assert (names[0], names[-1]) == ("nested", "full")
    expect(card.locator(".step.running span")).to_have_text("full")
    expect(card.locator("[data-ref=submodelReason]")).to_contain_text("top of the ladder")
    expect(card.locator("[data-ref=largest]")).to_contain_text("At most full: ")
    expect(card.locator("[data-ref=memoryTotal]")).to_contain_text("GB in all")
    expect(card.locator(".chart").first.locator(".line")).to_have_attribute("d", re.compile("^M"))
    card.locator("summary").click()
    expect(card.locator(".reasons")).to_contain_text("480")


def test_an_answer_is_shown_while_it_streams(tiny: Any) -> None:
    option(tiny, "#max-tokens", "60")
    tiny.evaluate(COUNT_GROWTH)
    answer = answered(ask(tiny, "turn the light on"))
    expect(answer.locator(".question")).to_have_text("turn the light on")
    expect(answer.locator(".piece")).to_have_attribute("data-submodel", "full")
    expect(answer).to_contain_text(re.compile(r"\d+\stokens · "))
    assert tiny.evaluate("window.growth") > 1


def test_a_switch_in_the_middle_of_an_answer_shows_in_text_and_ladder(tiny: Any) -> None:
    option(tiny, "#max-tokens", LONG)
    for _ in range(10):  # on a busy machine the answer may be over before the switch
        tiny.evaluate(SWITCH_AT_FIRST_WORD, "nested")
        answer = answered(ask(tiny, "turn the light on"))
        expect(tiny.locator(".step.running span")).to_have_text("nested")
        if answer.locator(".piece").count() > 1:
            break
        tiny.select_option(".node select", "auto")
        expect(tiny.locator(".step.running span")).to_have_text("full")
    pieces = answer.locator(".piece").evaluate_all("all => all.map(one => one.dataset.submodel)")
    assert pieces == ["full", "nested"]
    expect(answer.locator(".route li")).to_have_count(2)
    expect(tiny.locator(".node select")).to_have_value("nested")
    expect(tiny.locator(".said")).to_have_text("Nested is preferred.")


def test_a_structured_answer_is_json_of_the_schema(tiny: Any) -> None:
    option(tiny, "#schema", '{"type": ')
    tiny.fill("#prompt", "is it on?")
    tiny.press("#prompt", "Enter")
    expect(tiny.locator("#schema-error")).to_contain_text("The schema is no JSON")
    assert tiny.locator(".answer").count() == 0
    schema = {"properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    option(tiny, "#schema", json.dumps({"type": "object", "additionalProperties": False} | schema))
    answer = answered(ask(tiny, "is it on?"))
    assert json.loads(answer.locator(".text").inner_text()) in ({"on": True}, {"on": False})


def test_pictures_go_in_the_request_or_in_pieces_before_it(
    web: Web, page: Any, media_bundle: Bundle, tmp_path: Path
) -> None:
    small, large = encoded(photo(60, 40), "JPEG"), encoded(photo(300, 200), "PNG")
    limit = ", max_payload_bytes: 40000"
    assert len(small) * 4 / 3 < 30_000
    assert len(large) > 80_000
    files = [
        {"name": "small.jpeg", "mimeType": "image/jpeg", "buffer": small},
        {"name": "large.png", "mimeType": "image/png", "buffer": large},
    ]
    with (
        running_node(tmp_path, config(web, media_bundle, tmp_path, "eyes", limit)),
        listening(web.broker, "nestd/v1/eyes/request/generate", "nestd/v1/eyes/blob/#") as sent,
    ):
        opened(web, page, "eyes")
        option(page, "#max-tokens", "8")
        page.set_input_files("#file", files)
        expect(page.locator("#attachments img")).to_have_count(2)
        answer = answered(ask(page, "what is it?"))
        expect(answer.locator("img")).to_have_count(2)
        expect(page.locator(".encoders [data-how=loaded]")).to_contain_text("vision")
        page.click("text=Unload idle ones")
        expect(page.locator(".encoders [data-how=idle]")).to_have_count(2)
    *pieces, request = everything(sent)
    pieces = [piece.topic for piece in pieces]
    assert pieces[0].endswith("/init")
    assert pieces[-1].endswith("/fin")
    assert len(pieces) > 5
    first, second, words = content(request)
    assert base64.b64decode(first["data"]) == small
    assert second["blob"] == pieces[0].split("/")[-2]
    assert words == {"type": "text", "text": "what is it?"}


def test_the_camera_takes_a_picture(web: Web, page: Any) -> None:
    with daemon(web.broker, "echo", "bundle=media"):
        opened(web, page, "echo")
        page.click("#camera")
        expect(page.locator("#preview")).to_have_js_property("videoWidth", 640)
        page.click("#shutter")
        expect(page.locator("#attachments img")).to_have_count(1)
        answer = answered(ask(page, "and this?"))
    # The echo tells a medium's type, bytes and pixels.
    expect(answer.locator(".text")).to_have_text(re.compile(r"^image:\d{4,}:768 and this\?$"))


def test_the_microphone_becomes_a_wav_of_16_khz(
    web: Web, page: Any, media_bundle: Bundle, tmp_path: Path
) -> None:
    with (
        running_node(tmp_path, config(web, media_bundle, tmp_path, "ears")),
        listening(web.broker, "nestd/v1/ears/request/generate") as sent,
    ):
        opened(web, page, "ears")
        option(page, "#max-tokens", "8")
        page.click("#microphone")
        expect(page.locator("#recording")).to_have_text("recording, 1 s")
        page.click("#microphone")
        expect(page.locator("#attachments audio")).to_have_count(1)
        answered(ask(page, ""))
    (request,) = everything(sent)
    (part,) = content(request)
    recorded = soundfile.info(io.BytesIO(base64.b64decode(part["data"])))
    assert (part["type"], recorded.samplerate, recorded.channels) == ("audio", 16_000, 1)
    assert recorded.duration > 0.5


def everything(listener: Listener) -> list[Any]:
    received = []
    while not listener.received.empty():
        received.append(listener.received.get())
    return received


def content(request: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = json.loads(request.payload)["messages"][0]["content"]
    return parts


def test_a_running_answer_is_cancelled(web: Web, page: Any) -> None:
    with daemon(web.broker, "echo"):
        opened(web, page, "echo")
        answer = ask(page, "wait")
        expect(answer.locator("[data-ref=progress]")).to_have_text("Reading…")
        answer.locator("button").click()
        expect(answer.locator(".sentence.error")).to_contain_text("cancelled")
        expect(answer.locator("button")).to_be_hidden()


def test_an_error_is_a_sentence(web: Web, page: Any) -> None:
    with daemon(web.broker, "echo", "limits.max_prompt_chars=40"):
        opened(web, page, "echo")
        answer = ask(page, "x" * 50)
        expect(answer.locator(".sentence.error")).to_contain_text("40")


def test_what_strangers_write_is_shown_as_text(web: Web, page: Any) -> None:
    hostile = f"nestd/v1/{HOSTILE}"
    state = {
        "phase": HOSTILE,
        "phase_reason": HOSTILE,
        "submodel": HOSTILE,
        "submodel_reason": HOSTILE,
        "largest_reason": [HOSTILE],
        "memory_reason": HOSTILE,
        "modalities": {"length": -1},
        "queue": "full",
    }
    info = {
        "bundle": HOSTILE,
        "submodels": [{"name": HOSTILE, "effective_params": "1e9; x"}, None, 7, {"name": {}}],
        "modalities": ["text", HOSTILE],
        "config": None,
    }
    health = {"memory_total_bytes": HOSTILE, "watts": 1e308, "watts_scope": HOSTILE, "counters": 1}
    with listening(web.broker, "clients/me/none") as stranger, daemon(web.broker, "echo"):
        for kind, document in (("state", state), ("info", info), ("health", health)):
            stranger.publish(f"{hostile}/{kind}", document, retain=True)
        stranger.publish(f"{hostile}/availability", {"state": "online"}, retain=True)
        stranger.publish("nestd/v1/bytes/availability", b"\xff\x00{", retain=True)
        page.goto(web.page)
        card = page.locator(".node").filter(has=page.get_by_role("heading", name=HOSTILE))
        expect(card.locator("h2")).to_have_text(HOSTILE)
        expect(card.locator("[data-ref=submodel]")).to_have_text(HOSTILE)
        expect(card.locator(".encoders b")).to_have_text(HOSTILE)
        card.locator("summary").click()
        page.select_option("#ask-node", "echo")
        answer = answered(ask(page, HOSTILE))
        expect(answer.locator(".text")).to_have_text(HOSTILE)
        expect(answer.locator(".question")).to_have_text(HOSTILE)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("main img").count() == 0
    assert page.evaluate("document.body.dataset.hit") is None


def test_a_broker_that_is_away_is_told_and_what_was_asked_is_asked_again(
    web: Web, page: Any
) -> None:
    requests = "nestd/v1/echo/request/generate"
    with daemon(web.broker, "echo"), listening(web.broker, requests) as sent:
        opened(web, page, "echo")
        ask(page, "wait")
        asked = sent.until(lambda _: True)
        web.broker.stop()
        expect(page.locator("#trouble")).to_contain_text(f"{web.url} does not answer")
        expect(page.locator("#send")).to_be_disabled()
        web.broker.start()
        expect(page.locator("#trouble")).to_be_hidden()
        assert sent.until(lambda _: True) == asked
        page.locator(".answer button").click()
        expect(page.locator(".answer .sentence.error")).to_contain_text("cancelled")
        answer = answered(ask(page, "turn the light on"))
        expect(answer.locator(".text")).to_have_text("turn the light on")


def test_a_node_that_dies_and_one_that_is_cleared_away_are_told(web: Web, page: Any) -> None:
    with listening(web.broker, "clients/me/none") as owner, daemon(web.broker, "echo") as process:
        opened(web, page, "echo")
        process.kill()
        expect(page.locator(".node .pill")).to_have_text("offline")
        owner.publish("nestd/v1/echo/availability", b"", retain=True)
        expect(page.locator("#empty")).to_contain_text("No node has been seen")


def test_a_broker_with_passwords_lets_in_who_signs_in(page: Any, tmp_path: Path) -> None:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("Mosquitto is not installed")
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", passwords, "me", "secret"], check=True)
    with Web(tmp_path, f"password_file {passwords}", anonymous=False).running() as web:
        page.goto(web.page)
        for password in ("wrong", "secret"):
            page.fill("#username", "me")
            page.fill("#password", password)
            page.press("#password", "Enter")
            if password == "wrong":
                expect(page.locator("#login-error")).to_contain_text("check name and password")
        expect(page.locator("#connection")).to_have_text("connected")
        page.reload()
        expect(page.locator("#connection")).to_have_text("connected")
        assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")
        assert page.evaluate("localStorage.length") == 0
        page.click("text=Sign out")
        expect(page.locator("#login")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_nothing_is_wider_than_a_phone(web: Web, page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    with daemon(web.broker, "echo", "bundle=media"):
        opened(web, page, "echo")
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        answered(ask(page, "lengthy" * 50))
        assert page.evaluate("document.documentElement.scrollWidth") == 390
