"""pocket's bundle reads the committed pictures and hears the committed clips, at every size.

The bundle beside its checkpoint was made by `nestd convert`; it is there for machines without
torch, so all this runs on a board too.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import MediaReader
from nestd.daemon.engine.messages import (
    ChatMessage,
    Content,
    EngineOptions,
    MediaContent,
    Sampling,
    TextContent,
)
from nestd.daemon.prompt.template import Prompt

CONTEXT = 512
POCKET = Path(__file__).parents[1] / "examples" / "pocket"
SAMPLES = {
    "counter-21.png": (
        "set the thermostat in the office to",
        "degrees",
        '{"action":"set","device":"thermostat","room":"office","value":21}',
    ),
    "handwritten-7.png": ("set a timer for", "minutes", '{"action":"timer","minutes":7}'),
    "heater-on.wav": ("", "", '{"action":"on","device":"heater"}'),
    "close-the-curtains.wav": ("", "", '{"action":"close","device":"curtains"}'),
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(POCKET / "bundle")


@pytest.fixture(scope="module")
def graphs(bundle: Bundle) -> Graphs:
    return Graphs(bundle, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Iterator[MediaReader]:
    reader = MediaReader(bundle, Prompt(bundle), EngineOptions(threads=1))
    yield reader
    reader.close()


def medium(name: str) -> MediaContent:
    path = POCKET / "samples" / name
    kind = "audio" if path.suffix == ".wav" else "image"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return MediaContent.model_validate({"type": kind, "path": path, "sha256": digest})


def answer(bundle: Bundle, graphs: Graphs, reader: MediaReader, size: str, *parts: Content) -> str:
    messages = [ChatMessage(role="user", content=parts)]
    generation = Generation(
        graphs,
        Prompt(bundle).tokenizer,
        reader.read(messages, lambda _: None, lambda: False),
        Sampling(max_tokens=64, temperature=0),
        bundle.manifest.submodel(size),
        graphs.new_cache(CONTEXT),
        CONTEXT,
    )
    while generation.finish_reason is None:
        generation.step()
    return generation.text


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("size", ["P0.7M", "P1.5M", "P2.7M"])
def test_a_picture_or_a_clip_becomes_the_command_that_it_asks_for(
    bundle: Bundle, graphs: Graphs, reader: MediaReader, name: str, size: str
) -> None:
    before, after, command = SAMPLES[name]
    said = [before, medium(name), after]
    parts = [TextContent(text=part) if isinstance(part, str) else part for part in said if part]
    assert answer(bundle, graphs, reader, size, *parts) == command


def test_another_picture_gives_another_number(
    bundle: Bundle, graphs: Graphs, reader: MediaReader
) -> None:
    before, after, _ = SAMPLES["handwritten-7.png"]
    parts = (TextContent(text=before), medium("counter-21.png"), TextContent(text=after))
    assert answer(bundle, graphs, reader, "P2.7M", *parts) == '{"action":"timer","minutes":21}'


def test_the_bundle_is_the_one_that_its_checkpoint_converts_to(
    bundle: Bundle, tmp_path: Path
) -> None:
    made = convert(
        str(POCKET / "checkpoint"),
        tmp_path / "bundle",
        ConvertOptions(modalities=("text",)),
        io.StringIO(),
    )
    for name, file in made.manifest.files.items():
        assert bundle.manifest.files[name] == file, f"{name}: convert pocket again"
    assert bundle.manifest.modalities == ("text", "vision", "audio")
