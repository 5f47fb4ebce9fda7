"""pocket's data: deterministic, disjoint, valid JSON; its tokenizer loses no byte."""

import importlib
import json
import re
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

POCKET = Path(__file__).parents[1] / "examples" / "pocket"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(POCKET))
        return importlib.import_module("data")


@pytest.fixture(scope="module")
def tokenizer(data: ModuleType) -> ModuleType:
    del data  # imported first, so that `import data` inside resolves to the same module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(POCKET))
        return importlib.import_module("tokenizer")


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
