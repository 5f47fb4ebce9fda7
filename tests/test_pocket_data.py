"""pocket's data: deterministic, disjoint, valid JSON, media too; its tokenizer loses no byte."""

import importlib
import json
import random
import re
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nestd.daemon.prompt.audio import RATE, frame_count

POCKET = Path(__file__).parents[1] / "examples" / "pocket"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(POCKET))
        return importlib.import_module("data")


def imported(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(POCKET))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def tokenizer(data: ModuleType) -> ModuleType:
    del data  # imported first, so that `import data` inside resolves to the same module
    return imported("tokenizer")


@pytest.fixture(scope="module")
def media(tokenizer: ModuleType) -> ModuleType:
    del tokenizer
    return imported("media")


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    pytest.importorskip("sklearn", reason="pocket's handwriting is scikit-learn's")
    module = imported("pictures")
    for fonts in (module.SEGMENT_FONTS, module.TEXT_FONTS):
        for name in (*fonts["train"], *fonts["heldout"]):
            try:
                module.ImageFont.truetype(f"{name}.ttf", 12)
            except OSError:
                pytest.skip(f"pocket's displays need the font {name}: see pictures.py")
    return module


@pytest.fixture(scope="module")
def sounds() -> ModuleType:
    module = imported("sounds")
    if not module.is_available():
        pytest.skip("pocket's clips need espeak-ng")
    return module


def skeletons(command: str) -> set[str]:
    content = json.loads(command)
    parts = content["of"] if content["action"] == "all" else [content]
    return {re.sub(r"\d+", "#", json.dumps(part, sort_keys=True)) for part in parts}


def test_the_same_seed_gives_the_same_examples(data: ModuleType) -> None:
    first, again, other = (list(islice(data.examples("train", seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_command_is_valid_compact_json_with_an_action(data: ModuleType) -> None:
    for split in ("train", "heldout"):
        for example in islice(data.examples(split, 0), 3000):
            content = json.loads(example.command)
            assert content["action"]
            assert json.dumps(content, ensure_ascii=False, separators=(",", ":")) == example.command


def test_no_held_out_combination_is_ever_trained(data: ModuleType) -> None:
    trained = [e.command for e in islice(data.examples("train", 0), 20_000)]
    held_out = [e.command for e in islice(data.examples("heldout", 0), 2_000)]
    seen = set().union(*(skeletons(command) for command in trained))
    for command in held_out:
        if json.loads(command)["action"] != "unknown":
            assert not skeletons(command) <= seen


def test_no_held_out_request_is_ever_trained(data: ModuleType) -> None:
    trained = {e.request.lower() for e in islice(data.examples("train", 0), 20_000)}
    held_out = {e.request.lower() for e in islice(data.examples("heldout", 0), 2_000)}
    assert not trained & held_out


@pytest.mark.parametrize("text", ["the lamp", "Zoë, José — 21,5 °C", "日本語 🎉\n\t\x00", " 007 "])
def test_the_tokenizer_round_trips_any_utf8(tokenizer: ModuleType, text: str) -> None:
    trained = tokenizer.load_tokenizer()
    ids = trained.encode(text, add_special_tokens=False).ids
    assert tokenizer.UNK not in ids
    assert trained.decode(ids) == text


def test_digits_are_tokens_of_their_own(tokenizer: ModuleType) -> None:
    ids = tokenizer.load_tokenizer().encode("1234", add_special_tokens=False).ids
    assert len(ids) == 4


def test_a_prompt_has_the_form_of_the_chat_template(tokenizer: ModuleType) -> None:
    import jinja2

    template = jinja2.Template((tokenizer.CHECKPOINT / "chat_template.jinja").read_text())
    text = template.render(
        messages=[{"role": "user", "content": "hi"}], bos_token="<bos>", add_generation_prompt=True
    )
    trained = tokenizer.load_tokenizer()
    ids = trained.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode_prompt(trained, "hi")


def test_parts_of_a_message_become_soft_tokens_where_they_stand(tokenizer: ModuleType) -> None:
    import jinja2

    template = jinja2.Template((tokenizer.CHECKPOINT / "chat_template.jinja").read_text())
    content = [{"type": "text", "text": "set a timer for "}, {"type": "image"}, {"type": "audio"}]
    text = template.render(messages=[{"role": "user", "content": content}], bos_token="<bos>")
    assert "set a timer for<image_soft_token><audio_soft_token><end_of_turn>" in text


def test_a_pictured_number_is_in_the_command_and_not_in_the_words(media: ModuleType) -> None:
    for request in islice(media.pictured("heldout", 0), 300):
        assert not re.search(r"\d", request.before + request.after)
        assert re.findall(r"(?<=:)\d+", request.command) == [str(request.number)]


def test_a_picture_is_a_function_of_its_seed(pictures: ModuleType) -> None:
    first, again, other = (pictures.draw(random.Random(n), 47, "heldout")[0] for n in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_held_out_pictures_have_handwriting_and_fonts_that_are_never_trained(
    pictures: ModuleType,
) -> None:
    for fonts in (pictures.SEGMENT_FONTS, pictures.TEXT_FONTS):
        assert not set(fonts["train"]) & set(fonts["heldout"])
    digits = pictures._handwriting()
    trained = {image.tobytes() for (split, _), some in digits.items() for image in some
               if split == "train"}  # fmt: skip
    held_out = [image.tobytes() for (split, _), some in digits.items() for image in some
                if split == "heldout"]  # fmt: skip
    assert len(held_out) > 300
    assert not trained & set(held_out)


def test_held_out_voices_are_never_trained(sounds: ModuleType) -> None:
    assert not set(sounds.VARIANTS["train"]) & set(sounds.VARIANTS["heldout"])
    assert all(sounds.pick_voice(random.Random(n), "heldout").name.split("+")[1]
               in sounds.VARIANTS["heldout"] for n in range(50))  # fmt: skip


def test_every_spoken_request_fits_the_soft_tokens_of_a_clip(
    sounds: ModuleType, media: ModuleType, tokenizer: ModuleType
) -> None:
    rng = random.Random(0)
    for request in islice(media.spoken("heldout", 0), 10):
        clip = sounds.record(rng, sounds.utter(rng, request.words, "heldout"))
        assert len(clip) > RATE // 2
        assert (frame_count(len(clip)) - 1) // 16 + 1 <= tokenizer.AUDIO_TOKENS
        assert np.abs(clip).max() <= 1
