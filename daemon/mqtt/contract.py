"""The messages of the MQTT contract as models (docs/mqtt.md: Request, Events, Control, State).

Every JSON object that nestd reads or writes over MQTT is one of these; `schemas()` gives their JSON
schemas. Unknown keys are errors. Reading bytes into a model is `parse.py`'s business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nestd.daemon.engine.messages import FinishReason, Role

MAX_ID = 128
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"^[\x21-\x7e]+$")]
# It becomes the name of a file, so no dots and no slashes.
BlobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Effort = Literal["low", "auto", "high"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Requests


class TextPart(_Model):
    """A piece of text."""

    type: Literal["text"]
    text: str


class MediaPart(_Model):
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


class RequestMessage(_Model):
    """One turn: a plain string or a list of parts."""

    role: Role
    content: Content


class ResponseFormat(_Model):
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


class Tool(_Model):
    """A function that the answer may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
    description: Annotated[str, Field(max_length=4096)] = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}


class ToolCall(_Model):
    """The function that the answer calls; nestd calls nothing itself."""

    name: str
    arguments: dict[str, Any]


class Request(_Model):
    """What `<b>/request/generate` takes. A sampling value left out is the model's own default."""

    id: Id | None = None
    messages: Annotated[tuple[RequestMessage, ...], Field(min_length=1, max_length=256)]
    submodel: Annotated[str, Field(min_length=1, max_length=64)] = "auto"
    effort: Effort = "auto"
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


class Accepted(_Model):
    """The request is valid and waits; `ahead` requests run or wait before it.

    Sent where the request says `stream`, and once more with the next `attempt` if the engine died.
    """

    id: str
    event: Literal["accepted"] = "accepted"
    attempt: int
    seq: int
    ahead: int


class Delta(_Model):
    """More text. Sent with QoS 0 and only where the request says `stream`."""

    id: str
    event: Literal["delta"] = "delta"
    attempt: int
    seq: int
    text: str
    completion_tokens: int
    submodel: str


class Usage(_Model):
    """Tokens of the prompt and of the answer; `cached_tokens` of the prompt were not read again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timings(_Model):
    """Milliseconds: waiting for the engine, media to features, prompt, answer."""

    queue_ms: float
    encode_ms: float
    prefill_ms: float
    decode_ms: float


class Switch(_Model):
    """From the completion token with this index (0 based) on, the answer ran on `submodel`."""

    token: int
    submodel: str
    reason: str | None


class ConversationTurn(_Model):
    """Which answer of its conversation this is, from 1: 1 where nothing was known under the id."""

    id: str
    turn: int


class Done(_Model):
    """The whole answer.

    `tool_call` is `text` as a call, where it is one; `finish_reason` is then `tool_call`.

    `switches` starts with the first size. `joules` is what the board used meanwhile (health's
    `watts_scope` says what that covers), null where it cannot tell.
    """

    id: str
    event: Literal["done"] = "done"
    attempt: int
    seq: int
    text: str
    finish_reason: FinishReason | Literal["tool_call"]
    tool_call: ToolCall | None = None
    conversation: ConversationTurn | None = None
    submodel: str
    switches: tuple[Switch, ...]
    usage: Usage
    timings: Timings
    joules: float | None = None


class Error(_Model):
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


class CancelRequest(_Model):
    """Cancel the request `id`; `client` tells clients apart that use the same id."""

    transaction: str | int | None = None
    reply_to: str | None = None
    id: Id
    client: str | None = None


class SubmodelRequest(_Model):
    """Run on `submodel` from the next token on: one request, or all and those to come."""

    transaction: str | int | None = None
    reply_to: str | None = None
    submodel: Annotated[str, Field(min_length=1, max_length=64)]
    id: Id | None = None
    client: str | None = None


class ModalityRequest(_Model):
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


class HealthRequest(_Model):
    """Ask for the health figures now."""

    transaction: str | int | None = None
    reply_to: str | None = None


class BlobInit(_Model):
    """`<b>/blob/<id>/init`: announce a blob. `reply_to` holds for its chunks too."""

    transaction: str | int | None = None
    reply_to: str | None = None
    size: Annotated[int, Field(gt=0)]
    content_type: Annotated[str, Field(max_length=256)] | None = None
    sha256: Sha256 | None = None
    expires_in: Annotated[float, Field(gt=0)] | None = None


class BlobFin(_Model):
    """`<b>/blob/<id>/fin`: the blob is whole, and this is what it should be."""

    transaction: str | int | None = None
    reply_to: str | None = None
    size: Annotated[int, Field(gt=0)]
    sha256: Sha256


class ControlError(_Model):
    """Why a control request or an upload failed."""

    code: str
    status: int
    message: str


class ControlReply(_Model):
    """The reply to a control request or an upload; `transaction` is the request's own."""

    transaction: str | int | None
    ok: bool
    data: dict[str, Any] | None = None
    error: ControlError | None = None


