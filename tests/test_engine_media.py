"""Pictures and sound through the engine: what a request with them costs, gets and leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import psutil
import pytest
from support.media import clip, encoded, photo, tone

from nestd.bundle.manifest import Bundle, Modality
from nestd.daemon.engine.messages import (
    Cancel,
    ChatMessage,
    Content,
    EngineOptions,
    Event,
    Failed,
    Finished,
    KeepEncoders,
    MediaContent,
    Ready,
    Sampling,
    Start,
    Stats,
    TextContent,
)
from nestd.daemon.engine.process import EngineProcess
from nestd.daemon.prompt.media import MediaLimits

PATIENCE = 60.0
GREEDY = Sampling(max_tokens=4)


class Engine:
    """A running engine process."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.process = EngineProcess(bundle.path, options, self.events.put)
        self.process.start()
        self.until(lambda event: isinstance(event, Ready))
        assert self.process.pid is not None
        self.info = psutil.Process(self.process.pid)

    def until(self, wanted: Callable[[Event], bool]) -> Event:
        while not wanted(event := self.events.get(timeout=PATIENCE)):
            pass
        return event

    def start(self, request_id: str, *parts: Content) -> None:
        messages = (ChatMessage(role="user", content=parts),)
        self.process.send(Start(id=request_id, messages=messages, submodel="full", sampling=GREEDY))

    def ask(self, *parts: Content) -> Finished | Failed:
        self.start("a", *parts)
        event = self.until(lambda event: isinstance(event, Finished | Failed))
        assert isinstance(event, Finished | Failed)
        return event

    def wait_for_encoders(self, *modalities: Modality) -> None:
        self.until(lambda event: isinstance(event, Stats) and event.encoders == modalities)

    def maps(self, name: str) -> bool:
        return any(name in Path(item.path).name for item in self.info.memory_maps())


@pytest.fixture(params=["mapped", "resident"])
def engine(
    request: pytest.FixtureRequest, media_bundle: Bundle, tmp_path: Path
) -> Iterator[Engine]:
    prepared = tmp_path / "prepared" if request.param == "mapped" else None
    engine = Engine(media_bundle, EngineOptions(threads=1, prepared_directory=prepared))
    yield engine
    engine.process.stop(10)


@pytest.fixture
def mapped(media_bundle: Bundle, tmp_path: Path) -> Iterator[Engine]:
    prepared = tmp_path / "prepared"
    engine = Engine(media_bundle, EngineOptions(threads=1, prepared_directory=prepared))
    yield engine
    engine.process.stop(10)


def medium(path: Path, kind: str, data: bytes, **changes: object) -> MediaContent:
    digest = hashlib.sha256(data).hexdigest()
    file = path / digest
    file.write_bytes(data)
    return MediaContent.model_validate({"type": kind, "path": file, "sha256": digest, **changes})


@pytest.fixture
def picture(tmp_path: Path) -> MediaContent:
    return medium(tmp_path, "image", encoded(photo(300, 200), "PNG"), size=256)


@pytest.fixture
def sound(tmp_path: Path) -> MediaContent:
    return medium(tmp_path, "audio", clip(tone(2.0), "WAV"))


WHAT = TextContent(text="what is it")


def test_a_request_with_two_pictures_and_a_clip_is_answered(
    engine: Engine, picture: MediaContent, sound: MediaContent, tmp_path: Path
) -> None:
    other = medium(tmp_path, "image", encoded(photo(64, 64, seed=1), "PNG"), size=256)
    done = engine.ask(picture, WHAT, other, sound)
    assert isinstance(done, Finished)
    assert done.prompt_tokens > 2 * 16 + 188
    assert done.timings.encode_ms > 0
    assert len(done.text) > 0


