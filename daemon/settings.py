"""The whole configuration, typed: what may be set, in which unit, within which limits.

Reading and layering are in `nestd.daemon.config`. A field with a default here does not depend on
the board. A field without one does: its value is in a file of `device_profiles/`, and a comment
there says why it is what it is. `None` means "no limit" or "unknown", never 0.

Keys end in their unit: `_s` seconds, `_c` degrees Celsius, `_percent`, `_bytes` (sizes may be
written 600M or 1.5G).
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from nestd.daemon.elastic.settings import ElasticSettings
from nestd.daemon.engine.messages import CPU_PROVIDERS, EngineOptions
from nestd.daemon.prompt.media import MediaLimits
from nestd.daemon.remote.settings import RemoteSettings
from nestd.daemon.section import Count, PositiveSeconds, Seconds, Section, in_order
from nestd.daemon.units import ByteSize

SECRET = {"secret": True}


def _no_topic_magic(text: str) -> str:
    """Refuse what MQTT 5 (section 4.7) forbids in a topic name, and blanks that nobody wants."""
    bad = re.search(r"[+#\x00-\x20\x7f-\x9f]", text)
    if bad:
        raise ValueError(f"may not contain {bad[0]!r}: it becomes part of an MQTT topic")
    return text


def _node(text: str) -> str:
    if "/" in text:
        raise ValueError("may not contain '/': it is one level of an MQTT topic")
    return _no_topic_magic(text)


def _prefix(text: str) -> str:
    if text.startswith("$"):
        raise ValueError("may not start with '$': the broker keeps those topics to itself")
    if text.startswith("/") or text.endswith("/") or "//" in text:
        raise ValueError("may not start or end with '/' nor have an empty level")
    return _no_topic_magic(text)


def _topic_filter(text: str) -> str:
    levels = text.split("/")
    wrong = (
        text.startswith("$")
        or "\x00" in text
        or any("+" in level and level != "+" for level in levels)
        or any(
            "#" in level and (level != "#" or i + 1 < len(levels)) for i, level in enumerate(levels)
        )
    )
    if wrong:
        raise ValueError("write an MQTT topic filter, for example clients/+/reply or home/#")
    return text


Level = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_node)]
ExecutionProvider = Annotated[str, Field(pattern=r"^[A-Za-z]+ExecutionProvider$")]
TopicFilter = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_topic_filter)]


class MqttSettings(Section):
    """The broker and how to talk to it.

    Attributes:
        password_file: a file whose first line is the password; the password itself is never here.
        ca_file: certificates to trust instead of the system's.
        max_payload_bytes: a larger message from a client is refused; the broker's own limit counts
            too.
        response_topics: topic filters that a Response Topic may match besides `clients/+/#`.
        pools: groups of nodes that this one belongs to; a request to a group goes to any of them.
    """

    host: Annotated[str, Field(min_length=1, max_length=255)] = "localhost"
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    protocol: Annotated[Literal["5", "3.1.1"], BeforeValidator(str)] = "5"
    username: Annotated[str, Field(json_schema_extra=SECRET)] | None = None
    password_file: Annotated[Path, Field(json_schema_extra=SECRET)] | None = None
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Annotated[Path, Field(json_schema_extra=SECRET)] | None = None
    prefix: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_prefix)] = "nestd"
    client_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    keepalive_s: Annotated[int, Field(ge=5, le=65535)] = 30
    session_expiry_s: Annotated[int, Field(ge=0, le=2**32 - 1)] = 7 * 86400
    reconnect_min_s: Annotated[float, Field(gt=0, le=3600)] = 1.0
    reconnect_max_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    max_payload_bytes: Annotated[ByteSize, Field(ge=1024, le=268_435_455)] = 1_000_000
    response_topics: tuple[TopicFilter, ...] = ()
    pools: tuple[Level, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "reconnect_min_s", "reconnect_max_s")
        if (self.cert_file is None) != (self.key_file is None):
            key = "key_file" if self.cert_file else "cert_file"
            raise PydanticCustomError(
                "tls", "set cert_file and key_file together", {"keys": (key,)}
            )
        if self.ca_file and not self.tls:
            raise PydanticCustomError("tls", "needs `tls: true` beside it", {"keys": ("ca_file",)})
        if self.cert_file and not self.tls:
            raise PydanticCustomError(
                "tls", "needs `tls: true` beside it", {"keys": ("cert_file",)}
            )
        return self


class HomeAssistantSettings(Section):
    """Home Assistant's MQTT discovery.

    Attributes:
        prefix: where Home Assistant looks for discovery messages.
        status_topic: where Home Assistant says `online` when it has started.
    """

    enabled: bool = False
    prefix: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_prefix)] = (
        "homeassistant"
    )
    status_topic: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_prefix)] = (
        "homeassistant/status"
    )


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("write HOST:PORT, for example 127.0.0.1:9464 or [::1]:9464")
    return text


class MetricsSettings(Section):
    """Metrics for Prometheus, over HTTP without authentication: keep them on this machine.

    Attributes:
        listen: HOST:PORT; an IPv6 address stands in brackets.
    """

    enabled: bool = False
    listen: Annotated[str, AfterValidator(_address)] = "127.0.0.1:9464"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
Stage = Literal["request", "answer"]


class FilterSettings(Section):
    """What requests and answers have to pass.

    Attributes:
        command: a program and its arguments; no shell reads them.
        patterns: regular expressions (Python's) that must not occur.
        stages: what is judged.
        timeout_s: how long the program, or the patterns, may take for one thing.
        replacement: stands in the place of an answer that is refused; None answers an error.
    """

    command: Annotated[tuple[str, ...], Field(json_schema_extra=SECRET)] = ()
    patterns: Annotated[tuple[Pattern, ...], Field(json_schema_extra=SECRET)] = ()
    stages: tuple[Stage, ...] = ("request", "answer")
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    replacement: str | None = None


class EngineSettings(Section):
    """How the engine loads the bundle and answers; see `EngineOptions` for the limits.

    Attributes:
        parallel_requests: answers at once, as far as memory allows it.
        max_stall_s: how long a chunk of another prompt may hold up answers that run.
        prompt_lookup: guess an answer's next tokens from its prompt while it runs alone.
        kv_window: caches of sliding layers hold the last tokens alone, not the whole context.
        kv_bits: width of keys and values.
        session_cache_bytes: keys and values of ended answers, kept for prompts that begin alike.
        session_cache_s: how long they are kept after they were last of use.
        execution_providers: of ONNX Runtime, under its names, the preferred first.
    """

    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    context_length: Annotated[int, Field(ge=16, le=131072)]
    prefill_chunk: Annotated[int, Field(ge=1, le=4096)]
    parallel_requests: Annotated[int, Field(ge=1, le=64)]
    max_stall_s: Annotated[float, Field(gt=0, le=60)] = 0.25
    prompt_lookup: bool = True
    kv_window: bool = True
    kv_bits: Literal[8, 32] = 32
    session_cache_bytes: ByteSize
    session_cache_s: Seconds = 600.0
    execution_providers: Annotated[tuple[ExecutionProvider, ...], Field(min_length=1)] = (
        CPU_PROVIDERS
    )


class LimitSettings(Section):
    """What one client may ask of the node.

    Attributes:
        queue: requests that may wait; one more is answered 429.
        max_tokens: cap on the tokens of one answer.
        max_prompt_chars: characters of all text parts of a request.
        json_depth: nesting of a request's JSON.
        conversations: that are remembered; the least recently used is forgotten first.
        conversation_expiry_s: after which one that nobody goes on with is forgotten.
    """

    queue: Annotated[int, Field(ge=1, le=10_000)] = 16
    default_expiry_s: PositiveSeconds = 300.0
    max_expiry_s: PositiveSeconds = 86400.0
    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 1024
    max_prompt_chars: Annotated[int, Field(ge=1)] = 100_000
    json_depth: Annotated[int, Field(ge=4, le=64)] = 24
    conversations: Annotated[int, Field(ge=0, le=10_000)] = 64
    conversation_expiry_s: PositiveSeconds = 3600.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "default_expiry_s", "max_expiry_s")
        return self


class MediaSettings(Section):
    """Pictures, clips and videos.

    Attributes:
        max_bytes, max_pixels, max_audio_s, max_video_s: of one medium.
        max_video_frames: that are taken from a video; a longer one is sampled more thinly.
        video_frames_per_second: the rate of sampling where `max_video_frames` allows it.
        image_size: pixels of the square that pictures are scaled to where the request says nothing;
            the next smaller one that the bundle has.
        max_per_request: media of one request; one more is answered 413.
        store_bytes: disk for the media of open requests and for blobs.
        max_blobs: blobs at once, finished or not.
        blob_expiry_s: how long a blob is kept where its `init` does not say.
        feature_cache_bytes: encoded media that the engine keeps for the next request.
    """

    max_bytes: Annotated[ByteSize, Field(ge=1)] = 32 * 1024 * 1024
    max_pixels: Count = 50_000_000
    max_audio_s: PositiveSeconds = 300.0
    max_video_s: PositiveSeconds = 600.0
    max_video_frames: Annotated[int, Field(ge=1, le=64)]
    video_frames_per_second: Annotated[float, Field(gt=0, le=60)] = 1.0
    image_size: Count
    max_per_request: Annotated[int, Field(ge=1, le=64)] = 8
    store_bytes: ByteSize = 256 * 1024 * 1024
    max_blobs: Annotated[int, Field(ge=0, le=10_000)] = 32
    blob_expiry_s: PositiveSeconds = 600.0
    feature_cache_bytes: ByteSize = 64 * 1024 * 1024

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "max_bytes", "store_bytes")
        return self

    def limits(self) -> MediaLimits:
        """What one medium may be, for the decoder."""
        return MediaLimits(
            bytes=self.max_bytes,
            pixels=self.max_pixels,
            audio_seconds=self.max_audio_s,
            video_seconds=self.max_video_s,
            video_frames=self.max_video_frames,
            video_frames_per_second=self.video_frames_per_second,
        )


class Settings(Section):
    """The whole configuration of one node.

    Attributes:
        profile: name of the device profile in force (or the path of one of your own).
        node: this node's level in topics; None takes the host name.
        bundle_sha256: digest that the bundle must have, as `nestd inspect` prints it.
        bundle_signers: an allowed_signers file (ssh-keygen(1)); one of these has signed the bundle.
        sysroot: `/proc` and `/sys` are read below this directory, so that a recorded tree can take
            the board's place.
        weights: `mapped` keeps weights in files that the kernel may drop and read again;
            `resident` keeps them in private memory.
        state_directory: where the daemon keeps what it makes itself, prepared weights above all;
            None takes systemd's StateDirectory, or `~/.local/state/nestd`.
    """

    profile: str
    node: Level | None = None
    bundle: Path | None = None
    bundle_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    bundle_signers: Path | None = None
    sysroot: Path = Path("/")
    mqtt: MqttSettings = MqttSettings()
    home_assistant: HomeAssistantSettings = HomeAssistantSettings()
    engine: EngineSettings
    weights: Literal["mapped", "resident"]
    state_directory: Path | None = None
    limits: LimitSettings = LimitSettings()
    media: MediaSettings
    elastic: ElasticSettings
    metrics: MetricsSettings = MetricsSettings()
    remote: RemoteSettings = RemoteSettings()
    filter: FilterSettings = FilterSettings()
    health_interval_s: Annotated[float, Field(ge=1, le=86400)] = 60.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _check(self) -> Self:
        others = set(self.engine.execution_providers) - set(CPU_PROVIDERS)
        if others and self.weights == "mapped":
            raise PydanticCustomError(
                "providers",
                "must be `resident` where engine.execution_providers names more than the CPU: "
                "mapped weights are laid out for the CPU",
                {"keys": ("weights",)},
            )
        return self

    @property
    def node_name(self) -> str:
        """`node`, or the host name with what a topic level cannot hold replaced by `-`."""
        if self.node is not None:
            return self.node
        return re.sub(r"[+#/\x00-\x20\x7f-\x9f]", "-", socket.gethostname()) or "nestd"

    def engine_options(self) -> EngineOptions:
        """What the engine process is started with."""
        prepared = None if self.weights == "resident" else self.state_path / "prepared"
        return EngineOptions(
            **self.engine.model_dump(exclude={"session_cache_s", "max_stall_s"}),
            session_cache_seconds=self.engine.session_cache_s,
            max_stall_seconds=self.engine.max_stall_s,
            prepared_directory=prepared,
            media=self.media.limits(),
            feature_cache_bytes=self.media.feature_cache_bytes,
            log_format=self.log_format,
        )

    @property
    def journal_path(self) -> Path:
        """The file of answers that a killed daemon's successor must know; one for each node."""
        return self.state_path / f"answers-{self.node_name}.jsonl"

    @property
    def media_path(self) -> Path:
        """Where media lie while a request or a blob needs them; no other node shares it."""
        return self.state_path / f"media-{self.node_name}"

    @property
    def state_path(self) -> Path:
        """`state_directory`, or systemd's, or the one that the XDG specification names."""
        return self.state_directory or default_state_path()


def default_state_path() -> Path:
    """Return systemd's StateDirectory, or what the XDG specification names."""
    if systemd := os.environ.get("STATE_DIRECTORY"):
        return Path(systemd.split(":")[0])
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "nestd"
