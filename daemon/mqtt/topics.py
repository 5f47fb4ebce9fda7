"""Topics of the MQTT contract: building, parsing and judging them (docs/mqtt.md, Topics).

Pure functions of strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nestd.bundle.errors import BadRequest, ConfigError

VERSION = "v1"
Verb = Literal["generate", "cancel", "submodel", "modality", "health"]
# Who answers: the verb of a request, or the reception of blobs.
Answering = Verb | Literal["blob"]
CONTROL_VERBS: tuple[Verb, ...] = ("cancel", "submodel", "modality", "health")
CLIENTS = "clients"
SHARE = "$share"
MAX_TOPIC_BYTES = 256


def check_level(name: str, value: str) -> str:
    """Return `value` if it can be one level of a topic; ConfigError names the setting otherwise."""
    if not value or len(value) > 128 or any(c in "/+#$" or c <= " " for c in value):
        raise ConfigError(
            f"{name} {value!r} cannot be part of a topic: use 1 to 128 characters without blanks, "
            "/ + # or $"
        )
    return value


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one node.

    Attributes:
        prefix: first levels, `nestd` by default.
        node: the node's own level.
        response_topics: topic filters that a Response Topic may match besides `clients/+/#`.
        pools: names of groups of nodes; a request to one goes to any of its nodes.
    """

    prefix: str
    node: str
    response_topics: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for level in self.prefix.split("/"):
            check_level("the topic prefix", level)
        check_level("the node name", self.node)

    @property
    def base(self) -> str:
        """`<prefix>/v1/<node>`, called `<b>` in the documentation."""
        return f"{self.prefix}/{VERSION}/{self.node}"

    @property
    def availability(self) -> str:
        """Retained; also the topic of the last will."""
        return f"{self.base}/availability"

    @property
    def state(self) -> str:
        """Retained."""
        return f"{self.base}/state"

    @property
    def info(self) -> str:
        """Retained."""
        return f"{self.base}/info"

    @property
    def health(self) -> str:
        """Every 60 s, not retained."""
        return f"{self.base}/health"

    def request(self, verb: Verb) -> str:
        """Where requests of this kind come in."""
        return f"{self.base}/request/{verb}"

    def response(self, verb: Answering) -> str:
        """Where the reply goes if the request names no Response Topic."""
        return f"{self.base}/response/{verb}"

    def verb_of(self, topic: str) -> Verb | None:
        """Return the verb of a request topic of this node or of one of its pools, or None."""
        if any(topic == pool_request(self.prefix, pool) for pool in self.pools):
            return "generate"
        head, _, verb = topic.rpartition("/")
        if head != f"{self.base}/request":
            return None
        return next((known for known in get_args(Verb) if known == verb), None)

    @property
    def shared(self) -> tuple[str, ...]:
        """The topic filters by which the nodes of each pool share its requests."""
        return tuple(f"{SHARE}/{pool}/{pool_request(self.prefix, pool)}" for pool in self.pools)

    @property
    def blobs(self) -> str:
        """The topic filter of all messages about blobs."""
        return f"{self.base}/blob/+/+"

    def blob_of(self, topic: str) -> tuple[str, str]:
        """Return the blob's id, unchecked, and the last level of a topic that matches `blobs`."""
        _, blob_id, step = topic.rsplit("/", 2)
        return blob_id, step

    def check_response_topic(self, topic: str) -> str:
        """Return `topic` if we may answer there (delivery rule 7).

        Response topics come from strangers: without this rule a request could make the node
        publish on any topic that the broker lets the node write.

        Raises:
            BadRequest: the topic is malformed or not one of the allowed ones.
        """
        if len(topic.encode()) > MAX_TOPIC_BYTES:
            raise BadRequest(f"the response topic has over {MAX_TOPIC_BYTES} bytes: shorten it")
        if any(c in "+#$" or c < " " or c == "\x7f" for c in topic):
            raise BadRequest("the response topic holds + # $ or a control character: leave it out")
        levels = topic.split("/")
        if "" in levels:
            raise BadRequest("the response topic has an empty level: remove the extra /")
        allowed = (f"{CLIENTS}/+/+/#", f"{self.base}/response/#", *self.response_topics)
        if not any(matches(topic_filter, topic) for topic_filter in allowed):
            raise BadRequest(
                f"answers go only to {CLIENTS}/<your client id>/... or {self.base}/response/...: "
                "choose a response topic there"
            )
        return topic


def pool_request(prefix: str, pool: str) -> str:
    """Return where requests to any node of `pool` come in."""
    return f"{prefix}/{VERSION}/pool/{pool}/request/generate"


def answers_to(client_id: str, username: str | None) -> str:
    """Return the levels behind `clients/` under which a client gets its answers.

    Where there is a login they begin with it: a broker knows who logged in, while a client id is
    what a client says it is (examples/mosquitto/acl). A login that cannot be a level is left out.
    """
    if username is None:
        return client_id
    try:
        return f"{check_level('mqtt.username', username)}/{client_id}"
    except ConfigError:
        return client_id


def client_of(response_topic: str) -> str:
    """Return the client that a response topic belongs to; ids are unique per client.

    That is the `<id>` of `clients/<id>/...`, or "" for the response topics that all clients of a
    node share.
    """
    levels = response_topic.split("/")
    return levels[1] if levels[0] == CLIENTS and len(levels) >= 3 else ""


def matches(topic_filter: str, topic: str) -> bool:
    """Say whether `topic` matches an MQTT topic filter (`+` one level, `#` the rest)."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    # A leading wildcard does not reach topics of the broker ($SYS/...): MQTT 5, section 4.7.2.
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(given) or level not in ("+", given[index]):
            return False
    return len(wanted) == len(given)
