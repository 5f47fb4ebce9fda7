"""What a node says about itself, as models (docs/mqtt.md: Topics, State, Health)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nestd.daemon.mqtt.contract import ContractModel

Phase = Literal["starting", "loading", "ready", "degraded", "draining"]


class Availability(ContractModel):
    """Birth and last will; both carry the same `boot` and the connection's number `n`."""

    state: Literal["online", "offline"]
    boot: str
    n: int


class Queue(ContractModel):
    """How many requests run, wait and may wait."""

    running: int
    waiting: int
    limit: int


class State(ContractModel):
    """What the node does now, and why; a reason that does not apply is null.

    `submodel` is what the running answer runs on, or what a request without a wish would;
    `submodel_wanted` is what the owner has set, `auto` or a name; `largest` is the largest that any
    request may run on, null while requests are refused.
    `remote` is the model of the remote server, null where there is none; `remote_reason` tells when
    requests that allow it go there.
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
    remote: str | None
    remote_reason: str
    modalities: tuple[str, ...]
    modalities_reason: str
    modalities_off: tuple[str, ...]
    queue: Queue
    power_reason: str | None
    memory_reason: str | None


class Counters(ContractModel):
    """Counts since the daemon started."""

    accepted: int = 0
    done: int = 0
    errors: dict[str, int] = Field(default_factory=dict)
    completion_tokens: int = 0
    engine_exits: int = 0
    connections: int = 0
    sessions_lost: int = 0
    dropped_deltas: int = 0
    remote_done: int = 0
    remote_failed: int = 0


class Health(ContractModel):
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


class InfoLimits(ContractModel):
    """What a client has to stay below."""

    request_bytes: int
    json_depth: int
    queue: int
    max_tokens: int
    context_length: int
    default_expiry_seconds: float
    maximum_expiry_seconds: float


class InfoMedia(ContractModel):
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


class InfoSubmodel(ContractModel):
    """One size of the bundle; a `rung` is one that no smaller one equals."""

    name: str
    effective_params: int
    decoder_bytes: int
    mmlu_percent: float | None
    rung: bool


class Info(ContractModel):
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
