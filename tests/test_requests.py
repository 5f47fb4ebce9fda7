"""The book of requests: order, limits, and what is kept for how long."""

import pytest

from nestd.bundle.errors import QueueFull
from nestd.daemon.delivery import Entry, Final
from nestd.daemon.elastic.plan import Choice
from nestd.daemon.mqtt.contract import Request
from nestd.daemon.mqtt.packets import Message, Received
from nestd.daemon.mqtt.parse import Envelope
from nestd.daemon.requests import (
    EARLY_CANCELS,
    STORED_ANSWERS,
    RequestBook,
    RequestRecord,
    new_record,
)

FULL = Choice("full", "for a test")


def record(
    name: str, expires_in: float = 60, client: str = "me", **fields: object
) -> RequestRecord:
    request = Request.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)
    envelope = Envelope("clients/me/r", None, client, name, None, {}, name.encode())
    return new_record(envelope, request, Entry(Received("t", b"")), 0.0, expires_in)


def confirmed() -> Final:
    return Final(Message("clients/me/r", b"{}"), confirmed=True, mid=1)


@pytest.fixture
def book() -> RequestBook:
    return RequestBook(queue_limit=3)


def add(book: RequestBook, name: str, **fields: object) -> RequestRecord:
    item = record(name, **fields)  # type: ignore[arg-type]
    book.add(item)
    return item


def test_requests_run_by_priority_and_then_by_age(book: RequestBook) -> None:
    add(book, "a")
    add(book, "b", priority=9)
    add(book, "c", priority=9)
    order = []
    while (item := book.next_waiting()) is not None:
        order.append(item.id)
        book.start(item, FULL, 1.0)
    assert order == ["b", "c", "a"]


def test_ahead_counts_what_runs_and_what_goes_first(book: RequestBook) -> None:
    first = add(book, "first")
    book.start(first, FULL, 1.0)
    last = add(book, "last", priority=0)
    add(book, "middle")
    assert book.ahead_of(last) == 2


def test_only_waiting_requests_count_for_the_limit(book: RequestBook) -> None:
    book.start(add(book, "runs"), FULL, 1.0)
    for name in "abc":
        book.check_room(1000)
        add(book, name)
    with pytest.raises(QueueFull) as caught:
        book.check_room(1000)
    assert caught.value.retry_after_ms == 1000


def test_a_request_whose_engine_died_keeps_its_place(book: RequestBook) -> None:
    first = add(book, "first")
    engine_id = book.start(first, FULL, 1.0)
    add(book, "second")
    assert book.leave_engine(engine_id) is first
    book.wait_again(first)
    assert book.next_waiting() is first
    assert first.attempt == 2


def test_the_engine_gets_an_id_of_its_own_for_each_attempt(book: RequestBook) -> None:
    first = add(book, "first")
    one = book.start(first, FULL, 1.0)
    book.leave_engine(one)
    book.wait_again(first)
    assert book.start(first, FULL, 2.0) != one


def test_a_prompt_is_forgotten_when_its_request_ends(book: RequestBook) -> None:
    item = add(book, "a")
    book.end(item, confirmed())
    assert item.request is None
    assert book.find("me", "a") is item
    assert book.waiting == ()


def test_answers_are_kept_until_they_expire(book: RequestBook) -> None:
    item = add(book, "a")
    book.end(item, confirmed())
    book.forget_expired(59)
    assert book.find("me", "a") is item
    book.forget_expired(60)
    assert book.find("me", "a") is None


def test_an_answer_that_is_not_confirmed_is_not_forgotten(book: RequestBook) -> None:
    item = add(book, "a")
    book.end(item, Final(Message("clients/me/r", b"{}"), mid=1))
    book.forget_expired(100)
    assert book.find("me", "a") is item


def test_stored_answers_are_bounded_and_refusals_go_first() -> None:
    book = RequestBook(queue_limit=10**6)
    refusal = record("refusal")
    refusal.refused = True
    for number in range(STORED_ANSWERS):
        book.end(add(book, f"id{number}"), confirmed())
    refusal.final = confirmed()
    book.store(refusal)
    assert book.find("me", "refusal") is None
    assert book.find("me", "id0") is not None
    book.end(add(book, "one more"), confirmed())
    assert book.find("me", "id0") is None


def test_what_is_past_its_deadline_is_found_once_it_is_answered_too(book: RequestBook) -> None:
    add(book, "early", expires_in=10)
    add(book, "late", expires_in=20)
    assert book.next_deadline() == 10
    assert [item.id for item in book.expired(15)] == ["early"]


def test_requests_are_found_by_id_with_or_without_the_client(book: RequestBook) -> None:
    mine = add(book, "a")
    add(book, "a", client="you")
    assert book.open_with_id("a", "me") == [mine]
    assert len(book.open_with_id("a", None)) == 2
    book.end(mine, confirmed())
    assert book.open_with_id("a", "me") == []
    assert book.has_ended("a", None)


def test_an_early_cancel_works_once_and_not_for_ever(book: RequestBook) -> None:
    book.cancel_early(None, "a", until=10)
    assert book.take_early_cancel("me", "a", now=5)
    assert not book.take_early_cancel("me", "a", now=5)
    book.cancel_early("me", "b", until=10)
    assert not book.take_early_cancel("you", "b", now=5)
    assert not book.take_early_cancel("me", "b", now=11)


def test_early_cancels_are_bounded(book: RequestBook) -> None:
    for number in range(EARLY_CANCELS + 1):
        book.cancel_early(None, f"id{number}", until=10)
    assert not book.take_early_cancel("me", "id0", now=5)
    assert book.take_early_cancel("me", "id1", now=5)
