"""Topics: building, matching, and which response topics are allowed."""

import re
from pathlib import Path

import pytest

from nestd.bundle.errors import BadRequest, ConfigError
from nestd.daemon.mqtt.topics import Topics, answers_to, client_of, matches

SOURCES = Path(__file__).parents[1]
TOPICS = Topics("nestd", "kitchen")


def test_requests_to_its_pools_are_requests_to_the_node() -> None:
    topics = Topics("nestd", "node", pools=("house", "pool"))
    assert topics.shared == (
        "$share/house/nestd/v1/pool/house/request/generate",
        "$share/pool/nestd/v1/pool/pool/request/generate",
    )
    assert topics.verb_of("nestd/v1/pool/house/request/generate") == "generate"
    assert topics.verb_of("nestd/v1/pool/garden/request/generate") is None


def test_topics_are_built_below_prefix_version_and_node() -> None:
    assert TOPICS.base == "nestd/v1/kitchen"
    assert TOPICS.request("generate") == "nestd/v1/kitchen/request/generate"
    assert TOPICS.response("cancel") == "nestd/v1/kitchen/response/cancel"
    assert Topics("home/ai", "x").state == "home/ai/v1/x/state"


@pytest.mark.parametrize(
    ("prefix", "node"),
    [("nestd", "a/b"), ("nestd", ""), ("nestd", "a+"), ("$SYS", "a"), ("a//b", "c"), ("a", "b c")],
)
def test_a_prefix_or_node_that_is_no_topic_is_refused(prefix: str, node: str) -> None:
    with pytest.raises(ConfigError):
        Topics(prefix, node)


def test_the_verb_of_a_request_topic_is_found() -> None:
    assert TOPICS.verb_of("nestd/v1/kitchen/request/cancel") == "cancel"
    assert TOPICS.verb_of("nestd/v1/kitchen/request/reboot") is None
    assert TOPICS.verb_of("nestd/v1/cellar/request/cancel") is None


@pytest.mark.parametrize(
    "topic", ["clients/me/replies", "clients/me/a/b", "nestd/v1/kitchen/response/generate"]
)
def test_response_topics_of_clients_and_of_the_node_are_allowed(topic: str) -> None:
    assert TOPICS.check_response_topic(topic) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "clients/me",
        "clients",
        "clients//x",
        "/clients/me/x",
        "clients/+/x",
        "clients/me/#",
        "$SYS/broker",
        "clients/$x/y",
        "homeassistant/light/x/config",
        "nestd/v1/kitchen/request/generate",
        "nestd/v1/kitchen/state",
        "nestd/v1/cellar/response/generate",
        "clients/me/" + "x" * 300,
        "clients/me/\x00",
        "clients/me/\x7f",
    ],
)
def test_other_response_topics_are_refused(topic: str) -> None:
    with pytest.raises(BadRequest):
        TOPICS.check_response_topic(topic)


def test_the_owner_may_allow_more() -> None:
    topics = Topics("nestd", "kitchen", ("home/+/answers",))
    assert topics.check_response_topic("home/ha/answers")
    with pytest.raises(BadRequest):
        topics.check_response_topic("home/ha/other")


def test_the_client_is_the_level_after_clients() -> None:
    assert client_of("clients/me/replies") == "me"
    assert client_of("nestd/v1/kitchen/response/generate") == ""


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("#", "$SYS/a", False),
        ("+/a", "$SYS/a", False),
        ("a", "a/b", False),
        ("a/b", "a", False),
    ],
)
def test_filters_match_as_the_specification_says(
    topic_filter: str, topic: str, expected: bool
) -> None:
    assert matches(topic_filter, topic) is expected


def test_only_the_transport_imports_paho() -> None:
    importers = {
        str(path.relative_to(SOURCES))
        for folder in ("bundle", "cli", "conversion", "daemon", "device_profiles")
        for path in (SOURCES / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) paho", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importers == {"daemon/mqtt/transport.py"}


def test_answers_come_to_the_login_where_there_is_one() -> None:
    assert answers_to("app-1", None) == "app-1"
    topic = f"clients/{answers_to('app-1', 'phone')}/replies"
    assert topic == "clients/phone/app-1/replies"
    assert TOPICS.check_response_topic(topic) == topic
    assert client_of(topic) == "phone"
    # Such a login cannot be a level of a topic.
    assert answers_to("app-1", "a/b") == "app-1"
