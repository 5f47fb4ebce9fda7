"""The way to the broker, as far as it goes without a login: the network and TLS."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl

from nestd.bundle.errors import ConfigError
from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.mqtt.packets import TransportOptions
from nestd.daemon.mqtt.tls import explain, tls_context

CONNECT_SECONDS = 5.0
# A certificate that ends sooner should have been renewed.
CERTIFICATE_DAYS = 14


def network(options: TransportOptions) -> Finding:
    """Name resolution and a TCP connection."""
    place = f"{options.host}:{options.port}"
    try:
        with socket.create_connection((options.host, options.port), CONNECT_SECONDS) as connection:
            return ok("broker", f"{place} answers ({connection.getpeername()[0]})")
    except socket.gaierror as error:
        return failed(
            "broker",
            f"the name {options.host} is not known: {error.strerror}",
            "set mqtt.host to a name that this network resolves, or to an address",
        )
    except OSError as error:
        return failed(
            "broker",
            f"{place} does not answer: {error}",
            "start the broker, check mqtt.host and mqtt.port, and let the port through its "
            "firewall; Mosquitto 2 listens on localhost only until it has a `listener`",
        )


def handshake(options: TransportOptions) -> Finding:
    """TLS: version, and how long the broker's certificate holds."""
    if not options.tls:
        if is_here(options.host):
            return skipped("tls", "mqtt.tls is off, and the broker is on this machine")
        return warning(
            "tls",
            "mqtt.tls is off: passwords, prompts and answers cross the network in clear",
            "give the broker a certificate and set mqtt.tls and mqtt.ca_file (docs/security.md)",
        )
    remedy = "see docs/security.md for the settings of both sides"
    try:
        context = tls_context(options)
        address = (options.host, options.port)
        with (
            socket.create_connection(address, CONNECT_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=options.host) as secure,
        ):
            certificate, version = secure.getpeercert(), secure.version()
    except ConfigError as error:
        return failed("tls", str(error), remedy)
    except OSError as error:
        return failed("tls", explain(error, options.host), remedy)
    assert certificate is not None, "the context verifies certificates"
    end = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = (end - datetime.datetime.now(datetime.UTC).timestamp()) / 86400
    seen = f"{version}, the broker's certificate holds for {days:.0f} days"
    if days < CERTIFICATE_DAYS:
        return warning("tls", seen, "renew the broker's certificate")
    return ok("tls", seen)


def is_here(host: str) -> bool:
    """Say whether `host` names this machine, as far as its name or address tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
