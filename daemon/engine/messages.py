"""What the daemon process and the engine process say to each other.

One JSON object per line over a socket pair: commands go to the engine, events come back. `kind`
says which. Nothing else crosses the border, so either side can die and be replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from nestd.bundle.manifest import Modality
from nestd.daemon.prompt.media import MediaLimits

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ONNX Runtime's own name.
CPU_PROVIDERS = ("CPUExecutionProvider",)


class EngineOptions(_Message):
    """How the engine loads a bundle.

    Attributes:
        threads: intra-operator threads; None leaves the choice to ONNX Runtime.
        context_length: tokens that one session's KV cache holds.
        prefill_chunk: prompt tokens per prefill step; a cancel or switch waits for one chunk.
        kv_window: caches of sliding layers hold the last tokens alone, not the whole context.
        kv_bits: width of keys and values.
        parallel_requests: answers that run at once; each may fill a KV cache of `context_length`.
        max_stall_seconds: how long a chunk of a prompt may hold up answers that run.
        prompt_lookup: guess an answer's next tokens from its prompt while it runs alone.
        prepared_directory: where weights prepared for this CPU are kept and mapped from; None keeps
            the weights in private memory.
        execution_providers: of ONNX Runtime, for the decoder and the encoders, the preferred first.
        media: what one picture, clip or film may be.
        feature_cache_bytes: encoded media that are kept for the next request with the same bytes.
        session_cache_bytes: keys and values of ended answers, kept for prompts that begin alike.
        session_cache_seconds: how long they are kept after they were last of use.
        log_format: see `nestd.daemon.logs`.
    """

    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    context_length: Annotated[int, Field(ge=16, le=131072)] = 4096
    prefill_chunk: Annotated[int, Field(ge=1, le=4096)] = 128
    kv_window: bool = True
    kv_bits: Literal[8, 32] = 32
    parallel_requests: Annotated[int, Field(ge=1, le=64)] = 4
    max_stall_seconds: Annotated[float, Field(gt=0, le=60)] = 0.25
    prompt_lookup: bool = True
    prepared_directory: Path | None = None
    execution_providers: Annotated[tuple[str, ...], Field(min_length=1)] = CPU_PROVIDERS
    media: MediaLimits = MediaLimits()
    feature_cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    session_cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    session_cache_seconds: Annotated[float, Field(ge=0)] = 600.0
    log_format: Literal["text", "json"] = "text"


class Sampling(_Message):
    """How the next token is chosen; temperature 0 is greedy, top_k 0 is no limit."""

    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 256
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 64
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()


class Structure(_Message):
    """What an answer must be: JSON of this schema, or else free text that begins with no brace."""

    json_schema: str
    or_text: bool = False


class TextContent(_Message):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class MediaContent(_Message):
    """An encoded picture, clip or film in a file that stays there until the request has ended.

    Attributes:
        sha256: of the file; what was computed for the same bytes is used again.
        content_type: what its sender says it is, checked against the bytes.
        size: pixels of the square that a picture or frame is scaled to; one that the bundle has.
    """

    type: Literal["image", "audio", "video"]
    path: Path
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    content_type: str | None = None
    size: Annotated[int, Field(gt=0)] | None = None


Content = Annotated[TextContent | MediaContent, Field(discriminator="type")]


class ChatMessage(_Message):
    """One turn of the conversation, as the chat template takes it."""

    role: Role
    content: str | tuple[Content, ...]


def media_of(messages: Sequence[ChatMessage]) -> list[MediaContent]:
    """Return the media of `messages`, in order."""
    return [
        part
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, MediaContent)
    ]


# Commands: daemon -> engine


class Start(_Message):
    """Answer `messages` on `submodel`. Beyond `parallel_requests` they wait, the first first.

    `context_length` is what memory allows this session now; None is the engine's own.
    """

    kind: Literal["start"] = "start"
    id: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    submodel: str
    sampling: Sampling = Sampling()
    structure: Structure | None = None
    context_length: Annotated[int, Field(ge=16, le=131072)] | None = None


class Cancel(_Message):
    """Stop request `id` within one step; `Finished` with reason `cancelled` follows."""

    kind: Literal["cancel"] = "cancel"
    id: str


class SetSubmodel(_Message):
    """Run on `submodel` from the next step on: request `id`, or all of them (None)."""

    kind: Literal["set_submodel"] = "set_submodel"
    submodel: str
    id: str | None = None


class Retain(_Message):
    """From now on nothing larger than `submodel` runs.

    The pages of all larger parts go back to the kernel; when `submodel` is larger than before, its
    pages are fetched ahead.
    """

    kind: Literal["retain"] = "retain"
    submodel: str


class KeepEncoders(_Message):
    """Unload every encoder that is not in `keep`; one that runs now, when it has finished.

    Encoders load by themselves when a request needs them; those in `load` load now.
    """

    kind: Literal["keep_encoders"] = "keep_encoders"
    keep: tuple[Modality, ...]
    load: tuple[Modality, ...] = ()


class Stop(_Message):
    """End the engine process after the current step; unfinished requests are dropped."""

    kind: Literal["stop"] = "stop"


# Events: engine -> daemon


class Ready(_Message):
    """The bundle is loaded and requests may start."""

    kind: Literal["ready"] = "ready"
    load_seconds: float
    context_length: int


class Delta(_Message):
    """More text of request `id`; `completion_tokens` counts all tokens of the answer so far."""

    kind: Literal["delta"] = "delta"
    id: str
    text: str
    completion_tokens: int
    submodel: str


class Switch(_Message):
    """From the completion token with this index (0 based) on, the answer ran on `submodel`."""

    token: int
    submodel: str


class Timings(_Message):
    """Milliseconds of one request inside the engine, whatever else ran meanwhile.

    Attributes:
        encode_ms: until its prompt is tokenised and its media are encoded.
        prefill_ms: from then to its first token.
        decode_ms: from then to its end.
    """

    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class Finished(_Message):
    """Request `id` ended; `text` is the whole answer, `switches` starts with the first size.

    `cached_tokens` of the prompt's were known from an earlier answer and not read again;
    `guessed_tokens` of the answer's were guessed and needed no step of their own.
    """

    kind: Literal["finished"] = "finished"
    id: str
    text: str = ""
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    guessed_tokens: int = 0
    switches: tuple[Switch, ...] = ()
    timings: Timings = Timings()


class Failed(_Message):
    """Request `id` failed with a wire code of `nestd.bundle.errors` and its sentence."""

    kind: Literal["failed"] = "failed"
    id: str
    code: str
    message: str


class LoadFailed(_Message):
    """The bundle could not be loaded; the process exits after saying so."""

    kind: Literal["load_failed"] = "load_failed"
    message: str


class Stats(_Message):
    """Sent about once a second while the engine works and once after it has become idle.

    Also when an encoder has been loaded or unloaded; `encoders` are those loaded now. Rates are
    what all answers together got done in the time of their steps, over the last seconds of work.
    """

    kind: Literal["stats"] = "stats"
    rss_bytes: int
    private_bytes: int
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    submodel: str | None
    encoders: tuple[Modality, ...] = ()


class Exited(_Message):
    """The engine process has ended (made by the daemon's side, never on the wire)."""

    kind: Literal["exited"] = "exited"
    returncode: int


Command = Annotated[
    Start | Cancel | SetSubmodel | Retain | KeepEncoders | Stop, Field(discriminator="kind")
]
Event = Annotated[
    Ready | Delta | Finished | Failed | LoadFailed | Stats | Exited, Field(discriminator="kind")
]
COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
