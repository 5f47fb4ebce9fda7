"""A small web server for the page: it hands out files, and knows no broker's password.

Every answer has a Content Security Policy that allows the page's own files and the one broker.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from importlib.resources.abc import Traversable
from urllib.parse import urlsplit

from nestd.bundle.errors import ConfigError

log = logging.getLogger(__name__)

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".md": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
# A host source of a Content Security Policy holds names and IPv4 addresses only.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
# A browser that keeps a connection open and sends nothing holds a thread for so long.
IDLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Page:
    """A file that is served, and its type."""

    content_type: str
    data: bytes


def serve(listen: str, broker: str, prefix: str) -> ThreadingHTTPServer:
    """Return a server that listens at `listen` (`address:port`) and serves the page.

    Raises:
        ConfigError: `listen` or `broker` cannot be used.
    """
    origin = broker_origin(broker)
    settings = Page("application/json", json.dumps({"broker": broker, "prefix": prefix}).encode())
    pages = page_files() | {"/settings.json": settings}
    address, _, port = listen.rpartition(":")
    if not address or not port.isascii() or not port.isdigit():
        raise ConfigError(
            f"--listen {listen!r}: write an address and a port, such as 127.0.0.1:8090"
        )
    try:
        return ThreadingHTTPServer((address, int(port)), handler(pages, policy(origin)))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error


def broker_origin(url: str) -> str:
    """Return scheme, host and port of the broker's URL.

    Raises:
        ConfigError: it is no ws:// or wss:// URL, or one that the page's policy cannot name.
    """
    if "@" in url:  # first of all, for what follows repeats the URL
        raise ConfigError("--broker: leave user and password out, the page asks for them")
    advice = "write ws://HOST:PORT or wss://HOST:PORT, with the name or the IPv4 address of the"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"--broker {url!r}: {error}; {advice} broker") from error
    if parts.scheme not in ("ws", "wss") or not _HOST.fullmatch(host) or parts.fragment:
        raise ConfigError(f"--broker {url!r}: {advice} broker")
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def policy(origin: str) -> str:
    """Return the Content Security Policy: our own files, and the one broker.

    Pictures, clips and the camera that the user shows are blobs of the page itself.
    """
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        f"media-src blob:; connect-src 'self' {origin}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def page_files() -> dict[str, Page]:
    """Return the files of the page by path."""
    pages: dict[str, Page] = {}

    def add(folder: Traversable, path: str) -> None:
        for file in folder.iterdir():
            if file.is_dir():
                add(file, f"{path}{file.name}/")
            elif (suffix := file.name[file.name.rfind(".") :]) in TYPES:
                pages[path + file.name] = Page(TYPES[suffix], file.read_bytes())

    add(resources.files("nestd.dashboard"), "/")
    return pages | {"/": pages["/index.html"]}


def handler(pages: Mapping[str, Page], security_policy: str) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers with `pages`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "nestd"
        sys_version = ""
        timeout = IDLE_SECONDS

        def do_GET(self) -> None:
            """Answer with a file."""
            self._answer(body=True)

        def do_HEAD(self) -> None:
            """Answer with a file's headers."""
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            page = pages.get(urlsplit(self.path).path)
            if page is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.data)))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            if body:
                self.wfile.write(page.data)

        def end_headers(self) -> None:
            """Add what holds for every answer."""
            self.send_header("Content-Security-Policy", security_policy)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Permissions-Policy", "camera=(self), microphone=(self)")
            super().end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's)
            log.debug(format, *args)

    return Handler
