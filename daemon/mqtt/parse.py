"""Bytes of a message -> a request or a control request (docs/mqtt.md, Request).

Two steps, so that even a broken request is answered where its sender listens: `read_envelope` finds
where the answer goes and under which id; `read_request` and `read_control` then judge the content.
Bytes and nesting are bounded before any JSON is decoded (delivery rule 10).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nestd.bundle.errors import BadRequest, RequestError, TooLarge, UnsupportedMedia
from nestd.daemon.mqtt.contract import MAX_ID, PARTS, MediaPart, Request, RequestMessage
from nestd.daemon.mqtt.packets import Received
from nestd.daemon.mqtt.topics import Answering, Topics, client_of
from nestd.daemon.prompt.media import CONTENT_TYPES, FORMATS, MediaKind

JSON_TYPE = "application/json"
# User properties are strings; these hold JSON.
IN_STRINGS = ("messages", "response_format", "tools")

# Strings first, so that brackets inside them do not count. The closing quote is optional: an
# unterminated string takes the rest, and no input makes this scan more than once.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[{]|[\]}]', re.DOTALL)

_ModelT = TypeVar("_ModelT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """Bounds of one message."""

    max_bytes: int
    max_depth: int
    max_prompt_chars: int


@dataclass(frozen=True, slots=True)
class RawMedium:
    """A medium that came as the payload of its message."""

    kind: MediaKind
    content_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """Where an answer goes.

    Attributes:
        id: the request's own id, or else made of its correlation data; None if it has neither.
        problem: what is wrong with the message, or None.
        fields: the JSON object with user properties laid over it; empty if there is a problem.
        fingerprint: tells two payloads under the same id apart.
        medium: the payload, where it is a medium and not JSON.
    """

    response_topic: str
    correlation_data: bytes | None
    client: str
    id: str | None
    problem: RequestError | None
    fields: dict[str, Any]
    fingerprint: bytes
    medium: RawMedium | None = None


def check_depth(payload: bytes, limit: int) -> None:
    """Raise BadRequest if brackets nest deeper than `limit`, without decoding anything."""
    depth = 0
    for match in _TOKENS.finditer(payload):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            if depth > limit:
                raise BadRequest(f"the JSON nests deeper than {limit} levels: flatten it")
        elif token in (b"]", b"}"):
            depth -= 1


def read_json(payload: bytes, limits: ParseLimits) -> dict[str, Any]:
    """Return the JSON object in `payload`.

    Raises:
        TooLarge: more bytes than allowed.
        BadRequest: not a JSON object, or nested too deeply.
    """
    check_size(payload, limits)
    check_depth(payload, limits.max_depth)
    try:
        fields = json.loads(payload, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the payload is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest("the payload must be a JSON object, for example {}")
    return fields


def check_size(payload: bytes, limits: ParseLimits) -> None:
    """Raise TooLarge if a message has more bytes than allowed."""
    if len(payload) > limits.max_bytes:
        raise TooLarge(
            f"the payload has {len(payload)} bytes, the limit is {limits.max_bytes}: send less, or "
            "a large medium as a blob"
        )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def read_envelope(
    received: Received, verb: Answering, topics: Topics, limits: ParseLimits
) -> Envelope:
    """Find out where the answer to `received` goes; never raises on account of its content."""
    fields: dict[str, Any] = {}
    problem: RequestError | None = None
    medium = _raw_medium(received) if verb == "generate" else None
    try:
        if medium is not None:
            check_size(received.payload, limits)
        elif received.content_type not in (None, "", JSON_TYPE):
            raise UnsupportedMedia(
                f"content type {received.content_type!r} is not supported: send {JSON_TYPE}, or a "
                "medium with its own, for example image/jpeg"
            )
        else:
            fields = read_json(received.payload, limits)
    except RequestError as error:
        problem = error
    fields = _overlay(fields, received.user_properties)

    reply_to = received.response_topic or fields.get("reply_to")
    response_topic = topics.response(verb)
    if reply_to is not None and reply_to != "":
        try:
            if not isinstance(reply_to, str):
                raise BadRequest("reply_to must be a string: name a topic")
            response_topic = topics.check_response_topic(reply_to)
        except BadRequest as error:
            problem = problem or error
    own_id = fields.get("id")
    return Envelope(
        response_topic=response_topic,
        correlation_data=received.correlation_data,
        client=client_of(response_topic),
        id=own_id if _is_id(own_id) else _id_of_correlation(received.correlation_data),
        problem=problem,
        fields={} if problem else fields,
        fingerprint=_fingerprint(received, medium),
        medium=None if problem else medium,
    )


def _raw_medium(received: Received) -> RawMedium | None:
    """Return the payload if its Content Type is that of a medium."""
    stated = (received.content_type or "").partition(";")[0].strip().lower()
    for kind, formats in FORMATS.items():
        if CONTENT_TYPES.get(stated) in formats:
            return RawMedium(kind, stated, received.payload)
    return None


def _overlay(
    fields: dict[str, Any], user_properties: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    """Lay user properties over the JSON fields; `stop` may come several times."""
    result = dict(fields)
    stops = [value for name, value in user_properties if name == "stop"]
    result.update(user_properties)
    if stops:
        result["stop"] = stops
    return result


def _is_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_ID}}}", value) is not None


def _id_of_correlation(correlation_data: bytes | None) -> str | None:
    """Correlation data that reads as an id is the id; other bytes become hexadecimal."""
    if not correlation_data:
        return None
    text = correlation_data.decode("ascii", errors="replace")
    if _is_id(text):
        return text
    if len(correlation_data) <= MAX_ID // 2:
        return correlation_data.hex()
    return hashlib.sha256(correlation_data).hexdigest()


def _fingerprint(received: Received, medium: RawMedium | None) -> bytes:
    digest = hashlib.sha256(received.payload)
    if medium is not None:
        digest.update(medium.content_type.encode())
    for pair in received.user_properties:
        digest.update(json.dumps(pair).encode())
    return digest.digest()


def read_request(envelope: Envelope, limits: ParseLimits) -> Request:
    """Return the request in `envelope`.

    Raises:
        RequestError: what is wrong with it, in one sentence.
    """
    if envelope.problem is not None:
        raise envelope.problem
    fields = envelope.fields
    for name in IN_STRINGS:
        if isinstance(fields.get(name), str):
            fields = {**fields, name: _parsed(name, fields[name], limits)}
    if envelope.medium is not None:
        fields = _spell_out(fields, envelope.medium)
    request = _validate(Request, fields)
    _check_payload_parts(request, envelope.medium)
    size = sum(len(text) for message in request.messages for text in _texts(message))
    if size > limits.max_prompt_chars:
        raise TooLarge(
            f"the messages have {size} characters, the limit is {limits.max_prompt_chars}: shorten "
            "them"
        )
    return request


def _parsed(name: str, text: str, limits: ParseLimits) -> object:
    try:
        check_depth(text.encode(), limits.max_depth)
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} is not valid JSON: {error}") from error


def _spell_out(fields: dict[str, Any], medium: RawMedium) -> dict[str, Any]:
    """Turn `prompt` beside a medium into messages: the medium first, then the text."""
    if ("messages" in fields) == ("prompt" in fields):
        raise BadRequest(
            "the payload is a medium: give either prompt or messages as a user property"
        )
    if "messages" in fields:
        return fields
    parts = [
        {"type": medium.kind, "payload": True},
        {"type": "text", "text": fields["prompt"]},
    ]
    rest = {name: value for name, value in fields.items() if name != "prompt"}
    return rest | {"messages": [{"role": "user", "content": parts}]}


def _check_payload_parts(request: Request, medium: RawMedium | None) -> None:
    """Raise BadRequest unless one part stands for the medium in the payload, if there is one."""
    count = sum(part.payload for part in media_parts(request.messages))
    if medium is None and count:
        raise BadRequest(
            "a part refers to the payload, but the payload is JSON: send the medium's bytes with "
            "its Content Type and the rest in user properties, or use data or blob"
        )
    if medium is not None and count != 1:
        raise BadRequest(
            f"the payload is a medium and {count} parts refer to it: one must have "
            '"payload": true (or give prompt in place of messages)'
        )


def read_control(model: type[_ModelT], envelope: Envelope) -> _ModelT:
    """Return the control request in `envelope`, or raise RequestError."""
    if envelope.problem is not None:
        raise envelope.problem
    return _validate(model, envelope.fields)


def transaction_of(envelope: Envelope) -> str | int | None:
    """Return the client's own word for its control request, which goes back with the reply."""
    transaction = envelope.fields.get("transaction")
    return transaction if isinstance(transaction, str | int) else None


def _validate(model: type[_ModelT], fields: dict[str, Any]) -> _ModelT:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise BadRequest(_sentence(model, error)) from error


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """Describe the first problem without quoting any value: prompts do not belong in errors."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != PARTS)
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) == 1:
            return f"unknown key {where!r}: the keys are {', '.join(sorted(model.model_fields))}"
        return f"unknown key {where!r}: leave it out"
    if first["type"] == "missing":
        return f"{where} is missing: add it"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}"


def _texts(message: RequestMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if not isinstance(part, MediaPart)]


def media_parts(messages: Iterable[RequestMessage]) -> Iterator[MediaPart]:
    """Yield the pictures, clips and videos of a request, in their order."""
    for message in messages:
        if not isinstance(message.content, str):
            yield from (part for part in message.content if isinstance(part, MediaPart))
