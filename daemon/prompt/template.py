"""Chat messages -> the prompt's token ids, by the checkpoint's own chat template.

The template comes with the checkpoint, so it runs in Jinja's sandbox, without access to anything.
Texts come from anyone: what looks like a control token in them (`<end_of_turn>`) is encoded as the
characters that it is written with, and only the template's own control tokens become ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nestd.bundle.errors import BadRequest, BundleError
from nestd.bundle.manifest import Bundle, SoftTokens
from nestd.daemon.engine.messages import ChatMessage, Content, TextContent

TEMPLATE = "chat_template.jinja"
# Around the number of a control token that a text spells out, while the template runs. Unicode
# keeps these two code points for such uses within a program; in a text from outside they mean
# nothing and are replaced.
OPEN, CLOSE, REPLACEMENT = "\ufdd0", "\ufdd1", "\ufffd"


class Prompt:
    """Encodes the messages of one bundle's model."""

    def __init__(self, bundle: Bundle) -> None:
        """Read tokenizer and template; BundleError if either is damaged."""
        manifest = bundle.manifest
        self._tokens = manifest.tokens
        self._soft = {"image": manifest.vision, "audio": manifest.audio}
        path = bundle.file("tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} is damaged: {error}") from error
        # Control tokens are found here, so that those of a text can be told from the template's.
        self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder().items()
        self._control = {token.content: number for number, token in added if token.special}
        names = sorted(self._control, key=len, reverse=True)
        for soft in filter(None, self._soft.values()):
            if missing := {soft.begin, soft.soft_token, soft.end} - set(self._control.values()):
                raise BundleError(f"{path} has no control tokens {sorted(missing)}: convert again")
        self._any_control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._template = None
        if TEMPLATE in manifest.files:
            # The options are those of transformers, for which templates are written.
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = _raise_exception
            try:
                source = bundle.file(TEMPLATE).read_text(encoding="utf-8")
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise BundleError(f"{bundle.path / TEMPLATE} is damaged: {error}") from error

    def encode(self, messages: Sequence[ChatMessage], pieces: Sequence[int] = ()) -> list[int]:
        """Return the token ids of the prompt, never empty.

        Args:
            messages: the conversation.
            pieces: for each medium, in order, how many pictures or windows of sound it consists of;
                each of them becomes `SoftTokens.count` soft tokens.

        Raises:
            BadRequest: the template refuses the messages (roles out of turn, for example), or
                nothing is left to answer.
        """
        rendered = self._expand(self._render(messages, iter(pieces)), messages, sum(pieces))
        ids: list[int] = []
        end = 0
        for match in self._any_control.finditer(rendered):
            ids += self._encode_text(rendered[end : match.start()])
            ids.append(self._control[match[0]])
            end = match.end()
        ids += self._encode_text(rendered[end:])
        if not ids:
            raise BadRequest("the prompt is empty: give at least one message with text")
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(self._reveal(text), add_special_tokens=False).ids
        return ids

    def _render(self, messages: Sequence[ChatMessage], pieces: Iterator[int]) -> str:
        """Return the template's text; the control tokens of texts are hidden in it."""
        bos = self._token(self._tokens.bos)
        turns = [
            {"role": item.role, "content": self._content(item.content, pieces)} for item in messages
        ]
        if self._template is None:
            return bos + "".join(_plain(turn["content"]) for turn in turns)
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=self._token(self._tokens.eos[0]),
            )
        except TemplateError as error:
            raise BadRequest(
                f"the model's chat template refuses these messages ({error}): let user and "
                "assistant take turns, beginning with user; a system message may come first"
            ) from error

    def _content(
        self, content: str | Sequence[Content], pieces: Iterator[int]
    ) -> str | list[dict[str, str]]:
        """Return `content` as templates take it; one without media is a plain string."""
        if isinstance(content, str):
            return self._hide(content)
        texts = [part.text for part in content if isinstance(part, TextContent)]
        if len(texts) == len(content):
            return self._hide("".join(texts))
        parts: list[dict[str, str]] = []
        for part in content:
            if isinstance(part, TextContent):
                parts.append({"type": "text", "text": self._hide(part.text)})
            else:
                kind = "audio" if part.type == "audio" else "image"
                parts += [{"type": kind}] * next(pieces)
        return parts

    def _expand(self, rendered: str, messages: Sequence[ChatMessage], pieces: int) -> str:
        """Write out the soft tokens of each medium, as transformers' Gemma3nProcessor does."""
        found = 0
        for soft in self._soft.values():
            if soft is None:
                continue
            one = self._token(soft.soft_token)
            found += rendered.count(one)
            rendered = rendered.replace(one, self._medium(soft))
        if found != pieces:
            roles = ", ".join(sorted({item.role for item in messages}))
            raise BadRequest(
                f"the model's chat template takes {found} of {pieces} pictures and sounds in turns "
                f"of {roles}: put them into a user message"
            )
        return rendered

    def _medium(self, soft: SoftTokens) -> str:
        body = self._token(soft.soft_token) * soft.count
        return f"\n\n{self._token(soft.begin)}{body}{self._token(soft.end)}\n\n"

    def _hide(self, text: str) -> str:
        clean = text.replace(OPEN, REPLACEMENT).replace(CLOSE, REPLACEMENT)
        return self._any_control.sub(lambda m: f"{OPEN}{self._control[m[0]]}{CLOSE}", clean)

    def _reveal(self, text: str) -> str:
        return re.sub(f"{OPEN}(\\d+){CLOSE}", lambda m: self._token(int(m[1])), text)

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token) or ""


def _plain(content: Any) -> str:  # noqa: ANN401  (as templates take it)
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
