"""Metrics for Prometheus, over HTTP (docs/observability.md).

The main loop leaves the node's own `state` and `health` here once a second and reports what the
engine says; the HTTP server's threads only read what was left. A fact that the board cannot tell
has no sample. No metric carries a request's id or any of its text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import version
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nestd.bundle.errors import ConfigError
from nestd.daemon.engine.messages import Delta, Event, Exited, Failed, Finished
from nestd.daemon.mqtt.node_contract import Health, State
from nestd.daemon.requests import RequestBook
from nestd.daemon.settings import MetricsSettings
from nestd.daemon.status import Status

UPDATE_SECONDS = 1.0
# Seconds: from a desktop's first token to that of a long prompt on a small board, after a queue.
BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES = {
    "nestd_memory_available_bytes": ("memory_available_bytes", "Memory that can still be taken."),
    "nestd_memory_pressure_percent": (
        "memory_pressure_percent",
        "Share of the last ten seconds in which some task waited for memory.",
    ),
    "nestd_temperature_celsius": ("temperature_celsius", "Of the hottest part."),
    "nestd_battery_percent": ("battery_percent", "Charge of the battery."),
    "nestd_power_watts": ("watts", "Draw of what the health topic's watts_scope names."),
    "nestd_joules_per_token": ("joules_per_token", "Energy per token of the last answers."),
    "nestd_decode_tokens_per_second": ("decode_tokens_per_second", "Speed of the last answers."),
    "nestd_prefill_tokens_per_second": ("prefill_tokens_per_second", "Speed of the last prompts."),
    "nestd_uptime_seconds": ("uptime_seconds", "Since the daemon started."),
}
_COUNTERS = {
    "nestd_requests_accepted": ("accepted", "Requests taken into the queue."),
    "nestd_requests_done": ("done", "Requests answered."),
    "nestd_engine_exits": ("engine_exits", "Engine processes that ended by themselves."),
    "nestd_mqtt_connections": ("connections", "Connections made to the broker."),
    "nestd_mqtt_sessions_lost": ("sessions_lost", "Connections to a broker without our session."),
    "nestd_remote_done": ("remote_done", "Requests answered by the remote server."),
    "nestd_remote_failed": ("remote_failed", "Requests that the remote server failed to answer."),
    "nestd_dropped_deltas": ("dropped_deltas", "Pieces of text that could not be sent."),
}


class Metrics:
    """Collects and serves; `registry` is this node's own."""

    def __init__(
        self, settings: MetricsSettings, node: str, bundle: str, status: Status, book: RequestBook
    ) -> None:
        self._settings = settings
        self._status = status
        self._book = book
        self._next_update = float("-inf")
        self._begun: set[str] = set()
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self.registry = CollectorRegistry()
        self._node = _NodeCollector()
        self.registry.register(self._node)
        Info("nestd", "What runs here.", registry=self.registry).info(
            {"node": node, "bundle": bundle, "version": version("nestd")}
        )
        self._first_token = Histogram(
            "nestd_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._tokens = Counter("nestd_tokens", "Tokens run.", ["kind"], registry=self.registry)
        self._submodel_seconds = Counter(
            "nestd_submodel_seconds",
            "Seconds of answers on a sub-model, prompts included; several at once count each.",
            ["submodel"],
            registry=self.registry,
        )
        self._switches = Counter(
            "nestd_submodel_switches",
            "Changes of the sub-model in the middle of an answer.",
            registry=self.registry,
        )

    def start(self) -> None:
        """Serve, if that is wanted.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        if not self._settings.enabled:
            return
        host, port = self._settings.address
        try:
            self._server = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.listen: cannot listen on {self._settings.listen}: {error}; choose "
                "another address or set metrics.enabled to false"
            ) from error

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()

    def tick(self, now: float) -> None:
        """Leave the node's figures for the next scrape, once a second."""
        if self._settings.enabled and now >= self._next_update:
            self._next_update = now + UPDATE_SECONDS
            self._node.latest = (self._status.state(now), self._status.health(now))

    def note(self, event: Event, now: float) -> None:
        """Count an event of the engine, before its request is concluded."""
        if isinstance(event, Delta):
            record = self._book.by_engine_id(event.id)
            if record is not None and event.id not in self._begun:
                self._begun.add(event.id)
                self._first_token.observe(now - record.arrived)
        elif isinstance(event, Finished):
            self._begun.discard(event.id)
            self._finished(event)
        elif isinstance(event, Failed):
            self._begun.discard(event.id)
        elif isinstance(event, Exited):
            self._begun.clear()

    def _finished(self, event: Finished) -> None:
        self._tokens.labels("prompt").inc(event.prompt_tokens)
        self._tokens.labels("completion").inc(event.completion_tokens)
        self._tokens.labels("guessed").inc(event.guessed_tokens)
        self._switches.inc(max(0, len(event.switches) - 1))
        ends = [switch.token for switch in event.switches[1:]] + [event.completion_tokens]
        for number, (switch, end) in enumerate(zip(event.switches, ends, strict=True)):
            share = (end - switch.token) / max(1, event.completion_tokens)
            milliseconds = event.timings.decode_ms * share
            if number == 0:
                milliseconds += event.timings.prefill_ms
            self._submodel_seconds.labels(switch.submodel).inc(milliseconds / 1000)


class _NodeCollector(Collector):
    """Turns the node's own messages into metrics.

    Attributes:
        latest: replaced as a whole, so that a scrape in another thread sees one moment.
    """

    def __init__(self) -> None:
        self.latest: tuple[State, Health] | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the moment."""
        if self.latest is None:
            return
        state, health = self.latest
        for name, (key, text) in _GAUGES.items():
            yield _gauge(name, text, getattr(health, key))
        for name, (key, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(health.counters, key))
        errors = CounterMetricFamily("nestd_errors", "Errors answered, by code.", labels=["code"])
        for code, count in health.counters.errors.items():
            errors.add_metric([code], count)
        yield errors
        yield _gauge("nestd_requests_waiting", "Requests in the queue.", state.queue.waiting)
        yield _gauge("nestd_requests_running", "Requests being answered.", state.queue.running)
        yield _gauge("nestd_queue_limit", "Requests that may wait.", state.queue.limit)
        yield _gauge("nestd_ready", "1 while requests are answered.", int(state.phase == "ready"))
        resident = GaugeMetricFamily(
            "nestd_resident_memory_bytes", "Resident memory of a process.", labels=["process"]
        )
        resident.add_metric(["daemon"], health.rss_bytes)
        if health.engine_rss_bytes is not None:
            resident.add_metric(["engine"], health.engine_rss_bytes)
        yield resident


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """Return a gauge; without a sample where the value is not known."""
    return GaugeMetricFamily(name, text, value=value)