def test_answers_depend_on_what_is_seen(
    mapped: Engine, picture: MediaContent, tmp_path: Path
) -> None:
    black = medium(tmp_path, "image", encoded(photo(8, 8).point(lambda _: 0), "PNG"), size=256)
    sampling = Sampling(max_tokens=12, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    texts = []
    for part in (picture, black, picture):
        messages = (ChatMessage(role="user", content=(part, WHAT)),)
        start = Start(id="a", messages=messages, submodel="full", sampling=sampling)
        mapped.process.send(start)
        event = mapped.until(lambda event: isinstance(event, Finished))
        assert isinstance(event, Finished)
        texts.append(event.text)
    assert texts[0] != texts[1]
    assert texts[0] == texts[2]


def test_a_text_request_maps_no_encoder_and_starts_no_decoder(mapped: Engine) -> None:
    assert isinstance(mapped.ask(WHAT), Finished)
    assert not mapped.maps("_encoder")
    assert not mapped.info.children()


def test_encoders_load_when_they_are_needed_and_unload_when_told(
    mapped: Engine, picture: MediaContent, sound: MediaContent
) -> None:
    mapped.start("a", picture, WHAT)
    mapped.wait_for_encoders("vision")
    assert mapped.maps("vision_encoder")
    assert not mapped.maps("audio_encoder")
    mapped.start("b", sound, WHAT)
    mapped.wait_for_encoders("vision", "audio")
    mapped.process.send(KeepEncoders(keep=("audio",)))
    mapped.wait_for_encoders("audio")
    assert not mapped.maps("vision_encoder")
    mapped.process.send(KeepEncoders(keep=()))
    mapped.wait_for_encoders()
    assert not mapped.maps("_encoder")


def test_an_encoder_can_be_loaded_ahead(engine: Engine) -> None:
    engine.process.send(KeepEncoders(keep=("vision",), load=("vision",)))
    engine.wait_for_encoders("vision")


def test_a_picture_that_came_before_is_not_read_again(
    engine: Engine, picture: MediaContent
) -> None:
    first = engine.ask(picture, WHAT)
    picture.path.unlink()
    again = engine.ask(picture, WHAT)
    assert isinstance(first, Finished)
    assert isinstance(again, Finished)
    assert again.text == first.text


def test_what_unloading_forgets_is_read_again(engine: Engine, picture: MediaContent) -> None:
    engine.ask(picture, WHAT)
    engine.process.send(KeepEncoders(keep=()))
    engine.wait_for_encoders()
    assert isinstance(engine.ask(picture, WHAT), Finished)


@pytest.mark.parametrize(
    ("kind", "data", "code"),
    [
        ("image", b"no picture at all", "unsupported_media"),
        ("image", clip(tone(0.1), "WAV"), "unsupported_media"),
        ("audio", clip(tone(31.0), "WAV"), "too_large"),
    ],
    ids=["garbage", "a sound as a picture", "too long"],
)
def test_a_medium_that_is_refused_fails_its_request_and_nothing_else(
    media_bundle: Bundle, tmp_path: Path, kind: str, data: bytes, code: str
) -> None:
    limits = MediaLimits(audio_seconds=30.5)
    engine = Engine(media_bundle, EngineOptions(threads=1, media=limits))
    failed = engine.ask(medium(tmp_path, kind, data, **({"size": 256} if kind == "image" else {})))
    assert isinstance(failed, Failed)
    assert failed.code == code
    assert isinstance(engine.ask(WHAT), Finished)
    engine.process.stop(10)


def test_a_text_bundle_refuses_media(tiny_bundle: Bundle, picture: MediaContent) -> None:
    engine = Engine(tiny_bundle, EngineOptions(threads=1))
    failed = engine.ask(picture, WHAT)
    assert isinstance(failed, Failed)
    assert failed.code == "modality_unavailable"
    engine.process.stop(10)


def test_media_that_fill_the_context_are_refused_before_they_are_encoded(
    media_bundle: Bundle, sound: MediaContent
) -> None:
    engine = Engine(media_bundle, EngineOptions(threads=1, context_length=128))
    failed = engine.ask(sound, WHAT)
    assert isinstance(failed, Failed)
    assert failed.code == "too_large"
    assert not engine.maps("audio_encoder")
    engine.process.stop(10)


def test_a_request_is_cancelled_while_its_media_are_read(
    mapped: Engine, picture: MediaContent, sound: MediaContent
) -> None:
    mapped.start("a", picture, sound, WHAT)
    mapped.process.send(Cancel(id="a"))
    event = mapped.until(lambda event: isinstance(event, Finished | Failed))
    assert isinstance(event, Finished)
    assert event.finish_reason == "cancelled"
    assert isinstance(mapped.ask(picture, WHAT), Finished)


def test_memory_returns_when_the_encoders_go(
    mapped: Engine, picture: MediaContent, sound: MediaContent
) -> None:
    mapped.ask(picture, sound, WHAT)
    mapped.process.send(KeepEncoders(keep=()))
    mapped.wait_for_encoders()
    before = mapped.info.memory_info().rss
    for _ in range(3):
        assert isinstance(mapped.ask(picture, sound, WHAT), Finished)
        mapped.process.send(KeepEncoders(keep=()))
        mapped.wait_for_encoders()
    assert mapped.info.memory_info().rss < 1.05 * before


def test_a_clip_is_filled_up_with_the_padding_row(media_bundle: Bundle) -> None:
    from nestd.daemon.engine.encoders import Encoders, hard_embeddings
    from nestd.daemon.prompt.audio import mel

    window = mel(tone(1.0)[:, 0])
    rows = Encoders(media_bundle, EngineOptions(threads=1)).audio(window)
    tokens = (len(window.input_features) - 1) // 16 + 1
    assert rows.shape[0] == 188
    padding = hard_embeddings(media_bundle, "audio")[-1]
    np.testing.assert_array_equal(rows[tokens:], np.tile(padding, (188 - tokens, 1)))
    assert not np.isclose(rows[0], padding).all()
