"""A private CA, certificates of it, and a Mosquitto that speaks TLS with them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A CA whose files lie in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._ca = trustme.CA()
        self._directory = directory
        self.file = directory / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str, not_after: datetime.datetime | None = None) -> Pair:
        """Return a certificate for host names, addresses or, for a client, any name."""
        leaf = self._ca.issue_cert(*names, not_after=not_after)
        pair = Pair(self._directory / f"{names[0]}.pem", self._directory / f"{names[0]}.key")
        leaf.cert_chain_pems[0].write_to_path(pair.certificate)
        leaf.private_key_pem.write_to_path(pair.key)
        return pair

    def lines(self, server: Pair, *, clients: bool = False) -> tuple[str, ...]:
        """Return what mosquitto.conf needs; with `clients` it asks for their certificates."""
        return (
            f"cafile {self.file}",
            f"certfile {server.certificate}",
            f"keyfile {server.key}",
            f"require_certificate {str(clients).lower()}",
        )
