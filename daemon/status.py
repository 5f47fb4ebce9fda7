"""What a node says about itself: state, info, health (docs/mqtt.md, Topics).

State is published when it changes, at most once a second while only the queue moves; all of it
again on every connect.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import psutil
from pydantic import BaseModel

from nestd.bundle.manifest import Manifest
from nestd.daemon.content import Contents
from nestd.daemon.dispatch import Dispatch
from nestd.daemon.elastic.cost import pareto_front
from nestd.daemon.elastic.governor import Governor
from nestd.daemon.elastic.limits import margin_c
from nestd.daemon.mqtt import node_contract
from nestd.daemon.mqtt.packets import Message, Transport
from nestd.daemon.mqtt.parse import JSON_TYPE, ParseLimits
from nestd.daemon.mqtt.schemas import schemas
from nestd.daemon.mqtt.topics import VERSION, Topics
from nestd.daemon.remote.rung import RemoteRung
from nestd.daemon.replies import Replies
from nestd.daemon.requests import RequestBook
from nestd.daemon.settings import Settings
from nestd.daemon.supervisor import Supervisor

QUEUE_ONLY_PAUSE_SECONDS = 1.0


class Status:
    """Builds and publishes the node's own messages."""

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        manifest: Manifest,
        boot: str,
        transport: Transport,
        book: RequestBook,
        dispatch: Dispatch,
        supervisor: Supervisor,
        replies: Replies,
        governor: Governor,
        remote: RemoteRung,
        contents: Contents,
        config: dict[str, Any],
        started: float,
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._manifest = manifest
        self._boot = boot
        self._transport = transport
        self._book = book
        self._dispatch = dispatch
        self._supervisor = supervisor
        self._replies = replies
        self._governor = governor
        self._remote = remote
        self._contents = contents
        self._config = config
        self._started = started
        self._process = psutil.Process()
        self._published: node_contract.State | None = None
        self._published_at = float("-inf")
        self._next_health = started
        self.draining = False

    def announce(self, now: float) -> None:
        """Say everything, on a new connection."""
        self._publish_info()
        self._published = None
        self.publish_state(now)
        self.publish_health(now)

    def tick(self, now: float) -> None:
        """Publish what is due."""
        self.publish_state(now)
        if now >= self._next_health:
            self.publish_health(now)

    def publish_state(self, now: float) -> None:
        """Publish the state if it has changed."""
        state = self.state(now)
        old = self._published
        if state == old:
            return
        only_queue = old is not None and state == old.model_copy(update={"queue": state.queue})
        if only_queue and now - self._published_at < QUEUE_ONLY_PAUSE_SECONDS:
            return
        if self._transport.publish(_retained(self._topics.state, state)) is not None:
            self._published, self._published_at = state, now

    def publish_health(self, now: float) -> None:
        """Publish the health figures."""
        self._next_health = now + self._settings.health_interval_s
        self._transport.publish(
            Message(
                self._topics.health,
                self.health(now).model_dump_json().encode(),
                qos=0,
                content_type=JSON_TYPE,
            )
        )

    def phase(self) -> tuple[node_contract.Phase, str | None]:
        """Return the phase and its reason."""
        if self.draining:
            return "draining", "the node is stopping"
        if self._supervisor.degraded is not None:
            return "degraded", self._supervisor.degraded
        refusal = self._governor.plan.refusal
        if refusal is not None:
            return "degraded", refusal.reason
        if self._supervisor.state == "ready":
            return "ready", None
        reason = "the engine process is started again" if self._supervisor.exits else None
        return ("loading" if self._supervisor.state == "loading" else "starting"), reason

    def state(self, now: float) -> node_contract.State:
        """Return the state of the moment."""
        phase, reason = self.phase()
        plan, bounds = self._governor.plan, self._governor.bounds
        stats = self._dispatch.stats
        encoders = stats.encoders if stats is not None else ()
        running = [r for r in self._book.running if r.state == "running"]
        choice = running[0].route[-1] if running else plan.submodel
        remote, remote_reason = self._remote.told(now)
        return node_contract.State(
            phase=phase,
            phase_reason=reason,
            submodel=choice.value,
            submodel_reason=choice.reason,
            submodel_wanted=self._governor.wanted,
            largest=plan.largest.value,
            largest_reason=plan.largest.reason,
            context_length=plan.context_length.value,
            context_reason=plan.context_length.reason,
            concurrency=plan.concurrency.value,
            concurrency_reason=plan.concurrency.reason,
            remote=remote,
            remote_reason=remote_reason,
            modalities=("text", *encoders) if phase == "ready" else (),
            modalities_reason=plan.modalities.reason,
            modalities_off=self._governor.switched_off,
            queue=node_contract.Queue(
                running=len(running) + len(self._book.remote),
                waiting=len(self._book.waiting),
                limit=self._book.queue_limit,
            ),
            power_reason=bounds.power,
            memory_reason=bounds.memory,
        )

    def health(self, now: float) -> node_contract.Health:
        """Return the figures of the moment."""
        board = self._governor.snapshot
        margin, celsius = margin_c(board, self._settings.elastic), board.thermal.celsius
        stats = self._dispatch.stats
        counters = self._replies.counters | {"engine_exits": self._supervisor.exits}
        return node_contract.Health(
            uptime_seconds=round(now - self._started, 1),
            rss_bytes=self._process.memory_info().rss,
            engine_rss_bytes=stats.rss_bytes if stats else None,
            memory_available_bytes=board.memory.free_bytes,
            memory_total_bytes=board.memory.capacity_bytes,
            memory_pressure_percent=board.memory.pressure_some_percent,
            temperature_celsius=celsius,
            throttle_celsius=None if margin is None or celsius is None else celsius + margin,
            battery_percent=board.power.battery_percent,
            under_voltage=board.power.under_voltage,
            throttled=board.power.throttled,
            volts=board.power.volts,
            watts=board.power.watts,
            watts_scope=board.power.watts_scope,
            decode_tokens_per_second=stats.decode_tokens_per_second if stats else None,
            prefill_tokens_per_second=stats.prefill_tokens_per_second if stats else None,
            joules_per_token=self._governor.joules_per_token,
            counters=node_contract.Counters(**counters),
        )

    def info(self) -> node_contract.Info:
        """Return what the node is."""
        limits = self._settings.limits
        rungs = pareto_front(self._manifest.submodels)
        return node_contract.Info(
            node=self._topics.node,
            boot=self._boot,
            versions={
                "contract": VERSION,
                "nestd": version("nestd"),
                "onnxruntime": version("onnxruntime"),
            },
            bundle=self._manifest.name,
            submodels=tuple(
                node_contract.InfoSubmodel(
                    name=item.name,
                    effective_params=item.effective_params,
                    decoder_bytes=item.decoder_bytes,
                    mmlu_percent=item.mmlu_percent,
                    rung=item in rungs,
                )
                for item in self._manifest.submodels
            ),
            modalities=self._manifest.modalities,
            limits=node_contract.InfoLimits(
                request_bytes=self._settings.mqtt.max_payload_bytes,
                json_depth=limits.json_depth,
                queue=limits.queue,
                max_tokens=limits.max_tokens,
                context_length=self._settings.engine.context_length,
                default_expiry_seconds=limits.default_expiry_s,
                maximum_expiry_seconds=limits.max_expiry_s,
            ),
            media=self._media() if self._manifest.modalities != ("text",) else None,
            config=self._config,
            schemas=schemas(),
        )

    def _media(self) -> node_contract.InfoMedia:
        media, vision = self._settings.media, self._manifest.vision
        return node_contract.InfoMedia(
            max_bytes=media.max_bytes,
            max_pixels=media.max_pixels,
            max_audio_seconds=media.max_audio_s,
            max_video_seconds=media.max_video_s,
            max_video_frames=media.max_video_frames,
            max_per_request=media.max_per_request,
            image_sizes=() if vision is None else vision.sizes,
            image_size=self._contents.image_size(),
            store_bytes=media.store_bytes,
            max_blobs=media.max_blobs,
            blob_expiry_seconds=media.blob_expiry_s,
        )

    def _publish_info(self) -> None:
        info = self.info()
        message = _retained(self._topics.info, info)
        limit = self._replies.maximum_packet_size
        if limit is not None and message.size() > limit:
            # The schemas are the bulk of it, and the documentation has them too.
            message = _retained(self._topics.info, info.model_copy(update={"schemas": {}}))
        self._transport.publish(message)


def parse_limits(settings: Settings) -> ParseLimits:
    """Return the bounds of one message."""
    limits = settings.limits
    return ParseLimits(settings.mqtt.max_payload_bytes, limits.json_depth, limits.max_prompt_chars)


def _retained(topic: str, event: BaseModel) -> Message:
    payload = event.model_dump_json().encode()
    return Message(topic, payload, qos=1, retain=True, content_type=JSON_TYPE)
