"""Opens connections from plain arguments; the command line has its configuration file instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nestd.client.connection import Client, new_client_id
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.topics import answers_to
from nestd.daemon.mqtt.transport import PahoTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where the nodes are.

    Attributes:
        prefix: first levels of the nodes' topics.
        protocol: "5" or "3.1.1".
        ca_file: certificates to trust instead of the system's, with `tls`.
        cert_file, key_file: our own certificate, where the broker asks for one.
    """

    host: str = "localhost"
    port: int = 1883
    prefix: str = "nestd"
    protocol: str = "5"
    username: str | None = None
    password: str | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def client(self) -> Client:
        """Return a client with an id of its own, not connected yet."""
        client_id = new_client_id()
        options = TransportOptions(
            host=self.host,
            port=self.port,
            client_id=client_id,
            protocol=self.protocol,
            username=self.username,
            password=self.password,
            tls=self.tls,
            ca_file=self.ca_file,
            certificate_file=self.cert_file,
            key_file=self.key_file,
            clean_start=True,
            receive_maximum=1000,
        )
        return Client(PahoTransport(options), answers_to(client_id, self.username), self.prefix)


@contextmanager
def connect(
    broker: Broker | None = None, *, node: str | None = None, pool: str | None = None
) -> Iterator[Client]:
    """Yield a connected client, and disconnect it.

    Args:
        broker: None takes localhost.
        node: which node to ask; None takes the only one that is online.
        pool: a group of nodes instead, any of which answers.

    Raises:
        BrokerError: no broker, no such node, or several where none is named.
        ConfigError: the TLS files cannot be used.
    """
    client = (broker or Broker()).client()
    try:
        enter(client, node, pool)
        yield client
    finally:
        client.close()


def enter(client: Client, node: str | None, pool: str | None) -> None:
    """Connect `client` to its node or pool."""
    if pool is not None:
        client.connect_to_pool(pool)
    else:
        client.connect(node, fallback="")