# What a node says about itself

Phase = Literal["starting", "loading", "ready", "degraded", "draining"]


class Availability(_Model):
    """Birth and last will; both carry the same `boot` and the connection's number `n`."""

    state: Literal["online", "offline"]
    boot: str
    n: int


class Queue(_Model):
    """How many requests run, wait and may wait."""

    running: int
    waiting: int
    limit: int


class State(_Model):
    """What the node does now, and why; a reason that does not apply is null.

    `submodel` is what the running answer runs on, or what a request without a wish would;
    `submodel_wanted` is what the owner has set, `auto` or a name; `largest` is the largest that any
    request may run on, null while requests are refused.
    `modalities` are those loaded, `modalities_off` those that the owner has switched off.
    `power_reason` (battery, supply, heat, watts) and `memory_reason` say what stands against the
    largest sub-model, whether or not it is what binds now.
    """

    phase: Phase
    phase_reason: str | None
    submodel: str | None
    submodel_reason: str
    submodel_wanted: str
    largest: str | None
    largest_reason: str
    context_length: int
    context_reason: str
    concurrency: int
    concurrency_reason: str
    modalities: tuple[str, ...]
    modalities_reason: str
    modalities_off: tuple[str, ...]
    queue: Queue
    power_reason: str | None
    memory_reason: str | None


class Counters(_Model):
    """Counts since the daemon started."""

    accepted: int = 0
    done: int = 0
    errors: dict[str, int] = {}
    completion_tokens: int = 0
    engine_exits: int = 0
    connections: int = 0
    sessions_lost: int = 0
    dropped_deltas: int = 0


class Health(_Model):
    """Figures of the moment; null means that this board cannot tell.

    Memory is the machine's or the control group's, whichever has less available. `watts` covers
    what `watts_scope` says; `joules_per_token` is that of the last answers, prompts included.
    """

    uptime_seconds: float
    rss_bytes: int
    engine_rss_bytes: int | None
    memory_available_bytes: int | None
    memory_total_bytes: int | None
    memory_pressure_percent: float | None
    temperature_celsius: float | None
    throttle_celsius: float | None
    battery_percent: float | None
    under_voltage: bool | None
    throttled: bool | None
    volts: float | None
    watts: float | None
    watts_scope: str | None
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    joules_per_token: float | None
    counters: Counters


class InfoLimits(_Model):
    """What a client has to stay below."""

    request_bytes: int
    json_depth: int
    queue: int
    max_tokens: int
    context_length: int
    default_expiry_seconds: float
    maximum_expiry_seconds: float


class InfoMedia(_Model):
    """What media a client may send; `image_size` is what `detail: auto` means."""

    max_bytes: int
    max_pixels: int
    max_audio_seconds: float
    max_video_seconds: float
    max_video_frames: int
    max_per_request: int
    image_sizes: tuple[int, ...]
    image_size: int | None
    store_bytes: int
    max_blobs: int
    blob_expiry_seconds: float


class InfoSubmodel(_Model):
    """One size of the bundle; a `rung` is one that no smaller one equals."""

    name: str
    effective_params: int
    decoder_bytes: int
    mmlu_percent: float | None
    rung: bool


class Info(_Model):
    """What the node is; changes only when it starts anew or loads another bundle.

    `media` is null where the bundle takes text only.
    """

    node: str
    boot: str
    versions: dict[str, str]
    bundle: str
    submodels: tuple[InfoSubmodel, ...]
    modalities: tuple[str, ...]
    limits: InfoLimits
    media: InfoMedia | None
    config: dict[str, Any]
    schemas: dict[str, Any]


PUBLIC: tuple[type[BaseModel], ...] = (
    Request, Accepted, Delta, Done, Error,
    CancelRequest, SubmodelRequest, ModalityRequest, HealthRequest, BlobInit, BlobFin, ControlReply,
    Availability, State, Health, Info,
)  # fmt: skip


def schemas() -> dict[str, Any]:
    """Return the JSON schema of every message, by the model's name."""
    return {model.__name__: model.model_json_schema() for model in PUBLIC}
