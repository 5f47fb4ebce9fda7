"""The MQTT transport on paho: the only file that imports it.

One thread of our own runs paho's network functions (`loop_read`, `loop_write`, `loop_misc`), so the
pauses between two attempts to connect are ours (jittered), every exception is seen, and paho's
callbacks do nothing but emit events. MQTT 5 and 3.1.1; delivery rules 1, 6 and 9 of docs/mqtt.md.
"""

from __future__ import annotations

import logging
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paho.mqtt import MQTTException
from paho.mqtt.client import (
    Client,
    ConnectFlags,
    DisconnectFlags,
    MQTTMessage,
    MQTTMessageInfo,
    MQTTv5,
    MQTTv311,
)
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from nestd.daemon.mqtt.packets import (
    Connected,
    Disconnected,
    GaveUp,
    MakeWill,
    Message,
    Published,
    Received,
    Subscribed,
    Subscription,
    TransportEvent,
    TransportOptions,
)
from nestd.daemon.mqtt.tls import explain, explain_alert, tls_context

log = logging.getLogger(__name__)

_SESSION_TAKEN_OVER = 0x8E
_LASTING_SECONDS = 5.0
_SHORT_LIVED_FAILURES = 3
# CONNACK reasons that no waiting mends, by their name in both protocol versions.
_HOPELESS = frozenset(
    {
        "Unsupported protocol version",
        "Client identifier not valid",
        "Bad user name or password",
        "Not authorized",
        "Banned",
        "Bad authentication method",
    }
)
# What paho raises when the broker's bytes are not MQTT.
_PROTOCOL_ERRORS = (MQTTException, ValueError, IndexError, struct.error)


