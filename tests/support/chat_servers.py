"""Servers of the OpenAI chat API for tests: `transformers serve`, and one that misbehaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_SECONDS = 180.0


@contextmanager
def transformers_serve(log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`transformers serve` as a process of its own; yields its base URL when it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.commands.transformers_cli import main; main()"
    options = ("serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", code, *options], stdout=output, stderr=output, env=environ
        ) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(url):
                return
        except urllib.error.URLError:
            time.sleep(0.2)


class Misbehaving(ThreadingHTTPServer):
    """Answers as a test's `script` says; `asked` are the bodies that came, `keys` their headers."""

    daemon_threads = True

    def __init__(self, script: Callable[[Call], None]) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.let_go = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the daemon has gone away, as it should
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Call(BaseHTTPRequestHandler):
    """One request to `Misbehaving`."""

    server: Misbehaving
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        self.server.keys.append(self.headers["Authorization"])
        self.close_connection = True
        self.server.script(self)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        """Begin a stream of events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data: str) -> None:
        """Send an event with this data."""
        event = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def chunk(self, text: str | None = None, reason: str | None = None, **more: Any) -> None:
        """Send a piece of an answer."""
        delta = {"content": text, **more}
        self.send(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}))

    def end(self) -> None:
        """End the stream."""
        self.send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_arguments: Any) -> None:
        """Keep quiet."""


@contextmanager
def misbehaving(script: Callable[[Call], None]) -> Iterator[Misbehaving]:
    server = Misbehaving(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
