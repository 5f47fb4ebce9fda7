"""PUBACKs: after the final event's acknowledgement, in order, never over another connection."""

import pytest

from nestd.daemon.delivery import Delivery, Entry, Final
from nestd.daemon.mqtt.memory import MemoryTransport
from nestd.daemon.mqtt.packets import Message, Published, Received, Subscription


class Wire:
    """A delivery on a transport whose broker acknowledges when told."""

    def __init__(self) -> None:
        self.transport = MemoryTransport()
        self.transport.confirming = False
        self.delivery = Delivery(self.transport)
        self.received: list[Received] = []
        self.transport.start(self._on_event)
        self.transport.connect()
        self.transport.subscribe([Subscription("#", 1)])

    def _on_event(self, event: object) -> None:
        if isinstance(event, Published):
            self.delivery.published(event.mid, event.refusal)
        elif isinstance(event, Received):
            self.received.append(event)

    def entry(self, qos: int = 1) -> Entry:
        return self.delivery.receive(self.transport.deliver("r", {}, qos=qos))

    def reconnect(self) -> None:
        self.transport.disconnect()
        self.transport.connect()
        self.delivery.connected(self.received[-1].connection if self.received else 2)


def final(*entries: Entry) -> Final:
    return Final(Message("clients/me/r", b"{}"), list(entries))


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_the_puback_waits_for_the_brokers_acknowledgement(wire: Wire) -> None:
    wire.delivery.send(final(wire.entry()))
    assert wire.transport.acknowledged == []
    wire.transport.confirm()
    assert wire.transport.acknowledged == [1]
    assert wire.delivery.open_finals == 0


def test_pubacks_keep_the_order_of_arrival(wire: Wire) -> None:
    first, second, third = wire.entry(), wire.entry(), wire.entry()
    wire.delivery.send(final(third))
    wire.delivery.send(final(second))
    wire.transport.confirm()
    assert wire.transport.acknowledged == []
    wire.delivery.send(final(first))
    wire.transport.confirm()
    assert wire.transport.acknowledged == [1, 2, 3]


def test_pubacks_of_an_older_connection_are_dropped(wire: Wire) -> None:
    entry = wire.entry()
    wire.delivery.send(final(entry))
    wire.transport.disconnect()
    wire.transport.connect()
    wire.delivery.connected(2)
    wire.transport.confirm()
    assert wire.transport.acknowledged == []
    assert wire.received[-1].dup


def test_a_redelivered_request_joins_the_answer_that_is_under_way(wire: Wire) -> None:
    answer = final(wire.entry())
    wire.delivery.send(answer)
    wire.transport.disconnect()
    wire.transport.connect()
    wire.delivery.connected(2)
    wire.delivery.join(answer, wire.delivery.receive(wire.received[-1]))
    wire.transport.confirm()
    assert wire.transport.acknowledged == [1]
    assert len(wire.transport.published) == 1


def test_a_redelivered_request_whose_answer_is_confirmed_gets_its_puback(wire: Wire) -> None:
    answer = final()
    wire.delivery.send(answer)
    wire.transport.confirm()
    wire.delivery.join(answer, wire.entry())
    assert wire.transport.acknowledged == [1]


def test_answers_wait_for_a_connection(wire: Wire) -> None:
    entry = wire.entry()
    wire.transport.disconnect()
    answer = final(entry)
    wire.delivery.send(answer)
    assert wire.delivery.open_finals == 1
    assert wire.delivery.replace(answer, Message("clients/me/r", b"late"))
    wire.transport.connect()
    wire.delivery.connected(2)
    assert [m.payload for m in wire.transport.published] == [b"late"]
    assert not wire.delivery.replace(answer, Message("clients/me/r", b"later still"))


def test_answers_wait_for_room_in_the_transport(wire: Wire) -> None:
    wire.transport.accepting = False
    wire.delivery.send(final(wire.entry()))
    wire.delivery.send_waiting()
    assert wire.transport.published == []
    wire.transport.accepting = True
    wire.delivery.send_waiting()
    wire.transport.confirm()
    assert wire.transport.acknowledged == [1]


def test_an_answer_that_the_broker_refuses_settles_its_request(wire: Wire) -> None:
    wire.delivery.send(final(wire.entry()))
    wire.delivery.published(1, "Not authorized")
    assert wire.transport.acknowledged == [1]


def test_requests_of_qos_0_have_no_puback(wire: Wire) -> None:
    wire.delivery.send(final(wire.entry(qos=0)))
    wire.transport.confirm()
    assert wire.transport.acknowledged == []
    assert wire.delivery.open_entries == 0


def test_acknowledgements_of_unknown_messages_are_ignored(wire: Wire) -> None:
    wire.delivery.published(4711, None)
    assert wire.transport.acknowledged == []
