"""A request in the words of the OpenAI chat API, and the streamed answer back in nestd's.

Pure but for the files of media. What differs from server to server is not papered over: `top_k` and
`repetition_penalty` are no fields of this API and are not sent (`remote.extra_fields` may hold a
server's own), and sampling that a request leaves out is the server's.

Source: the API reference of OpenAI, "Create chat completion" and its streaming chunks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from nestd.bundle.errors import UnsupportedMedia
from nestd.daemon.engine.messages import ChatMessage, MediaContent, Switch, Timings
from nestd.daemon.mqtt.contract import Request, Tool
from nestd.daemon.prompt.media import MediaFormat, sniff
from nestd.daemon.remote.messages import REMOTE, Question, RemoteFinished
from nestd.daemon.remote.settings import RemoteSettings
from nestd.daemon.tools import call_of, chosen_tools, plain, tool_result

# Far above any answer, far below what would hurt: the server is not trusted to end.
MOST_CHARACTERS = 1_000_000
_IMAGES = {
    MediaFormat.JPEG: "image/jpeg",
    MediaFormat.PNG: "image/png",
    MediaFormat.WEBP: "image/webp",
}
_SOUNDS = {MediaFormat.WAV: "wav", MediaFormat.MP3: "mp3"}


class RemoteFailure(Exception):
    """The server does not answer; the sentence quotes nothing of what it said.

    Its words may hold the prompt, or the key.
    """

    def __init__(self, message: str, is_down: bool = True) -> None:
        super().__init__(f"the remote server {message}")
        self.is_down = is_down


# To the server


def body_of(question: Question, settings: RemoteSettings) -> dict[str, Any]:
    """Return the body of `POST /chat/completions`.

    Raises:
        RemoteFailure: a medium of a kind or format that the API does not take.
    """
    request, tools = question.request, question.request.tools
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": _turns(question.prompt, tools),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": question.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop) or None,
        "response_format": _response_format(request),
    }
    if tools:
        body["tools"] = [{"type": "function", "function": tool.model_dump()} for tool in tools]
        named = request.tool_choice not in ("auto", "none", "required")
        choice = {"type": "function", "function": {"name": request.tool_choice}}
        body["tool_choice"] = choice if named else request.tool_choice
    body |= settings.extra_fields or {}
    return {name: value for name, value in body.items() if value is not None}


def _response_format(request: Request) -> dict[str, Any] | None:
    form = request.response_format
    if form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": "answer", "schema": form.json_schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _turns(prompt: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the turns; a call that an earlier answer made, and its result, as the API has them."""
    turns: list[dict[str, Any]] = []
    call_id: str | None = None
    for message in prompt:
        call = call_of(plain(message), tools) if message.role == "assistant" else None
        if call is not None:
            call_id = f"call_{len(turns)}"
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            calls = [{"id": call_id, "type": "function", "function": function}]
            turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif message.role == "tool" and call_id is not None:
            turns.append({"role": "tool", "tool_call_id": call_id, "content": plain(message)})
        elif message.role == "tool":
            turns.append({"role": "user", "content": plain(tool_result(message))})
        else:
            call_id = None
            turns.append({"role": message.role, "content": _content(message)})
    return turns


def _content(message: ChatMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    return [
        _medium(part) if isinstance(part, MediaContent) else {"type": "text", "text": part.text}
        for part in message.content
    ]


def _medium(part: MediaContent) -> dict[str, Any]:
    data = part.path.read_bytes()
    try:
        found = sniff(data)
    except UnsupportedMedia as error:
        raise RemoteFailure(f"is not sent the {part.type}: {error}", is_down=False) from error
    text = base64.b64encode(data).decode()
    if part.type == "image" and found in _IMAGES:
        return {"type": "image_url", "image_url": {"url": f"data:{_IMAGES[found]};base64,{text}"}}
    if part.type == "audio" and found in _SOUNDS:
        return {"type": "input_audio", "input_audio": {"data": text, "format": _SOUNDS[found]}}
    raise RemoteFailure(f"takes no {part.type} in the format {found}", is_down=False)


# From the server


class _Function(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(BaseModel):
    index: int = 0
    function: _Function = _Function()


class _Delta(BaseModel):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(BaseModel):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    prompt_tokens_details: _Details | None = None


class _Chunk(BaseModel):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Answer:
    """An answer as it comes in."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tools = chosen_tools(request)
        self._text: list[str] = []
        self._characters = 0
        self._calls: dict[int, tuple[list[str], list[str]]] = {}
        self._finish_reason: str | None = None
        self._usage: _Usage | None = None
        self.pieces = 0

    def take(self, data: str) -> str:
        """Take the data of one event in; return the text that it adds.

        Raises:
            RemoteFailure: it is none of this API, or tells an error.
        """
        try:
            chunk = _Chunk.model_validate_json(data)
        except ValidationError as error:
            raise RemoteFailure("sent an event that is none of the chat API") from error
        if chunk.error is not None:
            raise RemoteFailure("told an error in the middle of its answer")
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        for call in choice.delta.tool_calls or ():
            names, arguments = self._calls.setdefault(call.index, ([], []))
            names.append(call.function.name or "")
            arguments.append(call.function.arguments or "")
            self._count(names[-1] + arguments[-1])
        text = choice.delta.content or ""
        self._count(text)
        if text:
            self._text.append(text)
            self.pieces += 1
        return text

    def finished(self, question_id: str, model: str, timings: Timings) -> RemoteFinished:
        """Return the whole answer.

        Raises:
            RemoteFailure: it is not whole, or not of the form that the request asks for.
        """
        if self._finish_reason is None:
            raise RemoteFailure("ended in the middle of its answer")
        if self._finish_reason not in ("stop", "length", "tool_calls", "function_call"):
            raise RemoteFailure("broke the answer off for a reason of its own", is_down=False)
        text, is_short = "".join(self._text), self._finish_reason == "length"
        if self._calls:
            text = self._call()
        elif self._request.tool_choice not in ("auto", "none") and not is_short:
            raise RemoteFailure("answered without the call that was required", is_down=False)
        if self._request.response_format.type != "text" and not is_short:
            _check_json(text)
        usage = self._usage
        details = usage.prompt_tokens_details if usage else None
        return RemoteFinished(
            id=question_id,
            model=model,
            text=text,
            finish_reason="length" if is_short else "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            counted=usage is not None,
            switches=(Switch(token=0, submodel=REMOTE),),
            timings=timings,
        )

    def _call(self) -> str:
        """Return the first call in the form that the engine's answers have."""
        names, arguments = self._calls[min(self._calls)]
        try:
            document = {
                "name": "".join(names),
                "parameters": json.loads("".join(arguments) or "{}"),
            }
        except (ValueError, RecursionError) as error:
            raise RemoteFailure("called a tool with what is no JSON", is_down=False) from error
        text = json.dumps(document, ensure_ascii=False)
        if call_of(text, self._tools) is None:
            raise RemoteFailure("called no tool of the request", is_down=False)
        return text

    def _count(self, text: str) -> None:
        self._characters += len(text)
        if self._characters > MOST_CHARACTERS:
            raise RemoteFailure(f"answered more than {MOST_CHARACTERS} characters", is_down=False)


def _check_json(text: str) -> None:
    """Raise RemoteFailure unless `text` is JSON; whether it keeps to a schema is the server's."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteFailure("answered no JSON, as was asked for", is_down=False) from error
