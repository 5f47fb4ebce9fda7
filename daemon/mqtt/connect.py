"""Settings -> how a node or a client connects to the broker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nestd.daemon.credentials import read_secret, secret_path
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.settings import MqttSettings, Settings

# Above the queue limit requests are answered 429 rather than left at the broker (delivery rule 4).
# PUBACKs go out in order, so a refused one takes its place until all before it are answered: ten
# queues' worth can be told at once.
QUEUES_RECEIVED = 10
# The broker silently drops what is over our Maximum Packet Size, so it is well above the largest
# payload that is allowed: what lies between the two is answered 413.
PACKET_MARGIN = 8
# Chunks of blobs are large and are acknowledged at once, so few need to be on their way.
BLOB_RECEIVE_MAXIMUM = 4
MAX_PACKET = 268_435_460


def node_options(settings: Settings) -> TransportOptions:
    """How the daemon connects: with a session that outlasts outages."""
    mqtt = settings.mqtt
    return _options(
        mqtt,
        client_id=mqtt.client_id or f"nestd-{settings.node_name}",
        clean_start=False,
        session_expiry_interval=mqtt.session_expiry_s,
        receive_maximum=min(65535, (1 + QUEUES_RECEIVED) * settings.limits.queue + 1),
        maximum_packet_size=min(MAX_PACKET, PACKET_MARGIN * mqtt.max_payload_bytes),
    )


def blob_options(settings: Settings) -> TransportOptions:
    """How the daemon connects for blobs: a second session beside that of `node_options`."""
    options = node_options(settings)
    return replace(
        options,
        client_id=f"{options.client_id}-blobs",
        receive_maximum=BLOB_RECEIVE_MAXIMUM,
        maximum_packet_size=min(MAX_PACKET, 2 * settings.mqtt.max_payload_bytes),
    )


def client_options(settings: Settings, client_id: str) -> TransportOptions:
    """How a client like `nestd ask` connects: without a session."""
    return _options(
        settings.mqtt,
        client_id=client_id,
        clean_start=True,
        session_expiry_interval=0,
        receive_maximum=1000,
        maximum_packet_size=None,
    )


def _options(
    mqtt: MqttSettings,
    client_id: str,
    clean_start: bool,
    session_expiry_interval: int,
    receive_maximum: int,
    maximum_packet_size: int | None,
) -> TransportOptions:
    return TransportOptions(
        host=mqtt.host,
        port=mqtt.port,
        client_id=client_id,
        protocol=mqtt.protocol,
        username=mqtt.username,
        password=read_password(mqtt.password_file),
        tls=mqtt.tls,
        ca_file=_text(mqtt.ca_file),
        certificate_file=_text(mqtt.cert_file),
        key_file=_text(secret_path(mqtt.key_file)),
        clean_start=clean_start,
        session_expiry_interval=session_expiry_interval,
        receive_maximum=receive_maximum,
        maximum_packet_size=maximum_packet_size,
        keepalive=mqtt.keepalive_s,
        retry_seconds=(mqtt.reconnect_min_s, mqtt.reconnect_max_s),
    )


def read_password(file: Path | None) -> str | None:
    """Return the first line of the password file; ConfigError if it cannot be read."""
    return read_secret(file, "mqtt.password_file")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
