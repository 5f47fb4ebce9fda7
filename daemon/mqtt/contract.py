"""Requests, events and control of the MQTT contract as models (docs/mqtt.md).

Every JSON object that nestd reads or writes over MQTT is one of these or of `node_contract`'s;
`schemas.py` gives their JSON schemas. Reading bytes into a model is `parse.py`'s business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nestd.daemon.engine.messages import FinishReason, Role
from nestd.daemon.remote.settings import Consent

MAX_ID = 128
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"^[\x21-\x7e]+$")]
# It becomes the name of a file, so no dots and no slashes.
BlobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Effort = Literal["low", "auto", "high"]


class ContractModel(BaseModel):
    """Base of every message: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Requests


class TextPart(ContractModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class MediaPart(ContractModel):
    """A medium: base64 `data`, the id of an uploaded `blob`, or the message's own `payload`.

    `detail` chooses the size that a picture, or each frame of a video, is scaled to.
    """

    type: Literal["image", "audio", "video"]
    data: str | None = None
    blob: BlobId | None = None
    payload: bool = False
    content_type: Annotated[str, Field(max_length=256)] | None = None
    detail: Literal["low", "auto", "high"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [self.data is not None, self.blob is not None, self.payload].count(True) != 1:
            raise ValueError("give exactly one of data, blob and payload")
        return self


Part = Annotated[TextPart | MediaPart, Field(discriminator="type")]


def _kind_of_content(content: object) -> str:
    return "text" if isinstance(content, str) else PARTS


# In the place of an error it says no more than `content` does.
PARTS = "parts"
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[Part, ...], Tag(PARTS)],
    Discriminator(_kind_of_content),
]


class RequestMessage(ContractModel):
    """One turn: a plain string or a list of parts."""

    role: Role
    content: Content


class ResponseFormat(ContractModel):
    """The form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("give json_schema with the type json_schema, and only with it")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """Return the JSON schema that the answer must keep to, None for text."""
        return {"type": "object"} if self.type == "json_object" else self.json_schema


class Tool(ContractModel):
    """A function that the answer may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
    description: Annotated[str, Field(max_length=4096)] = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}


class ToolCall(ContractModel):
    """The function that the answer calls; nestd calls nothing itself."""

    name: str
    arguments: dict[str, Any]


