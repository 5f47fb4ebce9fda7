"""A TCP proxy whose line can be cut and mended."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Proxy:
    """Passes bytes between clients of `port` and the broker while the line is up."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.up = True
        self.attempts = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection without a word, and refuse new ones."""
        with self._lock:
            self.up = False
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):  # it had been closed already
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.up = True

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self.attempts += 1
            with self._lock:
                if not self.up:
                    client.close()
                    continue
                broker = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((client, broker))
            threading.Thread(target=_pass_on, args=(client, broker), daemon=True).start()


def _pass_on(client: socket.socket, broker: socket.socket) -> None:
    with client, broker, selectors.DefaultSelector() as selector:
        for here, there in ((client, broker), (broker, client)):
            selector.register(here, selectors.EVENT_READ, there)
        try:
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    key.data.sendall(data)
        except OSError:
            return  # the line was cut
