"""Chat messages -> the prompt's token ids, by the checkpoint's own chat template.

The template comes with the checkpoint, so it runs in Jinja's sandbox, without access to anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nestd.bundle.errors import BadRequest, BundleError
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.messages import ChatMessage

TEMPLATE = "chat_template.jinja"


class Prompt:
    """Encodes the messages of one bundle's model."""

    def __init__(self, bundle: Bundle) -> None:
        """Read tokenizer and template; BundleError if either is damaged."""
        self._tokens = bundle.manifest.tokens
        path = bundle.file("tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} is damaged: {error}") from error
        self._template = None
        if TEMPLATE in bundle.manifest.files:
            # The options are those of transformers, for which templates are written.
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = _raise_exception
            try:
                source = bundle.file(TEMPLATE).read_text(encoding="utf-8")
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise BundleError(f"{bundle.path / TEMPLATE} is damaged: {error}") from error

    def text(self, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt's text, special tokens written out.

        Raises:
            BadRequest: the template refuses the messages (roles out of turn, for example).
        """
        bos = self._token(self._tokens.bos)
        if self._template is None:
            return bos + "".join(message.content for message in messages)
        turns = [{"role": item.role, "content": item.content} for item in messages]
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

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the token ids of the prompt, never empty.

        Raises:
            BadRequest: as `text`.
        """
        ids: list[int] = self.tokenizer.encode(self.text(messages), add_special_tokens=False).ids
        if not ids:
            raise BadRequest("the prompt is empty: give at least one message with text")
        return ids

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token) or ""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
