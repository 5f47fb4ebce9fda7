"""Messages become the token ids that the checkpoint's template and tokenizer make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nestd.bundle.errors import BadRequest, BundleError
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.messages import ChatMessage
from nestd.daemon.prompt.template import Prompt


def message(content: str, role: str = "user") -> ChatMessage:
    return ChatMessage(role=role, content=content)  # type: ignore[arg-type]


def test_the_checkpoints_template_is_applied(tiny_bundle: Bundle) -> None:
    prompt = Prompt(tiny_bundle)
    text = prompt.text([message("hi"), message("yes", "assistant"), message("ok")])
    assert text == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nok<end_of_turn>\n<start_of_turn>model\n"
    )


def test_special_tokens_of_the_template_become_single_ids(tiny_bundle: Bundle) -> None:
    ids = Prompt(tiny_bundle).encode([message("a")])
    assert ids[:2] == [2, 3]
    assert ids.count(4) == 1


def test_a_message_that_the_template_refuses_is_a_bad_request(tiny_bundle: Bundle) -> None:
    with pytest.raises(BadRequest, match="no tools.*take turns"):
        Prompt(tiny_bundle).encode([message("x", "tool")])


def _without_template(bundle: Bundle, path: Path) -> Bundle:
    shutil.copytree(bundle.path, path)
    document = json.loads((path / "manifest.json").read_text())
    del document["files"]["chat_template.jinja"]
    (path / "manifest.json").write_text(json.dumps(document))
    return Bundle.open(path)


def test_without_a_template_the_text_is_completed_as_it_stands(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    prompt = Prompt(_without_template(tiny_bundle, tmp_path / "b"))
    assert prompt.text([message("Once upon")]) == "<bos>Once upon"


def test_a_template_cannot_reach_out_of_its_sandbox(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(tiny_bundle.path, path)
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (path / "chat_template.jinja").write_text(template)
    document = json.loads((path / "manifest.json").read_text())
    document["files"]["chat_template.jinja"]["bytes"] = len(template)
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadRequest, match="unsafe"):
        Prompt(Bundle.open(path)).encode([message("hi")])


def test_a_damaged_tokenizer_is_a_bundle_error(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(tiny_bundle.path, path)
    size = (path / "tokenizer.json").stat().st_size
    (path / "tokenizer.json").write_text("{".ljust(size))
    with pytest.raises(BundleError, match="tokenizer.json is damaged"):
        Prompt(Bundle.open(path))