class PahoTransport:
    """See `nestd.daemon.mqtt.packets.Transport`."""

    def __init__(self, options: TransportOptions, make_will: MakeWill | None = None) -> None:
        self._options = options
        self._make_will = make_will
        self._five = options.protocol == "5"
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            clean_session=None if self._five else options.clean_start,
            protocol=MQTTv5 if self._five else MQTTv311,
            manual_ack=True,
        )
        self._client.max_queued_messages_set(options.max_outgoing)
        self._client.username_pw_set(options.username, options.password)
        if options.tls:
            self._client.tls_set_context(tls_context(options))
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.on_subscribe = self._on_subscribe
        self._client.on_log = self._on_log
        self._client.on_socket_open = _send_at_once
        self._client.on_socket_register_write = self._on_want_write
        self._emit: Callable[[TransportEvent], None] = _drop
        self._stopping = threading.Event()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        # Guards `_connection` against an acknowledgement that is just being queued. Never taken in
        # a callback: paho may hold a lock of its own there, and publish() takes them the other way.
        self._lock = threading.Lock()
        self._connection = 0
        self._accepted = False
        self._ever_accepted = False
        self._hanging_up = False
        self._reason = ""
        self._hopeless: str | None = None
        # Messages of QoS 0 that paho has taken and perhaps not yet written to the socket.
        self._unsent: deque[MQTTMessageInfo] = deque()

    # The daemon's side

    def start(self, emit: Callable[[TransportEvent], None]) -> None:
        """Begin to connect; `emit` is called from the transport's thread for every event."""
        self._emit = emit
        self._thread.start()

    def subscribe(self, subscriptions: list[Subscription]) -> None:
        """Send a SUBSCRIBE."""
        if self._five:
            self._client.subscribe(
                [(item.topic_filter, SubscribeOptions(qos=item.qos)) for item in subscriptions]
            )
        else:
            self._client.subscribe([(item.topic_filter, item.qos) for item in subscriptions])

    def unsubscribe(self, topic_filters: list[str]) -> None:
        """Send an UNSUBSCRIBE."""
        self._client.unsubscribe(topic_filters)

    def publish(self, message: Message) -> int | None:
        """Send `message` and return its mid, or None if it was not taken (no connection, full)."""
        if not self._accepted:
            return None
        unsent = self._unsent
        while unsent and _is_written(unsent[0]):
            unsent.popleft()
        if message.qos == 0 and len(unsent) >= self._options.max_outgoing:
            return None  # paho's own queue has no limit for QoS 0
        info = self._client.publish(
            message.topic,
            message.payload,
            qos=message.qos,
            retain=message.retain,
            properties=_properties(message, PacketTypes.PUBLISH) if self._five else None,
        )
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            return None
        if message.qos == 0:
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return None
            unsent.append(info)
        # A message of QoS 1 that met a closing connection stays with paho, which sends it on the
        # next one, so it counts as taken.
        return info.mid

    def acknowledge(self, received: Received) -> bool:
        """Send the PUBACK of `received`; False if it came over an older connection."""
        with self._lock:
            if received.connection != self._connection:
                return False
            self._client.ack(received.mid, received.qos)
        return True

    def stop(self, timeout: float, will: bool = False) -> None:
        """Disconnect within `timeout` seconds: cleanly, or so that the broker sends the `will`."""
        self._hanging_up = will
        self._stopping.set()
        if self._accepted and not will:
            self._client.disconnect()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # The transport's thread

    def _run(self) -> None:
        reason = "the MQTT thread has died: this is a bug of nestd, see the log"
        try:
            reason = self._connect_again_and_again()
        finally:
            # Also when an exception ends the thread: without this the daemon would wait for ever.
            self._emit(GaveUp(reason))
            self._wake_reader.close()
            self._wake_writer.close()

    def _connect_again_and_again(self) -> str:
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._connect()
                self._serve()
            except OSError as error:
                self._reason = explain(error, self._options.host)
            except _PROTOCOL_ERRORS as error:
                log.exception("the broker's answer is not MQTT")
                self._reason = f"the broker's answer is not MQTT: {error}"
            if self._stopping.is_set():
                break
            self._emit(Disconnected(self._reason or "the connection was lost"))
            if self._hopeless is not None:
                return self._hopeless
            if not self._accepted:
                failures += 1
            elif time.monotonic() - started >= _LASTING_SECONDS:
                failures = 0
            else:
                # A broker that accepts us and hangs up is no reason to come back at once, but it
                # is there: the pause stays short.
                failures = min(failures + 1, _SHORT_LIVED_FAILURES)
            self._accepted = False
            self._stopping.wait(self._pause(failures))
        return "stopped"

    def _pause(self, failures: int) -> float:
        """Seconds to wait: doubling, and random so that a fleet does not come back in step."""
        shortest, longest = self._options.retry_seconds
        ceiling = min(longest, shortest * 2.0 ** min(failures, 30))
        return random.uniform(ceiling / 2, ceiling)

    def _connect(self) -> None:
        options = self._options
        # Acknowledgements queued so far are thrown away by paho's connect(); from here on those of
        # the old connection are refused. Else one could acknowledge another message's mid.
        with self._lock:
            self._connection += 1
        self._unsent = deque()
        self._reason = ""
        if self._make_will is not None:
            will = self._make_will(self._connection)
            properties = _properties(will, PacketTypes.WILLMESSAGE) if self._five else None
            self._client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        if self._five:
            connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            connect.SessionExpiryInterval = options.session_expiry_interval
            connect.ReceiveMaximum = options.receive_maximum
            if options.maximum_packet_size is not None:
                connect.MaximumPacketSize = options.maximum_packet_size
            self._client.connect(
                options.host,
                options.port,
                options.keepalive,
                clean_start=options.clean_start,
                properties=connect,
            )
        else:
            self._client.connect(options.host, options.port, options.keepalive)

    def _serve(self) -> None:
        """Move bytes until the connection ends."""
        deadline = time.monotonic() + self._options.keepalive
        while (sock := self._client.socket()) is not None:
            writers = [sock] if self._client.want_write() else []
            # TLS may hold decrypted bytes that select() does not know of.
            pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
            readable, writable, _ = select.select(
                [sock, self._wake_reader], writers, [], 0 if pending else 1.0
            )
            if self._wake_reader in readable:
                self._wake_reader.recv(4096)
            if pending or sock in readable:
                self._client.loop_read()
            if sock in writable or self._client.want_write():
                self._client.loop_write()
            self._client.loop_misc()
            if self._stopping.is_set() and (self._hanging_up or not self._accepted):
                sock.close()
                return
            if not self._accepted and time.monotonic() > deadline:
                raise TimeoutError("no CONNACK came")

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except (BlockingIOError, OSError):
            return  # the buffer is full, so the thread wakes up anyway; or it has ended

    # paho's callbacks: in the transport's thread, except _on_want_write

    def _on_want_write(self, _client: Client, _userdata: object, _sock: object) -> None:
        # Having this callback also keeps paho from writing to the socket in the caller's thread.
        self._wake()

    def _on_connect(
        self,
        _client: Client,
        _userdata: object,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._reason = f"the broker refuses the connection: {reason}"
            # Later on it may be the broker that is being set up anew, so a node keeps trying.
            if not self._ever_accepted and str(reason) in _HOPELESS:
                self._hopeless = (
                    f"the broker {self._options.host}:{self._options.port} refuses the connection "
                    f"({reason}): check mqtt.username, mqtt.password_file, mqtt.client_id and "
                    "mqtt.protocol"
                )
            return
        self._ever_accepted = self._accepted = True
        limit = getattr(properties, "MaximumPacketSize", None)
        self._emit(Connected(self._connection, flags.session_present, limit))

    def _on_disconnect(
        self,
        _client: Client,
        _userdata: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._reason = self._reason or f"the connection ended: {reason}"
        if reason.value == _SESSION_TAKEN_OVER:
            # Two nodes with one client id would throw each other out for ever.
            self._hopeless = (
                f"another client has connected with the client id {self._options.client_id!r}: "
                "give each node its own node name or mqtt.client_id"
            )

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("a message with a topic that is not UTF-8 was ignored")
            return
        self._emit(_received(message, topic, self._connection))

    def _on_publish(
        self,
        _client: Client,
        _userdata: object,
        mid: int,
        reason: ReasonCode,
        _properties: Properties,
    ) -> None:
        # paho calls this for QoS 0 too, once the bytes are written; nobody waits for such a mid.
        self._emit(Published(mid, _refusal(reason)))

    def _on_subscribe(
        self,
        _client: Client,
        _userdata: object,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        self._emit(Subscribed(tuple(_refusal(reason) for reason in reasons)))

    def _on_log(self, _client: Client, _userdata: object, _level: int, text: str) -> None:
        # With TLS 1.3 the broker refuses our certificate after the handshake, in the first bytes
        # that we read, and what paho read there it tells only in its log.
        self._reason = explain_alert(text) or self._reason


def _refusal(reason: ReasonCode) -> str | None:
    return str(reason) if reason.is_failure else None


def _is_written(info: MQTTMessageInfo) -> bool:
    try:
        return info.is_published()
    except RuntimeError:
        return True  # its connection is gone, and the message with it


def _drop(_event: TransportEvent) -> None:
    """Before start() there is nobody to tell."""


def _received(message: MQTTMessage, topic: str, connection: int) -> Received:
    properties: Any = message.properties
    return Received(
        topic=topic,
        payload=bytes(message.payload),
        qos=message.qos,
        retain=message.retain,
        dup=message.dup,
        mid=message.mid,
        connection=connection,
        content_type=getattr(properties, "ContentType", None),
        correlation_data=getattr(properties, "CorrelationData", None),
        message_expiry_interval=getattr(properties, "MessageExpiryInterval", None),
        response_topic=getattr(properties, "ResponseTopic", None),
        user_properties=tuple(getattr(properties, "UserProperty", ())),
    )


def _send_at_once(_client: object, _userdata: object, sock: Any) -> None:  # noqa: ANN401  (paho)
    """Turn Nagle's algorithm off: a small message would wait up to 40 ms for a delayed ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _properties(message: Message, packet_type: int) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    if message.content_type is not None:
        properties.ContentType = message.content_type
        properties.PayloadFormatIndicator = 1
    if message.correlation_data is not None:
        properties.CorrelationData = message.correlation_data
    if message.message_expiry_interval is not None:
        properties.MessageExpiryInterval = message.message_expiry_interval
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    if message.user_properties:
        properties.UserProperty = list(message.user_properties)
    return properties