class Request(ContractModel):
    """What `<b>/request/generate` takes. A sampling value left out is the model's own default."""

    id: Id | None = None
    messages: Annotated[tuple[RequestMessage, ...], Field(min_length=1, max_length=256)]
    submodel: Annotated[str, Field(min_length=1, max_length=64)] = "auto"
    effort: Effort = "auto"
    remote: Consent | None = None
    max_tokens: Annotated[int, Field(ge=1, le=131072)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    response_format: ResponseFormat = ResponseFormat()
    tools: Annotated[tuple[Tool, ...], Field(max_length=64)] = ()
    tool_choice: Annotated[str, Field(min_length=1, max_length=64)] = "auto"
    conversation: Id | None = None
    stream: bool = False
    expires_in: Annotated[float, Field(gt=0)] | None = None
    reply_to: str | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 4


# Events


class Accepted(ContractModel):
    """The request is valid and waits; `ahead` requests run or wait before it.

    Sent where the request says `stream`, and once more with the next `attempt` if the engine died
    or the remote server failed. `remote`: the remote server is to answer; `remote_reason`: why, or
    why not, where the request allows it at all.
    """

    id: str
    event: Literal["accepted"] = "accepted"
    attempt: int
    seq: int
    ahead: int
    remote: bool = False
    remote_reason: str | None = None


class Delta(ContractModel):
    """More text. Sent with QoS 0 and only where the request says `stream`."""

    id: str
    event: Literal["delta"] = "delta"
    attempt: int
    seq: int
    text: str
    completion_tokens: int
    submodel: str


class Usage(ContractModel):
    """Tokens of the prompt and of the answer.

    `cached_tokens` of the prompt were not read again; `guessed_tokens` of the answer were guessed
    from what came before and needed no step of their own.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    guessed_tokens: int = 0


class Timings(ContractModel):
    """Milliseconds: waiting for the engine, media to features, prompt, answer."""

    queue_ms: float
    encode_ms: float
    prefill_ms: float
    decode_ms: float


class Switch(ContractModel):
    """From the completion token with this index (0 based) on, the answer ran on `submodel`."""

    token: int
    submodel: str
    reason: str | None


class ConversationTurn(ContractModel):
    """Which answer of its conversation this is, from 1: 1 where nothing was known under the id."""

    id: str
    turn: int


class Done(ContractModel):
    """The whole answer.

    `tool_call` is `text` as a call, where it is one; `finish_reason` is then `tool_call`. With
    `content_filter` the node's filter has put `text` in the answer's place.

    `switches` starts with the first size. `joules` is what the board used meanwhile (health's
    `watts_scope` says what that covers), null where it cannot tell.

    `remote_model` is set where the remote server has answered: the model's name there; `submodel`
    is then `remote`. `usage` is null where that server has told no figures.
    """

    id: str
    event: Literal["done"] = "done"
    attempt: int
    seq: int
    text: str
    finish_reason: FinishReason | Literal["tool_call", "content_filter"]
    tool_call: ToolCall | None = None
    conversation: ConversationTurn | None = None
    submodel: str
    remote_model: str | None = None
    switches: tuple[Switch, ...]
    usage: Usage | None
    timings: Timings
    joules: float | None = None


class Error(ContractModel):
    """The request failed; `id` is null where none could be read."""

    id: str | None
    event: Literal["error"] = "error"
    attempt: int
    seq: int
    code: str
    status: int
    message: str
    retry_after_ms: int | None = None


# Control


class CancelRequest(ContractModel):
    """Cancel the request `id`; `client` tells clients apart that use the same id."""

    transaction: str | int | None = None
    reply_to: str | None = None
    id: Id
    client: str | None = None


class SubmodelRequest(ContractModel):
    """Run on `submodel` from the next token on: one request, or all and those to come."""

    transaction: str | int | None = None
    reply_to: str | None = None
    submodel: Annotated[str, Field(min_length=1, max_length=64)]
    id: Id | None = None
    client: str | None = None


class ModalityRequest(ContractModel):
    """Load an encoder now or forbid it until it is enabled again; or unload it if it is idle."""

    transaction: str | int | None = None
    reply_to: str | None = None
    modality: Literal["vision", "audio", "all"]
    enabled: bool | None = None
    unload: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.enabled is not None) == self.unload:
            raise ValueError("give either enabled, true or false, or unload: true")
        if self.modality == "all" and not self.unload:
            raise ValueError("all goes with unload only: enable vision and audio one by one")
        return self


class HealthRequest(ContractModel):
    """Ask for the health figures now."""

    transaction: str | int | None = None
    reply_to: str | None = None


class BlobInit(ContractModel):
    """`<b>/blob/<id>/init`: announce a blob. `reply_to` holds for its chunks too."""

    transaction: str | int | None = None
    reply_to: str | None = None
    size: Annotated[int, Field(gt=0)]
    content_type: Annotated[str, Field(max_length=256)] | None = None
    sha256: Sha256 | None = None
    expires_in: Annotated[float, Field(gt=0)] | None = None


class BlobFin(ContractModel):
    """`<b>/blob/<id>/fin`: the blob is whole, and this is what it should be."""

    transaction: str | int | None = None
    reply_to: str | None = None
    size: Annotated[int, Field(gt=0)]
    sha256: Sha256


class ControlError(ContractModel):
    """Why a control request or an upload failed."""

    code: str
    status: int
    message: str


class ControlReply(ContractModel):
    """The reply to a control request or an upload; `transaction` is the request's own."""

    transaction: str | int | None
    ok: bool
    data: dict[str, Any] | None = None
    error: ControlError | None = None
